# /// script
# dependencies = ["hf_based_kernel", "accelerate", "datasets", "matplotlib"]
# ///
"""Sweep associative recall over kernels, widths, lengths, learning rates and seeds: one line per run in results.jsonl.

    python examples/studies/sweep_associative_recall.py --preset minutes --jobs 2

Several values for --kernel, --hidden_size, --seq_len with --num_pairs, --learning_rate or --seed, or a --preset, make a
sweep of the runs of train_associative_recall.py; plot_associative_recall.py draws it. Ctrl-C saves checkpoints and stops;
the same command goes on from there.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from tqdm import tqdm
from transformers import Mamba2Config, Mamba2ForCausalLM


sys.path.append(str(Path(__file__).parents[1] / "shared"))
sys.path.append(str(Path(__file__).parents[1] / "hf_based_kernel"))
import train_associative_recall as example
from interrupts import StopOnInterrupt, last_checkpoint, record_settings, whole
from options import check_least


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
COMPARED = ["rebased", "taylor", "attention"]
ABLATIONS = ["x2", "norm_x2", "gamma_x2", "gamma_beta_x2"]
# So many pairs that a state of few features cannot hold them all: with room to spare every kernel ends at 1.
CROWDED = {
    "seq_len": [32],
    "num_pairs": [8],
    "vocab_size": 64,
    "hidden_size": [32],
    "num_attention_heads": 2,
    "batch_size": 64,
    "max_steps": 600,
    "learning_rate": [5e-3, 1e-2, 2e-2],
    "seed": [0, 1, 2, 3, 4],
}
LONGER = {**CROWDED, "seq_len": [32, 64], "num_pairs": [8, 16], "hidden_size": [16, 32, 64], "max_steps": 1200}
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
    # Softmax attention has no features, so that one size of them is enough for it. A state of ReBased with one number more
    # for queries and keys is as large as Based's: (d + 1)(d + 2) / 2 = 1 + d + d (d + 1) / 2 features.
    "minutes": [
        {**CROWDED, "kernel": COMPARED, "feature_dim": 4},
        {**CROWDED, "kernel": ["rebased"], "feature_dim": 5},
        {**CROWDED, "kernel": COMPARED[:2], "feature_dim": 6},
    ],
    "hours": [
        {**LONGER, "kernel": [*COMPARED, *ABLATIONS], "feature_dim": 4},
        {**LONGER, "kernel": ["rebased"], "feature_dim": 5},
        {**LONGER, "kernel": COMPARED[:2], "feature_dim": 8},
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
        help="a sweep; other options given change it. minutes: 90 runs, about 15 CPU-minutes; hours: more kernels, "
        "widths and pairs; paper: the paper's grid, for GPUs",
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
    # an option that is given may make two grids of a preset one
    return list({tuple(settings(vars(run)).items()): run for run in runs}.values())


def check_arguments(parser, arguments):
    check_least(parser, arguments, batch_size=1, max_steps=1, eval_examples=1, jobs=1)
    if len(arguments.seq_len) != len(arguments.num_pairs):
        parser.error(
            f"--num_pairs must give one number for each --seq_len, got {len(arguments.num_pairs)} for "
            f"{len(arguments.seq_len)}"
        )
    if arguments.jobs > 1 and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("--jobs must be 1 where `accelerate launch` starts several processes, which share each run")


def make_model(arguments):
    """The paper's recall models, or transformers' Mamba2 of about their size."""
    if arguments.kernel != "mamba2":
        return example.make_model(arguments, **KERNELS[arguments.kernel])
    try:
        config = Mamba2Config(
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
    except (StrictDataclassError, ValueError) as error:
        raise SystemExit(f"the model's sizes do not fit together: {error.__cause__ or error}") from None
    return Mamba2ForCausalLM(config)


def settings(run):
    return {name: run[name] for name in SETTINGS}


# With --jobs, whether the first process has heard of Ctrl-C, in memory that all share.
heard: Any = argparse.Namespace(value=False)


class StopWithSweep(StopOnInterrupt):
    """Also for a Ctrl-C that came before training began."""

    def on_step_end(self, args, state, control, **kwargs):
        self.interrupted = self.interrupted or bool(heard.value)
        super().on_step_end(args, state, control, **kwargs)


def run_in_sweep(arguments):
    if heard.value:
        return None
    folder = "_".join(f"{name}={value}" for name, value in settings(vars(arguments)).items())
    output = Path(arguments.output_dir) / folder
    result = example.train(
        arguments,
        lambda: make_model(arguments),
        output,
        last_checkpoint(output),
        interrupt=StopWithSweep(arguments),
        quiet=arguments.jobs > 1,
        random_non_queries=arguments.fillers == "random",
    )
    return result and settings(vars(arguments)) | result


def begin_worker(threads, shared):
    global heard
    heard = shared
    torch.set_num_threads(threads)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """Without it, the workers of a killed sweep train on, beside those of the same command given again."""
    multiprocessing.parent_process().join()
    os._exit(1)


def finished_runs(runs):
    """Results in the order in which they come, `jobs` runs at a time; ends early after Ctrl-C."""
    jobs = runs[0].jobs
    if jobs == 1:
        yield from itertools.takewhile(lambda result: result is not None, map(run_in_sweep, runs))
        return
    threads = max(1, torch.get_num_threads() // jobs)
    spawn = multiprocessing.get_context("spawn")
    shared = spawn.RawValue("b", False)

    def hear(number, frame):
        if shared.value:
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise KeyboardInterrupt
        shared.value = True
        os.write(2, b"\nCtrl-C: saving checkpoints, no further run begins; a second one ends all at once\n")

    previous = signal.signal(signal.SIGINT, hear)
    with ProcessPoolExecutor(jobs, spawn, initializer=begin_worker, initargs=(threads, shared)) as pool:
        # Workers start here and stay deaf to Ctrl-C, which may come while they import; they read what this process heard.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        futures = [pool.submit(run_in_sweep, run) for run in runs]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        yield from (future.result() for future in as_completed(futures) if future.result() is not None)
    signal.signal(signal.SIGINT, previous)


def run_sweep(runs):
    output = Path(runs[0].output_dir)
    # A line does not tell it.
    record_settings(output, {"eval_examples": runs[0].eval_examples})
    results = output / "results.jsonl"
    done = [settings(json.loads(line)) for line in results.read_text().splitlines()] if results.exists() else []
    missing = [run for run in runs if settings(vars(run)) not in done]
    bar = tqdm(
        total=len(runs), initial=len(runs) - len(missing), desc="runs", disable=not PartialState().is_main_process
    )
    left = len(missing)
    for result in finished_runs(missing) if missing else ():
        left -= 1
        if PartialState().is_main_process:
            lines = results.read_text() if results.exists() else ""
            with whole(results) as unfinished:
                unfinished.write_text(lines + json.dumps(result) + "\n")
        bar.update()
        bar.set_postfix_str(f"{result['kernel']} {result['hidden_size']}: {result['accuracy']:.3f}")
    bar.close()
    if PartialState().is_main_process:
        print(f"{len(runs) - left} of {len(runs)} runs are in {results}; plot_associative_recall.py draws them")
    if left:
        raise SystemExit(130)


def main():
    run_sweep(parse_arguments())


if __name__ == "__main__":
    main()
