# /// script
# dependencies = ["hf_hierarchical_sae", "matplotlib"]
# ///
"""
Score single latents of sparse autoencoders against labelled text, at every budget: speakers of Shakespeare's plays,
the themes of a folder of texts, the supersenses of WordNet; and with a local language model as judge.

    python examples/studies/score_latents.py --sae outputs/sae

Several autoencoders of one layer are compared, after `compare_objectives.py` for instance:

    python examples/studies/score_latents.py --sae outputs/compare_minutes/{HierarchicalTopK,TopK-*}/seed0 \
        --wordnet /usr/share/wordnet --themes /usr/share/games/fortunes --judge outputs/SmolLM2-135M-Instruct

`--themes` takes a folder of files in the format of fortune(6), one per label: texts between lines of `%` (Debian:
fortunes). `--wordnet` takes the folder of WordNet's dictionary files (Debian: wordnet-base). What was scored is kept:
an interrupted run goes on where it stopped if the same command is given again.
"""

import argparse
import hashlib
import json
import random
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_hierarchical_sae import (
    HierarchicalSaeConfig,
    HierarchicalSaeModel,
    detection_scores,
    explain_latents,
    fuzzing_scores,
    read_latents,
    score_labels,
)
from hf_hierarchical_sae.whole_files import whole_file


sys.path.append(str(Path(__file__).parents[1] / "shared"))
from interrupts import record_settings
from options import check_least
from plays import find_plays, speeches


