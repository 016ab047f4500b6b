# /// script
# dependencies = ["hf_based_kernel"]
# ///
"""Time and memory of ReBased attention against softmax attention, for training, prefill and decoding, in one run.

    python examples/benchmarks/rebased_attention_cpu.py

Prints markdown tables of CPU time of one thread. Each contestant runs in a process of its own, one at a time and in turns of
consecutive calls, as a model makes them when it trains or decodes. Medians of the turns are shown; ratios above 1 mean that
ReBased is faster.

Floors are flops over the rate of a large matrix product, and bytes over the rate of a large copy, both rates measured in
the same run. Flops of ReBased: its products, with scores in chunks as it forms them; of softmax: the visible pairs; of the
models: the matrix products of a pass, counted. Bytes: inputs, outputs and gradients once; in decoding the state read and
written, or the keys and values read.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaModel, Mamba2Config, Mamba2Model
from transformers.cache_utils import DynamicLayer

from hf_based_kernel import RebasedConfig, RebasedModel, rebased_attention
from hf_based_kernel.rebased_attention_chunked import DEFAULT_CHUNK_SIZE, QUERY_ROWS
from hf_based_kernel.rebased_attention_forms import rebased_attention_reference
from hf_based_kernel.rebased_features import state_size


sys.path.append(str(Path(__file__).parents[1] / "shared"))
from turns import machine, medians_in_turns, take_turns


# Calls of a turn take so long together, or one does.
TURN_SECONDS = 0.1
MODELS = {
    "ReBased (convolution, attention)": lambda: RebasedModel(RebasedConfig(vocab_size=8, num_hidden_layers=2)),
    "Llama": lambda: LlamaModel(
        LlamaConfig(vocab_size=8, hidden_size=768, intermediate_size=1536, num_attention_heads=12, num_hidden_layers=2)
    ),
    "Mamba2 (transformers' torch form on a CPU)": lambda: Mamba2Model(
        Mamba2Config(vocab_size=8, hidden_size=768, head_dim=64, num_heads=24, n_groups=1, num_hidden_layers=2)
    ),
}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default=machine(), help="how the tables name the machine (%(default)s)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[128, 512, 2048, 4096, 16384], help="sequence lengths"
    )
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[128, 4096, 32768], help="tokens before a decoded one"
    )
    parser.add_argument(
        "--decode_layers", type=int, default=9, help="attention layers that a token passes (default: 9)"
    )
    parser.add_argument("--reference_up_to", type=int, default=2048, help="longest length for the quadratic form")
    parser.add_argument("--model_length", type=int, default=2048, help="length for the models; 0 leaves them out")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every contestant (default: 7)")
    parser.add_argument("--batch_size", type=int, default=1, help="sequences (default: 1)")
    parser.add_argument("--num_heads", type=int, default=12, help="heads (default: 12)")
    parser.add_argument(
        "--feature_dim", type=int, default=16, help="query and key numbers per ReBased head (default: 16)"
    )
    parser.add_argument("--head_dim", type=int, default=64, help="value numbers per head, all numbers of softmax (64)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the inputs (float32)")
    parser.add_argument("--contestant", help="take part as this one, a turn for each line on stdin")
    return parser.parse_args()


def contest(arguments, names):
    """Name → medians of the contestants, each in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--contestant"]
    return medians_in_turns({name: [*command, name] for name in names}, arguments.rounds)


def make_call(arguments):
    """What the contestant named `kind:name:size` calls."""
    kind, name, size = arguments.contestant.split(":")
    if kind == "rate":
        return rate_call(arguments, name)
    if kind == "model":
        return model_call(arguments, name, int(size))
    if kind == "decoding":
        return decoding_call(arguments, name, int(size))
    function = {"rebased": rebased_attention, "reference": reference, "softmax": softmax_attention}[name]
    inputs = make_inputs(arguments, name, int(size), requires_grad=kind == "training")
    return with_gradient(function, inputs) if kind == "training" else without_gradient(function, inputs)


def make_inputs(arguments, name, seq_len, *, requires_grad):
    """q, k, v: of ReBased (batch, seq, num_heads, dim), of softmax attention (batch, num_heads, seq, head_dim)"""
    if name in ("rebased", "reference"):
        rows = (arguments.batch_size, seq_len, arguments.num_heads)
        shapes = [(*rows, size) for size in (arguments.feature_dim, arguments.feature_dim, arguments.head_dim)]
    else:
        shapes = [(arguments.batch_size, arguments.num_heads, seq_len, arguments.head_dim)] * 3
    return [random_tensor(arguments, *shape).requires_grad_(requires_grad) for shape in shapes]


