# /// script
# dependencies = [
#     "peft_bias_steer", "accelerate", "trl", "datasets", "math-verify", "matplotlib", "reasoning-gym", "scipy", "tensorboard"
# ]
# ///
"""
Bias vectors and other methods with GRPO: the same questions, the same number of steps, several seeds.

    python examples/studies/compare_methods.py --jobs 2

Each run is a process of train_methods.py with a folder of its own; a folder that holds a result.json is not run again, so
an interrupted comparison goes on where it was, and one with other settings is refused. Writes a table (.md), the numbers
(.json) and reward curves (.png).

Presets: league (all methods of grpo_methods.py, each at the best of its rates by one seed, measured on three others, and
accuracy against the number of parameters; and the base model with and without solved examples), beyond_prompts (bias vectors
beside prompts, on the tasks of search_tasks.py with some signal), in_steps (bias vectors where the answer is worked out step by
step), format_reward (bias vectors, rewarded for the form of the answer alone), out_of_reach (bias vectors on a task beyond the
model), gpu (eight times as many samples a step, three times as many steps, and two harder tasks; `--jobs 4` shares one card),
paper (the recipe of arXiv 2505.18706, for a GPU node; not run yet). What stands after `--` goes to train_methods.py. To see
whether a new seed lands where the others say it should:

    python examples/studies/compare_methods.py --methods bias --seeds 4 --reference docs/results_bias_steer.json
"""

import argparse
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib
from scipy import stats
from tqdm import tqdm


sys.path.append(str(Path(__file__).parents[1] / "shared"))
from grpo_methods import LEARNING_RATES, METHODS, PROMPTS, STEP_BY_STEP
from interrupts import last_checkpoint, record_settings
from intervals import mean_interval
from options import check_least, check_seeds


matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


TRAIN = Path(__file__).with_name("train_methods.py")
CONFIGS = Path(__file__).parents[1] / "peft_bias_steer" / "configs"
EVALUATION = ["--bf16", "--eval_size", "128", "--eval_samples", "1"]
# the base is evaluated once, and checkpoints of full fine-tuning are large
SHORT = ["--max_steps", "20", *EVALUATION, "--skip_eval_before", "--save_steps", "1000"]
WATCHED = [*SHORT, "--eval_steps", "10"]
LONG_ANSWERS = ["--max_completion_length", "24"]
ROOM_FOR_STEPS = ["--max_completion_length", "64"]
LARGE_BATCHES = ["--max_steps", "60", "--prompts_per_step", "16", "--num_generations", "16"]
LARGE_BATCHES += ["--gradient_accumulation_steps", "2", *EVALUATION, *LONG_ANSWERS]
BASE_ALONE: dict[str, list[str]] = {"base": []}
BASE = {
    **BASE_ALONE,
    "base, 4 examples (number)": ["--few_shot", "4"],
    "base, 4 examples (equation)": ["--few_shot", "4", "--few_shot_answer", "{expression} = {answer}"],
}


@dataclass
class Preset:
    """
    What is run: `methods` × rates × `seeds` × `tasks`, each with `arguments`; before that, the base models. If there is a
    `choosing_seed`, it decides on each method's rate, and the `seeds` are run at that one.
    """

    methods: list[str]
    seeds: list[int]
    tasks: list[str]
    rates: dict[str, list[float]]
    arguments: list[str]
    base: dict[str, list[str]] = field(default_factory=dict)
    base_arguments: list[str] = field(default_factory=list)
    note: str = ""
    choosing_seed: int | None = None
    model: str = "outputs/SmolLM2-135M-Instruct"
    launch: list[str] = field(default_factory=lambda: [sys.executable])


