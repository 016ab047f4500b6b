# /// script
# dependencies = ["hf_based_kernel", "triton", "matplotlib", "fla-core", "retention"]
# ///
"""
ReBased attention on a GPU beside its peers: forward, forward + backward, decoding, whole models.

    python examples/benchmarks/rebased_attention_gpu.py --output_dir outputs/gpu

Writes rebased_attention.md and .json after every row, rebased_attention.png at the end. `--dry_run` runs every line at tiny
sizes on a CPU, Triton kernels interpreted. A peer that is missing or cannot run has a row that says why.

- "ms" replays a CUDA graph (no time of the CPU; median of 10 replays), "eager ms" calls from Python with a cold L2 cache
  (`triton.testing.do_bench`); where a graph cannot be captured or a call takes 20 ms, ms is eager ms.
- The floor is the larger of inputs, outputs and gradients once through memory at the measured rate of a copy, and the
  products that the contestant cannot do without at the measured rate of a product of bfloat16 8192 x 8192 matrices.
- "error" is against the contestant's own formula in float64 on the same inputs, 1024 tokens: the norm of the difference
  over the norm, of the output or (with backward) the worst gradient.
- "GiB" is the peak of a call above what was allocated before it; in decoding, the state or the keys and values moved.

What the peers compute:

- softmax attention, queries and keys as wide as values (`head_dim`): not the same function.
- fla `parallel_rebased`: the same function, quadratic in length; divides by the sums + eps, rounded to the input dtype.
- fla `chunk_linear_attn`: the same function on ReBased's packed features, built before and not timed; states between its
  chunks and the running sum of keys under its quotient are in the input dtype.
- retention `power_retention` (degree 2, no gate): (q·k)² with queries, keys and values of one width, 32 at least (at 16
  it has no configuration), so not at 16/64. "equal heads": as many heads, of head_dim. "same function": twice the heads of
  32 can hold ours, keys padded with zeros, values in halves. "equal state": as many heads of 32 as our state has bytes.

The peers tune themselves at the reference size (8 x 4096), over `--peer_configs` of their configurations per kernel.
"""

import argparse
import contextlib
import functools
import gc
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple


# Triton decides at its first import whether kernels are interpreted.
if "--dry_run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel  # noqa: E402

from hf_based_kernel import RebasedConfig, RebasedForCausalLM, rebased_attention  # noqa: E402
from hf_based_kernel.rebased_attention_forms import rebased_attention_reference  # noqa: E402
from hf_based_kernel.rebased_features import REBASED, key_features, query_features, state_size  # noqa: E402


DRY = "--dry_run" in sys.argv
DEVICE = "cpu" if DRY else "cuda"
HEADS, FEATURE_DIM, HEAD_DIM = (2, 4, 8) if DRY else (12, 16, 64)
REFERENCE_BATCH, REFERENCE_LENGTH = (1, 32) if DRY else (8, 4096)
LENGTHS = [32, 48] if DRY else [2**n for n in range(10, 17)]
CHECKED_LENGTH = 16 if DRY else 1024
DECODING = (
    {"batch_sizes": [1, 2], "contexts": [16]} if DRY else {"batch_sizes": [1, 8, 64], "contexts": [1024, 8192, 65536]}
)
OURS, FLASH = "ReBased (hf_based_kernel)", "FlashAttention (SDPA)"
PARTS = ["forward", "backward", "decode", "model"]
TITLES = {"backward": "forward + backward", "decode": "decoding, one token", "training": "training, a whole model"}
QUANTILES = (0.5, 0.2, 0.8)
# processes that compile where a peer tries all its configurations; each takes up to 8 GB of the card
CHILDREN = 8