def random_tensor(arguments, *shape):
    return torch.randn(*shape, dtype=getattr(torch, arguments.dtype))


def softmax_attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def reference(q, k, v):
    return rebased_attention_reference(q, k, v, scale=q.shape[-1] ** -0.5, eps=1e-6)


def without_gradient(function, inputs):
    def run():
        with torch.no_grad():
            function(*inputs)

    return run


def with_gradient(function, inputs):
    def run():
        out = function(*inputs)
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    return run


PRODUCT, COPY = 1024, 2**25


def rate_call(arguments, name):
    if name == "product":
        a, b = random_tensor(arguments, PRODUCT, PRODUCT), random_tensor(arguments, PRODUCT, PRODUCT)
        return lambda: a @ b
    source = random_tensor(arguments, COPY)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def machine_rates(arguments):
    """Flops per second of a large matrix product and bytes per second of a large copy, in the inputs' dtype."""
    times = contest(arguments, ["rate:product:", "rate:copy:"])
    product, copy = (1e-3 * times[f"rate:{name}:"]["cpu_ms"] for name in ("product", "copy"))
    return 2 * PRODUCT**3 / product, 2 * COPY * itemsize(arguments) / copy


def itemsize(arguments):
    return getattr(torch, arguments.dtype).itemsize


def floors(arguments, seq_len, rates, *, backward):
    """Milliseconds that ReBased needs for its flops, for its bytes, and softmax attention for its flops, at least."""
    features, values = arguments.feature_dim, arguments.head_dim
    chunk = min(seq_len, DEFAULT_CHUNK_SIZE)
    pairs = (chunk + min(chunk, QUERY_ROWS)) / 2
    # Products per visible pair: scores and values; with gradients those again, and those of q, k, v and the weights.
    flops = 2 * pairs * (features + values)
    softmax_flops = (seq_len + 1) / 2 * 4 * values
    size = 2 * (features + values)
    if seq_len > chunk:
        flops += 4 * state_size(features) * values
    if backward:
        flops += 2 * pairs * (3 * features + 2 * values)
        softmax_flops *= 3.5
        size *= 3
        if seq_len > chunk:
            flops += 8 * state_size(features) * values
    heads = 1e3 * arguments.batch_size * seq_len * arguments.num_heads
    return heads * flops / rates[0], heads * size * itemsize(arguments) / rates[1], heads * softmax_flops / rates[0]


def table(header, rows):
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def milliseconds(row):
    return "not measured" if row is None else f"{row['cpu_ms']:.2f}"


def benchmark_training(arguments, rates):
    header = ["length", "ReBased ms", "softmax ms", "quadratic ReBased ms", "softmax / ReBased"]
    header += ["flops floor ms", "bytes floor ms", "ReBased / floor", "softmax / its floor"]
    for title, kind in (("Forward", "forward"), ("Forward and backward", "training")):
        rows, memory = [], []
        for seq_len in arguments.lengths:
            names = ["rebased", "softmax", *(["reference"] if seq_len <= arguments.reference_up_to else [])]
            found = contest(arguments, [f"{kind}:{name}:{seq_len}" for name in names])
            rebased, softmax, plain = (
                found.get(f"{kind}:{name}:{seq_len}") for name in ("rebased", "softmax", "reference")
            )
            ours, theirs = rebased["cpu_ms"], softmax["cpu_ms"]
            compute, bytes_floor, softmax_floor = floors(arguments, seq_len, rates, backward=kind == "training")
            row = [str(seq_len), milliseconds(rebased), milliseconds(softmax), milliseconds(plain)]
            row += [f"{theirs / ours:.2f}×", f"{compute:.2f}", f"{bytes_floor:.2f}"]
            row.append(f"{ours / max(compute, bytes_floor):.1f}×")
            rows.append([*row, f"{theirs / softmax_floor:.1f}×"])
            memory.append([str(seq_len), *memory_cells(arguments, seq_len, rebased, softmax)])
        print(f"{title}:\n")
        table(header, rows)
    print("Peak memory, forward and backward; the floor is inputs, output and the gradients of both:\n")
    table(["length", "ReBased MiB", "floor MiB", "softmax MiB", "floor MiB"], memory)


def memory_cells(arguments, seq_len, *found):
    sizes = (2 * arguments.feature_dim + 2 * arguments.head_dim, 4 * arguments.head_dim)
    numbers = 2 * arguments.batch_size * seq_len * arguments.num_heads
    for size, row in zip(sizes, found):
        yield f"{row['peak_mib']:.0f}"
        yield f"{numbers * size * itemsize(arguments) / 2**20:.0f}"


