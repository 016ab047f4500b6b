# /// script
# dependencies = ["hf_based_kernel"]
# ///
"""Time and memory of ReBased attention against softmax attention, for training, prefill and decoding, in one run.

    python examples/benchmarks/rebased_attention_cpu.py --hardware "2-core x86-64 cloud machine, no GPU"

Prints markdown tables. On a CPU: CPU time of one thread. Competitors take turns of consecutive calls, 50 ms at least, as a
model makes them when it trains or decodes; a call right after the other competitor's would find its own data evicted from
the caches. Medians of the turns are shown; ratios above 1 mean that ReBased is faster.

Floors are flops over the rate of a large matrix product, and bytes over the rate of a large copy, both rates measured in
the same run. Flops of ReBased: its products, with scores in chunks as it forms them; of softmax: the visible pairs; of the
models: the matrix products of a pass, counted. Bytes: inputs, outputs and gradients once; in decoding the state read and
written, or the keys and values read.
"""

import argparse
import statistics
import subprocess
import sys
import time
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


TURN_SECONDS = 0.05


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="unnamed machine", help="how the tables name the machine")
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
    parser.add_argument("--memory_length", type=int, default=16384, help="length for peak memory; 0 leaves it out")
    parser.add_argument("--seconds", type=float, default=4.0, help="time spent on a competitor at least (default: 4)")
    parser.add_argument("--batch_size", type=int, default=1, help="sequences (default: 1)")
    parser.add_argument("--num_heads", type=int, default=12, help="heads (default: 12)")
    parser.add_argument(
        "--feature_dim", type=int, default=16, help="query and key numbers per ReBased head (default: 16)"
    )
    parser.add_argument("--head_dim", type=int, default=64, help="value numbers per head, all numbers of softmax (64)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the inputs (float32)")
    parser.add_argument(
        "--measure_memory_of", choices=["rebased", "softmax"], help="print only its peak memory, in MB"
    )
    return parser.parse_args()


def seconds_of(function, device):
    if device == "cpu":
        started = time.process_time()
        function()
        return time.process_time() - started
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def medians(functions, arguments):
    """Median seconds of a call of each function over turns of consecutive calls, three turns at least."""
    for function in functions.values():
        # The first call pays for allocations and code that is loaded on demand.
        function()
    calls = {
        name: max(1, round(TURN_SECONDS / seconds_of(function, arguments.device)))
        for name, function in functions.items()
    }

    def turn():
        return {name: seconds_of(repeated(functions[name], n), arguments.device) / n for name, n in calls.items()}

    rounds = [turn()]
    longest = max(seconds * calls[name] for name, seconds in rounds[0].items())
    rounds += [turn() for _ in range(min(200, max(2, round(arguments.seconds / longest))))]
    return {name: statistics.median(times[name] for times in rounds) for name in functions}


def repeated(function, calls):
    def run():
        for _ in range(calls):
            function()

    return run


def make_inputs(arguments, seq_len, *, requires_grad=True):
    """q, k, v of ReBased, (batch, seq, num_heads, dim), and of softmax attention, (batch, num_heads, seq, head_dim)."""
    rows = (arguments.batch_size, seq_len, arguments.num_heads)
    heads = (arguments.batch_size, arguments.num_heads, seq_len, arguments.head_dim)
    shapes = [(*rows, size) for size in (arguments.feature_dim, arguments.feature_dim, arguments.head_dim)]
    inputs = [
        random_tensor(arguments, *shape).requires_grad_(requires_grad) for shape in (*shapes, heads, heads, heads)
    ]
    return inputs[:3], inputs[3:]


def random_tensor(arguments, *shape):
    return torch.randn(*shape, device=arguments.device, dtype=getattr(torch, arguments.dtype))


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