BEST = {name: [rate] for name, rate in LEARNING_RATES.items()}
ARITHMETIC = ["basic_arithmetic"]
# Where search_tasks.py found two of 32 samples or more to be right after the question alone, on one machine or another;
# besides arithmetic.
WITH_SIGNAL = [
    "self_reference",
    "syllogism",
    "gcd",
    "letter_counting",
    "aiw",
    "calendar_arithmetic",
    "course_schedule",
]
PRESETS = {
    "league": Preset(
        [name for name in METHODS if name != "lora"],
        [1, 2, 3],
        ARITHMETIC,
        {name: method.rates for name, method in METHODS.items()},
        SHORT,
        BASE,
        EVALUATION,
        choosing_seed=0,
    ),
    "beyond_prompts": Preset(
        ["bias"],
        [0, 1, 2],
        WITH_SIGNAL,
        BEST,
        [*WATCHED, "--max_completion_length", "16"],
        {f"base, {kind}": options for kind, options in PROMPTS.items()},
        [*EVALUATION, "--max_completion_length", "16"],
    ),
    "in_steps": Preset(
        ["bias"],
        [0, 1, 2],
        [*ARITHMETIC, "three_numbers"],
        BEST,
        [*WATCHED, *ROOM_FOR_STEPS, *STEP_BY_STEP["step by step"]],
        {
            **{f"base, {kind}": options for kind, options in {"question": [], **STEP_BY_STEP}.items()},
            "base, 4 examples (equation)": BASE["base, 4 examples (equation)"],
        },
        [*EVALUATION, *ROOM_FOR_STEPS],
        note="step by step",
    ),
    "format_reward": Preset(
        ["bias"], [0], ARITHMETIC, BEST, [*WATCHED, "--reward", "formatted"], note="reward for the form alone"
    ),
    "out_of_reach": Preset(
        ["bias"],
        [0],
        ["four_digit_products"],
        BEST,
        [*WATCHED, *LONG_ANSWERS],
        BASE_ALONE,
        [*EVALUATION, *LONG_ANSWERS],
    ),
    "gpu": Preset(
        ["bias", "lora"],
        [0, 1],
        [*ARITHMETIC, "two_digit_sums", "two_digit_products"],
        BEST,
        [*LARGE_BATCHES, "--eval_steps", "20", "--skip_eval_before", "--save_steps", "1000"],
        BASE_ALONE,
        [*EVALUATION, *LONG_ANSWERS],
    ),
    "paper": Preset(
        ["bias", "lora", "full"],
        [0],
        ["gsm8k", "math", "deepscaler"],
        {"bias": [1e-3], "lora": [1e-4], "full": [1e-6]},
        [
            *("--max_steps", "314", "--warmup_ratio", "0.03", "--prompts_per_step", "128", "--num_generations", "16"),
            *("--gradient_accumulation_steps", "16", "--gradient_checkpointing", "--max_completion_length", "3072"),
            *("--eval_size", "500", "--eval_samples", "4", "--eval_steps", "50", "--skip_eval_before"),
        ],
        BASE_ALONE,
        ["--eval_size", "500", "--eval_samples", "4", "--max_completion_length", "3072"],
        model="Qwen/Qwen2.5-Math-1.5B",
        launch=["accelerate", "launch", "--config_file", str(CONFIGS / "ddp.yaml")],
    ),
}


@dataclass
class Run:
    """One process of train_methods.py; done once its folder holds a result.json. Its log lies beside the folder."""

    label: str
    task: str
    folder: Path
    arguments: list[str]
    method: str | None = None
    rate: float | None = None
    seed: int = 0

    @property
    def result(self) -> dict:
        return json.loads((self.folder / "result.json").read_text())

    @property
    def is_done(self) -> bool:
        return (self.folder / "result.json").exists()

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def settings(self) -> dict[str, list[str]]:
        """The arguments, by the option that they belong to."""
        found: dict[str, list[str]] = {}
        for argument in self.arguments:
            if argument.startswith("--"):
                values = found[argument.removeprefix("--")] = []
            else:
                values.append(argument)
        return found


def file_name(task: str) -> str:
    """Of a task, which may be an id of the hub or a folder."""
    return re.sub(r"[^\w.-]+", "_", task).strip("_.")


