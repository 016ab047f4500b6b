# /// script
# dependencies = ["hf_hierarchical_sae", "accelerate", "matplotlib", "sae-lens>=6.54"]
# ///
"""
Dictionaries beside the truth: HierarchicalTopK against TopK, BatchTopK and Matryoshka, one of these for each budget, on
activations whose features are known. One dictionary for all budgets is read at each by its k strongest latents and by a
threshold, as one for the largest budget is; BatchTopK has a threshold, as a JumpReLU. The data are SynthSAEBench's (arXiv 2602.14687, `sae_lens.synthetic`): features with
Zipf frequencies, a hierarchy and correlations; the judge is SAELens' `eval_sae_on_synthetic_data`.

    python examples/studies/synthetic_benchmark.py --preset hour

`hour` has an eighth of the benchmark's features and is for two CPU cores; `paper` has its sizes (16,384 features, 4,096
latents, 200M samples) and is for a GPU. Each seed is another generator as well as other weights. An interrupted run goes on
where it stopped if the same command is given again, which also adds seeds.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from sae_lens.synthetic import eval_sae_on_synthetic_data
from sae_lens.synthetic.firing_magnitudes import FoldedNormalMagnitudeConfig, LinearMagnitudeConfig
from sae_lens.synthetic.firing_probabilities import ZipfianFiringProbabilityConfig
from sae_lens.synthetic.hierarchy import HierarchyConfig
from sae_lens.synthetic.synthetic_model import (
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
)
from safetensors.torch import load_file, save_file
from torch.utils.data import IterableDataset
from tqdm import tqdm
from transformers import Trainer, set_seed

from hf_hierarchical_sae import HierarchicalSaeConfig, HierarchicalSaeModel, select_by_threshold
from hf_hierarchical_sae.training import last_checkpoint, training_arguments
from hf_hierarchical_sae.whole_files import whole_file


sys.path.append(str(Path(__file__).parents[1] / "shared"))
from dictionaries import AtBudget, folder_name, interval
from interrupts import record_settings, train_from
from options import check_least, check_seeds


PRESETS = {
    "hour": {
        "features": 2048,
        "roots": 16,
        "d_in": 256,
        "d_sae": 512,
        "batch_size": 1024,
        "steps": 1500,
        "save_steps": 500,
        "learning_rate": 3e-3,
        "eval_samples": 20_480,
        "budgets": [5, 10, 15],
        "k": 40,
    },
    "paper": {
        "features": 16_384,
        "roots": 128,
        "d_in": 768,
        "d_sae": 4096,
        "batch_size": 1024,
        "steps": 195_312,
        "save_steps": 10_000,
        "learning_rate": 3e-4,
        "eval_samples": 100_352,
        "budgets": [15, 20, 25, 30, 35],
        "k": 80,
    },
}
# Samples are kept for the next dictionary if all of them take no more than this many bytes.
KEPT_BYTES = 2**31
# What thresholds are read from.
THRESHOLD_BATCHES = 16
MEASURES = {"f1": "F1", "mcc": "MCC", "explained_variance": "explained variance", "uniqueness": "uniqueness"}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="hour", help="sizes, see above (hour)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data, weights and order (0 1 2)")
    parser.add_argument(
        "--check", type=int, metavar="SEED", help="one more seed, held against the intervals of two others or more"
    )
    parser.add_argument("--objectives", nargs="+", metavar="NAME", help="train those alone whose names start so (all)")
    parser.add_argument("--learning_rate", type=float, help="another peak than the preset's")
    parser.add_argument("--steps", type=int, help="another number of steps than the preset's")
    parser.add_argument("--output_dir", type=Path, help="where everything is written (outputs/synthetic_PRESET)")
    arguments = parser.parse_args()
    given = {name: value for name in ("learning_rate", "steps") if (value := getattr(arguments, name)) is not None}
    least = {"learning_rate": 0.0, "steps": THRESHOLD_BATCHES}
    check_least(parser, arguments, **{name: least[name] for name in given})
    if arguments.check is not None and len(arguments.seeds) < 2:
        parser.error(f"--check needs at least 2 --seeds for an interval, got {len(arguments.seeds)}")
    check_seeds(parser, [*arguments.seeds, *([] if arguments.check is None else [arguments.check])])
    arguments.settings = PRESETS[arguments.preset] | given
    arguments.output_dir = arguments.output_dir or Path("outputs") / f"synthetic_{arguments.preset}"
    names = objectives(arguments.settings)
    wanted = tuple(arguments.objectives or [""])
    arguments.chosen = {name: options for name, options in names.items() if name.startswith(wanted)}
    if not arguments.chosen:
        parser.error(f"--objectives must begin one of {', '.join(names)}, got {' '.join(wanted)}")
    return arguments


def objectives(settings):
    """Options of `HierarchicalSaeConfig` by name of the objective."""
    k, d_sae = settings["k"], settings["d_sae"]
    powers = sorted({*(2**power for power in range(k.bit_length())), k})
    prefixes = {"matryoshka_prefixes": [d_sae // 16, d_sae // 8, d_sae // 4, d_sae // 2, d_sae]}
    found = {
        "HierarchicalTopK": {"k": k},
        "HierarchicalTopK, powers of two": {"k": k, "budgets": powers},
        "HierarchicalTopK, prefixes": {"k": k, **prefixes},
        "HierarchicalTopK, powers of two, prefixes": {"k": k, "budgets": powers, **prefixes},
        f"HierarchicalTopK to {k // 2}, prefixes": {"k": k // 2, **prefixes},
    }
    # One dictionary for each budget, and one for the largest, which a threshold reads at the others.
    for budget in (k, *settings["budgets"]):
        batch = {"k": budget, "budgets": [budget], "selection": "batch_topk"}
        kinds = {
            "TopK": {"k": budget, "budgets": [budget]},
            "BatchTopK": batch,
            "Matryoshka BatchTopK": {**batch, **prefixes},
        }
        found |= {f"{kind} {'of' if budget == k else '-'} {budget}": options for kind, options in kinds.items()}
    return {name.replace(" - ", "-"): options for name, options in found.items()}


class Truth(NamedTuple):
    """A generator of SAELens and the seed that its samples start from."""

    model: SyntheticModel
    seed: int

    def features(self, batch_size, number):
        """(batch, features): what fires in the batch of this number, always the same."""
        torch.manual_seed(self.seed * 1_000_003 + number)
        return self.model.activation_generator.sample(batch_size)


def make_truth(settings, seed, device):
    # The benchmark's second version, with its seed for the first of ours.
    config = SyntheticModelConfig(
        num_features=settings["features"],
        hidden_dim=settings["d_in"],
        firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
        hierarchy=HierarchyConfig(
            total_root_nodes=settings["roots"],
            branching_factor=4,
            max_depth=3,
            mutually_exclusive_portion=1.0,
            compensate_probabilities=True,
            scale_children_by_parent=True,
        ),
        orthogonalization=OrthogonalizationConfig(num_steps=100, lr=3e-4),
        correlation=LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
        mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
        std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        bias=0.5,
        seed=42 + seed,
    )
    return Truth(SyntheticModel(config, device=device), seed)


class Batches(IterableDataset):
    """Whole batches of activations from `start` on, made anew or, if they were kept, from memory."""

    def __init__(self, truth, settings, start=0, kept=None):
        self.truth, self.settings, self.start, self.kept = truth, settings, start, kept

    def batch(self, number):
        if self.kept is not None:
            return self.kept[number]
        with torch.random.fork_rng(), torch.no_grad():
            return self.truth.model.feature_dict(self.truth.features(self.settings["batch_size"], number))

    def __iter__(self):
        for number in range(self.start, self.settings["steps"]):
            yield {"hidden_states": self.batch(number)}


def keep_batches(truth, settings, folder):
    """(steps, batch, d_in) in memory and on disk, if they fit."""
    sizes = settings["steps"], settings["batch_size"], settings["d_in"]
    if 4 * sizes[0] * sizes[1] * sizes[2] > KEPT_BYTES:
        return None
    folder.mkdir(exist_ok=True)
    path = folder / "batches.safetensors"
    if not path.exists():
        made = Batches(truth, settings)
        batches = [made.batch(number).cpu() for number in tqdm(range(sizes[0]), desc="sample", unit="batch")]
        with whole_file(path) as unfinished:
            save_file({"batches": torch.stack(batches)}, unfinished)
    return load_file(path)["batches"]


def train(options, settings, batches, seed, folder):
    set_seed(seed)
    sae = HierarchicalSaeModel(HierarchicalSaeConfig(d_in=settings["d_in"], d_sae=settings["d_sae"], **options))
    sae.initialize_from_activations(torch.cat([batches.batch(number).cpu() for number in range(4)]))
    training = training_arguments(
        folder,
        max_steps=settings["steps"],
        batch_size=1,
        learning_rate=settings["learning_rate"],
        save_steps=settings["save_steps"],
        seed=seed,
        ignore_data_skip=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        logging_strategy="no",
    )
    checkpoint = last_checkpoint(folder)
    batches.start = int(checkpoint.rpartition("-")[2]) if checkpoint else 0
    trainer = Trainer(model=sae, args=training, train_dataset=batches, data_collator=lambda items: items[0])
    train_from(trainer, checkpoint)
    sae.fold_input_scale()
    return sae.eval()


def judge(sae, truth, settings):
    """SAELens' numbers with as many latents as `sae.config.k`, always on the same samples, none of which were trained on."""
    torch.manual_seed(truth.seed + 10**9)
    result = eval_sae_on_synthetic_data(
        AtBudget(sae, sae.config.k),  # ty: ignore[invalid-argument-type]
        truth.model.feature_dict,
        truth.model.activation_generator,
        num_samples=settings["eval_samples"],
        batch_size=settings["batch_size"],
    )
    return {
        "f1": result.classification.f1_score,
        "mcc": result.mcc,
        "explained_variance": result.explained_variance,
        "uniqueness": result.uniqueness,
        "latents": result.sae_l0,
        "dead": result.dead_latents / settings["d_sae"],
        "true_latents": result.true_l0,
    }


