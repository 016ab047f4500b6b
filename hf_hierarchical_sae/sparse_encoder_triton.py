"""Triton kernels of a training step around the loss: the encoder's gradient and the decoder's tangent gradient.

Legend: B batch, K latents per input, D = d_in, F = d_sae. Everything is accumulated in float32, without atomics.

    latent f  dW_enc[f] = Σ g (x[b] − b_dec) and db_enc[f] = Σ g over its pairs (b, j), g = dL/dv[b, j]
    row f     G[f] −= ⟨G[f], W_dec[f]⟩ W_dec[f], in place

Programs of the first advance through the inputs in slabs of columns, which the L2 cache holds: device memory delivers
the inputs once and takes dW_enc once, 4·B·D + F·D·w bytes; 4·B·K·D come from L2. The second moves 3·F·D·w bytes.
"""

import re

import torch


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the GPU form of the sparse encoder needs triton: pip install triton") from error

from .hierarchical_topk_triton import TILE, group_by_latent, launch


NAMESPACE = re.sub(r"\W", "_", __name__)


@triton.jit
def _encoder_kernel(
    starts_ptr,  # (F + 1,) where each latent's pairs begin
    pairs_ptr,  # (B * K,) positions in (B, K), grouped by latent
    grad_values_ptr,  # (B, K) float32
    scaled_ptr,  # (B, D) float32
    b_dec_ptr,  # (D,)
    grad_weight_ptr,  # (F, D), out
    grad_bias_ptr,  # (F,) float32, out
    F,
    K,
    D,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    latent = program % F
    columns = program // F * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(starts_ptr + latent)
    end = tl.load(starts_ptr + latent + 1)
    bias = tl.load(b_dec_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    total_bias = tl.zeros((BLOCK_P,), dtype=tl.float32)
    for block in tl.range(start, end, BLOCK_P):
        places = block + tl.arange(0, BLOCK_P)
        live = places < end
        pairs = tl.load(pairs_ptr + places, mask=live, other=0)
        grad = tl.load(grad_values_ptr + pairs, mask=live, other=0.0)
        inside = live[:, None] & (columns < D)[None, :]
        scaled = tl.load(scaled_ptr + (pairs // K)[:, None] * D + columns[None, :], mask=inside, other=0.0)
        total += grad[:, None] * (scaled - bias[None, :])
        total_bias += grad
    row = grad_weight_ptr + latent.to(tl.int64) * D + columns
    tl.store(row, tl.sum(total, axis=0), mask=columns < D)
    if program < F:
        tl.store(grad_bias_ptr + latent, tl.sum(total_bias, axis=0))


@triton.jit
def _tangent_kernel(
    grad_ptr,  # (F, D), in and out
    weight_ptr,  # (F, D)
    D,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * D
    offsets = tl.arange(0, BLOCK_D)
    products = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for first in tl.range(0, D, BLOCK_D):
        inside = first + offsets < D
        grad = tl.load(grad_ptr + row + first + offsets, mask=inside, other=0.0).to(tl.float32)
        products += grad * tl.load(weight_ptr + row + first + offsets, mask=inside, other=0.0).to(tl.float32)
    along = tl.sum(products, axis=0)
    for first in tl.range(0, D, BLOCK_D):
        inside = first + offsets < D
        grad = tl.load(grad_ptr + row + first + offsets, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + row + first + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_ptr + row + first + offsets, grad - along * weight, mask=inside)


@torch.library.custom_op(f"{NAMESPACE}::encoder_gradient", mutates_args=())
def encoder_gradient_triton(
    top_indices: torch.Tensor,
    grad_values: torch.Tensor,
    scaled: torch.Tensor,
    b_dec: torch.Tensor,
    encoder_weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Gradients of the encoder's weight and bias from those of the selected latents' values.

    Args:
        top_indices (`torch.Tensor`): (batch, k).
        grad_values (`torch.Tensor`): (batch, k), float32.
        scaled (`torch.Tensor`): (batch, d_in), float32.
        b_dec (`torch.Tensor`): (d_in,).
        encoder_weight (`torch.Tensor`): (d_sae, d_in), of which only shape, dtype and device matter.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: (d_sae, d_in) in the weight's dtype and (d_sae,) in float32.
    """
    (d_sae, d_in), k = encoder_weight.shape, top_indices.shape[1]
    grad_weight = torch.empty_like(encoder_weight, memory_format=torch.contiguous_format)
    grad_bias = torch.empty(d_sae, dtype=torch.float32, device=scaled.device)
    block_d = min(256, triton.next_power_of_2(d_in))
    tensors = (*group_by_latent(top_indices, d_sae), grad_values.contiguous(), scaled.contiguous(), b_dec.contiguous())
    blocks = {"BLOCK_P": TILE // block_d, "BLOCK_D": block_d}
    programs = d_sae * triton.cdiv(d_in, block_d)
    launch(_encoder_kernel, programs, *tensors, grad_weight, grad_bias, d_sae, k, d_in, **blocks)
    return grad_weight, grad_bias


@encoder_gradient_triton.register_fake
def _(
    top_indices: torch.Tensor,
    grad_values: torch.Tensor,
    scaled: torch.Tensor,
    b_dec: torch.Tensor,
    encoder_weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_weight = torch.empty_like(encoder_weight, memory_format=torch.contiguous_format)
    return grad_weight, scaled.new_empty(len(encoder_weight), dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::tangent_gradient", mutates_args=("grad",))
def tangent_gradient_triton_(grad: torch.Tensor, weight: torch.Tensor) -> None:
    """
    Subtract from each row of a gradient its part along the same row of the weight, in place.

    Args:
        grad (`torch.Tensor`): (d_sae, d_in), contiguous.
        weight (`torch.Tensor`): (d_sae, d_in), contiguous, rows of unit norm.
    """
    d_sae, d_in = weight.shape
    launch(_tangent_kernel, d_sae, grad, weight, d_in, BLOCK_D=min(TILE, triton.next_power_of_2(d_in)))