class Contestant(NamedTuple):
    """`function(q, k, v)` over (batch, seq, num_heads, dim); `reference` is its formula, for float64."""

    function: Callable
    reference: Callable
    num_heads: int
    feature_dim: int
    head_dim: int
    state_rows: int | None  # None: quadratic in the length
    chunk_sizes: tuple[int, ...] = ()
    prepare: Callable = lambda q, k, v: (q, k, v)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--only", nargs="+", help="contestants whose names hold one of these words (default: all)")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="tokens (default: 1024 to 65536)")
    parser.add_argument("--dtype", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16"], help="(bfloat16)")
    parser.add_argument("--seconds", type=float, default=240, help="start no row after these (default: 240)")
    parser.add_argument(
        "--peer_configs", type=int, default=6, help="configurations a peer's kernel tries; 0 for all (6)"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/gpu"), help="default: outputs/gpu")
    parser.add_argument("--dry_run", action="store_true", help="tiny sizes on a CPU, kernels interpreted")
    parser.add_argument("--compile_share", type=int, help="used by the script itself, to compile in parallel")
    return parser.parse_args()


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: SDPBackend) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def fla_parallel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return importlib.import_module("fla.ops.rebased").parallel_rebased(q, k, v, eps=1e-6)


def fla_chunk(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return importlib.import_module("fla.ops.linear_attn").chunk_linear_attn(q, k, v, scale=1 / FEATURE_DIM)[0]


def packed_features(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple:
    return query_features(q.float(), REBASED).to(q.dtype), key_features(k.float(), REBASED).to(k.dtype), v


def features_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = torch.einsum("bihf,bjhf->bhij", q, k).tril() / FEATURE_DIM
    return torch.einsum("bhij,bjhd->bihd", weights / (weights.sum(-1, keepdim=True) + 1e-10), v)


def retention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunk_size: int = 512) -> torch.Tensor:
    power_retention = importlib.import_module("retention").power_retention
    return power_retention(q, k, v, deg=2, scale=q.shape[-1] ** -0.5, chunk_size=chunk_size)


def rebased_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return rebased_attention_reference(q, k, v, scale=q.shape[-1] ** -0.5, eps=1e-6)


def make_contestants(dtype: torch.dtype) -> dict[str, Contestant]:
    ours, softmax = (HEADS, FEATURE_DIM, HEAD_DIM), (HEADS, HEAD_DIM, HEAD_DIM, None)
    rows = state_size(FEATURE_DIM)
    triton_form = partial(rebased_attention, backend="triton")
    flash, cudnn, exact = (
        partial(softmax_attention, backend=backend)
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)
    )
    contestants = {
        OURS: Contestant(triton_form, rebased_reference, *ours, rows),
        FLASH: Contestant(flash, exact, *softmax),
        "cuDNN attention (SDPA)": Contestant(cudnn, exact, *softmax),
        "fla parallel_rebased": Contestant(fla_parallel, rebased_reference, *ours, None),
        "fla chunk_linear_attn": Contestant(fla_chunk, features_reference, *ours, rows, prepare=packed_features),
    }
    # its states: 16 x 16 blocks of products in the input dtype, their sums in float32
    bytes_of_32 = 768 * (32 * dtype.itemsize + 4)
    heads_of_equal_state = max(HEADS * rows * (HEAD_DIM + 1) * 4 // bytes_of_32, 1)
    sizes = {
        "equal heads": (HEADS, HEAD_DIM, 2560),
        "same function": (2 * HEADS, 32, 768),
        "equal state": (heads_of_equal_state, 32, 768),
    }
    for name, (heads, dim, rows) in sizes.items():
        contestants[f"retention, {name} ({heads} x {dim})"] = Contestant(
            retention, rebased_reference, heads, dim, dim, rows, chunk_sizes=(128, 512, 1024)
        )
    return contestants


@functools.cache
def random_generator() -> torch.Generator:
    # of its own: a CUDA graph that cannot be captured leaves the default one unusable
    return torch.Generator(DEVICE).manual_seed(0)


def random_tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype, generator=random_generator())


def make_inputs(contestant: Contestant, batch_size: int, length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    dims = (contestant.feature_dim, contestant.feature_dim, contestant.head_dim)
    tensors = [random_tensor(batch_size, length, contestant.num_heads, dim, dtype=dtype) for dim in dims]
    return [tensor.detach().requires_grad_() for tensor in contestant.prepare(*tensors)]


def forward(function: Callable, inputs: list[torch.Tensor], grad_out: torch.Tensor | None) -> list[torch.Tensor]:
    with torch.no_grad():
        return [function(*inputs)]


def backward(function: Callable, inputs: list[torch.Tensor], grad_out: torch.Tensor) -> list[torch.Tensor]:
    out = function(*inputs)
    return [out, *torch.autograd.grad(out, inputs, grad_out)]


RUNS = {"forward": forward, "backward": backward}


@functools.cache
def relative_error(contestant: Contestant, part: str, dtype: torch.dtype) -> float | Exception:
    inputs = make_inputs(contestant, 2, CHECKED_LENGTH, dtype)
    grad_out = random_tensor(*inputs[2].shape, dtype=dtype)
    try:
        results = RUNS[part](contestant.function, inputs, grad_out)
    except Exception as error:
        return error.with_traceback(None)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    expected = RUNS[part](contestant.reference, exact_inputs, grad_out.double())
    return max(((x - y).norm() / y.norm()).item() for x, y in zip(results, expected))


def milliseconds(function: Callable, *, graph: bool = True, rep: int = 50) -> dict[str, float]:
    """Median and quantiles: of a CUDA graph's replays where one can be captured, and of eager calls."""
    if DRY:
        begun = time.perf_counter()
        function()
        eager = [1e3 * (time.perf_counter() - begun)] * 3
    else:
        from triton.testing import do_bench, do_bench_cudagraph

        eager = do_bench(function, warmup=rep // 5, rep=rep, quantiles=QUANTILES)
    times = eager
    if not DRY and graph and eager[0] < 20:
        try:
            times = do_bench_cudagraph(function, rep=10, quantiles=QUANTILES)
        except Exception as error:
            print(f"no CUDA graph: {first_line(error)}", flush=True)
    return dict(zip(("ms", "low", "high"), times)) | {"eager_ms": eager[0]}


def peak_gib(function: Callable) -> float:
    if DRY:
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def measure_rates() -> dict[str, float]:
    """Bytes per second of a large copy, read and written; flops per second of a large bfloat16 product."""
    size, count = (64, 2**12) if DRY else (8192, 2**29)
    a, b = random_tensor(2, size, size)
    source = random_tensor(count)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), graph=False)["ms"]
    product = milliseconds(lambda: a @ b, graph=False)["ms"]
    return {"bytes": 2e3 * source.nbytes / copy, "flops": 2e3 * size**3 / product}


def floor_ms(contestant: Contestant, part: str, inputs: list[torch.Tensor], rates: dict[str, float]) -> float:
    read, written = sum(x.nbytes for x in inputs), inputs[2].nbytes
    batch_size, length = inputs[0].shape[:2]
    if contestant.state_rows is None:
        # the visible half of the scores, and of their products with the values
        flops = length * (contestant.feature_dim + contestant.head_dim)
    else:
        # every key into the state, every query through it
        flops = 4 * contestant.state_rows * (contestant.head_dim + 1)
    flops *= batch_size * length * contestant.num_heads
    moved = read + written
    if part == "backward":
        # two products for each; inputs and the output's gradient read, the inputs' gradients written
        flops, moved = 3 * flops, moved + 2 * read + written
    return 1e3 * max(moved / rates["bytes"], flops / rates["flops"])


def measure_attention(
    contestant: Contestant, part: str, batch_size: int, length: int, *, dtype: torch.dtype, rates: dict[str, float]
) -> dict:
    error = relative_error(contestant, part, dtype)
    if isinstance(error, Exception):
        raise error
    inputs = make_inputs(contestant, batch_size, length, dtype)
    grad_out = random_tensor(*inputs[2].shape, dtype=dtype)
    chunk_sizes = [size for size in contestant.chunk_sizes if 2 * size <= length]
    functions = {size: partial(contestant.function, chunk_size=size) for size in chunk_sizes}
    functions = {
        size: partial(RUNS[part], function, inputs, grad_out)
        for size, function in (functions or {None: contestant.function}).items()
    }
    row = {"error": error}
    if len(functions) > 1:
        quick = {size: milliseconds(run, graph=False, rep=5)["ms"] for size, run in functions.items()}
        functions = {size: functions[size] for size in [min(quick, key=quick.__getitem__)]}
        row["note"] = f"chunks of {next(iter(functions))}"
    run = next(iter(functions.values()))
    run()
    row |= milliseconds(run) | {"floor_ms": floor_ms(contestant, part, inputs, rates)}
    return row | {"gib": peak_gib(run)}


def measure_decoding(name: str, batch_size: int, context: int, *, rates: dict[str, float]) -> dict:
    """One token through one attention layer, after `context` others."""
    dims = (FEATURE_DIM, FEATURE_DIM, HEAD_DIM) if name == OURS else (HEAD_DIM,) * 3
    q, k, v = (random_tensor(batch_size, 1, HEADS, dim) for dim in dims)
    if name == OURS:
        past = [random_tensor(1, context, HEADS, dim) for dim in dims]
        _, state = rebased_attention(*past, return_state=True)
        state = state.repeat(batch_size, 1, 1, 1)
        moved = 2 * state.nbytes

        def step() -> torch.Tensor:
            return rebased_attention(q, k, v, initial_state=state, return_state=True)[0]
    else:
        keys, values = random_tensor(2, batch_size, HEADS, context, HEAD_DIM)
        moved = keys.nbytes + values.nbytes
        query = q.transpose(1, 2)

        def step() -> torch.Tensor:
            return F.scaled_dot_product_attention(query, keys, values)

    with torch.no_grad():
        return milliseconds(step) | {"floor_ms": 1e3 * moved / rates["bytes"], "gib": moved / 2**30}


def make_model(name: str) -> PreTrainedModel:
    """About 150M parameters: the paper's ReBased model and its attention baseline, random weights."""
    vocab_size, hidden_size, heads, layers = (64, 16, 2, 2) if DRY else (50280, 768, 12, 18 if name == OURS else 12)
    if name == OURS:
        config = RebasedConfig(
            vocab_size=vocab_size, hidden_size=hidden_size, num_attention_heads=heads, num_hidden_layers=layers
        )
        return RebasedForCausalLM(config).to(DEVICE)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to(DEVICE)


def measure_training(name: str, batch_size: int, length: int, *, rates: dict[str, float]) -> dict:
    """Forward and backward under autocast; the floor is six flops per parameter and token."""
    model = make_model(name).train()
    tokens = torch.randint(0, model.config.vocab_size, (batch_size, length), device=DEVICE)

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    step()
    row = milliseconds(step, graph=False, rep=1000) | {"gib": peak_gib(step)}
    row["floor_ms"] = 6e3 * model.num_parameters() * tokens.numel() / rates["flops"]
    return row | {
        "tokens_per_second": 1e3 * tokens.numel() / row["ms"],
        "note": f"{model.num_parameters():,} parameters",
    }


def measure_generation(name: str, batch_size: int, length: int, *, rates: dict[str, float]) -> dict:
    """Greedy `generate` with bfloat16 weights: ms of a token after the first; the prompt's time in the note."""
    model, new_tokens = make_model(name).to(torch.bfloat16).eval(), 2 if DRY else 32
    tokens = torch.randint(0, model.config.vocab_size, (batch_size, length), device=DEVICE)

    def seconds(count: int) -> float:
        begun = time.perf_counter()
        model.generate(tokens, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        if not DRY:
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    seconds(4)
    prompt = min(seconds(1) for _ in range(2))
    ms = sorted(1e3 * (seconds(1 + new_tokens) - prompt) / new_tokens for _ in range(3))
    row = {"ms": ms[1], "low": ms[0], "high": ms[2], "eager_ms": ms[1], "tokens_per_second": 1e3 * batch_size / ms[1]}
    return row | {"note": f"prompt {1e3 * prompt:.0f} ms", "gib": peak_gib(lambda: seconds(2))}


def limit_configs(count: int, share: int | None = None) -> None:
    """Thin the configurations of every autotuned kernel to `count`, evenly spaced; or to one `share` of these."""
    from triton.runtime.autotuner import Autotuner

    for tuner in [thing for thing in gc.get_objects() if issubclass(type(thing), Autotuner)]:
        # a kernel that is compiled again for every batch size: half as many
        limit = max(count // 2, 1) if "B" in tuner.keys else count
        if count and len(tuner.configs) > limit:
            tuner.configs = tuner.configs[:: len(tuner.configs) // limit][:limit]
        if share is not None:
            tuner.configs = tuner.configs[share :: count or CHILDREN] or tuner.configs[:1]


def is_peer(name: str) -> bool:
    return name.startswith(("fla", "retention"))


def compile_peers(arguments: argparse.Namespace) -> None:
    """Run every peer at the reference size, so that it tunes there; in a child, one share of its configurations."""
    for module in ("fla.ops.rebased", "fla.ops.linear_attn", "retention"):
        with contextlib.suppress(Exception):  # its rows will say so
            importlib.import_module(module)
    limit_configs(arguments.peer_configs, arguments.compile_share)
    for name, contestant in make_contestants(torch.bfloat16).items():
        if not is_peer(name) or (arguments.only and not any(word in name for word in arguments.only)):
            continue
        # sizes that a number's divisibility by 16 makes Triton compile apart
        for chunk_size in contestant.chunk_sizes[::2] or (None,):
            try:
                inputs = make_inputs(contestant, REFERENCE_BATCH, REFERENCE_LENGTH, torch.bfloat16)
                options = {"chunk_size": chunk_size} if chunk_size else {}
                backward(partial(contestant.function, **options), inputs, random_tensor(*inputs[2].shape))
            except Exception as error:
                print(f"{name}: {first_line(error)}", flush=True)


def compile_in_children(arguments: argparse.Namespace) -> None:
    """Fill Triton's cache from several processes: compiling takes longer than measuring."""
    torch.cuda.empty_cache()
    only = ["--only", *arguments.only] if arguments.only else []
    command = [sys.executable, __file__, "--peer_configs", str(arguments.peer_configs), *only, "--compile_share"]
    children = [
        subprocess.Popen([*command, str(share)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for share in range(arguments.peer_configs or CHILDREN)
    ]
    deadline = time.monotonic() + arguments.seconds / 3
    for child in children:
        try:
            child.wait(max(deadline - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            child.kill()


def first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:110].replace("|", "/")


def make_tasks(arguments: argparse.Namespace, rates: dict[str, float]) -> list[tuple[dict, Callable]]:
    """(what the row says of itself, what measures the rest), the peers last: one may damage the CUDA context."""
    tasks = []

    def add(part: str, dtype: str, name: str, batch: int, length: int, measure: Callable) -> None:
        if not arguments.only or any(word in name for word in arguments.only):
            row = {"part": part, "dtype": dtype, "name": name, "batch": batch, "length": length}
            tasks.append((row, partial(measure, rates=rates)))

    # the reference size first, for a run that is cut
    lengths = sorted(arguments.lengths, key=lambda length: length != REFERENCE_LENGTH)
    for dtype in arguments.dtype:
        for name, contestant in make_contestants(getattr(torch, dtype)).items():
            for part in [part for part in RUNS if part in arguments.parts]:
                for length in lengths:
                    batch = max(REFERENCE_BATCH * REFERENCE_LENGTH // length, 1)
                    measure = partial(measure_attention, contestant, part, batch, length, dtype=getattr(torch, dtype))
                    add(part, dtype, name, batch, length, measure)
    for name in (OURS, "softmax (SDPA)") if "decode" in arguments.parts else ():
        for batch in DECODING["batch_sizes"]:
            for context in DECODING["contexts"]:
                add("decode", "bfloat16", name, batch, context, partial(measure_decoding, name, batch, context))
    for name in (OURS, "Llama (SDPA)") if "model" in arguments.parts else ():
        batch, length = 1 if DRY else 4, REFERENCE_LENGTH
        add("training", "bfloat16", name, batch, length, partial(measure_training, name, batch, length))
        for batch in [1] if DRY else [1, 8]:
            for length in [8] if DRY else [2048, 16384]:
                add("generate", "bfloat16", name, batch, length, partial(measure_generation, name, batch, length))
    return sorted(tasks, key=lambda task: is_peer(task[0]["name"]))


def cell(number: float | None, form: str = ".4g") -> str:
    return "" if number is None else format(number, form)


def render(head: str, rows: list[dict]) -> str:
    """One table per part and dtype, sorted by size; ratios are to ReBased and to FlashAttention of the same size."""
    lines = [head, ""]
    for part, dtype in dict.fromkeys((row["part"], row["dtype"]) for row in rows):
        group = sorted(
            (row for row in rows if (row["part"], row["dtype"]) == (part, dtype)),
            key=lambda row: (row["batch"] if part in ("decode", "generate") else 0, row["length"]),
        )
        times = {(row["name"], row["batch"], row["length"]): row.get("ms") for row in group}
        lines += [
            f"## {TITLES.get(part, part)}, {dtype}",
            "",
            "| length | batch | contestant | ms | eager ms | floor ms | ms / floor | time / ReBased | FlashAttention / time "
            "| tokens/s | GiB | error | note |",
            "|" + "---:|" * 2 + "---|" + "---:|" * 9 + "---|",
        ]
        for row in group:
            size, ms, floor = (row["batch"], row["length"]), row.get("ms"), row.get("floor_ms")
            ours, flash = times.get((OURS, *size)), times.get((FLASH, *size))
            cells = [row["length"], row["batch"], row["name"], cell(ms), cell(row.get("eager_ms")), cell(floor)]
            cells += [cell(ms and floor and ms / floor, ".1f"), cell(ms and ours and ms / ours, ".2f")]
            cells += [cell(ms and flash and flash / ms, ".2f"), cell(row.get("tokens_per_second"), ",.0f")]
            cells += [cell(row.get("gib"), ".3f"), cell(row.get("error"), ".1e"), row.get("note", "")]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines.append("")
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = dict.fromkeys((row["part"], row["dtype"]) for row in rows if row["part"] in RUNS)
    if not groups:
        return
    figure, axes = pyplot.subplots(1, len(groups), figsize=(7 * len(groups), 5.5), squeeze=False)
    for axis, group in zip(axes[0], groups):
        for name in dict.fromkeys(row["name"] for row in rows):
            points = [
                row for row in rows if (row["part"], row["dtype"], row["name"]) == (*group, name) and "ms" in row
            ]
            points.sort(key=lambda row: row["length"])
            if points:
                ms = [row["ms"] for row in points]
                bars = [[row["ms"] - row["low"] for row in points], [row["high"] - row["ms"] for row in points]]
                axis.errorbar([row["length"] for row in points], ms, yerr=bars, marker="o", capsize=3, label=name)
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="tokens",
            ylabel="ms",
            title=f"{TITLES.get(group[0], group[0])}, {group[1]}",
        )
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def describe(rates: dict[str, float], peer_configs: int) -> str:
    versions = []
    for package in ("torch", "triton", "transformers", "fla-core", "retention"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} missing")
    card = "A dry run on a CPU, not a measurement" if DRY else torch.cuda.get_device_name()
    return (
        f"{card}; {', '.join(versions)}. Copy {rates['bytes'] / 1e12:.2f} TB/s, product {rates['flops'] / 1e12:.0f} "
        f"Tflop/s. {HEADS} heads, features {FEATURE_DIM}, values {HEAD_DIM}; peers' kernels tuned over "
        f"{peer_configs or 'all'} of their configurations."
    )


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    if not DRY and not torch.cuda.is_available():
        raise SystemExit(
            "rebased_attention_gpu.py found no CUDA GPU: run it on a machine with one, or give --dry_run."
        )
    begun = time.monotonic()
    if arguments.compile_share is not None:
        return compile_peers(arguments)
    rates = measure_rates()
    head, rows, compiled = describe(rates, arguments.peer_configs), [], DRY
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    print(head, flush=True)
    for row, measure in make_tasks(arguments, rates):
        try:
            if not DRY:
                torch.cuda.empty_cache()
            if is_peer(row["name"]) and not compiled and time.monotonic() - begun < arguments.seconds:
                compiled = True
                compile_in_children(arguments)
                compile_peers(arguments)
            row |= measure() if time.monotonic() - begun < arguments.seconds else {"note": "not measured"}
        except Exception as error:  # the row says what happened; the others are still measured
            row["note"] = first_line(error)
        rows.append(row)
        (arguments.output_dir / "rebased_attention.json").write_text(
            json.dumps({"head": head, "rows": rows}, indent=1)
        )
        (arguments.output_dir / "rebased_attention.md").write_text(render(head, rows))
        shown = [row[key] for key in ("part", "dtype", "name", "batch", "length")]
        shown += [cell(row.get("ms")), "ms, error", cell(row.get("error"), ".1e"), row.get("note", "")]
        print(f"{time.monotonic() - begun:5.0f} s:", *shown, flush=True)
    plot(rows, arguments.output_dir / "rebased_attention.png")
    print(render(head, rows))


if __name__ == "__main__":
    main()