def readings(name, folder, settings, batches):
    """Row of the tables, budget and autoencoder: one of its own budget, or one at each with its k strongest or by a threshold."""
    sae = HierarchicalSaeModel.from_pretrained(folder).to(batches.truth.model.device)
    if family(name) != name:
        yield name, sae.config.k, sae
        return
    sample = torch.cat([batches.batch(number) for number in range(THRESHOLD_BATCHES)])
    for budget in settings["budgets"]:
        yield f"{name}, by threshold", budget, select_by_threshold(sae, sample, budget)
    for budget in settings["budgets"] if sae.config.has_budgets else []:
        sae.config.k = budget
        yield name, budget, sae


def run(name, options, settings, batches, seed, output):
    """Train and judge, or read what an earlier run found: numbers by row and budget."""
    folder = output / folder_name(name) / f"seed{seed}"
    result = folder / "result.json"
    if not result.exists():
        if not (folder / "model.safetensors").exists():
            train(options, settings, batches, seed, folder).save_pretrained(folder)
        found = {}
        for row, budget, sae in readings(name, folder, settings, batches):
            numbers = found.setdefault(row, {})[budget] = judge(sae, batches.truth, settings)
            shown = ", ".join(f"{title} {numbers[measure]:.3f}" for measure, title in MEASURES.items())
            print(f"{row}, seed {seed}, at {budget}: {shown}", flush=True)
        with whole_file(result) as unfinished:
            unfinished.write_text(json.dumps(found, indent=2) + "\n")
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    found = json.loads(result.read_text())
    return {row: {int(budget): numbers for budget, numbers in at.items()} for row, at in found.items()}


