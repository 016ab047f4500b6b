# /// script
# dependencies = ["hf_based_kernel", "accelerate", "lm-eval", "matplotlib"]
# ///
"""Replace more and more of a Llama's attention, and measure how much of the teacher is left and how much of that is the window.

    accelerate launch examples/studies/compare_conversions.py --preset hour --replace 4 15 30

Trains as `hf_based_kernel/convert_llama.py` does, with its options: stage 1 once, then a model for each number of layers. After
stage 1 alone every number of layers is measured too. With --lm_eval, lm-eval scores each model on a task that is made of the
texts held out, the last words of their sentences (it is in OUTPUT_DIR/tasks). An interrupted run goes on where it stopped if the same command is given
again, and a model that is there is not trained again for another list.
"""

import argparse
import contextlib
import json
import math
import re
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
from conversions import (
    AttentionTransfer,
    answer,
    copying,
    divergence_by_stretch,
    fidelity,
    read_other,
    read_rows,
    spread,
    window_only,
)
from interrupts import whole
from options import check_least


COLUMNS = {
    "perplexity": ("perplexity", 1, 2),
    "kl": ("KL, nats", 1, 3),
    "agreement": ("same next token, %", 100, 1),
    "recall": ("recall hits, %", 100, 1),
    "copying": ("copied, %", 100, 1),
}
VARIANTS = ("", "window only, ")
# Texts held out on which every number of layers is measured after stage 1.
CURVE_TEXTS = 2
LAST_WORD = """task: last_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{' ' + word}}}}"
metric_list:
  - metric: acc
  - metric: perplexity
"""


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    example.add_options(parser)
    parser.set_defaults(output_dir=Path("outputs/compare_conversions"))
    parser.add_argument("--replace", type=int, nargs="+", default=[4, 15, 30], help="numbers of layers (4 15 30)")
    parser.add_argument(
        "--long_rows",
        type=int,
        default=4,
        help="held-out rows of --seq_len after one another that are read at once, and looked at in stretches (4)",
    )
    parser.add_argument(
        "--other_files", nargs="+", type=Path, help="text files of another kind, to measure the models on as well"
    )
    default = ", ".join(f"{rate:g} of {name}" for name, rate in example.RATES.items())
    parser.add_argument("--learning_rate", type=float, help=f"peak of stage 2 ({default})")
    parser.add_argument("--lm_eval", action="store_true", help="score every model with lm-eval too")
    arguments = example.complete(parser, parser.parse_args())
    check_least(parser, arguments, long_rows=1, **({} if arguments.learning_rate is None else {"learning_rate": 0.0}))
    arguments.numbers, arguments.replace = sorted(arguments.replace), max(arguments.replace)
    return arguments


def one_more_each_time(arguments, teacher, weights, order, held_out):
    """After stage 1: the KL divergence with the first 1, 2, … layers replaced, and with nothing but their windows."""
    # --long_rows says which rows of the texts are held out.
    path = arguments.output_dir / f"after_transfer_{arguments.long_rows}.json"
    if not path.exists():
        module = AttentionTransfer(teacher, example.replaced(arguments, teacher, weights, sorted(weights)))
        curves = {}
        for variant in VARIANTS if arguments.window else VARIANTS[:1]:
            choices = (order[:number] for number in range(1, len(order) + 1))
            with window_only(module) if variant else contextlib.nullcontext():
                found = module.divergences(held_out[:CURVE_TEXTS], choices)
                curves[variant] = list(tqdm(found, desc=f"{variant}one more each time", total=len(order)))
        if PartialState().is_main_process:
            with whole(path) as unfinished:
                unfinished.write_text(json.dumps(curves) + "\n")
    PartialState().wait_for_everyone()
    return json.loads(path.read_text())


def measure(arguments, teacher, tokenizer, model, long_texts, other):
    number = model.config.layer_types.count("linear_attention")
    alone = bool(number and arguments.window)
    held_out = long_texts[:, : arguments.seq_len]
    measured = fidelity(model, teacher, held_out, arguments.window, windows_alone=alone)
    measured |= copying(model, windows_alone=alone)
    found = {"replaced": number, **spreads(measured)}
    if other is not None:
        measured = fidelity(model, teacher, other, arguments.window, windows_alone=alone)
        found["other"] = {"texts": len(other), **spreads(measured)}
    if number:
        stretches = divergence_by_stretch(model, teacher, long_texts, stretch_length(arguments))
        found["kl_by_stretch"] = [spread(values) for values in stretches]
    if arguments.lm_eval:
        found["lm_eval"] = score_last_words(arguments, tokenizer, model, held_out)
    return {**found, "answer": answer(model, tokenizer, example.QUESTION)}


def spreads(measured):
    return {name: spread(values) for name, values in measured.items()}


