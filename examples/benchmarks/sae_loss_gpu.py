# /// script
# dependencies = ["hf_hierarchical_sae", "triton"]
# ///
"""
The HierarchicalTopK loss and all its gradients on a GPU, in every form, beside plain TopK, as a Markdown table:

    python examples/benchmarks/sae_loss_gpu.py --output outputs/gpu/sae_loss.md

The forms of one k and dtype run in turn, several rounds over; times are medians, ratios are to the fastest plain TopK
of that k and dtype. Memory is the peak above the inputs. The floor of a form is the bytes it has to move through
device memory (as the docstring of `hierarchical_topk_triton.py` counts them) over the bandwidth at which this
GPU copies a tensor. The table is written again after every group of forms; what has to be compiled first comes last
and within `--compile_seconds`. `--dry_run` runs all of it at tiny sizes on a CPU, kernels interpreted. Without a GPU,
`--bandwidth 3.35` lists the floors for a card with that many TB/s (here an H100) and no times.
"""

import argparse
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path


# Triton decides at its first import whether kernels are interpreted.
if "--dry_run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from hf_hierarchical_sae.hierarchical_topk import (  # noqa: E402
    hierarchical_topk_loss,
    hierarchical_topk_loss_reference,
)


EMBEDDING_BAG = "TopK, `embedding_bag`"
COMPILED = "HierarchicalTopK, reference compiled"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", nargs="+", type=int, default=[32, 64, 128], help="latents per input (32 64 128)")
    parser.add_argument("--batch_size", type=int, default=4096, help="inputs (default: 4096)")
    parser.add_argument("--d_sae", type=int, default=65536, help="latents (default: 65536)")
    parser.add_argument("--d_in", type=int, default=2304, help="width of an input (default: 2304)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], help="of all tensors")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds (default: 20)")
    parser.add_argument("--compile_seconds", type=float, default=60, help="start no compilation after these (60)")
    parser.add_argument("--bandwidth", type=float, help="TB/s of device memory to list floors for, without a GPU")
    parser.add_argument("--dry_run", action="store_true", help="tiny sizes on a CPU, kernels interpreted")
    parser.add_argument("--output", type=Path, help="file for the table, which is printed too")
    arguments = parser.parse_args()
    if arguments.dry_run:
        arguments.k, arguments.batch_size, arguments.d_sae, arguments.d_in = [2, 4], 8, 32, 48
        arguments.rounds = 2
    return arguments


def make_inputs(batch_size: int, k: int, d_sae: int, d_in: int, *, dtype: torch.dtype, device: str) -> list:
    """indices: (batch, k); values: (batch, k); W_dec: (d_sae, d_in); b_dec: (d_in,); target: (batch, d_in)."""
    indices = torch.rand(batch_size, d_sae, device=device).topk(k, dim=1).indices
    values = torch.rand(batch_size, k, device=device).sort(dim=1, descending=True).values
    W_dec = F.normalize(torch.randn(d_sae, d_in, device=device), dim=1)
    tensors = (values, W_dec, torch.zeros(d_in, device=device), torch.randn(batch_size, d_in, device=device))
    return [indices, *[tensor.to(dtype).requires_grad_() for tensor in tensors]]