def family(name):
    """A kind of dictionary, of which there is one for each budget or one for all."""
    kind, _, k = name.rpartition("-")
    return kind if k.isdigit() else name


def curves(results, measure):
    """(budget, mean, half width) of each kind, from the dictionary of that budget or the one of all."""
    found = {}
    for name, runs in results.items():
        kind = family(name)
        budgets = runs[0] if kind == name else [int(name.rpartition("-")[2])]
        for budget in budgets:
            found.setdefault(kind, []).append((budget, *interval([one[budget][measure] for one in runs])))
    return found


def table(results, budgets, measure):
    lines = [
        f"| {MEASURES[measure]} | dictionaries | " + " | ".join(f"at {budget}" for budget in budgets) + " |",
        "|---" * (len(budgets) + 2) + "|",
    ]
    for kind, points in curves(results, measure).items():
        count = sum(family(name) == kind for name in results)
        cells = {
            budget: f"{mean:.3f}" + ("" if width is None else f" ± {width:.3f}") for budget, mean, width in points
        }
        lines.append(f"| {kind} | {count} | " + " | ".join(cells.get(budget, "–") for budget in budgets) + " |")
    return "\n".join(lines)


def inside_intervals(results, checked, seed):
    """How many numbers of another seed are where the intervals say, and which are not."""
    outside, count = [], 0
    for name, found in checked.items():
        for budget, numbers in found.items():
            for measure in MEASURES:
                mean, width = interval([run[budget][measure] for run in results[name]])
                count += 1
                if abs(numbers[measure] - mean) > width:
                    outside.append(f"{name} at {budget}: {MEASURES[measure]} {numbers[measure]:.3f}")
    rest = f"; outside are {'; '.join(outside)}" if outside else ""
    return f"Of {count} numbers of seed {seed}, {count - len(outside)} lie in the intervals of the others{rest}."