def list_runs(preset: Preset, output_dir: Path, extra: list[str]) -> list[Run]:
    runs = []
    for task in preset.tasks:
        folder = output_dir / Path(preset.model).name / file_name(task)
        always = ["--model", preset.model, "--task", task]
        for label, options in preset.base.items():
            name = label.translate(str.maketrans(" ", "_", ",()"))
            arguments = [*always, *preset.base_arguments, *options, *extra, "--max_steps", "0"]
            runs.append(Run(label, task, folder / name, arguments))
        for seed in preset.seeds:
            for method in preset.methods:
                for rate in preset.rates[method]:
                    arguments = [*always, "--method", method, "--learning_rate", str(rate), "--seed", str(seed)]
                    arguments += [*preset.arguments, *extra]
                    note = f"-{preset.note.replace(' ', '_')}" if preset.note else ""
                    label = METHODS[method].label + (f", {preset.note}" if preset.note else "")
                    path = folder / f"{method}-lr{rate:g}-seed{seed}{note}"
                    runs.append(Run(label, task, path, arguments, method, rate, seed))
    return runs


def carry_out(run: Run, launch: list[str], environment: dict[str, str]) -> None:
    """Raises `RuntimeError` if the process fails. The bulky weights of full fine-tuning are deleted once evaluated."""
    command = [*launch, str(TRAIN), "--output_dir", str(run.folder), *run.arguments]
    if last_checkpoint(run.folder):
        command.append("--resume_from_checkpoint")
    with run.log.open("w") as log:
        code = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    if code or not run.is_done:
        lines = run.log.read_text().splitlines() or ["it printed nothing"]
        raise RuntimeError(f"{shlex.join(command)} ended with {code}, see {run.log}: {lines[-1]}")
    if run.method == "full":
        for file in (run.folder / "model").glob("*.safetensors"):
            file.unlink()
    for folder in run.folder.glob("checkpoint-*"):
        shutil.rmtree(folder)


