# /// script
# dependencies = ["hf_based_kernel", "accelerate", "datasets", "matplotlib"]
# ///
"""Train a small ReBased model on multi-query associative recall with stock `Trainer` and report its accuracy.

    accelerate launch examples/hf_based_kernel/train_associative_recall.py --num_pairs 4 --seq_len 32

Ctrl-C saves a checkpoint and stops; the same command with --resume_from_checkpoint goes on from there.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from accelerate import PartialState
from huggingface_hub import EvalResult
from huggingface_hub.errors import StrictDataclassError
from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator, logging, set_seed

from hf_based_kernel import RebasedConfig, RebasedForCausalLM
from hf_based_kernel.associative_recall import make_recall_dataset, query_positions, recall_accuracy


sys.path.append(str(Path(__file__).parents[1] / "shared"))
from interrupts import StopOnInterrupt, add_resume_option, find_checkpoint, train_from
from options import check_least


# Options of RebasedConfig.
KERNELS: dict[str, dict[str, Any]] = {
    "rebased": {},
    "taylor": {"kernel": "taylor"},
    "attention": {"layer_types": ["conv", "sliding_attention"]},
}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kernel",
        default="rebased",
        choices=KERNELS,
        help="similarity: rebased, taylor (Based), or softmax attention after a convolution (default: rebased)",
    )
    parser.add_argument("--seq_len", type=int, default=32, help="tokens per sequence (default: 32)")
    parser.add_argument("--num_pairs", type=int, default=4, help="pairs, and queries, per sequence (default: 4)")
    parser.add_argument("--vocab_size", type=int, default=256, help="tokens: half keys, half values (default: 256)")
    parser.add_argument("--hidden_size", type=int, default=64, help="width of the model (default: 64)")
    parser.add_argument("--num_attention_heads", type=int, default=4, help="heads (default: 4)")
    parser.add_argument("--feature_dim", type=int, default=16, help="query and key numbers per head (default: 16)")
    parser.add_argument("--batch_size", type=int, default=128, help="sequences per step and process (default: 128)")
    parser.add_argument("--max_steps", type=int, default=600, help="optimizer steps (default: 600)")
    parser.add_argument("--learning_rate", type=float, default=5e-3, help="peak learning rate (default: 5e-3)")
    parser.add_argument("--eval_examples", type=int, default=1000, help="sequences to test on (default: 1000)")
    parser.add_argument("--save_steps", type=int, default=200, help="steps between checkpoints (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and examples (default: 0)")
    parser.add_argument("--output_dir", default="outputs/recall", help="where all is written (outputs/recall)")
    add_resume_option(parser)
    arguments = parser.parse_args()
    check_least(parser, arguments, batch_size=1, max_steps=1, eval_examples=1, learning_rate=0.0, seed=0)
    find_checkpoint(parser, arguments)
    return arguments


def make_datasets(arguments, world_size, **options):
    """Examples to train on, each seen once and drawn while training, and examples to test on."""
    options |= {name: getattr(arguments, name) for name in ("seq_len", "num_pairs", "vocab_size")}
    examples = arguments.max_steps * arguments.batch_size * world_size
    try:
        return (
            make_recall_dataset(examples, seed=arguments.seed, streaming=True, **options),
            make_recall_dataset(arguments.eval_examples, seed=arguments.seed + 1, **options),
        )
    except ValueError as error:
        raise SystemExit(f"the task's sizes do not fit together: {error}") from None


def make_collator(arguments):
    """Batches whose logits are wanted only where a query can stand: the rest of the head's work would be ignored."""
    # Labels are shifted by one when the loss is taken, so there is one position more than labels that count.
    positions = query_positions(arguments.seq_len, arguments.num_pairs)
    kept = torch.cat([positions, torch.tensor([arguments.seq_len - 1])])

    def collate(examples):
        batch = default_data_collator(examples)
        labels = batch["labels"][:, positions + 1]
        batch["labels"] = torch.nn.functional.pad(labels, (1, 0), value=-100)
        return batch | {"logits_to_keep": kept}

    return collate


def make_model(arguments, **options):
    """The paper's recall models: a short convolution, then attention, no feed-forward.

    The convolution tells a key from its value. With learned positions, or weights drawn far below 1 / sqrt(width), a run
    can stay for long where it guesses one of the sequence's values.
    """
    options.setdefault("use_position_embeddings", False)
    options.setdefault("initializer_range", 0.5 * arguments.hidden_size**-0.5)
    try:
        config = RebasedConfig(
            vocab_size=arguments.vocab_size,
            hidden_size=arguments.hidden_size,
            intermediate_size=0,
            num_hidden_layers=2,
            num_attention_heads=arguments.num_attention_heads,
            feature_dim=arguments.feature_dim,
            sliding_window=arguments.seq_len,
            conv_type="base",
            norm_type="layer_norm",
            max_position_embeddings=arguments.seq_len,
            **options,
        )
    except (StrictDataclassError, ValueError) as error:
        raise SystemExit(f"the model's sizes do not fit together: {error.__cause__ or error}") from None
    return RebasedForCausalLM(config)


