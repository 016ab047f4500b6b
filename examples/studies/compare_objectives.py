# /// script
# dependencies = ["hf_hierarchical_sae", "accelerate", "datasets", "matplotlib"]
# ///
"""
Train one sparse autoencoder per objective on the same activations, with the same steps, and compare them at every
sparsity budget: HierarchicalTopK (all budgets, powers of two only, with Matryoshka prefixes; each read by the strongest
latents and by a threshold), TopK and BatchTopK for each budget, Matryoshka; in the larger presets TopK with an auxiliary
loss for dead latents too; with the first seed also inside the language model, on text that was not harvested.

    accelerate launch examples/studies/compare_objectives.py --preset minutes

`minutes` reads SmolLM2-135M layer 9. `larger` and `hours` have twice and four times the latents and three and seven times
the tokens, at layers 21 and 9, and fewer dictionaries of one budget. `paper` has the sizes of arXiv 2505.24473
(Gemma-2-2B layer 12, 65,536 latents; 50M tokens, not its 1B) and is for a GPU with 250 GB of disk. `synthetic` plants
known features and needs no language model. An interrupted run goes on where it stopped if the same command is given
again.
"""

import argparse
import json
import random
import re
import shutil
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from torch.utils.data import StackDataset

from hf_hierarchical_sae import (
    HierarchicalSaeModel,
    evaluate_budgets,
    evaluate_in_model,
    iterate_activations,
    select_by_threshold,
)
from hf_hierarchical_sae.whole_files import whole_file


sys.path.append(str(Path(__file__).parents[1] / "shared"))
from dictionaries import folder_name, harvested, language_model, train
from interrupts import record_settings
from options import check_layers, check_seeds
from plays import find_plays


DEMO_MODEL = Path("outputs/SmolLM2-135M-Instruct")
DEMO_MODEL_NAME = str(DEMO_MODEL) if DEMO_MODEL.exists() else "HuggingFaceTB/SmolLM2-135M-Instruct"
# Texts that are left out of the harvest: there the reconstructions take the place of the layer's output.
SPLICED_TEXTS = 64
PRESETS = {
    "minutes": {
        "learning_rate": 3e-3,
        "steps": 400,
        "batch_size": 512,
        "model": DEMO_MODEL_NAME,
        "layer": 9,
        "dataset": None,
        "dtype": "float32",
        "tokens": 150_000,
        "eval_tokens": 16_384,
        "spliced_tokens": 2000,
        "d_sae": 4608,
        "budgets": [8, 16, 32, 64],
    },
    "larger": {
        "learning_rate": 3e-3,
        "steps": 1000,
        "batch_size": 512,
        "model": DEMO_MODEL_NAME,
        "layer": 21,
        "dataset": None,
        "dtype": "float32",
        "tokens": 500_000,
        "eval_tokens": 16_384,
        "spliced_tokens": 2000,
        "d_sae": 9216,
        "budgets": [8, 16, 32, 64],
        "separate": [8, 64],
        "auxiliary": [8],
    },
    "hours": {
        "learning_rate": 2e-3,
        "steps": 2000,
        "batch_size": 512,
        "model": DEMO_MODEL_NAME,
        "layer": 9,
        "dataset": None,
        "dtype": "float32",
        "tokens": 1_000_000,
        "eval_tokens": 16_384,
        "spliced_tokens": 2000,
        "d_sae": 16_384,
        "budgets": [8, 16, 32, 64],
        "separate": [8, 64],
        "auxiliary": [8],
    },
    "paper": {
        "learning_rate": 1e-3,
        "steps": 25_000,
        "batch_size": 2048,
        "model": "google/gemma-2-2b",
        "layer": 12,
        "dataset": "HuggingFaceFW/fineweb",
        "dtype": "bfloat16",
        "tokens": 50_000_000,
        "eval_tokens": 65_536,
        "spliced_tokens": 16_384,
        "d_sae": 65_536,
        "budgets": [8, 16, 32, 64, 128],
    },
    "synthetic": {
        "learning_rate": 1e-2,
        "steps": 200,
        "batch_size": 512,
        "model": None,
        "tokens": 40_000,
        "eval_tokens": 8_192,
        "d_in": 96,
        "features": 128,
        "d_sae": 256,
        "budgets": [2, 4, 8, 32],
    },
}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="minutes", help="sizes, see above (minutes)")
    parser.add_argument("--model", help="hub id or folder of another language model than the preset's")
    parser.add_argument("--layer", type=int, help="another decoder layer than the preset's, counted from 0")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="seeds of weights and batches (0 1)")
    parser.add_argument("--output_dir", type=Path, help="where everything is written (outputs/compare_PRESET)")
    arguments = parser.parse_args()
    check_seeds(parser, arguments.seeds)
    arguments.settings = {**PRESETS[arguments.preset]}
    if "dtype" not in arguments.settings and (arguments.model, arguments.layer) != (None, None):
        parser.error(f"--preset {arguments.preset} has no language model: leave out --model and --layer")
    arguments.settings.update(
        {name: value for name in ("model", "layer") if (value := getattr(arguments, name)) is not None}
    )
    if "layer" in arguments.settings:
        check_layers(parser, arguments.settings["model"], "layer", arguments.settings["layer"])
    arguments.output_dir = arguments.output_dir or Path("outputs") / f"compare_{arguments.preset}"
    return arguments