def plot(results, path):
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    separate = {family(name) for name in results if family(name) != name}
    figure = Figure(figsize=(14, 7), layout="constrained")
    axes = dict(zip(["f1", "mcc", "explained_variance"], figure.subplots(1, 3)))
    for measure, part in axes.items():
        colors = {}
        for place, (kind, points) in enumerate(curves(results, measure).items()):
            budgets, means, widths = zip(*points)
            widths = None if widths[0] is None else widths
            # Beside one another: intervals of the same budget would hide each other.
            shifted = [budget * 1.01**place for budget in budgets]
            dictionary = kind.removesuffix(", by threshold")
            form = {"fmt": "s:" if dictionary in separate else "o-" if dictionary == kind else "o--", "label": kind}
            form["color"] = colors.setdefault(dictionary, colormaps["tab20"](len(colors)))
            part.errorbar(shifted, means, widths, **form, markersize=4, capsize=2, linewidth=1.2)
        part.set(xlabel="latents per input", ylabel=MEASURES[measure])
        part.set_xscale("log", base=2)
        part.set_xticks(budgets, [str(budget) for budget in budgets])
        part.grid(alpha=0.3)
    figure.legend(*axes["f1"].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=150)


def main():
    arguments = parse_arguments()
    settings, output = arguments.settings, arguments.output_dir
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record_settings(output, settings)
    results = {}
    for seed in [*arguments.seeds, *([] if arguments.check is None else [arguments.check])]:
        folders = [output / place / f"seed{seed}" / "result.json" for place in map(folder_name, arguments.chosen)]
        truth = kept = None
        if not all(folder.exists() for folder in folders):
            truth = make_truth(settings, seed, device)
            kept = keep_batches(truth, settings, output / f"data{seed}")
        for name, options in arguments.chosen.items():
            found = run(name, options, settings, Batches(truth, settings, kept=kept), seed, output)
            for row, numbers in found.items():
                results.setdefault(row, []).append(numbers)
        # Made again from their seeds if they are needed.
        shutil.rmtree(output / f"data{seed}", ignore_errors=True)
    checked = {} if arguments.check is None else {name: runs.pop() for name, runs in results.items()}
    first = next(iter(results.values()))[0]
    latents = next(iter(first.values()))["true_latents"]
    summary = [
        f"{settings['features']} features in {settings['d_in']} dimensions, {latents:.1f} of them at a time; "
        f"{settings['d_sae']} latents, {settings['steps'] * settings['batch_size']:,} samples, learning rate "
        f"{settings['learning_rate']:g}, {len(arguments.seeds)} seeds. ± holds another seed's value 19 times of 20.",
    ]
    for measure in MEASURES:
        summary += ["", table(results, settings["budgets"], measure)]
    if checked:
        summary += ["", inside_intervals(results, checked, arguments.check)]
    (output / "summary.md").write_text("\n".join(summary) + "\n")
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(results, output / "curves.png")
    print("\n" + "\n".join(summary))
    print(f"\n{output}/summary.md  {output}/results.json  {output}/curves.png")


if __name__ == "__main__":
    main()
