# /// script
# dependencies = ["hf_based_kernel", "accelerate", "datasets", "matplotlib"]
# ///
"""Train a small ReBased model on multi-query associative recall with stock `Trainer` and report its accuracy.

    accelerate launch examples/hf_based_kernel/train_associative_recall.py --num_pairs 4 --seq_len 32

Several values for --kernel, --hidden_size, --seq_len with --num_pairs, --learning_rate or --seed, or a --preset, make a
sweep: one line per run in results.jsonl, which plot_associative_recall.py draws. A sweep goes on where it stopped.

    python examples/hf_based_kernel/train_associative_recall.py --preset minutes --jobs 2

Ctrl-C saves a checkpoint and stops; the same command goes on from there (a single run with --resume_from_checkpoint).
"""

import argparse
import itertools
import json
import multiprocessing
import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import matplotlib
import torch
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from tqdm import tqdm
from transformers import (
    Mamba2Config,
    Mamba2ForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_based_kernel import RebasedConfig, RebasedForCausalLM
from hf_based_kernel.associative_recall import make_recall_dataset, query_positions, recall_accuracy


# Options of RebasedConfig; those between taylor and attention are the ablations of the paper's Table 1.
KERNELS: dict[str, dict[str, Any]] = {
    "rebased": {},
    "taylor": {"kernel": "taylor"},
    "x2": {"use_qk_norm": False, "use_gamma": False, "use_beta": False},
    "norm_x2": {"use_gamma": False, "use_beta": False},
    "gamma_x2": {"use_qk_norm": False, "use_beta": False},
    "gamma_beta_x2": {"use_qk_norm": False},
    "attention": {"layer_types": ["conv", "sliding_attention"]},
    "mamba2": {},
}
SWEPT = ("seed", "hidden_size", "learning_rate", "kernel")
SETTINGS = [
    "kernel",
    "seq_len",
    "num_pairs",
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "feature_dim",
    "fillers",
    "batch_size",
    "max_steps",
    "learning_rate",
    "seed",
]
SHORTER = {"batch_size": 64, "seed": [0, 1, 2]}
LONGER = {**SHORTER, "seq_len": [64], "num_pairs": [8], "vocab_size": 1024, "max_steps": 1600}
COMPARED = ["rebased", "taylor", "attention"]
ABLATIONS = ["x2", "norm_x2", "gamma_x2", "gamma_beta_x2"]
# As the authors' configuration: 64 epochs of 100,000 examples.
PAPER = {
    "vocab_size": 8192,
    "num_attention_heads": 12,
    "fillers": "zero",
    "batch_size": 512,
    "max_steps": 12_500,
    "learning_rate": [5e-4, 1e-3, 3e-3, 1e-2],
    "seed": [0, 1, 2, 3, 4],
    "eval_examples": 3000,
}
PRESETS = {
    "minutes": [
        {**SHORTER, "kernel": COMPARED, "hidden_size": [16, 32, 64]},
        {**LONGER, "kernel": COMPARED},
        {**SHORTER, "kernel": ABLATIONS, "hidden_size": [32, 64]},
    ],
    "paper": [
        {
            **PAPER,
            "kernel": [*COMPARED, "mamba2"],
            "hidden_size": [64, 128, 256, 512],
            "seq_len": [128, 256, 512, 1024, 2048],
            "num_pairs": [16, 64, 128, 256, 512],
        },
        {
            **PAPER,
            "kernel": ["rebased", "taylor", *ABLATIONS],
            "hidden_size": [16, 24, 32, 48],
            "seq_len": [256, 2048],
            "num_pairs": [32, 32],
        },
    ],
}


def parse_arguments():
    """The single runs that the command line asks for, each with all of its settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="a sweep; other options given change it. minutes: two cores, 25 minutes; paper: the paper's grid, for GPUs",
    )
    parser.add_argument(
        "--kernel",
        nargs="+",
        default=["rebased"],
        choices=KERNELS,
        help="similarity: rebased, taylor (Based), the ablations of the paper's Table 1, or softmax attention after a "
        "convolution, or transformers' Mamba2 (default: rebased)",
    )
    parser.add_argument("--seq_len", type=int, nargs="+", default=[32], help="tokens per sequence (default: 32)")
    parser.add_argument(
        "--num_pairs", type=int, nargs="+", default=[4], help="pairs, and queries, for each --seq_len (default: 4)"
    )
    parser.add_argument("--vocab_size", type=int, default=256, help="tokens: half keys, half values (default: 256)")
    parser.add_argument(
        "--fillers", default="random", choices=["random", "zero"], help="tokens between the queries (default: random)"
    )
    parser.add_argument("--hidden_size", type=int, nargs="+", default=[64], help="width of the model (default: 64)")
    parser.add_argument("--num_attention_heads", type=int, default=4, help="heads (default: 4)")
    parser.add_argument("--feature_dim", type=int, default=16, help="query and key numbers per head (default: 16)")
    parser.add_argument("--batch_size", type=int, default=128, help="sequences per step and process (default: 128)")
    parser.add_argument("--max_steps", type=int, default=1500, help="optimizer steps (default: 1500)")
    parser.add_argument(
        "--learning_rate", type=float, nargs="+", default=[5e-3], help="peak learning rate (default: 5e-3)"
    )
    parser.add_argument("--eval_examples", type=int, default=1000, help="sequences to test on (default: 1000)")
    parser.add_argument("--save_steps", type=int, default=200, help="steps between checkpoints (default: 200)")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="seed of weights and examples (default: 0)")
    parser.add_argument("--jobs", type=int, default=1, help="runs of a sweep at the same time (default: 1)")
    parser.add_argument("--output_dir", default="outputs/recall", help="where all is written (outputs/recall)")
    parser.add_argument(
        "--resume_from_checkpoint",
        nargs="?",
        const=True,
        default=False,
        help="go on from the last checkpoint in --output_dir, or from the one given; a sweep does so by itself",
    )
    arguments, runs = parser.parse_args(), []
    defaults = {name: parser.get_default(name) for name in vars(arguments)}
    for grid in PRESETS[arguments.preset] if arguments.preset else [{}]:
        parser.set_defaults(**defaults | grid)
        arguments = parser.parse_args()
        check_arguments(parser, arguments)
        for sizes in zip(arguments.seq_len, arguments.num_pairs):
            for values in itertools.product(*(getattr(arguments, name) for name in SWEPT)):
                changes = dict(zip(SWEPT, values), seq_len=sizes[0], num_pairs=sizes[1])
                runs.append(argparse.Namespace(**vars(arguments) | changes))
    if len(runs) == 1 and arguments.resume_from_checkpoint is True:
        runs[0].resume_from_checkpoint = last_checkpoint(arguments.output_dir)
        if runs[0].resume_from_checkpoint is None:
            parser.error(
                f"--resume_from_checkpoint: {arguments.output_dir} holds no checkpoint; leave the option out to start "
                "afresh"
            )
    return runs


def check_arguments(parser, arguments):
    for name in ("batch_size", "max_steps", "eval_examples", "jobs"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if len(arguments.seq_len) != len(arguments.num_pairs):
        parser.error(
            f"--num_pairs must give one number for each --seq_len, got {len(arguments.num_pairs)} for "
            f"{len(arguments.seq_len)}"
        )
    if arguments.jobs > 1 and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("--jobs must be 1 where `accelerate launch` starts several processes, which share each run")


def last_checkpoint(folder):
    return get_last_checkpoint(folder) if Path(folder).is_dir() else None


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
    """Examples to train on, each seen once and drawn while training, and examples to test on."""
    options = {name: getattr(arguments, name) for name in ("seq_len", "num_pairs", "vocab_size")}
    options["random_non_queries"] = arguments.fillers == "random"
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


def make_model(arguments):
    """The paper's recall models: a short convolution, then attention, no feed-forward, learned positions; or Mamba2."""
    try:
        if arguments.kernel == "mamba2":
            return Mamba2ForCausalLM(
                Mamba2Config(
                    vocab_size=arguments.vocab_size,
                    hidden_size=arguments.hidden_size,
                    num_hidden_layers=2,
                    num_heads=arguments.hidden_size // 16,
                    head_dim=32,
                    state_size=64,
                    n_groups=1,
                    chunk_size=min(64, arguments.seq_len),
                    tie_word_embeddings=True,
                    use_cache=False,
                )
            )
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
            use_position_embeddings=True,
            max_position_embeddings=arguments.seq_len,
            **KERNELS[arguments.kernel],
        )
    except (StrictDataclassError, ValueError) as error:
        raise SystemExit(f"the model's sizes do not fit together: {error.__cause__ or error}") from None
    return RebasedForCausalLM(config)


