# /// script
# dependencies = ["hf_hierarchical_sae", "jinja2"]
# ///
"""
One page about what `make demo` made: numbers and plots, answers before and after, the autoencoder's dashboard, and what to
type next. It stands alone, but for the dashboard beside it, and fetches nothing.

    python examples/studies/demo_page.py --outputs outputs --model outputs/SmolLM2-135M-Instruct

A part that was not made is named with the command that makes it.
"""

import argparse
import base64
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from hf_hierarchical_sae import HierarchicalSaeModel
from hf_hierarchical_sae.dashboard import write_dashboard


sys.path.append(str(Path(__file__).parents[1] / "shared"))
from plays import find_plays


ANSWERS_SHOWN = 8
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>What make demo made</title>
<style>
body { font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: #1b1f24; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; } table { border-collapse: collapse; margin: .5rem 0; }
td, th { border: 1px solid #dde1e6; padding: .25rem .6rem; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #f6f7f9; padding: .6rem .8rem; overflow-x: auto; white-space: pre-wrap; } h2 { margin-top: 2.5rem; }
</style>
</head>
<body>
<h1>What <code>make demo</code> made</h1>
{%- for part in parts %}
<h2 id="{{ part.name }}">{{ part.title }}</h2>
{%- if part.missing %}
<p>Not made yet: <code>{{ part.missing }}</code>.</p>
{%- else %}
<p>{{ part.text }}</p>
{%- if part.rows %}
<table>
<tr>{% for cell in part.head %}<th>{{ cell }}</th>{% endfor %}</tr>
{%- for row in part.rows %}
<tr>{% for cell in row %}<td{% if cell is number %} class="number"{% endif %}>{{ "%.3f" | format(cell) if cell is float else cell }}</td>{% endfor %}</tr>
{%- endfor %}
</table>
{%- endif %}
{%- if part.sample %}<pre>{{ part.sample }}</pre>{% endif %}
{%- if part.picture %}<img src="data:image/png;base64,{{ part.picture }}" alt="{{ part.title }}">{% endif %}
{%- if part.link %}<p><a href="{{ part.link }}">Its latents, at every budget</a></p>{% endif %}
{%- endif %}
<pre>{{ part.next }}</pre>
{%- endfor %}
</body>
</html>
"""


def picture(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def steer(folder: Path) -> dict[str, Any]:
    """Bias vectors with GRPO, of `train_grpo.py`."""
    result = json.loads((folder / "result.json").read_text())
    answers = result["answers"]
    return {
        "text": f"{result['before']:.1%} of {len(answers)} held-out questions right before, {result['after']:.1%} after "
        f"{result['steps']} steps of GRPO with one vector per decoder layer. The first answers, cut where they were cut:",
        "head": ["question", "right", "before", "after"],
        "rows": answers[:ANSWERS_SHOWN],
        "picture": picture(folder / "reward.png"),
    }


def sae(folder: Path) -> dict[str, Any]:
    """A sparse autoencoder, of `train_sae.py`."""
    result = json.loads((folder / "result.json").read_text())
    before, after = result["explained_variance_before"], result["explained_variance_after"]
    return {
        "text": f"One dictionary of {result['d_sae']:,} latents on layer {result['layer']}, trained on {result['tokens']:,} "
        f"tokens of {result['text']} in {result['seconds']:.0f} s: explained variance on held-out tokens with so many "
        "latents per token.",
        "head": ["latents per token", "before", "after"],
        "rows": [[int(budget), before[budget], after[budget]] for budget in after],
        "picture": picture(folder / "explained_variance.png"),
        "link": f"{folder.name}/dashboard.html" if (folder / "dashboard.html").exists() else None,
    }


def language_model(folder: Path) -> dict[str, Any]:
    """A small language model, of `train_language_model.py`."""
    result = json.loads((folder / "language_model.json").read_text())
    return {
        "text": f"{result['parameters']:,} parameters, {result['steps']} steps of {result['tokens_per_step']:,} tokens of "
        f"{result['text']}, {result['seconds']:.0f} s: perplexity {result['perplexity_before']:,.1f} before, "
        f"{result['perplexity_after']:,.1f} after. What it writes, from a state of {result['state_bytes']:,} bytes at any "
        "length:",
        "sample": result["generated"][0],
        "picture": picture(folder / "language_model.png"),
    }


def recall(folder: Path) -> dict[str, Any]:
    """Associative recall, of `train_associative_recall.py`."""
    result = json.loads((folder / "associative_recall.json").read_text())
    guessing = result["accuracy_of_guessing_a_value_of_the_sequence"]
    return {
        "text": f"{result['parameters']:,} parameters, {result['num_pairs']} pairs in {result['seq_len']} tokens, "
        f"{result['max_steps']} steps, {result['seconds']:.0f} s: {result['accuracy_before']:.3f} of the values recalled "
        f"before, {result['accuracy']:.3f} after ({guessing:.3f} by guessing).",
        "picture": picture(folder / "associative_recall.png"),
    }


PARTS = {
    "steer": (
        "Bias vectors by reinforcement learning",
        steer,
        "make demo-steer",
        "bias-steer inspect {folder}/adapter            # norms of the vectors\n"
        "bias-steer lens {folder}/adapter               # the tokens that each one promotes\n"
        "python examples/peft_bias_steer/train_grpo.py --help",
    ),
    "sae": (
        "A sparse autoencoder for every budget",
        sae,
        "make demo-sae",
        "hierarchical-sae --help                # harvest, train, evaluate, dashboard, convert\n"
        "make space                             # its latents on your own sentence, and a chat with the vectors",
    ),
    "rebased": (
        "A ReBased language model",
        language_model,
        "make demo-rebased",
        "python examples/hf_based_kernel/convert_llama.py --help   # a pretrained Llama with its attention replaced",
    ),
    "recall": (
        "Associative recall",
        recall,
        "make demo-rebased",
        "python examples/hf_based_kernel/train_associative_recall.py --num_pairs 8 --seq_len 64",
    ),
}


def read_part(read: Callable[[Path], dict[str, Any]], folder: Path) -> dict[str, Any] | None:
    """`None` where there is nothing, what a killed run left, or what another example than the demo's wrote."""
    try:
        return read(folder)
    except (FileNotFoundError, LookupError, TypeError, ValueError):
        return None


def make_page(outputs: Path) -> str:
    """The page, as HTML."""
    parts = []
    for name, (title, read, command, then) in PARTS.items():
        folder = outputs / name
        part = {"name": name, "title": title, "next": then.format(folder=folder)}
        parts.append(part | (read_part(read, folder) or {"missing": command}))
    return Environment(autoescape=True).from_string(PAGE).render(parts=parts)


def add_dashboard(folder: Path, model: str, max_tokens: int) -> None:
    """Writes the autoencoder's dashboard into its folder."""
    logging.disable_progress_bar()
    dtype = json.loads((folder / "result.json").read_text()).get("dtype", "float32")
    texts = [path.read_text(encoding="utf-8")[:2000] for path in find_plays("--dashboard_tokens 0")]
    random.Random(0).shuffle(texts)
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    write_dashboard(
        HierarchicalSaeModel.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(model, dtype=dtype),
        tokenizer,
        texts,
        path=folder / "dashboard.html",
        max_tokens=max_tokens,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--outputs", type=Path, default=Path("outputs"), help="folder of the parts (%(default)s)")
    add("--model", default="outputs/SmolLM2-135M-Instruct", help="language model of the autoencoder (%(default)s)")
    add("--dashboard_tokens", type=int, default=20_000, help="tokens that the dashboard shows latents on, 0 for none")
    args = parser.parse_args()
    if not args.outputs.is_dir():
        parser.error(f"--outputs must be a folder that `make demo` wrote to, got {args.outputs}")
    if args.dashboard_tokens and read_part(sae, args.outputs / "sae"):
        add_dashboard(args.outputs / "sae", args.model, args.dashboard_tokens)
    (args.outputs / "index.html").write_text(make_page(args.outputs), encoding="utf-8")
    print(f"Open {args.outputs / 'index.html'}")


if __name__ == "__main__":
    main()
