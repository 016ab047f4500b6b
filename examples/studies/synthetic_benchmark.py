# /// script
# dependencies = ["hf_hierarchical_sae", "accelerate", "matplotlib", "sae-lens>=6.54"]
# ///
"""
Dictionaries beside the truth: HierarchicalTopK against TopK, BatchTopK and Matryoshka, one of these for each budget, on
activations whose features are known. The data are SynthSAEBench's (arXiv 2602.14687, `sae_lens.synthetic`): features with
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
from torch.utils.data import IterableDataset
from tqdm import tqdm
from transformers import Trainer, set_seed

from hf_hierarchical_sae import HierarchicalSaeConfig, HierarchicalSaeModel
from hf_hierarchical_sae.training import last_checkpoint, training_arguments
from hf_hierarchical_sae.whole_files import whole_file


sys.path.append(str(Path(__file__).parents[1] / "shared"))
from dictionaries import AtBudget, folder_name, interval


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
        "budgets": [5, 10, 15, 20],
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
    },
}
# Samples are kept for the next dictionary if all of them take no more than this many bytes.
KEPT_BYTES = 2**31
MEASURES = {"f1": "F1", "mcc": "MCC", "explained_variance": "explained variance", "uniqueness": "uniqueness"}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="hour", help="sizes, see above (hour)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data, weights and order (0 1 2)")
    parser.add_argument("--objectives", nargs="+", metavar="NAME", help="train those alone whose names start so (all)")
    parser.add_argument("--learning_rate", type=float, help="another peak than the preset's")
    parser.add_argument("--steps", type=int, help="another number of steps than the preset's")
    parser.add_argument("--output_dir", type=Path, help="where everything is written (outputs/synthetic_PRESET)")
    arguments = parser.parse_args()
    given = {name: getattr(arguments, name) for name in ("learning_rate", "steps")}
    arguments.settings = PRESETS[arguments.preset] | {name: value for name, value in given.items() if value}
    arguments.output_dir = arguments.output_dir or Path("outputs") / f"synthetic_{arguments.preset}"
    names = objectives(arguments.settings)
    wanted = tuple(arguments.objectives or [""])
    arguments.chosen = {name: options for name, options in names.items() if name.startswith(wanted)}
    if not arguments.chosen:
        parser.error(f"--objectives must begin one of {', '.join(names)}, got {' '.join(wanted)}")
    return arguments


def objectives(settings):
    """Options of `HierarchicalSaeConfig` by name of the objective."""
    budgets, d_sae = settings["budgets"], settings["d_sae"]
    largest = budgets[-1]
    powers = sorted({*(2**power for power in range(largest.bit_length())), largest})
    prefixes = [d_sae // 16, d_sae // 8, d_sae // 4, d_sae // 2, d_sae]
    found = {
        "HierarchicalTopK": {"k": largest},
        "HierarchicalTopK, powers of two": {"k": largest, "budgets": powers},
        "HierarchicalTopK, powers of two, prefixes": {
            "k": largest,
            "budgets": powers,
            "matryoshka_prefixes": prefixes,
        },
    }
    for k in budgets:
        batch = {"k": k, "budgets": [k], "selection": "batch_topk"}
        found[f"TopK-{k}"] = {"k": k, "budgets": [k]}
        found[f"BatchTopK-{k}"] = batch
        found[f"Matryoshka TopK-{k}"] = {"k": k, "budgets": [k], "matryoshka_prefixes": prefixes}
        found[f"Matryoshka BatchTopK-{k}"] = {**batch, "matryoshka_prefixes": prefixes}
    return found


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
    path = folder / "batches.pt"
    if not path.exists():
        made = Batches(truth, settings)
        batches = [made.batch(number).cpu() for number in tqdm(range(sizes[0]), desc="sample", unit="batch")]
        with whole_file(path) as unfinished:
            torch.save(torch.stack(batches), unfinished)
    return torch.load(path, mmap=True)


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
    trainer.train(resume_from_checkpoint=checkpoint)
    sae.fold_input_scale()
    return sae.eval()


def judge(sae, truth, settings, budgets):
    """SAELens' numbers at each budget, all on the same samples, none of which were trained on."""
    found = {}
    for k in budgets:
        torch.manual_seed(truth.seed + 10**9)
        result = eval_sae_on_synthetic_data(
            AtBudget(sae, k),  # ty: ignore[invalid-argument-type]
            truth.model.feature_dict,
            truth.model.activation_generator,
            num_samples=settings["eval_samples"],
            batch_size=settings["batch_size"],
        )
        found[k] = {
            "f1": result.classification.f1_score,
            "mcc": result.mcc,
            "explained_variance": result.explained_variance,
            "uniqueness": result.uniqueness,
            "latents": result.sae_l0,
            "dead": result.dead_latents / settings["d_sae"],
            "true_latents": result.true_l0,
        }
    return found


