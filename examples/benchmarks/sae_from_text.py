# /// script
# dependencies = ["hf_hierarchical_sae[cli,cpu]"]
# ///
"""What training straight from text costs beside a harvest and training on it: the same tokens, steps and model.

    python examples/benchmarks/sae_from_text.py --output outputs/sae_from_text.md

Every command runs in a process of its own, start included, and in turns within each round; a number is the median over
rounds. CPU seconds say what was computed, whatever else the machine does.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1] / "shared"))
from plays import find_plays


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="outputs/SmolLM2-135M-Instruct", help="folder or Hub id (default: %(default)s)"
    )
    parser.add_argument("--text", nargs="+", help="text files with tokens enough for all steps (default: the plays)")
    parser.add_argument("--layer", type=int, default=15, help="decoder layer, from 0 (default: 15)")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of 1024 tokens (default: 60)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that the medians are taken over (default: 3)")
    parser.add_argument("--hardware", default="not stated", help="what the machine is, for the head of the table")
    parser.add_argument("--output", type=Path, default=Path("outputs/sae_from_text.md"), help="file for the table")
    return parser.parse_args()


def seconds(*command):
    """CPU and wall seconds of `hierarchical-sae` with these arguments."""
    before, start = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-m", "hf_hierarchical_sae.cli", *command], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return cpu, time.perf_counter() - start


def one_round(arguments, folder):
    """Name → CPU and wall seconds."""
    files = arguments.text or map(str, find_plays("--text"))
    text = ["--model", arguments.model, "--text", *files, "--layer", str(arguments.layer)]
    text += ["--tokens", str(1024 * arguments.steps)]
    steps = ["--steps", str(arguments.steps), "--save_steps", str(arguments.steps)]
    return {
        "harvest": seconds("harvest", f"{folder}/states", *text),
        "training on it": seconds("train", f"{folder}/states", f"{folder}/on_states", *steps),
        "training straight from text": seconds("train", f"{folder}/on_text", *text, *steps),
    }


def main():
    arguments = parse_arguments()
    rounds = []
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(one_round(arguments, folder))
            print(json.dumps(rounds[-1]), flush=True)
    rows = {name: [statistics.median(found[name][i] for found in rounds) for i in (0, 1)] for name in rounds[0]}
    both = [sum(pair) for pair in zip(rows["harvest"], rows["training on it"])]
    ratios = [one / other for one, other in zip(rows["training straight from text"], both)]
    table = [
        f"Hardware: {arguments.hardware}. {1024 * arguments.steps} tokens, {arguments.rounds} rounds.\n",
        "| command | CPU s | wall s |\n|---|---|---|",
        *(f"| {name} | {cpu:.1f} | {wall:.1f} |" for name, (cpu, wall) in rows.items()),
        f"| straight from text ÷ harvest and training | {ratios[0]:.2f} | {ratios[1]:.2f} |",
    ]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text("\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
