# /// script
# dependencies = ["hf_based_kernel"]
# ///
"""Tokens per second and memory of whole models that decode after a context: converted ones beside their teacher's shape,
and the paper's 150M model beside a Llama of its size.

    python examples/benchmarks/rebased_decoding.py --output outputs/rebased_decoding.md

Every model runs in a process of its own, in turns, on one thread; a number is the median over rounds of CPU time. Weights are
random: the time does not depend on them. So are the keys and values of the context. In brackets the time over its floor, which
is reading the weights and the cache once, as fast as a product of a matrix and a vector reads.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_based_kernel import RebasedCache, RebasedConfig, RebasedForCausalLM


sys.path.append(str(Path(__file__).parents[1] / "shared"))
from turns import machine, medians_in_turns, take_turns


# The shape of SmolLM2-135M.
SMOLLM2: dict[str, Any] = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 65_536,
    "tie_word_embeddings": True,
}
# 151,880,448 parameters with learned positions apart: the paper's attention baseline.
LLAMA_150M: dict[str, Any] = {
    "vocab_size": 50_280,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 65_536,
    "tie_word_embeddings": True,
}
WINDOW = 64


def converted(number):
    """SmolLM2's shape with so many layers replaced, spread over its depth."""
    layers = SMOLLM2["num_hidden_layers"]
    chosen = [i for i in range(layers) if (i + 1) * number // layers > i * number // layers]
    return RebasedForCausalLM.from_llama(
        LlamaForCausalLM(LlamaConfig(**SMOLLM2)), chosen, linear_attention_window=WINDOW
    )


MODELS = {
    "SmolLM2-135M": lambda: LlamaForCausalLM(LlamaConfig(**SMOLLM2)),
    "15 of 30 layers replaced": lambda: converted(15),
    "30 of 30 layers replaced": lambda: converted(30),
    "Llama, 150M": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA_150M)),
    "ReBased, 150M": lambda: RebasedForCausalLM(RebasedConfig()),
}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="which (all)")
    parser.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        default=[128, 2048, 8192, 32_768],
        help="tokens before (128 2048 8192 32768)",
    )
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8], help="sequences decoded at once (1 8)")
    parser.add_argument("--tokens", type=int, default=8, help="tokens of a round (8)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that the medians are taken over (5)")
    parser.add_argument("--most_cache_gib", type=float, default=4, help="leave out where keys and values are more (4)")
    parser.add_argument("--output", type=Path, default=Path("outputs/rebased_decoding.md"), help="file for the table")
    parser.add_argument(
        "--contestant", nargs=3, metavar=("MODEL", "CONTEXT", "BATCH"), help="be one of the processes that take turns"
    )
    return parser.parse_args()


def cache_after(model, context, batch_size):
    """The model's cache as if it had read so many tokens."""
    config = model.config
    sizes = (batch_size, config.num_key_value_heads, context, config.head_dim)
    if isinstance(model, LlamaForCausalLM):
        cache = DynamicCache(config=config)
        for i in range(config.num_hidden_layers):
            cache.update(torch.randn(sizes), torch.randn(sizes), i)
        return cache
    cache = RebasedCache(config)
    model(torch.zeros(batch_size, 2 * WINDOW, dtype=torch.long), past_key_values=cache)
    for layer, kind in zip(cache.layers, config.layer_types):
        if kind == "full_attention":
            layer.keys, layer.values = torch.randn(sizes), torch.randn(sizes)
    cache.seen_tokens = context
    return cache


def cache_bytes(cache):
    tensors = [
        x
        for layer in cache.layers
        for x in (layer.tensors() if isinstance(cache, RebasedCache) else (layer.keys, layer.values))
    ]
    return sum(x.nbytes for x in tensors)


@torch.inference_mode()
def prepare(name, context, batch_size):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    return model, cache_after(model, context, batch_size)


def contest(name, context, batch_size, tokens):
    torch.set_num_threads(1)
    model, cache = prepare(name, context, batch_size)
    token = torch.zeros(batch_size, 1, dtype=torch.long)

    @torch.inference_mode()
    def decode():
        for _ in range(tokens):
            model(token, past_key_values=cache, logits_to_keep=1)

    take_turns(lambda: decode, warm_up=1)


@torch.inference_mode()
def read_rate():
    """Bytes per second of CPU time that products of matrices and a vector read, one thread, out of what no cache holds."""
    torch.set_num_threads(1)
    matrices, vector = torch.randn(12, 3072, 4096), torch.randn(1, 4096)
    seconds = []
    for _ in range(5):
        started = time.process_time()
        for matrix in matrices:
            F.linear(vector, matrix)
        seconds.append(time.process_time() - started)
    return matrices.nbytes / min(seconds)


def sizes_of(name):
    """Bytes of the weights, and of a sequence's cache: what it always has, and what each token adds."""
    model, cache = prepare(name, 1, 1)
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    each = kinds.count("full_attention") * 2 * model.config.num_key_value_heads * model.config.head_dim * 4
    return sum(x.nbytes for x in model.parameters()), cache_bytes(cache) - each, each


def measure(arguments, sizes, rate, context, batch_size):
    """Cells of a row: tokens per second of CPU time and how often the floor, if the cache is not too large; its megabytes."""
    commands, totals = {}, {name: batch_size * (fixed + context * each) for name, (_, fixed, each) in sizes.items()}
    for name, total in totals.items():
        if total <= arguments.most_cache_gib * 2**30:
            given = ["--contestant", name, str(context), str(batch_size), "--tokens", str(arguments.tokens)]
            commands[name] = [sys.executable, __file__, *given]
    answers = medians_in_turns(commands, arguments.rounds)
    for name, total in totals.items():
        cell = "not run"
        if name in answers:
            seconds, floor = answers[name]["cpu_ms"] / 1000 / arguments.tokens, (sizes[name][0] + total) / rate
            cell = f"{batch_size / seconds:.1f} ({seconds / floor:.1f}×)"
        yield f"{cell} | {total / 1e6:,.1f}"


def main():
    arguments = parse_arguments()
    if arguments.contestant:
        name, context, batch_size = arguments.contestant
        contest(name, int(context), int(batch_size), arguments.tokens)
        return
    cells = [(batch_size, context) for batch_size in arguments.batch_sizes for context in arguments.contexts]
    rate = read_rate()
    lines = [
        f"{machine()}, reads {rate / 1e9:.1f} GB/s; torch {torch.__version__}, float32, one thread, CPU time; "
        f"{arguments.rounds} rounds of {arguments.tokens} tokens",
        "",
        "| batch | context | " + " | ".join(f"{name}, tokens/s | cache, MB" for name in arguments.models) + " |",
        "|---" * (2 + 2 * len(arguments.models)) + "|",
    ]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    sizes = {name: sizes_of(name) for name in arguments.models}
    for batch_size, context in tqdm(cells):
        row = measure(arguments, sizes, rate, context, batch_size)
        lines.append(f"| {batch_size} | {context:,} | {' | '.join(row)} |")
        # Written after every row, so that a run that is cut short keeps them.
        arguments.output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