def train(arguments, output_dir, checkpoint):
    """Train one model and leave it in `output_dir`: its settings and results, or None where Ctrl-C stopped it."""
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
        # Each process reads its own part: a batch cannot be cut up, as logits_to_keep belongs to all of its rows.
        accelerator_config={"dispatch_batches": False},
        disable_tqdm=arguments.jobs > 1,
        report_to="none",
        seed=arguments.seed,
    )
    if training.n_gpu > 1:
        raise SystemExit(
            "several GPUs in one process are not supported; start this with `accelerate launch --multi_gpu`"
        )
    train_set, test_set = make_datasets(arguments, training.world_size)
    model = make_model(arguments)
    interrupt = StopOnInterrupt()
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
    if arguments.jobs > 1:
        trainer.remove_callback(PrinterCallback)
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train(resume_from_checkpoint=checkpoint)
    if interrupt.interrupted:
        print(
            f"Stopped at step {trainer.state.global_step} of {arguments.max_steps}; checkpoint in {output_dir}. "
            "Run the same command to go on, a single run with --resume_from_checkpoint."
        )
        return None
    after = trainer.evaluate()["eval_accuracy"]
    if trainer.is_world_process_zero():
        model.save_pretrained(output_dir)
    log = trainer.state.log_history
    return {
        **{name: getattr(arguments, name) for name in SETTINGS},
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


def run_single(arguments):
    output, started = Path(arguments.output_dir), time.time()
    result = train(arguments, output, arguments.resume_from_checkpoint)
    if result is None or not PartialState().is_main_process:
        return
    guessing = 1 / arguments.num_pairs
    result |= {
        "accuracy_of_guessing_a_value_of_the_sequence": guessing,
        "seconds": round(time.time() - started, 1),
    }
    (output / "associative_recall.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(result["curve"], guessing, output / "associative_recall.png")

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


def settings(run):
    return {name: run[name] for name in SETTINGS}


def run_in_sweep(arguments):
    folder = "_".join(f"{name}={value}" for name, value in settings(vars(arguments)).items())
    output = Path(arguments.output_dir) / folder
    checkpoint = last_checkpoint(output)
    # Stock Trainer would take one more step from the checkpoint of the last one.
    finished = checkpoint is not None and checkpoint.endswith(f"-{arguments.max_steps}")
    return train(arguments, output, None if finished else checkpoint)


def finished_runs(runs):
    """Results in the order in which they come, `jobs` runs at a time; ends early after Ctrl-C."""
    jobs = runs[0].jobs
    if jobs == 1:
        yield from itertools.takewhile(lambda result: result is not None, map(run_in_sweep, runs))
        return
    threads = max(1, torch.get_num_threads() // jobs)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        # Ctrl-C reaches the workers too, which save and hand back None.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for future in as_completed([pool.submit(run_in_sweep, run) for run in runs]):
            if future.result() is None:
                pool.shutdown(cancel_futures=True)
                return
            yield future.result()


def run_sweep(runs):
    output = Path(runs[0].output_dir)
    output.mkdir(parents=True, exist_ok=True)
    results = output / "results.jsonl"
    done = [settings(json.loads(line)) for line in results.read_text().splitlines()] if results.exists() else []
    missing = [run for run in runs if settings(vars(run)) not in done]
    bar = tqdm(
        total=len(runs), initial=len(runs) - len(missing), desc="runs", disable=not PartialState().is_main_process
    )
    for result in finished_runs(missing) if missing else ():
        if PartialState().is_main_process:
            with results.open("a") as file:
                file.write(json.dumps(result) + "\n")
        bar.update()
        bar.set_postfix_str(f"{result['kernel']} {result['hidden_size']}: {result['accuracy']:.3f}")
    bar.close()
    print(f"{bar.n} of {len(runs)} runs are in {results}; plot_associative_recall.py draws them")


def main():
    runs = parse_arguments()
    if len(runs) == 1:
        run_single(runs[0])
    else:
        run_sweep(runs)


if __name__ == "__main__":
    main()
