# /// script
# dependencies = ["matplotlib"]
# ///
"""Draw the results of sweep_associative_recall.py: accuracy against the size of the state, and the curves.

    python examples/studies/plot_associative_recall.py outputs/recall/results.jsonl

Each kernel is shown at its own best learning rate, by the mean of the seeds, as in the paper. Prints the table behind the
plots, with the means at all rates.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure


KERNELS = {
    "rebased": "ReBased",
    "taylor": "Based",
    "attention": "convolution, softmax attention",
    "mamba2": "Mamba2",
    "x2": "x²",
    "norm_x2": "norm(x)²",
    "gamma_x2": "(γx)²",
    "gamma_beta_x2": "(γx + β)²",
}
TASK = ("seq_len", "num_pairs", "vocab_size", "max_steps")
# Shown where they differ between the runs.
RECIPE = {"batch_size": "batch {}", "fillers": "{} fillers", "num_attention_heads": "{} heads"}
LEARNT = 0.9


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.jsonl of a sweep")
    parser.add_argument("--output_dir", type=Path, help="folder of the two pictures (default: that of the results)")
    arguments = parser.parse_args()
    if not arguments.results.is_file():
        parser.error(
            f"results: expected the results.jsonl of a sweep, got {arguments.results}, which does not exist; "
            "run sweep_associative_recall.py first"
        )
    return arguments


def read_cells(path):
    """Runs that differ in nothing but rate and seed: {(task, width, feature_dim, kernel): {learning rate: [run, …]}}."""
    cells = defaultdict(lambda: defaultdict(list))
    for line in path.read_text().splitlines():
        run = json.loads(line)
        task = tuple(run[name] for name in (*TASK, *RECIPE))
        cells[task, run["hidden_size"], run["feature_dim"], run["kernel"]][run["learning_rate"]].append(run)
    in_order = sorted(cells.items(), key=lambda item: (*item[0][:3], list(KERNELS).index(item[0][3])))
    return {
        cell: {rate: sorted(rates[rate], key=lambda run: run["seed"]) for rate in sorted(rates)}
        for cell, rates in in_order
    }


def at_best_rate(cells):
    """{(task, width, feature_dim, kernel): [run, …]} at the learning rate whose seeds have the best mean."""
    return {cell: max(rates.values(), key=accuracy) for cell, rates in cells.items()}


def accuracy(runs):
    return mean(run["accuracy"] for run in runs)


def state_size(run):
    """Numbers that a layer has to keep of a sequence: sums of features (products once each) and with values; or keys, values."""
    heads, d = run["num_attention_heads"], run["feature_dim"]
    if run["kernel"] == "mamba2":
        return 64 * 2 * run["hidden_size"]
    # As in RebasedConfig: values are narrower than the model where heads do not divide it.
    head_dim = run["hidden_size"] // heads
    if run["kernel"] == "attention":
        return 2 * run["seq_len"] * heads * head_dim
    features = d * (d + 1) // 2 + (1 + d if run["kernel"] == "taylor" else 0)
    return features * heads * (head_dim + 1)


def steps_to_learn(run):
    return next((step for step, reached in run["curve"] if reached >= LEARNT), None)


def describe(task, cells):
    seq_len, num_pairs, vocab_size, max_steps, *recipe = task
    said = [f"{num_pairs} pairs in {seq_len} tokens of {vocab_size}, {max_steps:,} steps"]
    of_all = zip(*(other[len(TASK) :] for other, *_ in cells))
    said += [text.format(own) for text, own, values in zip(RECIPE.values(), recipe, of_all) if len(set(values)) > 1]
    return ", ".join(said)


def print_table(cells):
    columns = ["task", "width", "feature_dim", "kernel", "parameters", "state", "seeds", "accuracy by rate"]
    columns += ["accuracy at the best", "lowest – highest", f"steps to {LEARNT} by seed"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for (cell, rates), runs in zip(cells.items(), at_best_rate(cells).values()):
        task, width, feature_dim, kernel = cell
        by_rate = ", ".join(f"{rate:g}: {accuracy(tried):.3f}" for rate, tried in rates.items())
        reached = [run["accuracy"] for run in runs]
        steps = ", ".join(str(steps_to_learn(run) or "never") for run in runs)
        print(
            f"| {describe(task, cells)} | {width} | {feature_dim} | {KERNELS[kernel]} | {runs[0]['parameters']:,} | "
            f"{state_size(runs[0]):,} | {len(runs)} | {by_rate} | {mean(reached):.3f} | "
            f"{min(reached):.3f} – {max(reached):.3f} | {steps} |"
        )
    runs = [run for rates in cells.values() for tried in rates.values() for run in tried]
    print(f"\n{len(runs)} runs, {sum(run['cpu_seconds'] for run in runs) / 60:.0f} CPU-minutes of training")


def color(kernel):
    return f"C{list(KERNELS).index(kernel)}"


def add_legend(figure):
    """One for all panels, below them, where it covers no curve."""
    entries = {}
    for panel in figure.axes:
        entries |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels())}
    names = [name for name in KERNELS.values() if name in entries]
    figure.legend([entries[name] for name in names], names, loc="outside lower center", ncols=4, fontsize="small")


def plot_accuracy(cells, path):
    tasks = list(dict.fromkeys(cell[0] for cell in cells))
    figure = Figure(figsize=(6.5 * len(tasks), 4.5), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)
    bottom = max(0, min(run["accuracy"] for runs in cells.values() for run in runs) - 0.1)
    for panel, task in zip(panels[0], tasks):
        for offset, kernel in enumerate(KERNELS):
            found = [runs for cell, runs in cells.items() if (cell[0], cell[-1]) == (task, kernel)]
            if found:
                draw_seeds(panel, sorted(found, key=lambda runs: state_size(runs[0])), kernel, 1.04**offset)
        panel.axhline(1 / task[1], color="gray", linestyle="--")
        panel.set_xscale("log", base=2)
        panel.set_ylim(bottom, 1.02)
        panel.set_title(f"{describe(task, cells)} (guessing: {1 / task[1]:.3f})", fontsize="medium")
        panel.set_xlabel("numbers in a layer's state")
        panel.grid(alpha=0.3)
    add_legend(figure)
    panels[0][0].set_ylabel("recall accuracy: mean, every seed")
    figure.savefig(path, dpi=110)


def draw_seeds(panel, found, kernel, shift):
    """A line through the means, a bar from the lowest to the highest seed and a dash for each; found: [[run, …], …]."""
    # shifted, so that bars at states of one size stand side by side
    sizes = [state_size(runs[0]) * shift for runs in found]
    reached = [[run["accuracy"] for run in runs] for runs in found]
    middle = [mean(values) for values in reached]
    bars = [[m - min(v) for m, v in zip(middle, reached)], [max(v) - m for m, v in zip(middle, reached)]]
    panel.errorbar(sizes, middle, bars, marker="o", color=color(kernel), label=KERNELS[kernel])
    for size, values in zip(sizes, reached):
        panel.plot([size] * len(values), values, "_", color=color(kernel))


def plot_curves(cells, path):
    places = list(dict.fromkeys(cell[:3] for cell in cells))
    columns = min(2, len(places))
    rows = -(-len(places) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for panel in panels.flat[len(places) :]:
        panel.remove()
    for panel, place in zip(panels.flat, places):
        for (*where, kernel), runs in cells.items():
            if tuple(where) != place:
                continue
            curves = [dict(run["curve"]) for run in runs]
            steps = sorted(set.intersection(*map(set, curves)))
            by_step = [[curve[step] for curve in curves] for step in steps]
            panel.plot(steps, [mean(values) for values in by_step], color=color(kernel), label=KERNELS[kernel])
            panel.fill_between(
                steps,
                [min(v) for v in by_step],
                [max(v) for v in by_step],
                color=color(kernel),
                alpha=0.15,
                linewidth=0,
            )
        panel.set_title(f"width {place[1]}, feature_dim {place[2]}: {describe(place[0], cells)}", fontsize="small")
        panel.set_ylim(0, 1.02)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    add_legend(figure)
    for panel in panels[:, 0]:
        panel.set_ylabel("recall accuracy")
    figure.savefig(path, dpi=110)


def main():
    arguments = parse_arguments()
    cells = read_cells(arguments.results)
    best = at_best_rate(cells)
    folder = arguments.output_dir or arguments.results.parent
    plot_accuracy(best, folder / "recall_accuracy.png")
    plot_curves(best, folder / "recall_curves.png")
    print_table(cells)
    print(f"Pictures: {folder / 'recall_accuracy.png'}  {folder / 'recall_curves.png'}")


if __name__ == "__main__":
    main()
