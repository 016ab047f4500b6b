"""Triton kernels of the HierarchicalTopK loss (arXiv 2505.24473), of any size, deterministic.

Legend: B batch, K latents per input, D = d_in, F = d_sae. Everything is accumulated in float32.

    forward   r = b − x; for j = 1…K: r += v_j W[i_j], error_j = ‖r‖²                     r stays in registers
    suffix    s = 0; for j = K…1: s += c_j r, S[b, j] = s, r −= v_j W[i_j]                 c_j = dL/d error_j · 2 / (B·D)
    latent f  dW[f] = Σ v_j S[b, j] and dv_j = ⟨W[f], S[b, j]⟩ over its pairs (b, j), found by sorting the indices

A subset of budgets or plain TopK only puts zeros in c. Programs advance through the decoder in slabs of columns that fit
in the L2 cache: device memory delivers each decoder row once per pass, and its K uses per input are served by L2.

The decoder gradient has one form, sorted and without atomics. It moves no more bytes: S is written and read once, as
much as atomic additions read and write where they miss the L2 cache. It makes training resume bit for bit, and inputs
that share a latent do not wait for one another. S exists for a window of columns at a time, which bounds it whatever K
is: 8 floats per element of `target` or half the decoder gradient, whichever is more. Beside it stand two residuals,
one float for every 1024 / K elements of `target` (partial sums of the errors) and the sorted order of the indices.

Floor of forward and backward, with w bytes per element of `W_dec`: 4·F·D·w + 8·B·K·D + 40·B·D bytes through device
memory and 2·B·K·D·w through L2. For B = 4096, D = 2304, F = 65,536 and K = 32 / 64 / 128 in float32 that is 5.2 / 7.6 /
12.5 GB, 1.6 / 2.3 / 3.7 ms at 3.35 TB/s (H100), and 2.4 / 4.8 / 9.7 GB in L2. Plain TopK that gathers its rows from
device memory, once forward and once for dv, has 3.0 / 5.4 / 10.3 GB. Times on a GPU: not measured.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch

from .once_differentiable import once_differentiable


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("backend='triton' needs triton: pip install triton, or use backend='torch'") from error

# Each copy of this module (the package, a checkpoint's remote code) registers its operators under its own name.
NAMESPACE = re.sub(r"\W", "_", __name__)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Half of the L2 cache of an A100 or H100 with room for what streams past; one warp holds TILE elements in registers.
SLAB_BYTES = 2**24
TILE = 1024


@triton.jit
def _forward_kernel(
    indices_ptr,  # (B, K)
    values_ptr,  # (B, K)
    W_dec_ptr,  # (F, D)
    b_dec_ptr,  # (D,)
    target_ptr,  # (B, D)
    residual_ptr,  # (B, D) float32, out
    squares_ptr,  # (programs, K) float32, out
    B,
    K,
    D,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Neighbouring programs share columns, not inputs, so that the decoder's slab stays in the L2 cache.
    program = tl.program_id(0)
    row_blocks = tl.cdiv(B, BLOCK_B)
    rows = (program % row_blocks * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    columns = program // row_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    live = rows < B
    inside = live[:, None] & (columns < D)[None, :]
    cells = rows[:, None] * D + columns[None, :]
    bias = tl.load(b_dec_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    residual = bias[None, :] - tl.load(target_ptr + cells, mask=inside, other=0.0).to(tl.float32)
    residual = tl.where(inside, residual, 0.0)
    for j in range(K):
        latents = tl.load(indices_ptr + rows * K + j, mask=live, other=0).to(tl.int64)
        values = tl.load(values_ptr + rows * K + j, mask=live, other=0.0).to(tl.float32)
        decoder = tl.load(W_dec_ptr + latents[:, None] * D + columns[None, :], mask=inside, other=0.0)
        residual += values[:, None] * decoder.to(tl.float32)
        tl.store(squares_ptr + program.to(tl.int64) * K + j, tl.sum(residual * residual))
    tl.store(residual_ptr + cells, residual, mask=inside)


@triton.jit
def _suffix_kernel(
    indices_ptr,  # (B, K)
    values_ptr,  # (B, K)
    W_dec_ptr,  # (F, D)
    scales_ptr,  # (K,) float32
    residual_ptr,  # (B, D) float32, after latent K
    grad_ptr,  # (B, D) float32, in: dL/d reconstruction, out: dL/d b_dec of each input
    suffix_ptr,  # (B * K, WIDTH) float32, out
    first_column,
    B,
    K,
    D,
    WIDTH: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    row_blocks = tl.cdiv(B, BLOCK_B)
    rows = (program % row_blocks * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    offsets = program // row_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    columns = first_column + offsets
    live = rows < B
    inside = live[:, None] & (columns < D)[None, :]
    cells = rows[:, None] * D + columns[None, :]
    residual = tl.load(residual_ptr + cells, mask=inside, other=0.0)
    suffix = tl.load(grad_ptr + cells, mask=inside, other=0.0)
    for step in range(K):
        j = K - 1 - step
        suffix += tl.load(scales_ptr + j) * residual
        if STORE:
            pairs = rows * K + j
            places = suffix_ptr + pairs[:, None] * WIDTH + offsets[None, :]
            tl.store(places, suffix, mask=inside, eviction_policy="evict_first")
        latents = tl.load(indices_ptr + rows * K + j, mask=live, other=0).to(tl.int64)
        values = tl.load(values_ptr + rows * K + j, mask=live, other=0.0).to(tl.float32)
        decoder = tl.load(W_dec_ptr + latents[:, None] * D + columns[None, :], mask=inside, other=0.0)
        residual -= values[:, None] * decoder.to(tl.float32)
    tl.store(grad_ptr + cells, suffix, mask=inside)


@triton.jit
def _latent_kernel(
    starts_ptr,  # (F + 1,) where each latent's pairs begin
    pairs_ptr,  # (B * K,) positions in (B, K), grouped by latent
    values_ptr,  # (B, K)
    suffix_ptr,  # (B * K, WIDTH) float32
    W_dec_ptr,  # (F, D)
    grad_values_ptr,  # (B, K) float32, in and out: summed over windows
    grad_W_dec_ptr,  # (F, D), out
    first_column,
    D,
    WIDTH: tl.constexpr,
    NEEDS_VALUES: tl.constexpr,
    NEEDS_W_DEC: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    latent = tl.program_id(0)
    start = tl.load(starts_ptr + latent)
    end = tl.load(starts_ptr + latent + 1)
    offsets = tl.arange(0, WIDTH)
    columns = first_column + offsets
    decoder_row = latent.to(tl.int64) * D + columns
    if NEEDS_VALUES:
        decoder = tl.load(W_dec_ptr + decoder_row, mask=columns < tl.where(start < end, D, 0), other=0.0).to(
            tl.float32
        )
    total = tl.zeros((BLOCK_P, WIDTH), dtype=tl.float32)
    for block in tl.range(start, end, BLOCK_P):
        places = block + tl.arange(0, BLOCK_P)
        live = places < end
        pairs = tl.load(pairs_ptr + places, mask=live, other=0)
        inside = live[:, None] & (columns < D)[None, :]
        suffix = tl.load(suffix_ptr + pairs[:, None] * WIDTH + offsets[None, :], mask=inside, other=0.0)
        if NEEDS_VALUES:
            grad_values = tl.load(grad_values_ptr + pairs, mask=live, other=0.0)
            grad_values += tl.sum(suffix * decoder[None, :], axis=1)
            tl.store(grad_values_ptr + pairs, grad_values, mask=live)
        if NEEDS_W_DEC:
            total += tl.load(values_ptr + pairs, mask=live, other=0.0).to(tl.float32)[:, None] * suffix
    if NEEDS_W_DEC:
        tl.store(grad_W_dec_ptr + decoder_row, tl.sum(total, axis=0), mask=columns < D)


def _blocks(batch: int, width: int, d_sae: int, element_size: int) -> dict[str, int]:
    """Rows and columns of one program's tile: columns of which the whole dictionary fits in the L2 cache."""
    block_d = min(max(32, _power_of_2_below(SLAB_BYTES // (d_sae * element_size))), 256, triton.next_power_of_2(width))
    return {"BLOCK_B": min(TILE // block_d, triton.next_power_of_2(batch)), "BLOCK_D": block_d}


def _window_width(batch: int, k: int, d_sae: int, d_in: int) -> int:
    """Columns for which the gradients of all (input, latent) pairs are held at a time."""
    affordable = max(8 * batch, d_sae // 2) * d_in // (batch * k)
    return min(512, triton.next_power_of_2(d_in), max(1, _power_of_2_below(affordable)))


def _power_of_2_below(n: int) -> int:
    return 1 << (n.bit_length() - 1) if n > 0 else 0


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Every program is one warp: its sums need no shared memory and no barrier."""
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](*arguments, **constants, num_warps=1)


@torch.library.custom_op(f"{NAMESPACE}::forward", mutates_args=())
def _forward(
    top_indices: torch.Tensor, top_values: torch.Tensor, W_dec: torch.Tensor, b_dec: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean squared error of every prefix, (k,), and what the reconstruction has over `target`, (batch, d_in)."""
    (batch, k), (d_sae, d_in) = top_indices.shape, W_dec.shape
    blocks = _blocks(batch, d_in, d_sae, W_dec.element_size())
    programs = triton.cdiv(batch, blocks["BLOCK_B"]) * triton.cdiv(d_in, blocks["BLOCK_D"])
    residual = torch.empty(target.shape, dtype=torch.float32, device=target.device)
    squares = torch.empty((programs, k), dtype=torch.float32, device=target.device)
    inputs = (top_indices, top_values, W_dec, b_dec, target)
    launch(_forward_kernel, programs, *inputs, residual, squares, batch, k, d_in, **blocks)
    return squares.sum(dim=0) / residual.numel(), residual


@_forward.register_fake
def _(
    top_indices: torch.Tensor, top_values: torch.Tensor, W_dec: torch.Tensor, b_dec: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return (
        target.new_empty(top_indices.shape[1], dtype=torch.float32),
        target.new_empty(target.shape, dtype=torch.float32),
    )


@torch.library.custom_op(f"{NAMESPACE}::backward", mutates_args=())
def _backward(
    top_indices: torch.Tensor,
    top_values: torch.Tensor,
    W_dec: torch.Tensor,
    residual: torch.Tensor,
    scales: torch.Tensor,
    grad_reconstruction: torch.Tensor | None,
    needs_values: bool,
    needs_W_dec: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `top_values` (float32; empty if not needed), `W_dec` (likewise) and of each input's `b_dec`."""
    (batch, k), (d_sae, d_in) = top_indices.shape, W_dec.shape
    needs_pairs = needs_values or needs_W_dec
    width = _window_width(batch, k, d_sae, d_in) if needs_pairs else triton.next_power_of_2(d_in)
    blocks = _blocks(batch, width, d_sae, W_dec.element_size())
    row_blocks = triton.cdiv(batch, blocks["BLOCK_B"])
    grad = torch.zeros_like(residual)
    if grad_reconstruction is not None:
        grad.copy_(grad_reconstruction)
    suffix = residual.new_empty((batch * k, width) if needs_pairs else 0)
    grad_values = residual.new_zeros(top_values.shape if needs_values else 0)
    grad_W_dec = torch.empty_like(W_dec) if needs_W_dec else W_dec.new_empty(0)
    starts, pairs = group_by_latent(top_indices, d_sae) if needs_pairs else (None, None)
    inputs = (top_indices, top_values, W_dec, scales, residual)
    needs = {"NEEDS_VALUES": needs_values, "NEEDS_W_DEC": needs_W_dec}
    for start in range(0, d_in, width):
        programs = row_blocks * triton.cdiv(min(width, d_in - start), blocks["BLOCK_D"])
        sizes = {"WIDTH": width, "STORE": needs_pairs, **blocks}
        launch(_suffix_kernel, programs, *inputs, grad, suffix, start, batch, k, d_in, **sizes)
        if needs_pairs:
            tensors = (starts, pairs, top_values, suffix, W_dec, grad_values, grad_W_dec)
            launch(_latent_kernel, d_sae, *tensors, start, d_in, WIDTH=width, **needs, BLOCK_P=TILE // width)
    return grad_values, grad_W_dec, grad


@_backward.register_fake
def _(
    top_indices: torch.Tensor,
    top_values: torch.Tensor,
    W_dec: torch.Tensor,
    residual: torch.Tensor,
    scales: torch.Tensor,
    grad_reconstruction: torch.Tensor | None,
    needs_values: bool,
    needs_W_dec: bool,
) -> tuple[torch.Tensor, ...]:
    return (
        residual.new_empty(top_values.shape if needs_values else 0),
        torch.empty_like(W_dec) if needs_W_dec else W_dec.new_empty(0),
        torch.empty_like(residual),
    )


def group_by_latent(top_indices: torch.Tensor, d_sae: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each latent's pairs start, (d_sae + 1,), and the positions in (batch, k), sorted by latent."""
    latents, pairs = torch.sort(top_indices.flatten().to(torch.int32), stable=True)
    bounds = torch.arange(d_sae + 1, dtype=torch.int32, device=latents.device)
    return torch.searchsorted(latents, bounds), pairs


class _HierarchicalTopKTriton(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        top_indices: torch.Tensor,
        top_values: torch.Tensor,
        W_dec: torch.Tensor,
        b_dec: torch.Tensor,
        target: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        errors, residual = _forward(top_indices, top_values, W_dec, b_dec, target)
        ctx.save_for_backward(top_indices, top_values, W_dec, residual)
        ctx.b_dec_dtype, ctx.target_dtype = b_dec.dtype, target.dtype
        ctx.set_materialize_grads(False)
        return errors, residual + target

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_errors: torch.Tensor | None, grad_reconstruction: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        top_indices, top_values, W_dec, residual = ctx.saved_tensors
        _, needs_values, needs_W_dec, needs_b_dec, needs_target = ctx.needs_input_grad
        scales = residual.new_zeros(top_indices.shape[1])
        if grad_errors is not None:
            scales = grad_errors * (2 / residual.numel())
        grad_values, grad_W_dec, grad = _backward(
            top_indices, top_values, W_dec, residual, scales, grad_reconstruction, needs_values, needs_W_dec
        )
        grad_target = None
        if needs_target:
            grad_target = -grad if grad_reconstruction is None else grad_reconstruction - grad
        return (
            None,
            grad_values.to(top_values.dtype) if needs_values else None,
            grad_W_dec if needs_W_dec else None,
            grad.sum(dim=0).to(ctx.b_dec_dtype) if needs_b_dec else None,
            None if grad_target is None else grad_target.to(ctx.target_dtype),
        )


def budget_errors_triton(
    top_indices: torch.Tensor,
    top_values: torch.Tensor,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor,
    target: torch.Tensor,
    budgets: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Triton form of the loss, see `choose_form`: on a GPU or, with `TRITON_INTERPRET=1`, on CPU.

    Args:
        top_indices (`torch.Tensor`): (batch, k).
        top_values (`torch.Tensor`): (batch, k).
        W_dec (`torch.Tensor`): (d_sae, d_in).
        b_dec (`torch.Tensor`): (d_in,).
        target (`torch.Tensor`): (batch, d_in).
        budgets (`Sequence[int]`): strictly increasing budgets in [1, k].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the mean squared error at each budget, (budgets,), and the
        reconstruction with all k latents, (batch, d_in); both float32.

    Raises:
        `ValueError`: If tensors are not on a GPU, or the decoder is in float64.
    """
    if W_dec.dtype not in DTYPES:
        raise ValueError(
            f"backend='triton' needs W_dec in float32, bfloat16 or float16, got {W_dec.dtype}: use backend='torch'"
        )
    if not W_dec.is_cuda and isinstance(_forward_kernel, triton.JITFunction):
        raise ValueError(f"backend='triton' needs tensors on a GPU, got {W_dec.device}: use backend='torch'")
    contiguous = [tensor.contiguous() for tensor in (top_indices, top_values, W_dec, b_dec, target)]
    errors, reconstruction = _HierarchicalTopKTriton.apply(*contiguous)
    first, last = budgets[0], budgets[-1]
    if last - first + 1 == len(budgets):
        return errors[first - 1 : last], reconstruction
    places = torch.tensor([budget - 1 for budget in budgets])
    # The host does not wait for what the GPU has still to do.
    return errors[places.to(errors.device, non_blocking=True)], reconstruction
