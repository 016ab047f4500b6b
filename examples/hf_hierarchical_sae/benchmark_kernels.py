# /// script
# dependencies = ["hf_hierarchical_sae", "triton"]
# ///
"""
The HierarchicalTopK loss and all its gradients on a GPU, in every form, beside plain TopK, as a Markdown table:

    python examples/hf_hierarchical_sae/benchmark_kernels.py --output docs/sae_kernels.md

All forms run in turn, several rounds over; times are medians, ratios are to plain TopK by `embedding_bag` at the same
k. Memory is the peak above the inputs. The floor of a form is the bytes it has to move through device memory (as the
docstring of `hierarchical_topk_loss_triton.py` counts them) over the bandwidth at which this GPU copies a tensor.
Without a GPU, --bandwidth 3.35 lists the floors for a card with that many TB/s (here an H100) and no times.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from hf_hierarchical_sae.hierarchical_topk_loss import hierarchical_topk_loss, hierarchical_topk_loss_reference


BASELINE = "TopK, `embedding_bag`"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", nargs="+", type=int, default=[32, 64, 128], help="latents per input (32 64 128)")
    parser.add_argument("--batch_size", type=int, default=4096, help="inputs (default: 4096)")
    parser.add_argument("--d_sae", type=int, default=65536, help="latents (default: 65536)")
    parser.add_argument("--d_in", type=int, default=2304, help="width of an input (default: 2304)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of all tensors (default: float32)")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds (default: 20)")
    parser.add_argument("--bandwidth", type=float, help="TB/s of device memory to list floors for, without a GPU")
    parser.add_argument("--output", type=Path, help="file for the table, which is printed too")
    return parser.parse_args()


def make_inputs(batch_size, k, d_sae, d_in, dtype, device):
    indices = torch.rand(batch_size, d_sae, device=device).topk(k, dim=1).indices
    values = torch.rand(batch_size, k, device=device).sort(dim=1, descending=True).values
    W_dec = F.normalize(torch.randn(d_sae, d_in, device=device), dim=1)
    tensors = (values, W_dec, torch.zeros(d_in, device=device), torch.randn(batch_size, d_in, device=device))
    return indices, *[tensor.to(dtype).requires_grad_() for tensor in tensors]


def plain_topk(indices, values, W_dec, b_dec, target):
    reconstruction = F.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum") + b_dec
    return (reconstruction - target).float().square().mean()


def make_forms(k):
    """Name -> loss function. The first two minimise the plain TopK loss, the others the mean over all budgets."""
    return {
        BASELINE: plain_topk,
        "TopK, Triton": partial(hierarchical_topk_loss, budgets=(k,), backend="triton"),
        "HierarchicalTopK, Triton": partial(hierarchical_topk_loss, backend="triton"),
        "HierarchicalTopK, torch": partial(hierarchical_topk_loss, backend="torch"),
        "HierarchicalTopK, reference compiled": torch.compile(hierarchical_topk_loss_reference, dynamic=False),
    }


def floor_bytes(name, indices, W_dec, target):
    """Bytes through device memory at least, for forward and backward; nothing is claimed of the other forms."""
    decoder, gathered = W_dec.numel() * W_dec.element_size(), indices.numel() * W_dec.shape[1]
    if name == BASELINE:
        return decoder + 2 * gathered * W_dec.element_size()
    return 4 * decoder + 8 * gathered + 40 * target.numel() if name.endswith("Triton") else None


def run(form, inputs):
    loss = form(*inputs)
    torch.autograd.grad(loss, inputs[1:])
    return loss.detach()


def milliseconds(function, *arguments):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function(*arguments)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def peak_memory(form, inputs):
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(form, inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copied_bytes_per_second():
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    copy = torch.empty_like(source)
    times = [milliseconds(copy.copy_, source) for _ in range(20)]
    return 2 * source.numel() / (statistics.median(times) * 1e-3)


def rows_for(k, arguments, bandwidth):
    """One Markdown row per form."""
    dtype = DTYPES[arguments.dtype]
    inputs = make_inputs(arguments.batch_size, k, arguments.d_sae, arguments.d_in, dtype, "cuda")
    forms, memory, times, rows = make_forms(k), {}, {}, []
    for name, form in forms.items():
        try:
            run(form, inputs)
            memory[name], times[name] = peak_memory(form, inputs), []
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    for _ in range(arguments.rounds):
        for name in times:
            times[name].append(milliseconds(run, forms[name], inputs))
    for name in forms:
        floor = floor_bytes(name, inputs[0], inputs[2], inputs[4])
        floor = f"{floor / bandwidth * 1e3:.2f}" if floor else ""
        if name not in times:
            rows.append(f"| {k} | {name} | out of memory | | | {floor} |")
            continue
        median = statistics.median(times[name])
        ratio = median / statistics.median(times[BASELINE])
        rows.append(f"| {k} | {name} | {median:.2f} | {ratio:.2f} | {memory[name] / 2**30:.2f} | {floor} |")
    return rows


def floors_for(k, arguments, bandwidth):
    """The rows of `rows_for` where there is nothing to time them on."""
    dtype = DTYPES[arguments.dtype]
    inputs = make_inputs(arguments.batch_size, k, arguments.d_sae, arguments.d_in, dtype, "meta")
    floors = {name: floor_bytes(name, inputs[0], inputs[2], inputs[4]) for name in make_forms(k)}
    cells = {name: f"{floor / bandwidth * 1e3:.2f}" if floor else "" for name, floor in floors.items()}
    return [f"| {k} | {name} | not measured | | | {cell} |" for name, cell in cells.items()]


def main():
    arguments = parse_arguments()
    if torch.cuda.is_available():
        torch.manual_seed(0)
        rows, bandwidth = rows_for, copied_bytes_per_second()
        where = f"{torch.cuda.get_device_name()}, {bandwidth / 1e12:.2f} TB/s in a copy, torch {torch.__version__}"
    elif arguments.bandwidth:
        rows, bandwidth = floors_for, arguments.bandwidth * 1e12
        where = f"No GPU here; floors at {arguments.bandwidth:.2f} TB/s"
    else:
        raise SystemExit(
            "benchmark_kernels.py times GPU kernels and found no CUDA GPU: run it on a machine with one, or give "
            "--bandwidth to list floors."
        )
    lines = [
        f"{where}. Batch {arguments.batch_size}, {arguments.d_sae} latents, d_in {arguments.d_in}, {arguments.dtype}.",
        "",
        "| k | form | ms | ratio to plain TopK | peak memory above the inputs, GiB | floor, ms |",
        "|---|---|---|---|---|---|",
    ]
    for k in arguments.k:
        lines += rows(k, arguments, bandwidth)
    table = "\n".join(lines) + "\n"
    print(table)
    if arguments.output:
        arguments.output.write_text(table)


if __name__ == "__main__":
    main()