def carry_out_all(runs: list[Run], launch: list[str], jobs: int) -> None:
    """Runs what is not done, `jobs` at a time; the first failure ends the program once the running ones are done."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # spinning OpenMP threads make a busy small machine many times slower, and a sixth of a step on a CPU went into memory
    # that glibc gives back after every tensor
    tuned = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    tuned |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
    environment = {**tuned, **os.environ}
    failed = threading.Event()

    def work(run: Run) -> None:
        if failed.is_set():
            return
        try:
            carry_out(run, launch, environment)
        except RuntimeError:
            failed.set()
            raise

    for run in runs:
        record_settings(run.folder, run.settings)
    todo = [run for run in runs if not run.is_done]
    bar = tqdm(total=len(runs), initial=len(runs) - len(todo), desc="runs", unit="run")
    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(work, run) for run in todo]:
            try:
                future.result()
            except RuntimeError as error:
                raise SystemExit(str(error)) from None
            bar.update()
    bar.close()


def carried_out(presets: list[Preset], args: argparse.Namespace, extra: list[str]) -> list[Run]:
    """The finished runs of all presets: all runs, unless only those that are there are wanted."""
    runs = [run for preset in presets for run in list_runs(preset, args.output_dir, extra)]
    if args.only_finished:
        runs = [run for run in runs if run.is_done]
    carry_out_all(runs, presets[0].launch, args.jobs)
    return runs


def best_rates(rows: list[dict]) -> dict[str, list[float]]:
    """Of each method, the rate with the most right answers; of several, the lowest."""
    best = {}
    for row in sorted(rows, key=lambda row: (row["accuracy"], -row["learning_rate"])):
        best[row["method"]] = [row["learning_rate"]]
    return best


def prediction_intervals(rows: list[list[float]]) -> list[tuple[float, float] | None]:
    """
    Where one more seed of each row lies with 95 % probability or more, if seeds are normally distributed: the wider of the
    interval from its own seeds, which says too little where two or three happen to agree, and of that from the variance of
    all rows, which says too little of a row whose seeds differ more than others'. None for one seed.
    """
    several = [values for values in rows if len(values) > 1]
    freedom = sum(len(values) - 1 for values in several)
    pooled = (sum((len(values) - 1) * statistics.variance(values) for values in several) / max(1, freedom)) ** 0.5
    found: list[tuple[float, float] | None] = [None] * len(rows)
    for place, values in enumerate(rows):
        if len(values) > 1:
            estimates = (len(values) - 1, statistics.stdev(values)), (freedom, pooled)
            widest = max(float(stats.t.ppf(0.975, degrees)) * deviation for degrees, deviation in estimates)
            half, mean = widest * (1 + 1 / len(values)) ** 0.5, statistics.mean(values)
            found[place] = max(0.0, mean - half), min(1.0, mean + half)
    return found


def summarize(runs: list[Run]) -> list[dict]:
    """One entry for each base model, and for each method and rate over its seeds, in the order of the runs."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.task, run.label, run.rate), []).append(run)
    rows = []
    for (task, label, rate), members in groups.items():
        results = [run.result for run in members]
        scores = [result["after"] if members[0].method else result["before"] for result in results]
        accuracies = [score["greedy"]["accuracy"] for score in scores]
        row = {
            "task": task,
            "label": label,
            "method": members[0].method,
            "learning_rate": rate,
            "seeds": [run.seed for run in members],
            "accuracies": accuracies,
            "accuracy": statistics.mean(accuracies),
            "interval": scores[0]["greedy"]["interval"],
            "sampled_accuracies": [score["sampled"]["accuracy"] for score in scores],
        }
        row["sampled_accuracy"] = statistics.mean(row["sampled_accuracies"])
        for key in ("format_rate", "unparsable", "exact_string", "finished", "most_frequent"):
            row[key] = statistics.mean(score["greedy"][key] for score in scores)
        right = sum(
            s["greedy"]["accuracy_when_formatted"] * s["greedy"]["format_rate"]
            for s in scores
            if s["greedy"]["format_rate"]
        )
        row["accuracy_when_formatted"] = right / (len(scores) * row["format_rate"]) if row["format_rate"] else None
        if members[0].method:
            row["rewards"] = [result["rewards"] for result in results]
            row["during"] = [result["during"] for result in results]
            row["no_signal_warnings"] = sum(bool(result["no_signal_warning"]) for result in results)
            for key in ("trainable_parameters", "optimizer_bytes", "file_bytes"):
                row[key] = results[0][key]
            row["peak_memory_bytes"] = max(result["peak_memory_bytes"] for result in results)
            for key in ("seconds_per_step", "cpu_seconds_per_step", "cpu_seconds_sampling"):
                # A run that was resumed after its last step has none.
                seconds = [result[key] for result in results if result[key] is not None]
                row[key] = statistics.median(seconds) if seconds else None
        rows.append(row)
    for task in {row["task"] for row in rows}:
        of_task = [row for row in rows if row["task"] == task]
        for row, interval in zip(of_task, prediction_intervals([row["accuracies"] for row in of_task])):
            row["next_seed"] = interval
    return rows


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def between(pair: list[float] | tuple[float, float] | None) -> str:
    return "–" if pair is None else f"{pair[0]:.1%} to {pair[1]:.1%}"


def with_interval(row: dict) -> str:
    """The mean of the seeds and each; for one seed, its Wilson interval."""
    several = ", ".join(map(percent, row["accuracies"])) if len(row["seeds"]) > 1 else between(row["interval"])
    return f"{percent(row['accuracy'])} ({several})"


