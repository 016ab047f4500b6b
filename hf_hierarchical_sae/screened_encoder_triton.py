"""Triton kernels of the screened encoder: a weight in bfloat16 with its row norms, and the scores of chosen latents.

Legend: B batch, C candidates per input, D = d_in, F = d_sae.
"""

import torch


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the GPU form of the screened encoder needs triton: pip install triton") from error

from .hierarchical_topk_loss_triton import TILE, launch


@triton.jit
def _halve_kernel(
    weight_ptr,  # (F, D) float32
    half_ptr,  # (F, D) bfloat16, out
    squares_ptr,  # (F,) float32, out
    squared_errors_ptr,  # (F,) float32, out
    D,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK_D)
    squares = tl.zeros((BLOCK_D,), dtype=tl.float32)
    squared_errors = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for first in tl.range(0, D, BLOCK_D):
        cells = row.to(tl.int64) * D + first + offsets
        weight = tl.load(weight_ptr + cells, mask=first + offsets < D, other=0.0)
        half = weight.to(tl.bfloat16)
        tl.store(half_ptr + cells, half, mask=first + offsets < D)
        error = weight - half.to(tl.float32)
        squares += weight * weight
        squared_errors += error * error
    tl.store(squares_ptr + row, tl.sum(squares, axis=0))
    tl.store(squared_errors_ptr + row, tl.sum(squared_errors, axis=0))


@triton.jit
def _scores_kernel(
    x_ptr,  # (B, D) float32
    weight_ptr,  # (F, D) float32
    bias_ptr,  # (F,) float32
    places_ptr,  # (B, C)
    out_ptr,  # (B, C) float32, out
    C,
    D,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    blocks = tl.cdiv(C, BLOCK_C)
    batch = (program // blocks).to(tl.int64)
    candidates = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    live = candidates < C
    places = tl.load(places_ptr + batch * C + candidates, mask=live, other=0)
    offsets = tl.arange(0, BLOCK_D)
    products = tl.zeros((BLOCK_C, BLOCK_D), dtype=tl.float32)
    for first in tl.range(0, D, BLOCK_D):
        columns = first + offsets
        x = tl.load(x_ptr + batch * D + columns, mask=columns < D, other=0.0)
        inside = live[:, None] & (columns < D)[None, :]
        weight = tl.load(weight_ptr + places[:, None] * D + columns[None, :], mask=inside, other=0.0)
        products += weight * x[None, :]
    scores = tl.sum(products, axis=1) + tl.load(bias_ptr + places, mask=live, other=0.0)
    tl.store(out_ptr + batch * C + candidates, scores, mask=live)


def halve_triton(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Args:
        weight (`torch.Tensor`): (d_sae, d_in), float32.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: the weight in bfloat16, its rows' squared norms and the
        squared norms of what was rounded off, (d_sae,) each.
    """
    weight = weight.contiguous()
    half = torch.empty_like(weight, dtype=torch.bfloat16)
    squares, squared_errors = torch.empty((2, len(weight)), dtype=torch.float32, device=weight.device)
    block_d = min(TILE, triton.next_power_of_2(weight.shape[1]))
    launch(_halve_kernel, len(weight), weight, half, squares, squared_errors, weight.shape[1], BLOCK_D=block_d)
    return half, squares, squared_errors


def scores_triton(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """
    Args:
        x (`torch.Tensor`): (batch, d_in), float32.
        weight (`torch.Tensor`): (d_sae, d_in), float32.
        bias (`torch.Tensor`): (d_sae,), float32.
        places (`torch.Tensor`): (batch, candidates), the chosen latents.

    Returns:
        `torch.Tensor`: (batch, candidates), float32.
    """
    tensors = [tensor.contiguous() for tensor in (x, weight, bias, places)]
    out = torch.empty(places.shape, dtype=torch.float32, device=x.device)
    block_d = min(256, triton.next_power_of_2(x.shape[1]))
    blocks = {"BLOCK_C": TILE // block_d, "BLOCK_D": block_d}
    programs = len(x) * triton.cdiv(places.shape[1], blocks["BLOCK_C"])
    launch(_scores_kernel, programs, *tensors, out, places.shape[1], x.shape[1], **blocks)
    return out