def run(name, options, settings, truth, kept, seed, output):
    """Train and judge, or read what an earlier run found: numbers by budget."""
    folder = output / folder_name(name) / f"seed{seed}"
    result = folder / "result.json"
    if not result.exists():
        if not (folder / "model.safetensors").exists():
            train(options, settings, Batches(truth, settings, kept=kept), seed, folder).save_pretrained(folder)
        sae = HierarchicalSaeModel.from_pretrained(folder).to(truth.model.device)
        budgets = [options["k"]]
        if sae.config.has_budgets:
            # One dictionary at every budget, those it was not trained for included.
            budgets = settings["budgets"]
            sae.config.k = budgets[-1]
        found = judge(sae, truth, settings, budgets)
        at = found[options["k"]]
        numbers = ", ".join(f"{title} {at[measure]:.3f}" for measure, title in MEASURES.items())
        print(f"{name}, seed {seed}: at {options['k']} {numbers}", flush=True)
        result.write_text(json.dumps(found, indent=2) + "\n")
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    return {int(budget): numbers for budget, numbers in json.loads(result.read_text()).items()}


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


def plot(results, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.5), layout="constrained")
    axes = dict(zip(["f1", "mcc", "explained_variance"], figure.subplots(1, 3)))
    for measure, part in axes.items():
        for place, (kind, points) in enumerate(curves(results, measure).items()):
            budgets, means, widths = zip(*points)
            widths = None if widths[0] is None else widths
            # Beside one another: intervals of the same budget would hide each other.
            shifted = [budget * 1.012**place for budget in budgets]
            style = "o-" if kind.startswith("Hierarchical") else "s--"
            part.errorbar(shifted, means, widths, fmt=style, label=kind, markersize=4, capsize=2, linewidth=1.2)
        part.set(xlabel="latents per input", ylabel=MEASURES[measure])
        part.set_xscale("log", base=2)
        part.set_xticks(budgets, [str(budget) for budget in budgets])
        part.grid(alpha=0.3)
    axes["f1"].legend(fontsize="x-small")
    figure.savefig(path, dpi=150)


def main():
    arguments = parse_arguments()
    settings, output = arguments.settings, arguments.output_dir
    device = "cuda" if torch.cuda.is_available() else "cpu"
    output.mkdir(parents=True, exist_ok=True)
    record = output / "settings.json"
    if record.exists() and json.loads(record.read_text()) != settings:
        raise SystemExit(f"{output} holds results of other settings: give another --output_dir, or delete it")
    record.write_text(json.dumps(settings, indent=2) + "\n")
    results = {}
    for seed in arguments.seeds:
        folders = [output / place / f"seed{seed}" / "result.json" for place in map(folder_name, arguments.chosen)]
        truth = kept = None
        if not all(folder.exists() for folder in folders):
            truth = make_truth(settings, seed, device)
            kept = keep_batches(truth, settings, output / f"data{seed}")
        for name, options in arguments.chosen.items():
            results.setdefault(name, []).append(run(name, options, settings, truth, kept, seed, output))
        # Made again from their seeds if they are needed.
        shutil.rmtree(output / f"data{seed}", ignore_errors=True)
    first = next(iter(results.values()))[0]
    latents = next(iter(first.values()))["true_latents"]
    summary = [
        f"{settings['features']} features in {settings['d_in']} dimensions, {latents:.1f} of them at a time; "
        f"{settings['d_sae']} latents, {settings['steps'] * settings['batch_size']:,} samples, learning rate "
        f"{settings['learning_rate']:g}, {len(arguments.seeds)} seeds. ± holds another seed's value 19 times of 20.",
    ]
    for measure in MEASURES:
        summary += ["", table(results, settings["budgets"], measure)]
    (output / "summary.md").write_text("\n".join(summary) + "\n")
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(results, output / "curves.png")
    print("\n" + "\n".join(summary))
    print(f"\n{output}/summary.md  {output}/results.json  {output}/curves.png")


if __name__ == "__main__":
    main()