def accuracy_table(rows: list[dict]) -> str:
    lines = [
        "| trained | rate | seeds | right, greedy | each seed | another seed (95 %) | right, sampled | in form | "
        "right if in form | unparsable |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        trained = row["method"] is not None
        cells = [
            row["label"],
            f"{row['learning_rate']:g}" if trained else "–",
            str(len(row["seeds"])) if trained else "–",
            percent(row["accuracy"]) + ("" if len(row["seeds"]) > 1 else f" ({between(row['interval'])})"),
            ", ".join(map(percent, row["accuracies"])) if trained else "–",
            between(row["next_seed"]),
            percent(row["sampled_accuracy"]),
            percent(row["format_rate"]),
            percent(row["accuracy_when_formatted"]),
            f"{row['unparsable']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cost_table(rows: list[dict]) -> str:
    lines = [
        "| trained | parameters | optimizer, bytes | file, bytes | peak memory, MiB | CPU seconds per step | to sample |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["method"] is not None:
            cells = [row["label"], *(f"{row[k]:,}" for k in ("trainable_parameters", "optimizer_bytes", "file_bytes"))]
            cells.append(f"{row['peak_memory_bytes'] / 2**20:,.0f}")
            cells += [
                "–" if row[k] is None else f"{row[k]:.1f}" for k in ("cpu_seconds_per_step", "cpu_seconds_sampling")
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def task_table(rows: list[dict]) -> str:
    """Of each task, the best prompt, the answer that is right most often, and what each method reaches."""
    methods = list(dict.fromkeys(row["label"] for row in rows if row["method"]))
    lines = [f"| task | most frequent answer | best prompt | its answers right | {' | '.join(methods)} |"]
    lines.append("|---" * (len(methods) + 4) + "|")
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        best = max((row for row in of_task if not row["method"]), key=lambda row: row["accuracy"], default=None)
        prompt = ["–", "–"] if best is None else [best["label"].removeprefix("base, "), with_interval(best)]
        trained = {row["label"]: with_interval(row) for row in of_task if row["method"]}
        cells = [task, percent(of_task[0]["most_frequent"]), *prompt, *(trained.get(label, "–") for label in methods)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rate_table(rows: list[dict]) -> str:
    """What one seed reaches at each rate."""
    of_label: dict[str, list[dict]] = {}
    for row in rows:
        of_label.setdefault(row["label"], []).append(row)
    columns = max(map(len, of_label.values()))
    lines = [
        f"| trained, seed {rows[0]['seeds'][0]} |" + " rate: right, greedy |" * columns,
        "|---" * (columns + 1) + "|",
    ]
    for label, members in of_label.items():
        cells = [f"{row['learning_rate']:g}: {percent(row['accuracy'])}" for row in members]
        lines.append(f"| {' | '.join([label, *cells, *['–'] * (columns - len(cells))])} |")
    return "\n".join(lines)


def plot_sizes(rows: list[dict], path: Path) -> None:
    """
    Held-out accuracy against the number of trained parameters: each seed, and the mean with its 95 % interval. Methods of the
    same size stand side by side.
    """
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    trained = [row for row in rows if row["method"] is not None]
    for index, row in enumerate(trained):
        size, seeds = row["trainable_parameters"], row["accuracies"]
        equals = [other["label"] for other in trained if other["trainable_parameters"] == size]
        size *= 1.3 ** (equals.index(row["label"]) - (len(equals) - 1) / 2)
        error = mean_interval(seeds)
        style: Any = {"color": f"C{index % 10}", "marker": "os^"[index // 10], "label": row["label"]}
        axes.errorbar(size, row["accuracy"], yerr=error, capsize=3, **style)
        axes.plot([size] * len(seeds), seeds, ".", color=style["color"], alpha=0.5)
    for row, style in zip([row for row in rows if row["method"] is None], ("-", "--", ":", "-.")):
        axes.axhline(row["accuracy"], color="grey", linestyle=style, label=row["label"])
        axes.axhspan(*row["interval"], color="grey", alpha=0.1, linewidth=0)
    axes.set(xscale="log", xlabel="trained parameters", ylabel="right, greedy", ylim=(0, 1), title=rows[0]["task"])
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot(rows: list[dict], path: Path) -> None:
    """Reward of each step, mean over the seeds and their range; held-out accuracies as points."""
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    trained = [row for row in rows if row["method"] is not None]
    for index, row in enumerate(trained):
        color = f"C{index}"
        curves = [list(values) for values in zip(*row["rewards"])]
        steps = range(1, len(curves) + 1)
        several_rates = sum(other["label"] == row["label"] for other in trained) > 1
        label = f"{row['label']}, rate {row['learning_rate']:g}" if several_rates else row["label"]
        axes.plot(steps, [statistics.mean(values) for values in curves], color=color, label=label)
        axes.fill_between(steps, list(map(min, curves)), list(map(max, curves)), color=color, alpha=0.15)
        for accuracy in row["accuracies"]:
            axes.plot(len(curves) + 0.6, accuracy, "o", color=color, markersize=4)
        for entry in (entry for during in row["during"] for entry in during):
            axes.plot(entry["step"], entry["accuracy"], "o", color=color, markersize=4)
    for row, style in zip([row for row in rows if row["method"] is None], ("-", "--", ":")):
        axes.axhline(row["accuracy"], color="grey", linestyle=style, label=row["label"])
    axes.set(xlabel="step", ylabel="reward (dots: held out, greedy)", ylim=(0, 1), title=rows[0]["task"])
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def check_against(reference: Path, rows: list[dict]) -> None:
    """Says of each accuracy whether it lies where the reference's seeds let it be expected."""
    expected = {(row["task"], row["label"], row["learning_rate"]): row for row in json.loads(reference.read_text())}
    for row in rows:
        other = expected.get((row["task"], row["label"], row["learning_rate"]))
        if other is None or other["next_seed"] is None:
            continue
        low, high = other["next_seed"]
        for seed, accuracy in zip(row["seeds"], row["accuracies"]):
            verdict = "within" if low <= accuracy <= high else "OUTSIDE"
            print(f"{row['label']}, seed {seed}: {accuracy:.1%}, {verdict} {between(other['next_seed'])}")


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="league", help="what to run (%(default)s)")
    parser.add_argument("--model", help="another model than the preset's")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="only these of the preset")
    parser.add_argument("--seeds", nargs="+", type=int, help="these instead of the preset's")
    parser.add_argument("--tasks", nargs="+", help="these instead of the preset's (see train_methods.py --task)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (%(default)s)")
    parser.add_argument("--only_finished", action="store_true", help="run nothing, put together what is there")
    parser.add_argument("--output_dir", type=Path, help="where everything is written (outputs/compare_PRESET)")
    parser.add_argument(
        "--reference", type=Path, help=".json of an earlier comparison: does it foresee these results?"
    )
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    args = parser.parse_args(own)
    check_least(parser, args, jobs=1)
    if args.seeds:
        check_seeds(parser, args.seeds)
    rates = PRESETS[args.preset].rates
    if unknown := set(args.methods or ()) - rates.keys():
        parser.error(f"--methods: --preset {args.preset} has rates for {', '.join(rates)}, got {', '.join(unknown)}")
    if args.reference and not args.reference.is_file():
        parser.error(f"--reference: expected the .json of an earlier comparison, got {args.reference}")
    args.output_dir = args.output_dir or Path(f"outputs/compare_{args.preset}")
    extra = sys.argv[len(own) + 2 :]
    if "--output_dir" in extra or ("--max_steps", "0") in zip(extra, extra[1:]):
        parser.error(f"after --: each run trains, in a folder of its own, got {shlex.join(extra)}")
    return args, extra


def main() -> None:
    args, extra = parse_arguments()
    preset = PRESETS[args.preset]
    for name in ("model", "methods", "seeds", "tasks"):
        if getattr(args, name) is not None:
            setattr(preset, name, getattr(args, name))
    stem = args.output_dir / Path(preset.model).name / args.preset
    page, rows = [f"`{shlex.join(['python', *sys.argv])}`"], []
    parts = [replace(preset, tasks=[task]) for task in preset.tasks]
    tried = []
    if preset.choosing_seed is not None:
        tried = summarize(carried_out([replace(preset, seeds=[preset.choosing_seed], base={})], args, extra))
        for part in parts:
            part.rates = best_rates([row for row in tried if row["task"] in part.tasks])
            part.methods = [method for method in part.methods if method in part.rates]
    finished = carried_out(parts, args, extra)
    for task in preset.tasks:
        of_task = summarize([run for run in finished if run.task == task])
        if not of_task:
            continue
        rows += of_task
        page += [f"## {task}", accuracy_table(of_task), cost_table(of_task)]
        if at_rates := [row for row in tried if row["task"] == task]:
            page.append(rate_table(at_rates))
        draw = plot if preset.choosing_seed is None else plot_sizes
        draw(of_task, stem.with_name(f"{args.preset}_{file_name(task)}.png"))
    if len(preset.tasks) > 1:
        page.insert(1, task_table(rows))
    if not rows:
        raise SystemExit(f"--only_finished found no finished run of {args.preset} in {args.output_dir}")
    text = "\n\n".join(page)
    print(text)
    stem.with_suffix(".md").write_text(text + "\n")
    stem.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    if args.reference:
        check_against(args.reference, rows)


if __name__ == "__main__":
    main()
