# /// script
# dependencies = [
#     "peft_bias_steer", "accelerate", "trl", "datasets", "math-verify", "matplotlib", "reasoning-gym", "rich", "tensorboard"
# ]
# ///
"""
What trained vectors are and do: tokens they promote, their norms, the part of each layer, other tasks, other scales.

    python examples/studies/read_vectors.py outputs/steer/adapter --output_dir outputs/steer/reading

Options that are not listed below are those of train_methods.py, and say on which held-out questions accuracy is measured
(`--task`, `--eval_size`, `--max_completion_length`, `--bf16`, ...). Writes reading.md with every table, reading.json,
vectors.png and behaviour.png. Parts that reading.json holds already are not measured again.
"""

import argparse
import hashlib
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import train_methods  # ty: ignore[import-not-found]  # the script beside this one
from peft import PeftConfig, PeftModel
from safetensors.torch import save
from tqdm import tqdm
from transformers import set_seed

from peft_bias_steer import BiasSteerConfig, steering_vectors
from peft_bias_steer.analysis import (
    VectorStatistics,
    layer_ablation,
    logit_lens,
    plot_statistics,
    residual_ratios,
    vector_statistics,
)
from peft_bias_steer.whole_files import whole_file


matplotlib.use("Agg")
sys.path.append(str(Path(__file__).parents[1] / "shared"))
from interrupts import record_settings  # noqa: E402
from matplotlib import pyplot  # noqa: E402


TRANSFER = ["chain_sum", "products", "gcd", "letter_counting"]