def train(arguments, build, output_dir, checkpoint, *, interrupt=None, quiet=False, **task):
    """Train what `build` makes and leave it in `output_dir`: the results, or None where Ctrl-C stopped it."""
    started = time.process_time()
    set_seed(arguments.seed)
    training = TrainingArguments(
        output_dir=output_dir,
        max_steps=arguments.max_steps,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, arguments.max_steps // 10),
        weight_decay=0.1,
        max_grad_norm=1.0,
        logging_steps=max(1, arguments.max_steps // 20),
        eval_strategy="steps",
        eval_steps=max(1, arguments.max_steps // 20),
        save_steps=arguments.save_steps,
        save_total_limit=1,
        dataloader_pin_memory=torch.cuda.is_available(),
        # Without it, processes that torchrun starts on CPUs would each train a model of their own.
        use_cpu=not torch.accelerator.is_available(),
        # Each process reads its own part: a batch cannot be cut up, as logits_to_keep belongs to all of its rows.
        accelerator_config={"dispatch_batches": False},
        disable_tqdm=quiet,
        report_to="none",
        seed=arguments.seed,
    )
    if training.n_gpu > 1:
        raise SystemExit(
            "several GPUs in one process are not supported; start this with `accelerate launch --multi_gpu`"
        )
    train_set, test_set = make_datasets(arguments, training.world_size, **task)
    model = build()
    interrupt = interrupt or StopOnInterrupt(arguments)
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=train_set.with_format("torch"),
        eval_dataset=test_set.with_format("torch"),
        data_collator=make_collator(arguments),
        compute_metrics=recall_accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        callbacks=[interrupt],
    )
    if quiet:
        trainer.remove_callback(PrinterCallback)
    before = trainer.evaluate()["eval_accuracy"]
    train_from(trainer, checkpoint)
    if interrupt.interrupted:
        print(
            f"Stopped at step {trainer.state.global_step} of {arguments.max_steps}; checkpoint in {output_dir}. "
            "Run the same command with --resume_from_checkpoint to go on."
        )
        return None
    after = trainer.evaluate()["eval_accuracy"]
    if trainer.is_world_process_zero():
        model.save_pretrained(output_dir)
    log = trainer.state.log_history
    return {
        "parameters": model.num_parameters(),
        "accuracy_before": before,
        "accuracy": after,
        # The last step may have been evaluated twice.
        "curve": list({entry["step"]: entry["eval_accuracy"] for entry in log if "eval_accuracy" in entry}.items()),
        "cpu_seconds": round(time.process_time() - started, 1),
        "resumed": bool(checkpoint),
    }


def plot(curve, guessing, path):
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(*zip(*curve), "o-")
    axes.axhline(guessing, color="gray", linestyle="--", label="one of the sequence's values at random")
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("step")
    axes.set_ylabel("recall accuracy on unseen sequences")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main():
    logging.disable_progress_bar()  # of weights; training keeps its own
    arguments, started = parse_arguments(), time.time()
    output = Path(arguments.output_dir)

    def build():
        return make_model(arguments, **KERNELS[arguments.kernel])

    result = train(arguments, build, output, arguments.resume_from_checkpoint)
    if result is None:
        raise SystemExit(130)
    if not PartialState().is_main_process:
        return
    guessing = 1 / arguments.num_pairs
    result |= {name: value for name, value in vars(arguments).items() if name != "resume_from_checkpoint"}
    result |= {
        "accuracy_of_guessing_a_value_of_the_sequence": guessing,
        "seconds": round(time.time() - started, 1),
    }
    (output / "associative_recall.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(result["curve"], guessing, output / "associative_recall.png")
    task = f"associative recall, {arguments.num_pairs} pairs in {arguments.seq_len} tokens of {arguments.vocab_size}"
    metric = EvalResult("text-generation", "associative-recall", task, "accuracy", result["accuracy"])
    RebasedForCausalLM.from_pretrained(output).model_card(str(output), [metric]).save(output / "README.md")

    lines = [
        f"Trained:    a {arguments.kernel} model, {result['parameters']:,} parameters, on associative recall "
        f"({arguments.num_pairs} pairs in {arguments.seq_len} tokens of {arguments.vocab_size}), "
        f"{arguments.max_steps} steps, {result['seconds']} s",
        f"Unseen:     accuracy {result['accuracy_before']:.3f} before, {result['accuracy']:.3f} after "
        f"({guessing:.3f} by guessing among the sequence's values)",
        f"Artefacts:  {output}/  {output}/associative_recall.json  {output}/associative_recall.png",
    ]
    summary = "\n".join(lines)
    (output / "summary.txt").write_text(summary + "\n")
    print(f"\n{summary}")


if __name__ == "__main__":
    main()