def machine_rates(arguments):
    """Flops per second of a large matrix product and bytes per second of a large copy, in the inputs' dtype."""
    options = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
    size = 1024 if arguments.device == "cpu" else 8192
    a, b, source = (
        torch.randn(size, size, **options),
        torch.randn(size, size, **options),
        torch.randn(2**25, **options),
    )
    target = torch.empty_like(source)
    times = medians({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, arguments)
    return 2 * size**3 / times["product"], 2 * source.nbytes / times["copy"]


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
    itemsize = getattr(torch, arguments.dtype).itemsize
    return heads * flops / rates[0], heads * size * itemsize / rates[1], heads * softmax_flops / rates[0]


def table(header, rows):
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def milliseconds(seconds):
    return "not measured" if seconds is None else f"{1e3 * seconds:.2f}"


def benchmark_training(arguments, rates):
    header = ["length", "ReBased ms", "softmax ms", "quadratic ReBased ms", "softmax / ReBased"]
    header += ["flops floor ms", "bytes floor ms", "ReBased / floor", "softmax / its floor"]
    for title, backward in (("Forward", False), ("Forward and backward", True)):
        rows = []
        for seq_len in arguments.lengths:
            linear, softmax = make_inputs(arguments, seq_len)
            competitors = {"rebased": (rebased_attention, linear), "softmax": (softmax_attention, softmax)}
            if seq_len <= arguments.reference_up_to:
                competitors["reference"] = (reference, linear)
            wrap = with_gradient if backward else without_gradient
            times = medians({name: wrap(*one) for name, one in competitors.items()}, arguments)
            compute, memory, softmax_floor = floors(arguments, seq_len, rates, backward=backward)
            row = [str(seq_len)] + [milliseconds(times.get(name)) for name in ("rebased", "softmax", "reference")]
            row += [f"{times['softmax'] / times['rebased']:.2f}×", f"{compute:.2f}", f"{memory:.2f}"]
            row.append(f"{1e3 * times['rebased'] / max(compute, memory):.1f}×")
            rows.append([*row, f"{1e3 * times['softmax'] / softmax_floor:.1f}×"])
        print(f"{title}:\n")
        table(header, rows)


def benchmark_decoding(arguments, rates):
    rows, layers = [], range(arguments.decode_layers)
    for context in arguments.contexts:
        linear, (query, keys, values) = make_inputs(arguments, context, requires_grad=False)
        _, state = rebased_attention(*linear, return_state=True)
        states = [state.clone() for _ in layers]
        caches = [(keys.clone(), values.clone()) for _ in layers]
        growing = DynamicLayer()
        growing.update(keys, values)
        token, query = [x[:, :1] for x in linear], query[:, :, :1]

        def rebased(token=token, states=states):
            for i in layers:
                _, states[i] = rebased_attention(*token, initial_state=states[i], return_state=True)

        def softmax(query=query, caches=caches):
            for cached in caches:
                F.scaled_dot_product_attention(query, *cached)

        def growth(growing=growing, keys=keys, values=values):
            # Always from this context on: over many calls the cache would be another one.
            growing.keys, growing.values = keys, values
            growing.update(keys[:, :, :1], values[:, :, :1])

        functions = {"rebased": rebased, "softmax": softmax, "growth": growth}
        times = medians({name: without_gradient(function, []) for name, function in functions.items()}, arguments)
        ours, theirs, grown = times["rebased"] / len(layers), times["softmax"] / len(layers), times["growth"]
        cached_bytes = keys.nbytes + values.nbytes
        floor, softmax_floor = 2 * state.nbytes / rates[1], cached_bytes / rates[1]
        row = [str(context), milliseconds(ours), milliseconds(theirs), f"{theirs / ours:.1f}×", milliseconds(grown)]
        row += [f"{(theirs + grown) / ours:.1f}×", milliseconds(floor), f"{ours / floor:.1f}×"]
        rows.append([*row, f"{theirs / softmax_floor:.1f}×", f"{state.nbytes:,}", f"{cached_bytes:,}"])
    print(
        f"Decoding after a context, a token through {len(layers)} attention layers, per layer. Growth: appending the"
    )
    print(
        "token to the keys and values of transformers' `DynamicCache`, which copies them; ReBased has no such step:\n"
    )
    header = ["context", "ReBased ms", "softmax ms", "softmax / ReBased", "cache growth ms", "with growth / ReBased"]
    header += ["bytes floor ms", "ReBased / floor", "softmax / its floor", "ReBased state bytes", "key-value bytes"]
    table(header, rows)


def benchmark_models(arguments, rates):
    """Two layers of each model, width 768, forward and backward from embeddings."""
    rebased = RebasedConfig(vocab_size=8, num_hidden_layers=2)
    llama = LlamaConfig(
        vocab_size=8, hidden_size=768, intermediate_size=1536, num_attention_heads=12, num_hidden_layers=2
    )
    mamba = Mamba2Config(vocab_size=8, hidden_size=768, head_dim=64, num_heads=24, n_groups=1, num_hidden_layers=2)
    models = {
        "ReBased (convolution, attention)": RebasedModel(rebased),
        "Llama": LlamaModel(llama),
        "Mamba2 (transformers' torch form on a CPU)": Mamba2Model(mamba),
    }
    embedded = random_tensor(arguments, arguments.batch_size, arguments.model_length, 768)
    functions, floor = {}, {}
    for name, model in models.items():
        model.to(embedded).train()
        functions[name] = lambda model=model: model(inputs_embeds=embedded).last_hidden_state.sum().backward()
        with FlopCounterMode(display=False) as counter:
            functions[name]()
        floor[name] = counter.get_total_flops() / rates[0]
    times = medians(functions, arguments)
    ours = times["ReBased (convolution, attention)"]
    rows = []
    for name, seconds in times.items():
        row = [name, f"{models[name].num_parameters():,}", milliseconds(seconds), f"{seconds / ours:.2f}×"]
        rows.append([*row, milliseconds(floor[name]), f"{seconds / floor[name]:.1f}×"])
    print(f"Two layers of transformers models, width 768, {arguments.model_length} tokens, forward and backward:\n")
    table(["model", "parameters", "ms", "time / ReBased", "flops floor ms", "time / floor"], rows)


def memory_of_this_process(field):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if field in line)