def decoding_call(arguments, name, context):
    """One token through all layers, or what transformers' cache does for it in one of them."""
    inputs = make_inputs(arguments, name, context, requires_grad=False)
    layers = range(arguments.decode_layers)
    if name == "rebased":
        _, state = rebased_attention(*inputs, return_state=True)
        states, token = [state.clone() for _ in layers], [x[:, :1] for x in inputs]

        def call():
            for i in layers:
                _, states[i] = rebased_attention(*token, initial_state=states[i], return_state=True)

    elif name == "softmax":
        query, *cached = inputs
        caches, query = [[x.clone() for x in cached] for _ in layers], query[:, :, :1]

        def call():
            for cached in caches:
                F.scaled_dot_product_attention(query, *cached)

    else:
        _, keys, values = inputs
        growing = DynamicLayer()
        growing.update(keys, values)

        def call():
            # Always from this context on: over many calls the cache would be another one.
            growing.keys, growing.values = keys, values
            growing.update(keys[:, :, :1], values[:, :, :1])

    return without_gradient(call, [])


def benchmark_decoding(arguments, rates):
    rows, layers = [], arguments.decode_layers
    heads = arguments.batch_size * arguments.num_heads
    state_bytes = 4 * heads * state_size(arguments.feature_dim) * (arguments.head_dim + 1)
    for context in arguments.contexts:
        names = ["rebased", "softmax", "growth"]
        found = contest(arguments, [f"decoding:{name}:{context}" for name in names])
        ours, theirs, grown = (found[f"decoding:{name}:{context}"]["cpu_ms"] for name in names)
        ours, theirs = ours / layers, theirs / layers
        cached_bytes = 2 * heads * context * arguments.head_dim * itemsize(arguments)
        floor, softmax_floor = 2e3 * state_bytes / rates[1], 1e3 * cached_bytes / rates[1]
        row = [str(context), f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.1f}×", f"{grown:.2f}"]
        row += [f"{(theirs + grown) / ours:.1f}×", f"{floor:.2f}", f"{ours / floor:.1f}×"]
        rows.append([*row, f"{theirs / softmax_floor:.1f}×", f"{state_bytes:,}", f"{cached_bytes:,}"])
    print(f"Decoding after a context, a token through {layers} attention layers, per layer. Growth: appending the")
    print(
        "token to the keys and values of transformers' `DynamicCache`, which copies them; ReBased has no such step:\n"
    )
    header = ["context", "ReBased ms", "softmax ms", "softmax / ReBased", "cache growth ms", "with growth / ReBased"]
    header += ["bytes floor ms", "ReBased / floor", "softmax / its floor", "ReBased state bytes", "key-value bytes"]
    table(header, rows)


def model_call(arguments, name, seq_len):
    """Two layers, width 768, forward and backward from embeddings."""
    model, embedded = MODELS[name]().train(), random_tensor(arguments, arguments.batch_size, seq_len, 768)
    model.to(embedded)
    return lambda: model(inputs_embeds=embedded).last_hidden_state.sum().backward()


def benchmark_models(arguments, rates):
    found = contest(arguments, [f"model:{name}:{arguments.model_length}" for name in MODELS])
    times = {name: found[f"model:{name}:{arguments.model_length}"]["cpu_ms"] for name in MODELS}
    rows, ours = [], times["ReBased (convolution, attention)"]
    for name, spent in times.items():
        with FlopCounterMode(display=False) as counter:
            model_call(arguments, name, arguments.model_length)()
        floor = 1e3 * counter.get_total_flops() / rates[0]
        row = [name, f"{MODELS[name]().num_parameters():,}", f"{spent:.2f}", f"{spent / ours:.2f}×"]
        rows.append([*row, f"{floor:.2f}", f"{spent / floor:.1f}×"])
    print(f"Two layers of transformers models, width 768, {arguments.model_length} tokens, forward and backward:\n")
    table(["model", "parameters", "ms", "time / ReBased", "flops floor ms", "time / floor"], rows)


def main():
    arguments = parse_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.contestant:
        return take_turns(lambda: make_call(arguments), warm_up=2, turn_seconds=TURN_SECONDS)
    print(
        f"{arguments.hardware}; {arguments.dtype}, batch {arguments.batch_size}, {arguments.num_heads} heads, ", end=""
    )
    print(
        f"values {arguments.head_dim}, features {arguments.feature_dim}; torch {torch.__version__}, one thread, CPU time\n"
    )
    rates = machine_rates(arguments)
    print(f"Rates of this machine: {rates[0] / 1e9:.0f} Gflop/s, {rates[1] / 1e9:.1f} GB/s\n")
    benchmark_training(arguments, rates)
    benchmark_decoding(arguments, rates)
    if arguments.model_length:
        benchmark_models(arguments, rates)


if __name__ == "__main__":
    main()
