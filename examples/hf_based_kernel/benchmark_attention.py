# /// script
# dependencies = ["hf_based_kernel"]
# ///
"""Time and memory of ReBased attention against softmax attention, for training, prefill and decoding, in one run.

    python examples/hf_based_kernel/benchmark_attention.py --hardware "2-core x86-64 cloud machine, no GPU"

Prints markdown tables. On a CPU: CPU time of one thread; competitors take turns, medians are shown. Ratios above 1 mean
that ReBased is faster. Floors are the flops of the linear form over the rate of a large matrix product, and its bytes
(read q, k, v, write the output, once) over the rate of a large copy, both measured in the same run.
"""

import argparse
import functools
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaModel, Mamba2Config, Mamba2Model

from hf_based_kernel import RebasedConfig, RebasedModel, rebased_attention
from hf_based_kernel.rebased_attention import DEFAULT_CHUNK_SIZE, rebased_attention_reference, state_size


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="unnamed machine", help="how the tables name the machine")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[128, 512, 2048, 4096, 16384], help="sequence lengths"
    )
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[128, 4096, 32768], help="tokens before a decoded one"
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
    """Median seconds of each function; they take turns until each has had its time, three turns at least."""

    def turn():
        return {name: seconds_of(function, arguments.device) for name, function in functions.items()}

    # The first turn pays for allocations and code that is loaded on demand.
    turn()
    rounds = [turn()]
    more = min(200, max(2, round(arguments.seconds / max(rounds[0].values()))))
    rounds += [turn() for _ in range(more)]
    return {name: statistics.median(times[name] for times in rounds) for name in functions}


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


def floors(arguments, seq_len, rates):
    """Milliseconds that the forward pass needs for its flops and for its bytes at least."""
    features, values = arguments.feature_dim, arguments.head_dim
    chunk = min(seq_len, DEFAULT_CHUNK_SIZE)
    flops = 2 * chunk * (features + values)
    if seq_len > chunk:
        flops += 4 * state_size(features) * values
    heads = arguments.batch_size * seq_len * arguments.num_heads
    size = getattr(torch, arguments.dtype).itemsize
    return 1e3 * heads * flops / rates[0], 1e3 * heads * 2 * (features + values) * size / rates[1]


def table(header, rows):
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def milliseconds(seconds):
    return "not measured" if seconds is None else f"{1e3 * seconds:.2f}"


def benchmark_training(arguments):
    rates = machine_rates(arguments)
    print(f"Rates of this machine: {rates[0] / 1e9:.0f} Gflop/s, {rates[1] / 1e9:.1f} GB/s\n")
    forward, both = [], []
    for seq_len in arguments.lengths:
        linear, softmax = make_inputs(arguments, seq_len)
        competitors = {"rebased": (rebased_attention, linear), "softmax": (softmax_attention, softmax)}
        if seq_len <= arguments.reference_up_to:
            competitors["reference"] = (reference, linear)
        times = medians({name: without_gradient(*one) for name, one in competitors.items()}, arguments)
        compute, memory = floors(arguments, seq_len, rates)
        row = [str(seq_len)] + [milliseconds(times.get(name)) for name in ("rebased", "softmax", "reference")]
        row += [f"{times['softmax'] / times['rebased']:.2f}×", f"{compute:.2f}", f"{memory:.2f}"]
        forward.append([*row, f"{1e3 * times['rebased'] / max(compute, memory):.1f}×"])
        times = medians({name: with_gradient(*one) for name, one in competitors.items()}, arguments)
        row = [str(seq_len)] + [milliseconds(times.get(name)) for name in ("rebased", "softmax", "reference")]
        both.append([*row, f"{times['softmax'] / times['rebased']:.2f}×"])
    names = ["length", "ReBased ms", "softmax ms", "quadratic ReBased ms", "softmax / ReBased"]
    print("Forward:\n")
    table([*names, "flops floor ms", "bytes floor ms", "ReBased / floor"], forward)
    print("Forward and backward:\n")
    table(names, both)


def benchmark_decoding(arguments):
    rows = []
    for context in arguments.contexts:
        linear, (query, keys, values) = make_inputs(arguments, context, requires_grad=False)
        _, state = rebased_attention(*linear, return_state=True)
        step = functools.partial(rebased_attention, initial_state=state, return_state=True)
        functions = {
            "rebased": without_gradient(step, [x[:, :1] for x in linear]),
            "softmax": without_gradient(F.scaled_dot_product_attention, [query[:, :, :1], keys, values]),
        }
        times = medians(functions, arguments)
        row = [str(context), milliseconds(times["rebased"]), milliseconds(times["softmax"])]
        row += [f"{times['softmax'] / times['rebased']:.1f}×", f"{state.nbytes:,}", f"{keys.nbytes + values.nbytes:,}"]
        rows.append(row)
    print("Decoding one token after a context; softmax over a cache that is already there, its growth not counted:\n")
    header = ["context", "ReBased ms", "softmax ms", "softmax / ReBased", "ReBased state bytes", "key-value bytes"]
    table(header, rows)


def benchmark_models(arguments):
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
    functions = {}
    for name, model in models.items():
        model.to(embedded).train()
        functions[name] = lambda model=model: model(inputs_embeds=embedded).last_hidden_state.sum().backward()
    times = medians(functions, arguments)
    ours = times["ReBased (convolution, attention)"]
    rows = [
        [name, f"{models[name].num_parameters():,}", milliseconds(seconds), f"{seconds / ours:.2f}×"]
        for name, seconds in times.items()
    ]
    print(f"Two layers of transformers models, width 768, {arguments.model_length} tokens, forward and backward:\n")
    table(["model", "parameters", "ms", "time / ReBased"], rows)


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
    for name in ("rebased", "softmax"):
        command = [sys.executable, *sys.argv, "--measure_memory_of", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append([name, f"{float(done.stdout):.0f}"])
    print(f"Peak memory over inputs, forward and backward, {arguments.memory_length} tokens:\n")
    table(["attention", "MB"], rows)


def main():
    arguments = parse_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.measure_memory_of:
        return measure_memory(arguments)
    print(f"{arguments.hardware}; {arguments.device}, {arguments.dtype}, batch {arguments.batch_size}, ", end="")
    print(f"{arguments.num_heads} heads, values {arguments.head_dim}, features {arguments.feature_dim}; ", end="")
    print(f"torch {torch.__version__}, one thread, CPU time\n" if arguments.device == "cpu" else "CUDA events\n")
    benchmark_training(arguments)
    benchmark_decoding(arguments)
    if arguments.model_length:
        benchmark_models(arguments)
    if arguments.memory_length and arguments.device == "cpu":
        benchmark_memory(arguments)


if __name__ == "__main__":
    main()