def parse_arguments() -> tuple[argparse.Namespace, argparse.Namespace]:
    """Own options, and those of train_methods.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="folder or hub id of a BiasSteer adapter")
    parser.add_argument("--model", help="its base model (default: the one that the adapter names)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/reading"), help="(%(default)s)")
    parser.add_argument("--group_size", type=int, default=5, help="layers that are ablated together (%(default)s)")
    parser.add_argument("--transfer", nargs="*", default=TRANSFER, help="other tasks to try it on (%(default)s)")
    parser.add_argument("--scales", nargs="+", type=float, default=[0, 0.25, 0.5, 0.75, 1, 1.25, 1.5], help="factors")
    parser.add_argument("--shown", type=int, default=6, help="tokens per cell of the lens (%(default)s)")
    args, rest = parser.parse_known_args()
    if args.group_size < 1:
        raise SystemExit(f"--group_size must be at least 1, got {args.group_size}")
    return args, train_methods.parse_arguments(rest)


def load_adapter(args: argparse.Namespace) -> tuple[Any, Any]:
    """The steered model and its tokenizer."""
    try:
        config = PeftConfig.from_pretrained(args.adapter)
    except (OSError, ValueError) as error:
        raise SystemExit(f"expected the folder or hub id of an adapter, got {args.adapter!r}: {error}") from None
    if not isinstance(config, BiasSteerConfig):
        raise SystemExit(f"expected a BiasSteer adapter, got a {config.peft_type} adapter in {args.adapter}")
    args.model = args.model or config.base_model_name_or_path
    base, tokenizer = train_methods.example.load(args.model)
    return PeftModel.from_pretrained(base, args.adapter).eval(), tokenizer


def keep_apart(output_dir: Path, model: Any, args: argparse.Namespace, questions: argparse.Namespace) -> None:
    """Refuse a folder with what other vectors or options gave; the same name may stand for vectors that were trained anew."""
    vectors = {str(layer): vector.cpu().contiguous() for layer, vector in steering_vectors(model).items()}
    options = {name: str(value) for name, value in (vars(questions) | vars(args)).items() if name != "output_dir"}
    record_settings(output_dir, options | {"vectors": hashlib.sha256(save(vectors)).hexdigest()[:16]})


class Reader:
    """The measurements; each returns what goes into reading.json under its name."""

    def __init__(self, model: Any, tokenizer: Any, args: argparse.Namespace, questions: argparse.Namespace):
        self.model, self.tokenizer, self.args, self.questions = model, tokenizer, args, questions

    def evaluate(self, task_name: str | None = None) -> dict:
        """Greedy scores of the model as it is now, on the held-out questions of the task or of another one."""
        options = self.questions
        if task_name is not None:
            options = train_methods.parse_arguments(["--task", task_name])
            for name in ("model", "eval_size", "bf16", "max_completion_length", "chat_template", "split_seed"):
                setattr(options, name, getattr(self.questions, name))
        task = train_methods.load_task(options)
        prompt_of = train_methods.prompt_maker(self.tokenizer, task, options)
        prompts = [prompt_of(row) for row in task.held_out]
        length = options.max_completion_length
        completions = train_methods.complete(
            self.model, self.tokenizer, prompts, max_new_tokens=length, bf16=options.bf16
        )
        return train_methods.score(completions, task.held_out, task)

    def lens(self) -> list[dict]:
        return [asdict(lens) for lens in logit_lens(self.model, self.tokenizer, top_k=self.args.shown)]

    def vectors(self) -> dict:
        task = train_methods.load_task(self.questions)
        prompt_of = train_methods.prompt_maker(self.tokenizer, task, self.questions)
        ratios = residual_ratios(self.model, self.tokenizer, [prompt_of(row) for row in task.held_out[:16]])
        return asdict(vector_statistics(steering_vectors(self.model))) | {"ratios": list(ratios.values())}

    def scales(self) -> list[dict]:
        results = []
        for scale in tqdm(self.args.scales, desc="scales"):
            self.model.set_scale("default", scale)
            results.append({"scale": scale, **self.evaluate()})
        self.model.set_scale("default", 1.0)
        return results

    def ablation(self) -> dict:
        layers = list(steering_vectors(self.model))
        size = self.args.group_size
        groups = [layers[start : start + size] for start in range(0, len(layers), size)]
        bar = tqdm(total=2 * len(groups) + 2, desc="ablation")

        def metric(model: PeftModel) -> float:
            bar.update()
            return self.evaluate()["accuracy"]

        result = asdict(layer_ablation(self.model, metric, groups=groups))
        bar.close()
        return result

    def transfer(self) -> list[dict]:
        results = []
        for name in tqdm(self.args.transfer, desc="transfer"):
            with self.model.disable_adapter():
                before = self.evaluate(name)
            results.append({"task": name, "before": before, "after": self.evaluate(name)})
        return results


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows])


def lens_table(lenses: list[dict], vectors: dict) -> str:
    def tokens(scores: list[dict]) -> str:
        return " ".join(f"`{score['token']!r}`".replace("|", "\\|") for score in scores)

    rows = [
        [str(lens["layer"]), f"{norm:.2f}", f"{ratio:.1%}", tokens(lens["normed"]["promoted"])]
        + [tokens(lens["normed"]["suppressed"])]
        for lens, norm, ratio in zip(lenses, vectors["norms"], vectors["ratios"])
    ]
    return markdown(["layer", "norm", "of the residual", "promoted", "suppressed"], rows)


def rates(score: dict) -> list[str]:
    low, high = score["interval"]
    return [f"{score['accuracy']:.1%}", f"{low:.1%} to {high:.1%}", f"{score['format_rate']:.1%}"]


def scale_table(results: list[dict]) -> str:
    rows = [[f"{r['scale']:g}", *rates(r), str(r["unparsable"])] for r in results]
    return markdown(["scale", "right", "95 %", "in form", "unparsable"], rows)


def ablation_table(result: dict) -> str:
    rows = [
        [f"{group[0]}–{group[-1]}" if len(group) > 1 else str(group[0]), f"{kept:.1%}", f"{left_out:.1%}"]
        for group, kept, left_out in zip(result["groups"], result["kept"], result["left_out"])
    ]
    rows += [["none", f"{result['none']:.1%}", f"{result['all']:.1%}"]]
    rows += [["all", f"{result['all']:.1%}", f"{result['none']:.1%}"]]
    return markdown(["layers", "right with these alone", "right without these"], rows)


def transfer_table(results: list[dict]) -> str:
    rows = [[r["task"], *rates(r["before"]), *rates(r["after"])] for r in results]
    columns = ["right before", "95 %", "in form before", "right after", "95 %", "in form after"]
    return markdown(["task", *columns], rows)


def plot_behaviour(reading: dict, path: Path) -> None:
    figure, (scales, ablation) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    x = [result["scale"] for result in reading["scales"]]
    scales.plot(x, [r["accuracy"] for r in reading["scales"]], marker="o", label="right")
    scales.plot(x, [r["format_rate"] for r in reading["scales"]], marker=".", linestyle=":", label="in form")
    scales.fill_between(x, *zip(*[r["interval"] for r in reading["scales"]]), alpha=0.15)
    scales.set(xlabel="scale of the vectors", ylim=(0, 1.02), title="held-out questions, greedy")
    scales.legend()
    result = reading["ablation"]
    centres = [sum(group) / len(group) for group in result["groups"]]
    width = 0.4 * len(result["groups"][0])
    ablation.bar([c - width / 2 for c in centres], result["kept"], width, label="with these layers alone")
    ablation.bar([c + width / 2 for c in centres], result["left_out"], width, label="without these layers")
    ablation.axhline(result["all"], color="black", linestyle="--", label="all vectors")
    ablation.axhline(result["none"], color="grey", linestyle=":", label="base model")
    ablation.set(xlabel="layer", ylim=(0, 1.3), title="right, by layers")
    ablation.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    args, questions = parse_arguments()
    set_seed(0)
    model, tokenizer = load_adapter(args)
    questions.model = args.model
    reader = Reader(model, tokenizer, args, questions)
    keep_apart(args.output_dir, model, args, questions)
    path = args.output_dir / "reading.json"
    reading: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for part in ("lens", "vectors", "scales", "ablation", "transfer"):
        if part not in reading:
            reading[part] = getattr(reader, part)()
            with whole_file(path) as unfinished:
                unfinished.write_text(json.dumps(reading) + "\n")

    vectors = reading["vectors"]
    plot_statistics(
        VectorStatistics(**{k: v for k, v in vectors.items() if k != "ratios"}), args.output_dir / "vectors.png"
    )
    plot_behaviour(reading, args.output_dir / "behaviour.png")
    sections = [
        f"`{shlex.join(['python', *sys.argv])}`",
        "## Tokens promoted and suppressed by each layer, through the final norm",
        lens_table(reading["lens"], vectors),
        f"Stable rank {vectors['stable_rank']:.2f} of {len(vectors['layers'])}.",
        "## Scale",
        scale_table(reading["scales"]),
        "## Ablation",
        ablation_table(reading["ablation"]),
        "## Transfer",
        transfer_table(reading["transfer"]),
    ]
    text = "\n\n".join(sections)
    (args.output_dir / "reading.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