def objectives(settings):
    """Options of `HierarchicalSaeConfig` by name of the objective."""
    budgets, d_sae = settings["budgets"], settings["d_sae"]
    largest, middle, separate = budgets[-1], budgets[-2], settings.get("separate", budgets)
    powers = [2**power for power in range(largest.bit_length())]
    prefixes = [d_sae // 16, d_sae // 8, d_sae // 4, d_sae // 2, d_sae]
    return {
        "HierarchicalTopK": {"k": largest},
        **{f"TopK-{k}": {"k": k, "budgets": [k]} for k in separate},
        **{
            f"TopK-{k}, auxiliary loss": {"k": k, "budgets": [k], "aux_loss_coefficient": 1 / 32}
            for k in settings.get("auxiliary", [])
        },
        "HierarchicalTopK, powers of two": {"k": largest, "budgets": powers},
        **{f"BatchTopK-{k}": {"k": k, "budgets": [k], "selection": "batch_topk"} for k in separate},
        f"Matryoshka-{middle}": {"k": middle, "budgets": [middle], "matryoshka_prefixes": prefixes},
        "HierarchicalTopK, prefixes": {"k": largest, "matryoshka_prefixes": prefixes},
    }


def passages(settings):
    """Rows of text to splice into, and rows to harvest, always in the same order."""
    if settings["dataset"]:
        import datasets

        rows = datasets.load_dataset(settings["dataset"], split="train", streaming=True)
        return rows.take(SPLICED_TEXTS), rows.skip(SPLICED_TEXTS)
    pieces = [
        text[start : start + 2000]
        for text in map(Path.read_text, find_plays(None))
        for start in range(0, len(text), 2000)
    ]
    random.Random(0).shuffle(pieces)
    return pieces[:SPLICED_TEXTS], pieces[SPLICED_TEXTS:]


def planted(settings):
    """The same of sparse sums of known directions, about five at a time; the r-th fires with probability 1/r."""
    generator = torch.Generator().manual_seed(0)
    count, features, d_in = settings["tokens"] + settings["eval_tokens"], settings["features"], settings["d_in"]
    directions = torch.nn.functional.normalize(torch.randn(features, d_in, generator=generator), dim=1)
    frequency = (1 / torch.arange(1, features + 1)).clamp(max=0.9)
    fires = torch.rand(count, features, generator=generator) < frequency
    strength = torch.empty(count, features).exponential_(1.0, generator=generator)
    rows = (fires * strength) @ directions + 0.05 * torch.randn(count, d_in, generator=generator)
    train, held_out = rows[: settings["tokens"]], rows[settings["tokens"] :]
    return StackDataset(hidden_states=train), train[:8192], held_out  # ty: ignore[invalid-argument-type]


def measured(sae, settings, data, budgets, spliced):
    """Quality on held-out activations and, if asked, in the language model."""
    evaluation = evaluate_budgets(sae, data[2], budgets)
    print(evaluation, flush=True)
    found = evaluation.to_dict()
    if spliced:
        stream = iterate_activations(
            *language_model(settings["model"], settings["dtype"]),
            passages(settings)[0],
            settings["layer"],
            max_tokens=settings["spliced_tokens"],
        )
        evaluation = evaluate_in_model(sae, stream, budgets)
        print(evaluation, flush=True)
        found["spliced"] = evaluation.to_dict()
    return found


def measured_by_threshold(sae, settings, data, budgets, spliced):
    """The same with a threshold for each budget, measured on activations of the training."""
    parts = [
        measured(select_by_threshold(sae, data[1], budget), settings, data, [budget], spliced) for budget in budgets
    ]
    return joined(parts)


def joined(parts):
    """Evaluations at one budget each as one of all."""
    found = dict(parts[0])
    for name, value in found.items():
        if isinstance(value, list):
            found[name] = [part[name][0] for part in parts]
        elif isinstance(value, dict):
            found[name] = joined([part[name] for part in parts])
    return found


def run(name, options, settings, data, seed, folder, spliced):
    """Train and evaluate, or read what an earlier run found."""
    result = folder / "result.json"
    earlier = json.loads(result.read_text()) if result.exists() else None
    if earlier and (not spliced or "spliced" in earlier):
        return earlier
    print(f"\n{name}, seed {seed}", flush=True)
    if earlier:  # It was not the seed to splice in then.
        sae, seconds = HierarchicalSaeModel.from_pretrained(folder), earlier["cpu_seconds_per_step"]
        sae = sae.to(PartialState().device)
    else:
        sae, seconds = train(options, settings, data, seed, folder)
    if PartialState().is_main_process:
        k = options["k"]
        sae.save_pretrained(folder)
        budgets = [k]
        if sae.config.has_budgets:
            # One dictionary at every budget, those it was not trained for included.
            budgets = settings["budgets"]
            wider = {"k": budgets[-1], "budgets": budgets[-1:]}
            sae = HierarchicalSaeModel.from_pretrained(folder, **wider).to(sae.device)
        found = measured(sae, settings, data, budgets, spliced)
        found["dead_at_trained_k"] = found["dead_fraction"][budgets.index(k)]
        found["cpu_seconds_per_step"] = seconds
        if options.get("budgets") != [k]:
            found["by_threshold"] = measured_by_threshold(sae, settings, data, budgets, spliced)
        with whole_file(result) as unfinished:
            unfinished.write_text(json.dumps(found, indent=2) + "\n")
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    PartialState().wait_for_everyone()
    return json.loads(result.read_text())


def explained(found, budget):
    """Explained variance at a budget, or None where the autoencoder has no such budget."""
    values = dict(zip(found["budgets"], found["explained_variance"]))
    return values.get(budget)


def table(results, budgets):
    """Markdown: mean over seeds, and the largest distance from it if there are several."""

    def cell(values, digits=3, factor=1.0):
        values = [value * factor for value in values if value is not None]
        if not values:
            return "–"
        mean = sum(values) / len(values)
        spread = f" ± {max(abs(value - mean) for value in values):.{digits}f}" if len(values) > 1 else ""
        return f"{mean:.{digits}f}{spread}"

    lines = [
        "| objective | " + " | ".join(f"EV at {budget}" for budget in budgets) + " | dead, % | CPU s per step |",
        "|---" * (len(budgets) + 3) + "|",
    ]
    for name, runs in results.items():
        cells = [cell([explained(found, budget) for found in runs]) for budget in budgets]
        cells.append(cell([found["dead_at_trained_k"] for found in runs], digits=1, factor=100))
        # A run that was resumed after its last step has none.
        seconds = [each for found in runs if (each := found["cpu_seconds_per_step"]) is not None]
        cells.append(f"{min(seconds):.2f}" if seconds else "–")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_thresholds(results):
    """The results with rows of their own for what was read by a threshold."""
    found = {}
    for name, runs in results.items():
        thresholds = [run.pop("by_threshold", None) for run in runs]
        found[name] = runs
        if thresholds[0] is not None:
            # What is equal, of the training.
            found[f"{name}, by threshold"] = [run | more for run, more in zip(runs, thresholds)]
    return found


def used(results, where="held out"):
    """Of each kind of dictionary that selects by a threshold, latents per token at each budget, on average over seeds."""
    lines = []
    for kind in dict.fromkeys(re.sub(r"-\d+$", "", name) for name in results):
        counts = {}
        for name, runs in results.items():
            is_of_kind = name == kind or name.startswith(f"{kind}-")
            if is_of_kind and (kind.endswith("by threshold") or kind.startswith("BatchTopK")):
                for run in runs if where == "held out" else [runs[0]["spliced"]]:
                    for budget, latents in zip(run["budgets"], run["latents_per_token"]):
                        counts.setdefault(budget, []).append(latents)
        if counts:
            means = (f"{sum(values) / len(values):.1f}" for values in counts.values())
            lines.append(f"- latents per token, {where}, of {kind}: {', '.join(means)}")
    return lines


def spliced_table(results, budgets):
    """Markdown: the language model's loss recovered and KL divergence, of the seed that was spliced in."""
    quality = {name: runs[0]["spliced"] for name, runs in results.items()}
    titles = [f"{title} at {budget}" for title in ("recovered", "KL") for budget in budgets]
    lines = ["| objective | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for name, found in quality.items():
        columns = [dict(zip(found["budgets"], found[column])) for column in ("loss_recovered", "kl_divergence")]
        values = [column.get(budget) for column in columns for budget in budgets]
        cells = ["–" if value is None else f"{value:.3f}" for value in values]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    found = quality["HierarchicalTopK"]
    lines += [
        "",
        f"Cross-entropy of the language model on {found['tokens']} tokens: {found['clean_cross_entropy']:.3f} as it is, "
        f"{found['zeros_cross_entropy']:.3f} with zeros in place of the layer's output.",
    ]
    return "\n".join(lines)


def claims(results, budgets):
    """What the paper's claim comes to here: the number furthest from it over all seeds, and whether it holds."""
    hierarchical, smallest, widest = results["HierarchicalTopK"], budgets[0], budgets[-1]
    behind = max(
        explained(own, budget) - explained(found, budget)
        for budget in budgets
        if f"TopK-{budget}" in results
        for found, own in zip(hierarchical, results[f"TopK-{budget}"])
    )
    ahead = min(
        explained(found, smallest) - explained(own, smallest)
        for found, own in zip(hierarchical, results[f"TopK-{widest}"])
    )
    rise = min(
        later - earlier
        for found in hierarchical
        for earlier, later in zip(found["explained_variance"], found["explained_variance"][1:])
    )
    dead = max(found["dead_at_trained_k"] for found in hierarchical)
    return [
        ("within 0.02 of the TopK trained for each budget", f"at most {behind:.3f} behind", behind <= 0.02),
        (f"0.10 above TopK-{widest} at {smallest}", f"at least {ahead:.3f} above", ahead >= 0.10),
        ("explained variance rises with the budget", f"by at least {rise:.3f} from one to the next", rise > 0),
        ("less than 5 % of latents dead", f"at most {100 * dead:.1f} %", dead < 0.05),
    ]


def means(runs):
    """(budgets) mean latents per token, and (seeds, budgets) explained variance."""
    latents, explained = (
        torch.tensor([run[name] for run in runs]) for name in ("latents_per_token", "explained_variance")
    )
    return latents.mean(0), explained


def plot(results, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes, colors = figure.subplots(), {}
    separate = [runs for name, runs in results.items() if name.startswith("BatchTopK")]
    for name, runs in results.items():
        if runs in separate:
            continue
        latents, curves = means(runs)
        dictionary = name.removesuffix(", by threshold")
        is_ours = name.startswith("HierarchicalTopK")
        axes.errorbar(
            latents,
            curves.mean(0),
            (curves.mean(0) - curves.amin(0), curves.amax(0) - curves.mean(0)),
            fmt="^:" if dictionary != name else "o-" if is_ours else "s--",
            color=colors.setdefault(dictionary, f"C{len(colors)}"),
            label=name,
            linewidth=2 if is_ours else 1,
            markersize=4,
        )
    points = [means(runs) for runs in separate]
    axes.plot(
        [x.item() for x, _ in points], [y.mean().item() for _, y in points], "k*", label="BatchTopK, each budget"
    )
    ticks = results["HierarchicalTopK"][0]["budgets"]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set(xlabel="latents per token", ylabel="explained variance on held-out tokens")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=150)


def main():
    arguments = parse_arguments()
    settings, output = arguments.settings, arguments.output_dir
    # Without it, processes that torchrun starts on CPUs would not know of one another.
    PartialState(cpu=not torch.accelerator.is_available())
    started, processor = time.monotonic(), time.process_time()
    record_settings(output, settings)
    data = (
        planted(settings)
        if settings["model"] is None
        else harvested(settings, lambda: passages(settings)[1], output / "activations")
    )
    print(f"{len(data[0])} tokens to train on, {len(data[2])} held out, of size {data[1].shape[1]}", flush=True)
    results, trained = {}, 0
    for name, options in objectives(settings).items():
        results[name] = []
        for seed in arguments.seeds:
            folder = output / folder_name(name) / f"seed{seed}"
            trained += not (folder / "result.json").exists()
            spliced = settings["model"] is not None and seed == arguments.seeds[0]
            results[name].append(run(name, options, settings, data, seed, folder, spliced))

    if not PartialState().is_main_process:
        return
    count, results = len(results), with_thresholds(results)
    budgets, found = settings["budgets"], claims(results, settings["budgets"])
    summary = [table(results, budgets), ""]
    summary += [f"- {claim}: {'holds' if holds else 'does not hold'} ({number})" for claim, number, holds in found]
    summary += used(results)
    if settings["model"] is not None:
        summary += ["", spliced_table(results, budgets), "", *used(results, "spliced")]
    minutes = [(time.monotonic() - started) / 60, (time.process_time() - processor) / 60]
    summary += [
        "",
        f"This run: {trained} of {count * len(arguments.seeds)} dictionaries trained, {minutes[0]:.1f} minutes, "
        f"{minutes[1]:.1f} CPU minutes, {torch.get_num_threads()} threads.",
    ]
    (output / "summary.md").write_text("\n".join(summary) + "\n")
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(results, output / "pareto.png")
    print("\n" + "\n".join(summary))
    print(f"\n{output}/summary.md  {output}/results.json  {output}/pareto.png")


if __name__ == "__main__":
    main()
