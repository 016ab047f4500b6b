# /// script
# dependencies = ["hf_based_kernel", "accelerate", "matplotlib"]
# ///
"""Replace more and more of a Llama's attention, and measure how much of the teacher is left and how much of that is the window.

    accelerate launch examples/studies/compare_conversions.py --preset hour --replace 4 15 30

Trains as `hf_based_kernel/convert_llama.py` does, with its options: stage 1 once, then a model for each number of layers. After
stage 1 alone every number of layers is measured too. An interrupted run goes on where it stopped if the same command is given
again, and a model that is there is not trained again for another list.
"""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

import matplotlib
import torch
from accelerate import PartialState
from tqdm import tqdm

from hf_based_kernel import RebasedForCausalLM


sys.path.append(str(Path(__file__).parents[1] / "shared"))
sys.path.append(str(Path(__file__).parents[1] / "hf_based_kernel"))
import convert_llama as example
from conversions import AttentionTransfer, answer, fidelity, read_rows, spread, window_only


COLUMNS = {
    "perplexity": ("perplexity", 1, 2),
    "kl": ("KL, nats", 1, 3),
    "agreement": ("same next token, %", 100, 1),
    "recall": ("recall hits, %", 100, 1),
    "copying": ("copied, %", 100, 1),
}
VARIANTS = ("", "window only, ")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    example.add_options(parser)
    parser.set_defaults(output_dir=Path("outputs/compare_conversions"))
    parser.add_argument("--replace", type=int, nargs="+", default=[4, 15, 30], help="numbers of layers (4 15 30)")
    arguments = example.complete(parser, parser.parse_args())
    arguments.numbers, arguments.replace = sorted(arguments.replace), max(arguments.replace)
    return arguments


def one_more_each_time(arguments, teacher, weights, order, held_out):
    """After stage 1: the KL divergence with the first 1, 2, … layers replaced, and with nothing but their windows."""
    path = arguments.output_dir / "after_transfer.json"
    if not path.exists():
        module = AttentionTransfer(teacher, example.replaced(arguments, teacher, weights, sorted(weights)))
        curves = {}
        for variant in VARIANTS if arguments.window else VARIANTS[:1]:
            choices = (order[:number] for number in range(1, len(order) + 1))
            with window_only(module) if variant else contextlib.nullcontext():
                found = module.divergences(held_out[: example.ORDER_TEXTS], choices)
                curves[variant] = list(tqdm(found, desc=f"{variant}one more each time", total=len(order)))
        path.write_text(json.dumps(curves) + "\n")
    return json.loads(path.read_text())


def measure(arguments, teacher, tokenizer, model, held_out):
    number = model.config.layer_types.count("linear_attention")
    alone = bool(number and arguments.window)
    measured = fidelity(model, teacher, held_out, arguments.window, windows_alone=alone)
    measured = {name: spread(values) for name, values in measured.items()}
    return {"replaced": number, **measured, "answer": answer(model, tokenizer, example.QUESTION)}


def write_report(arguments, results, curves, heading):
    lines = [heading, "", f"| layers replaced | {' | '.join(name for name, *_ in COLUMNS.values())} |"]
    lines.append("|---" * (1 + len(COLUMNS)) + "|")
    for result in results:
        for variant in VARIANTS:
            if f"{variant}kl" in result:
                cells = [
                    " ± ".join(f"{factor * x:.{digits}f}" for x in result[f"{variant}{key}"])
                    for key, (_, factor, digits) in COLUMNS.items()
                ]
                lines.append(f"| {result['replaced']}{', window only' * bool(variant)} | {' | '.join(cells)} |")
    lines += ["", f"Asked: {example.QUESTION}", ""]
    lines += [f"- {result['replaced']} replaced: {' '.join(result['answer'].split())}" for result in results]
    table = "\n".join(lines) + "\n"
    (arguments.output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.output_dir / "results.md").write_text(table)
    plot(results, curves, arguments.output_dir / "conversion.png")
    return table


def plot(results, curves, path):
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axes, keys in ((left, ("kl",)), (right, ("copying", "recall"))):
        for i, key in enumerate(keys):
            for variant, style in zip(VARIANTS, ("o-", "o:")):
                chosen = [
                    result for result in results if f"{variant}{key}" in result and (result["replaced"] or key != "kl")
                ]
                if chosen:
                    means, errors = zip(*(result[f"{variant}{key}"] for result in chosen))
                    numbers = [result["replaced"] for result in chosen]
                    axes.errorbar(numbers, means, errors, fmt=f"C{i}{style}", capsize=2, label=variant + key)
        axes.set_xlabel("layers replaced")
        axes.grid(alpha=0.3)
    for variant, curve in curves.items():
        left.plot(range(1, len(curve) + 1), curve, "C2:" if variant else "C2-", label=f"{variant}after stage 1")
    left.set_yscale("log")
    left.set_ylabel("KL(teacher ‖ model), nats a token")
    right.set_ylabel("share that is right")
    for axes in (left, right):
        axes.legend(fontsize="small", framealpha=0.6)
    figure.savefig(path, dpi=110)


def main():
    arguments, started = parse_arguments(), time.time()
    example.begin(arguments)
    teacher, tokenizer = example.load_teacher(arguments, PartialState().device)
    rows, held_out, text_name = read_rows(arguments, tokenizer)
    weights = example.transfer(arguments, teacher, rows)
    order = example.order_layers(arguments, teacher, weights, held_out)
    curves = one_more_each_time(arguments, teacher, weights, order, held_out)
    same = RebasedForCausalLM.from_llama(teacher).eval()
    results = [measure(arguments, teacher, tokenizer, same, held_out)]
    del same
    for number in arguments.numbers:
        model = example.distill(arguments, teacher, tokenizer, weights, rows, order[:number])
        results.append(measure(arguments, teacher, tokenizer, model, held_out))
        if PartialState().is_main_process:
            heading = (
                f"{text_name}; {arguments.transfer_steps} and {arguments.distill_steps} steps of {arguments.batch_size} x "
                f"{arguments.seq_len} tokens, {held_out.shape[0]} texts held out, window {arguments.window}, torch {torch.__version__}"
            )
            table = write_report(arguments, results, curves, heading)
    if PartialState().is_main_process:
        print(f"\n{table}\n{time.time() - started:.0f} s. Models: {arguments.output_dir}/NUMBER; plot: conversion.png")


if __name__ == "__main__":
    main()