def plain_topk(
    indices: torch.Tensor, values: torch.Tensor, W_dec: torch.Tensor, b_dec: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    reconstruction = F.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum") + b_dec
    return (reconstruction - target).float().square().mean()


def make_forms(k: int) -> dict:
    """Name -> loss function; "TopK" minimises the error of all k latents only, the others the mean over budgets."""
    return {
        EMBEDDING_BAG: plain_topk,
        "TopK, Triton": partial(hierarchical_topk_loss, budgets=(k,), backend="triton"),
        "HierarchicalTopK, Triton": partial(hierarchical_topk_loss, backend="triton"),
        "HierarchicalTopK, torch": partial(hierarchical_topk_loss, backend="torch"),
    }


def floor_bytes(name: str, inputs: list) -> int | None:
    """Bytes through device memory at least, for forward and backward; nothing is claimed of the other forms."""
    indices, _, W_dec, _, target = inputs
    decoder, gathered = W_dec.numel() * W_dec.element_size(), indices.numel() * W_dec.shape[1]
    if name == EMBEDDING_BAG:
        return decoder + 2 * gathered * W_dec.element_size()
    return 4 * decoder + 8 * gathered + 40 * target.numel() if name.endswith("Triton") else None


def run(form, inputs: list) -> None:
    torch.autograd.grad(form(*inputs), inputs[1:])


def milliseconds(function, *arguments) -> float:
    """Of one call: on the GPU's clock, or the wall's where there is no GPU."""
    if not torch.cuda.is_available():
        begun = time.perf_counter()
        function(*arguments)
        return 1e3 * (time.perf_counter() - begun)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function(*arguments)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def peak_memory(form, inputs: list) -> int:
    if not torch.cuda.is_available():
        run(form, inputs)
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(form, inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copied_bytes_per_second(device: str) -> float:
    source = torch.empty(2**30 if device == "cuda" else 2**20, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    times = [milliseconds(copy.copy_, source) for _ in range(20)]
    return 2 * source.numel() / (statistics.median(times) * 1e-3)


def measure(forms: dict, inputs: list, rounds: int) -> dict:
    """Name -> median milliseconds and peak bytes, or the reason why there are none."""
    measured, times = {}, {}
    for name, form in forms.items():
        try:
            run(form, inputs)
            times[name], measured[name] = [], peak_memory(form, inputs)
        except Exception as error:  # the row says what happened; the other forms are still measured
            reasons = {torch.OutOfMemoryError: "out of memory", NotImplementedError: "no backward in torch"}
            measured[name] = reasons.get(type(error), f"failed: {error!r:.80}")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    for _ in range(rounds):
        for name in times:
            times[name].append(milliseconds(run, forms[name], inputs))
    return {
        name: (statistics.median(times[name]), result) if name in times else result
        for name, result in measured.items()
    }


def render(head: str, groups: dict) -> str:
    """The table of (dtype, k) -> {form: (result, floor in ms or None)}."""
    lines = [
        head,
        "",
        "| dtype | k | form | ms | ratio to the fastest plain TopK | peak memory above the inputs, GiB | floor, ms |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for (dtype, k), rows in groups.items():
        plain = [row[0][0] for name, row in rows.items() if name.startswith("TopK") and isinstance(row[0], tuple)]
        for name, (result, floor) in rows.items():
            floor = "" if floor is None else f"{floor:.2f}"
            cells = f"{result} | | "
            if isinstance(result, tuple):
                ratio = f"{result[0] / min(plain):.2f}" if plain else ""
                cells = f"{result[0]:.2f} | {ratio} | {result[1] / 2**30:.2f}"
            lines.append(f"| {dtype} | {k} | {name} | {cells} | {floor} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu" if arguments.dry_run else "meta"
    if device == "meta" and not arguments.bandwidth:
        raise SystemExit(
            "sae_loss_gpu.py times GPU kernels and found no CUDA GPU: run it on a machine with one, give --bandwidth "
            "to list floors, or --dry_run to see it run."
        )
    bandwidth = arguments.bandwidth * 1e12 if device == "meta" else copied_bytes_per_second(device)
    where = {"cpu": "A dry run, not a measurement", "meta": f"No GPU here; floors at {arguments.bandwidth} TB/s"}
    if device == "cuda":
        name, version = torch.cuda.get_device_name(), torch.__version__
        where["cuda"] = f"{name}, {bandwidth / 1e12:.2f} TB/s in a copy, torch {version}"
    sizes = (arguments.batch_size, arguments.d_sae, arguments.d_in)
    head = f"{where[device]}. Batch {sizes[0]}, {sizes[1]} latents, d_in {sizes[2]}."
    pairs = [(dtype, k) for dtype in arguments.dtype for k in arguments.k]
    groups = {}

    def add(dtype, k, forms):
        inputs = make_inputs(sizes[0], k, *sizes[1:], dtype=DTYPES[dtype], device=device)
        results = dict.fromkeys(forms, "not measured")
        if device != "meta":
            results = measure(forms, inputs, arguments.rounds)
        floors = {name: floor_bytes(name, inputs) for name in forms}
        rows = {name: (results[name], floor and floor / bandwidth * 1e3) for name, floor in floors.items()}
        groups[dtype, k] = groups.get((dtype, k), {}) | rows
        if arguments.output:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(render(head, groups))

    for dtype, k in pairs:
        add(dtype, k, make_forms(k))
        print(f"measured: {dtype}, k {k}", flush=True)
    begun = time.monotonic()
    for dtype, k in pairs if device != "meta" else []:
        torch.compiler.reset()
        backend = "eager" if arguments.dry_run else "inductor"
        form = torch.compile(hierarchical_topk_loss_reference, dynamic=False, backend=backend)
        if time.monotonic() - begun < arguments.compile_seconds:
            add(dtype, k, {COMPILED: form})
    print(render(head, groups))


if __name__ == "__main__":
    main()