# WordNet's lexicographer files of nouns and verbs, numbers 3 to 43, lexnames(5WN).
SUPERSENSES = """
    noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body noun.cognition noun.communication noun.event
    noun.feeling noun.food noun.group noun.location noun.motive noun.object noun.person noun.phenomenon noun.plant
    noun.possession noun.process noun.quantity noun.relation noun.shape noun.state noun.substance noun.time verb.body
    verb.change verb.cognition verb.communication verb.competition verb.consumption verb.contact verb.creation
    verb.emotion verb.motion verb.perception verb.possession verb.social verb.stative verb.weather
"""
# Endings that an inflected form loses, and what takes their place, morphy(7WN).
ENDINGS = [("ies", "y"), ("es", "e"), ("es", ""), ("s", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")]
TITLES = {
    "above_chance": "share of latents above chance",
    "information": "information, mean over latents",
    "probe_auroc": "AUROC of the best latent for a label",
}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", nargs="+", required=True, help="folders or hub ids of autoencoders of one layer")
    parser.add_argument("--names", nargs="+", help="what to call them (default: the last folders that differ)")
    parser.add_argument("--model", help="language model (default: the one that the first autoencoder names)")
    parser.add_argument(
        "--budgets", nargs="+", type=int, default=[8, 16, 32, 64], help="latents per token (8 16 32 64)"
    )
    parser.add_argument("--tokens", type=int, default=40_000, help="tokens of each text (default: 40000)")
    parser.add_argument("--speakers", type=int, default=24, help="number of speakers (default: 24)")
    parser.add_argument("--themes", type=Path, help="folder of themes to score as well")
    parser.add_argument("--wordnet", type=Path, help="folder of WordNet's files, to score supersenses as well")
    parser.add_argument("--judge", help="hub id or folder of a causal language model that explains and judges")
    parser.add_argument("--judge_latents", type=int, default=12, help="latents that it judges (default: 12)")
    parser.add_argument("--permutations", type=int, default=20, help="permutations of the labels (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of texts, permutations and judged latents (default: 0)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/sae_scores"), help="outputs/sae_scores")
    arguments = parser.parse_args()
    check_least(parser, arguments, tokens=1, speakers=2, permutations=1, seed=0, judge_latents=0)
    if min(arguments.budgets) < 1:
        parser.error(f"--budgets must be at least 1, got {min(arguments.budgets)}")
    arguments.names = arguments.names or short_names(arguments.sae)
    files = {result_name(name) for name in arguments.names}
    if not len(files) == len(arguments.names) == len(arguments.sae):
        parser.error(f"--names must be as many as --sae and give files of different names, got {arguments.names}")
    for option, file in (("themes", ""), ("wordnet", "cntlist.rev")):
        folder = getattr(arguments, option)
        if folder and not (folder / file).exists():
            parser.error(f"--{option}: expected a folder{f' with {file}' if file else ''}, got {folder}")
    for path in arguments.sae:
        check_autoencoder(parser, path, max(arguments.budgets))
    return arguments


def check_autoencoder(parser, path, widest):
    """Refuse what is no autoencoder, and one that cannot be read at every budget."""
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        parser.error(f"--sae: expected the folder or hub id of an autoencoder, got {path} ({error})")
    if not isinstance(config, HierarchicalSaeConfig):
        parser.error(f"--sae: expected autoencoders, got a {config.model_type} in {path}")
    if not config.has_budgets:
        parser.error(f"--sae: expected autoencoders with selection topk, got {config.selection} in {path}")
    if widest > config.d_sae:
        parser.error(f"--budgets must be at most {config.d_sae}, the latents in {path}, got {widest}")


def short_names(paths):
    """The parts of the paths that are not the same in all of them; the last part of one that has no other."""
    parts = [Path(path).parts for path in paths]
    shared = set.intersection(*map(set, parts))
    return ["/".join(part for part in path if part not in shared) or path[-1] for path in parts]


def result_name(name):
    """The file with the scores of the autoencoder of this name."""
    return f"{name.replace('/', '_')}.json"


def identity(path):
    """What tells an autoencoder from another, or from itself before it was trained on: a hash of its weights."""
    state = HierarchicalSaeModel.from_pretrained(path).state_dict()
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode() + state[key].flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def texts_by_speaker(count, seed):
    """Texts by speaker, of the `count` speakers who say most in Shakespeare's plays, in random order."""
    found = defaultdict(list)
    for path in find_plays(None):
        play = path.stem.replace("-", " ")
        for speaker, speech in speeches(path):
            if len(speech) >= 100:
                found[f"{speaker.title()} ({play})"].append(speech)
    most = sorted(found, key=lambda speaker: -sum(map(len, found[speaker])))[:count]
    return {speaker: random.Random(seed).sample(found[speaker], len(found[speaker])) for speaker in most}


def themes(folder, seed):
    """Texts by file of a folder in the format of fortune(6), in random order."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix or not path.is_file():
            continue
        texts = [text.strip() for text in path.read_text(encoding="utf-8", errors="replace").split("\n%\n")]
        if sum(map(len, texts)) >= 10_000:
            found[path.name] = random.Random(seed).sample(texts, len(texts))
    if len(found) < 2:
        raise SystemExit(f"--themes: expected at least 2 files without suffix and with 10,000 characters in {folder}")
    return found


def supersenses(folder, tokenizer, activations):
    """For each token the supersense of its word, by the word's most frequent sense in WordNet's counts; -1 if none."""
    most, sense_of, base_of = {}, {}, {}
    for line in (folder / "cntlist.rev").read_text().splitlines():
        key, _, count = line.split()
        lemma, _, sense = key.partition("%")
        if int(count) > most.get(lemma, 0):
            most[lemma], sense_of[lemma] = int(count), int(sense.split(":")[1])
    for kind in ("noun", "verb"):
        base_of.update(line.split()[:2] for line in (folder / f"{kind}.exc").read_text().splitlines())
    names = SUPERSENSES.split()

    def label(word):
        word = base_of.get(word, word)
        candidates = [word] + [word.removesuffix(end) + other for end, other in ENDINGS if word.endswith(end)]
        lemma = next((candidate for candidate in candidates if candidate in sense_of), None)
        number = sense_of.get(lemma, -1) - 3
        return number if 0 <= number < len(names) else -1

    labels = torch.full((len(activations.token_ids),), -1)
    starts = activations.context_starts.tolist()
    for start, end in zip(starts, starts[1:]):
        ids = activations.token_ids[start:end].tolist()
        ends = [len(tokenizer.decode(ids[: place + 1])) for place in range(len(ids))]
        for word in re.finditer(r"[A-Za-z]+", tokenizer.decode(ids)):
            # The last token of a word: only there is the word known to the model.
            last = next((place for place, after in enumerate(ends) if after >= word.end()), None)
            if last is not None:
                labels[start + last] = label(word[0].lower())
    return labels, names


def judged(activations, tokenizer, judge, judge_tokenizer, arguments, budget):
    """Mean scores of latents drawn at random among those that fire often enough at the smallest budget."""
    uses = activations.rank_counts()[:, : arguments.budgets[0]].sum(dim=1)
    usual = ((uses >= 30) & (uses <= activations.tokens // 20)).nonzero().flatten()
    generator = torch.Generator().manual_seed(arguments.seed)
    latents = usual[torch.randperm(len(usual), generator=generator)[: arguments.judge_latents]].tolist()
    asked = {"judge_tokenizer": judge_tokenizer, "k": budget}
    explanations = explain_latents(activations, tokenizer, latents, judge, **asked)
    given = (activations, tokenizer, explanations, judge)
    found = {"detection": detection_scores(*given, **asked), "fuzzing": fuzzing_scores(*given, **asked)}
    # What the explanations add: the same questions with another latent's explanation, if there is another.
    if len(explanations) > 1:
        others = dict(zip(explanations, [*list(explanations.values())[1:], *list(explanations.values())[:1]]))
        control = (activations, tokenizer, others, judge)
        found |= {
            "detection, swapped": detection_scores(*control, **asked),
            "fuzzing, swapped": fuzzing_scores(*control, **asked),
        }
    means = {
        name: sum(score.auroc for score in scores.values()) / len(scores) for name, scores in found.items() if scores
    }
    return {"explanations": explanations, "latents": len(explanations), **means}


def score(path, language_model, tokenizer, judge, arguments):
    """All scores of one autoencoder."""
    # One dictionary at every budget, those it was not trained for included.
    widest = arguments.budgets[-1]
    sae = HierarchicalSaeModel.from_pretrained(path, k=widest, budgets=[widest], budget_weights=None)
    found = {}

    def read(texts):
        share = -(-arguments.tokens // len(texts))
        return read_latents(sae, language_model, tokenizer, texts, max_tokens=share, batch_tokens=1024)

    def add(name, activations, *labels):
        scores = score_labels(
            activations, *labels, budgets=arguments.budgets, permutations=arguments.permutations, seed=arguments.seed
        )
        print(f"\n{name}\n{scores}\n", flush=True)
        found[name] = scores.to_dict()

    activations = read(texts_by_speaker(arguments.speakers, arguments.seed))
    add("speakers", activations)
    if arguments.wordnet:
        add("supersenses", activations, *supersenses(arguments.wordnet, tokenizer, activations))
    if arguments.judge:
        found["judge"] = {
            str(budget): judged(activations, tokenizer, *judge, arguments, budget)
            for budget in sorted({arguments.budgets[0], arguments.budgets[-1]})
        }
        print(json.dumps(found["judge"], indent=2), flush=True)
    if arguments.themes:
        add("themes", read(themes(arguments.themes, arguments.seed)))
    return found


def tables(results, budgets):
    """Markdown: each score with its chance level, one row per autoencoder and one column per budget."""
    lines = []
    first = next(iter(results.values()))
    for labels in (name for name in first if name != "judge"):
        head = first[labels]
        lines += [f"### {labels}: {head['labels']} labels, {head['tokens']} tokens", ""]
        for title, name, digits, factor in (
            ("latents scored", "scored_latents", 0, 1),
            ("latents above chance, %", "above_chance", 1, 100),
            ("purity (by chance)", "purity", 3, 1),
            ("information (by chance)", "information", 3, 1),
            ("AUROC of the best latent for a label", "probe_auroc", 3, 1),
        ):
            lines += [
                f"| {title} | " + " | ".join(f"at {k}" for k in budgets) + " |",
                "|---" * (len(budgets) + 1) + "|",
            ]
            for sae, scores in results.items():
                cells = [f"{factor * value:.{digits}f}" for value in scores[labels][name]]
                if f"{name}_by_chance" in head:
                    chance = scores[labels][f"{name}_by_chance"]
                    cells = [f"{cell} ({value:.{digits}f})" for cell, value in zip(cells, chance)]
                lines.append(f"| {sae} | " + " | ".join(cells) + " |")
            lines.append("")
    if "judge" in first:
        names = ["detection", "detection, swapped", "fuzzing", "fuzzing, swapped"]
        lines += ["### judge: mean AUROC", "", "| | budget | latents | " + " | ".join(names) + " |", "|---" * 7 + "|"]
        for sae, scores in results.items():
            for budget, found in scores["judge"].items():
                cells = [f"{found[name]:.3f}" if name in found else "–" for name in names]
                lines.append(f"| {sae} | {budget} | {found['latents']} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def plot(results, budgets, path):
    from matplotlib.figure import Figure

    kinds = [name for name in next(iter(results.values())) if name != "judge"]
    figure = Figure(figsize=(4.6 * len(TITLES), 3.4 * len(kinds)), layout="constrained")
    grid = figure.subplots(len(kinds), len(TITLES), squeeze=False)
    for row, kind in zip(grid, kinds):
        for axes, (name, title) in zip(row, TITLES.items()):
            for sae, scores in results.items():
                is_ours = "Hierarchical" in sae
                axes.plot(
                    budgets, scores[kind][name], "o-" if is_ours else "s--", label=sae, lw=2.5 if is_ours else 1.2
                )
                if f"{name}_by_chance" in scores[kind] and sae == next(iter(results)):
                    axes.plot(budgets, scores[kind][f"{name}_by_chance"], ":", color="gray", label=f"{sae}, by chance")
            axes.set_xscale("log", base=2)
            axes.set_xticks(budgets, [str(budget) for budget in budgets])
            axes.set(title=f"{kind}: {title}", xlabel="latents per token")
            axes.grid(alpha=0.3)
    grid[0][1].legend(fontsize="x-small")
    figure.savefig(path, dpi=90)


def main():
    arguments = parse_arguments()
    output = arguments.output_dir
    arguments.budgets = sorted(set(arguments.budgets))
    settings = {
        name: str(value) for name, value in vars(arguments).items() if name not in ("sae", "names", "output_dir")
    }
    record_settings(output, settings)

    name = arguments.model or HierarchicalSaeModel.from_pretrained(arguments.sae[0]).config.model_name
    if name is None:
        raise SystemExit("the autoencoder does not name its language model: give --model")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer: Any = AutoTokenizer.from_pretrained(name)
    language_model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
    judge = None
    if arguments.judge:
        judge_model: Any = AutoModelForCausalLM.from_pretrained(arguments.judge, dtype=torch.float32)
        judge = judge_model.to(device), AutoTokenizer.from_pretrained(arguments.judge)

    results = {}
    for sae, path in zip(arguments.names, arguments.sae):
        result, weights = output / result_name(sae), identity(path)
        if not result.exists():
            print(f"\n== {sae} ==", flush=True)
            scores = score(path, language_model, tokenizer, judge, arguments)
            with whole_file(result) as unfinished:
                unfinished.write_text(json.dumps({"weights": weights, **scores}, indent=2) + "\n")
        results[sae] = json.loads(result.read_text())
        if results[sae].pop("weights", None) != weights:
            raise SystemExit(
                f"{result} holds the scores of another autoencoder than {path}, or of it before it was trained on: give "
                "another --output_dir or --names, or delete it"
            )
    (output / "summary.md").write_text(tables(results, arguments.budgets))
    plot(results, arguments.budgets, output / "scores.png")
    print((output / "summary.md").read_text())
    print(f"Artefacts:  {output}/summary.md  {output}/scores.png")


if __name__ == "__main__":
    main()
