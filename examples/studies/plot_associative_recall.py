# /// script
# dependencies = ["matplotlib"]
# ///
"""Draw the sweep of train_associative_recall.py: accuracy against width for each length, and the learning curves.

    python examples/studies/plot_associative_recall.py outputs/recall/results.jsonl

Of several learning rates each point shows the one with the best mean, as in the paper. Prints the table behind the plots.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean

import matplotlib


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
LEARNT = 0.9


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.jsonl of a sweep")
    parser.add_argument("--output_dir", type=Path, help="folder of the two pictures (default: that of the results)")
    arguments = parser.parse_args()
    if not arguments.results.is_file():
        parser.error(
            f"results: expected the results.jsonl of a sweep, got {arguments.results}, which does not exist; "
            "run train_associative_recall.py with --preset first"
        )
    return arguments


def read_cells(path):
    """Runs that differ in nothing but their seed, at the best learning rate: {(task, width, kernel): [run, …]}."""
    by_rate = defaultdict(list)
    for line in path.read_text().splitlines():
        run = json.loads(line)
        task = (run["seq_len"], run["num_pairs"], run["vocab_size"], run["max_steps"])
        by_rate[task, run["hidden_size"], run["kernel"], run["learning_rate"]].append(run)
    cells = {}
    for (*cell, _), runs in by_rate.items():
        best = cells.get(tuple(cell))
        if best is None or accuracy(runs) > accuracy(best):
            cells[tuple(cell)] = runs
    return dict(sorted(cells.items(), key=lambda item: (*item[0][:2], list(KERNELS).index(item[0][2]))))


def accuracy(runs):
    return mean(run["accuracy"] for run in runs)


def steps_to_learn(run):
    return next((step for step, reached in run["curve"] if reached >= LEARNT), None)


def describe(task):
    seq_len, num_pairs, vocab_size, max_steps = task
    return f"{num_pairs} pairs in {seq_len} tokens of {vocab_size}, {max_steps:,} steps"


def print_table(cells):
    print(
        f"| task | width | kernel | parameters | rate | seeds | accuracy | lowest – highest | steps to {LEARNT} by seed |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for (task, width, kernel), runs in cells.items():
        runs = sorted(runs, key=lambda run: run["seed"])
        reached = [run["accuracy"] for run in runs]
        steps = ", ".join(str(steps_to_learn(run) or "never") for run in runs)
        print(
            f"| {describe(task)} | {width} | {KERNELS[kernel]} | {runs[0]['parameters']:,} | {runs[0]['learning_rate']:g} | "
            f"{len(runs)} | {mean(reached):.3f} | {min(reached):.3f} – {max(reached):.3f} | {steps} |"
        )
    print(f"\n{sum(run['cpu_seconds'] for runs in cells.values() for run in runs) / 60:.0f} CPU-minutes of training")


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
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(task for task, _, _ in cells))
    figure, panels = pyplot.subplots(
        1, len(tasks), figsize=(4.5 * len(tasks), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, task in zip(panels[0], tasks):
        kernels = [kernel for kernel in KERNELS if any(cell[0] == task and cell[2] == kernel for cell in cells)]
        for offset, kernel in enumerate(kernels):
            widths = [cell[1] for cell in cells if cell[0] == task and cell[2] == kernel]
            reached = [[run["accuracy"] for run in cells[task, width, kernel]] for width in widths]
            middle = [mean(values) for values in reached]
            bars = [[m - min(v) for m, v in zip(middle, reached)], [max(v) - m for m, v in zip(middle, reached)]]
            # Apart by 2 %, so that bars at the same width do not cover one another.
            shifted = [width * 1.02 ** (offset - len(kernels) / 2) for width in widths]
            panel.errorbar(shifted, middle, bars, marker="o", capsize=3, color=color(kernel), label=KERNELS[kernel])
        panel.axhline(1 / task[1], color="gray", linestyle="--")
        widths = sorted({cell[1] for cell in cells if cell[0] == task})
        panel.set_xscale("log", base=2)
        panel.set_xticks(widths, [str(width) for width in widths])
        panel.set_ylim(0, 1.02)
        panel.set_title(describe(task), fontsize="medium")
        panel.set_xlabel("width of the model")
        panel.set_xlim(widths[0] / 1.3, widths[-1] * 1.3)
        panel.grid(alpha=0.3)
    add_legend(figure)
    panels[0][0].set_ylabel("recall accuracy: mean, lowest, highest seed\n(dashed: a value of the sequence at random)")
    figure.savefig(path, dpi=110)


def plot_curves(cells, path):
    from matplotlib import pyplot

    places = list(dict.fromkeys((task, width) for task, width, _ in cells))
    columns = min(3, len(places))
    rows = -(-len(places) // columns)
    figure, panels = pyplot.subplots(
        rows, columns, figsize=(4.2 * columns, 3.2 * rows), sharey=True, squeeze=False, layout="constrained"
    )
    for panel in panels.flat[len(places) :]:
        panel.remove()
    for panel, place in zip(panels.flat, places):
        for (task, width, kernel), runs in cells.items():
            if (task, width) != place:
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
        panel.set_title(f"width {place[1]}: {describe(place[0])}", fontsize="small")
        panel.set_ylim(0, 1.02)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    add_legend(figure)
    for panel in panels[:, 0]:
        panel.set_ylabel("recall accuracy")
    figure.savefig(path, dpi=110)


def main():
    arguments = parse_arguments()
    matplotlib.use("Agg")
    cells = read_cells(arguments.results)
    folder = arguments.output_dir or arguments.results.parent
    plot_accuracy(cells, folder / "recall_accuracy.png")
    plot_curves(cells, folder / "recall_curves.png")
    print_table(cells)
    print(f"Pictures: {folder / 'recall_accuracy.png'}  {folder / 'recall_curves.png'}")


if __name__ == "__main__":
    main()