def measure_memory(arguments):
    """Print how many MB above its start this process grew over a forward and backward pass, on Linux."""
    linear, softmax = make_inputs(arguments, arguments.memory_length)
    function, inputs = {"rebased": (rebased_attention, linear), "softmax": (softmax_attention, softmax)}[
        arguments.measure_memory_of
    ]
    # Writing 5 resets the peak to what is in use now.
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_of_this_process("VmRSS")
    with_gradient(function, inputs)()
    print((memory_of_this_process("VmHWM") - before) / 1024)


def benchmark_memory(arguments):
    rows = []
    linear = 2 * arguments.feature_dim + 3 * arguments.head_dim
    sizes = {"rebased": linear, "softmax": 5 * arguments.head_dim}
    numbers = arguments.batch_size * arguments.memory_length * arguments.num_heads
    for name, size in sizes.items():
        command = [sys.executable, *sys.argv, "--measure_memory_of", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        floor = numbers * size * getattr(torch, arguments.dtype).itemsize / 2**20
        rows.append([name, f"{float(done.stdout):.0f}", f"{floor:.0f}", f"{float(done.stdout) / floor:.1f}×"])
    print(
        f"Peak memory over inputs, forward and backward, {arguments.memory_length} tokens; the floor is the output, its"
    )
    print("gradient and the inputs' gradients:\n")
    table(["attention", "MB", "floor MB", "MB / floor"], rows)


def main():
    arguments = parse_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.measure_memory_of:
        return measure_memory(arguments)
    print(f"{arguments.hardware}; {arguments.device}, {arguments.dtype}, batch {arguments.batch_size}, ", end="")
    print(f"{arguments.num_heads} heads, values {arguments.head_dim}, features {arguments.feature_dim}; ", end="")
    print(f"torch {torch.__version__}, one thread, CPU time\n" if arguments.device == "cpu" else "CUDA events\n")
    rates = machine_rates(arguments)
    print(f"Rates of this machine: {rates[0] / 1e9:.0f} Gflop/s, {rates[1] / 1e9:.1f} GB/s\n")
    benchmark_training(arguments, rates)
    benchmark_decoding(arguments, rates)
    if arguments.model_length:
        benchmark_models(arguments, rates)
    if arguments.memory_length and arguments.device == "cpu":
        benchmark_memory(arguments)


if __name__ == "__main__":
    main()