def score_last_words(arguments, tokenizer, model, held_out):
    """lm-eval's accuracy and perplexity at the last words of sentences, as in LAMBADA."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = arguments.output_dir / "tasks"
    folder.mkdir(exist_ok=True)
    documents = [
        {"text": text[: word.start()].rstrip(), "word": word[1]}
        for text in tokenizer.batch_decode(held_out, skip_special_tokens=True)
        for word in re.finditer(r"\s([A-Za-z]+)[.?!]", text)
        if word.start() > len(text) // 8
    ]
    if not documents:
        raise SystemExit("--lm_eval: no sentence ends in the texts held out; give other texts, or longer --seq_len")
    (folder / "last_word.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / "last_word.yaml").write_text(
        LAST_WORD.format(data=json.dumps(str((folder / "last_word.jsonl").resolve())))
    )
    scored = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=["last_word"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    found = scored["results"]["last_word"]
    return {
        "documents": len(documents),
        "accuracy": found["acc,none"],
        "perplexity": found["perplexity,none"],
    }


def write_report(arguments, results, curves, heading):
    lines = [heading, "", *fidelity_table([(result["replaced"], result) for result in results])]
    if "other" in results[0]:
        lines += ["", f"On {results[0]['other']['texts']} texts of another kind:", ""]
        lines += fidelity_table([(result["replaced"], result["other"]) for result in results])
    lines += stretches_table(arguments, results) + last_words_table(results)
    lines += ["", f"Asked: {example.QUESTION}", ""]
    lines += [f"- {result['replaced']} replaced: {' '.join(result['answer'].split())}" for result in results]
    table = "\n".join(lines) + "\n"
    (arguments.output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.output_dir / "results.md").write_text(table)
    plot(results, curves, arguments.output_dir / "conversion.png")
    return table


def fidelity_table(results):
    """Rows for pairs of a number of layers and what was measured with them replaced."""
    columns = {key: column for key, column in COLUMNS.items() if key in results[0][1]}
    lines = [f"| layers replaced | {' | '.join(name for name, *_ in columns.values())} |"]
    lines.append("|---" * (1 + len(columns)) + "|")
    for number, found in results:
        for variant in VARIANTS:
            if f"{variant}kl" in found:
                cells = [
                    " ± ".join(f"{factor * x:.{digits}f}" for x in found[f"{variant}{key}"])
                    for key, (_, factor, digits) in columns.items()
                ]
                lines.append(f"| {number}{', window only' * bool(variant)} | {' | '.join(cells)} |")
    return lines


def stretch_length(arguments):
    """A row of training at most, so that rows four times as long can be held against it."""
    return min(arguments.seq_len, math.ceil(arguments.seq_len * arguments.long_rows / 4))


def stretches_table(arguments, results):
    """KL along texts that are longer than the rows that were trained on, or as long."""
    length = stretch_length(arguments)
    total = arguments.seq_len * arguments.long_rows
    titles = [f"{start + 1:,} – {min(start + length, total):,}" for start in range(0, total - 1, length)]
    lines = ["", f"| layers replaced | KL at tokens {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|"]
    for result in results:
        if "kl_by_stretch" in result:
            cells = [f"{mean:.3f} ± {error:.3f}" for mean, error in result["kl_by_stretch"]]
            lines.append(f"| {result['replaced']} | {' | '.join(cells)} |")
    return lines


def last_words_table(results):
    """What lm-eval found, if it was asked."""
    lines = ["", "| layers replaced | last words right, % | perplexity of them | sentences |", "|---" * 4 + "|"]
    for result in results:
        if "lm_eval" in result:
            found = result["lm_eval"]
            error = 1.96 * (found["accuracy"] * (1 - found["accuracy"]) / found["documents"]) ** 0.5
            right = f"{100 * found['accuracy']:.1f} ± {100 * error:.1f}"
            lines.append(f"| {result['replaced']} | {right} | {found['perplexity']:.1f} | {found['documents']} |")
    return lines if len(lines) > 3 else []


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
    teacher, tokenizer = example.load_teacher(arguments, PartialState().device)
    rows, long_texts, held_out_texts, text_name = read_rows(arguments, tokenizer, arguments.long_rows)
    other = read_other(arguments, tokenizer)
    example.begin(arguments, held_out_texts)
    held_out = long_texts[:, : arguments.seq_len]
    weights = example.transfer(arguments, teacher, rows)
    order = example.order_layers(arguments, teacher, weights, rows)
    curves = one_more_each_time(arguments, teacher, weights, order, held_out)
    same = RebasedForCausalLM.from_llama(teacher).eval()
    results = [measure(arguments, teacher, tokenizer, same, long_texts, other)]
    del same
    for number in arguments.numbers:
        chosen = order[:number]
        model = example.distill(arguments, teacher, tokenizer, weights, rows, chosen, arguments.learning_rate)
        results.append(measure(arguments, teacher, tokenizer, model, long_texts, other))
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
