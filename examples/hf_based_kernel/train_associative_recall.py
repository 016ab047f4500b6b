# /// script
# dependencies = ["hf_based_kernel", "accelerate", "datasets", "matplotlib"]
# ///
"""Train a small ReBased model on multi-query associative recall with stock `Trainer` and report its accuracy.

    accelerate launch examples/hf_based_kernel/train_associative_recall.py --num_pairs 4 --seq_len 32

Ctrl-C saves a checkpoint and stops; the same command with --resume_from_checkpoint goes on from there.
"""

import argparse
import json
import signal
import time
from pathlib import Path

import matplotlib
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_based_kernel import RebasedConfig, RebasedForCausalLM
from hf_based_kernel.associative_recall import make_recall_dataset, recall_accuracy


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kernel", default="rebased", choices=["rebased", "taylor"], help="similarity (default: rebased)"
    )
    parser.add_argument("--seq_len", type=int, default=32, help="tokens per sequence (default: 32)")
    parser.add_argument("--num_pairs", type=int, default=4, help="pairs, and queries, per sequence (default: 4)")
    parser.add_argument("--vocab_size", type=int, default=256, help="tokens: half keys, half values (default: 256)")
    parser.add_argument("--hidden_size", type=int, default=64, help="width of the model (default: 64)")
    parser.add_argument("--num_attention_heads", type=int, default=4, help="heads (default: 4)")
    parser.add_argument("--feature_dim", type=int, default=16, help="query and key numbers per head (default: 16)")
    parser.add_argument("--batch_size", type=int, default=128, help="sequences per step and process (default: 128)")
    parser.add_argument("--max_steps", type=int, default=1500, help="optimizer steps (default: 1500)")
    parser.add_argument("--learning_rate", type=float, default=5e-3, help="peak learning rate (default: 5e-3)")
    parser.add_argument("--eval_examples", type=int, default=1000, help="sequences to test on (default: 1000)")
    parser.add_argument("--save_steps", type=int, default=200, help="steps between checkpoints (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and examples (default: 0)")
    parser.add_argument("--output_dir", default="outputs/recall", help="where all is written (outputs/recall)")
    parser.add_argument(
        "--resume_from_checkpoint",
        nargs="?",
        const=True,
        default=False,
        help="go on from the last checkpoint in --output_dir, or from the one given",
    )
    arguments = parser.parse_args()
    for name in ("batch_size", "max_steps", "eval_examples"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if arguments.resume_from_checkpoint is True:
        folder = Path(arguments.output_dir)
        arguments.resume_from_checkpoint = get_last_checkpoint(arguments.output_dir) if folder.is_dir() else None
        if arguments.resume_from_checkpoint is None:
            parser.error(
                f"--resume_from_checkpoint: {folder} holds no checkpoint; leave the option out to start afresh"
            )
    return arguments


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C ends training after the current step with a checkpoint; a second one ends it at once."""

    def __init__(self):
        self.interrupted = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.previous = signal.signal(signal.SIGINT, self.handle)

    def handle(self, number, frame):
        self.interrupted = True
        signal.signal(signal.SIGINT, self.previous)
        print("\nCtrl-C: saving a checkpoint after this step", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGINT, self.previous)


def make_datasets(arguments, world_size):
    """Examples to train on, each seen once, and examples to test on."""
    options = {name: getattr(arguments, name) for name in ("seq_len", "num_pairs", "vocab_size")}
    examples = arguments.max_steps * arguments.batch_size * world_size
    try:
        return (
            make_recall_dataset(examples, seed=arguments.seed, **options),
            make_recall_dataset(arguments.eval_examples, seed=arguments.seed + 1, **options),
        )
    except ValueError as error:
        raise SystemExit(f"the task's sizes do not fit together: {error}") from None


def make_model(arguments):
    """The paper's recall model: a short convolution, then attention, no feed-forward, learned positions."""
    try:
        config = RebasedConfig(
            vocab_size=arguments.vocab_size,
            hidden_size=arguments.hidden_size,
            intermediate_size=0,
            num_hidden_layers=2,
            num_attention_heads=arguments.num_attention_heads,
            feature_dim=arguments.feature_dim,
            kernel=arguments.kernel,
            conv_type="base",
            norm_type="layer_norm",
            use_position_embeddings=True,
            max_position_embeddings=arguments.seq_len,
        )
    except StrictDataclassError as error:
        raise SystemExit(f"the model's sizes do not fit together: {error.__cause__ or error}") from None
    return RebasedForCausalLM(config)


def plot(log, guessing, path):
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(*zip(*((entry["step"], entry["eval_accuracy"]) for entry in log if "eval_accuracy" in entry)), "o-")
    axes.axhline(guessing, color="gray", linestyle="--", label="one of the sequence's values at random")
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("step")
    axes.set_ylabel("recall accuracy on unseen sequences")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main():
    arguments = parse_arguments()
    started = time.time()
    set_seed(arguments.seed)
    training = TrainingArguments(
        output_dir=arguments.output_dir,
        max_steps=arguments.max_steps,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, arguments.max_steps // 10),
        weight_decay=0.1,
        max_grad_norm=1.0,
        logging_steps=max(1, arguments.max_steps // 10),
        eval_strategy="steps",
        eval_steps=max(1, arguments.max_steps // 10),
        save_steps=arguments.save_steps,
        save_total_limit=1,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        seed=arguments.seed,
    )
    train, test = make_datasets(arguments, training.world_size)
    model = make_model(arguments)
    interrupt = StopOnInterrupt()
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=train.with_format("torch"),
        eval_dataset=test.with_format("torch"),
        data_collator=default_data_collator,
        compute_metrics=recall_accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        callbacks=[interrupt],
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    output = Path(arguments.output_dir)
    if interrupt.interrupted:
        print(
            f"Stopped at step {trainer.state.global_step} of {arguments.max_steps}; checkpoint in {output}. "
            "Run the same command with --resume_from_checkpoint to go on."
        )
        return
    after = trainer.evaluate()["eval_accuracy"]
    if not trainer.is_world_process_zero():
        return

    model.save_pretrained(output)
    result = {
        "kernel": arguments.kernel,
        "seq_len": arguments.seq_len,
        "num_pairs": arguments.num_pairs,
        "vocab_size": arguments.vocab_size,
        "parameters": model.num_parameters(),
        "steps": trainer.state.global_step,
        "accuracy_before": before,
        "accuracy_after": after,
        "accuracy_of_guessing_a_value_of_the_sequence": 1 / arguments.num_pairs,
        "seconds": round(time.time() - started, 1),
    }
    (output / "associative_recall.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(trainer.state.log_history, 1 / arguments.num_pairs, output / "associative_recall.png")

    lines = [
        f"Trained:    a {arguments.kernel} model, {model.num_parameters():,} parameters, on associative recall "
        f"({arguments.num_pairs} pairs in {arguments.seq_len} tokens of {arguments.vocab_size}), "
        f"{trainer.state.global_step} steps, {result['seconds']} s",
        f"Unseen:     accuracy {before:.3f} before, {after:.3f} after "
        f"({1 / arguments.num_pairs:.3f} by guessing among the sequence's values)",
        f"Artefacts:  {output}/  {output}/associative_recall.json  {output}/associative_recall.png",
    ]
    summary = "\n".join(lines)
    (output / "summary.txt").write_text(summary + "\n")
    print(f"\n{summary}")


if __name__ == "__main__":
    main()
