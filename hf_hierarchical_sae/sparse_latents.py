"""Latents of which few are active: the strongest of each input, sums of their rows, and the gradients of both."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from .hierarchical_topk import suits_numba, suits_triton
from .large_pages import empty_in_large_pages
from .once_differentiable import once_differentiable


# Numbers that oneDNN's product gives at a time, and for how many inputs at most: it keeps what it prepares for every size.
ONEDNN_BLOCK, ONEDNN_INPUTS = 2**20, 512


def pre_activations(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, chunk_size: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """
    Yield the first latent's number and the pre-activations of `chunk_size` latents at a time, without a gradient.

    Args:
        x (`torch.Tensor`): (tokens, d_in).
        weight (`torch.Tensor`): (d_sae, d_in).
        bias (`torch.Tensor`): (d_sae,).
        chunk_size (`int`): latents at a time; each yields (tokens, chunk).
    """
    is_plain = x.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
    for start in range(0, len(weight), chunk_size):
        # Weights in half precision are read as float32: latents of nearly equal strength would change places.
        rows, offsets = (part[start : start + chunk_size].to(x.dtype) for part in (weight, bias))
        if is_plain:
            yield start, _product(x, rows, offsets)
        else:
            yield start, F.linear(x, rows, offsets)


def _product(x: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """`F.linear` on CPU, whose bias is written to memory before the product."""
    is_onednn = x.dtype == torch.float32 and torch.backends.mkldnn.enabled and _mkl_lags_behind()
    if is_onednn and len(x) * len(rows) <= 2 * ONEDNN_BLOCK:
        return torch.ops.mkldnn._linear_pointwise(x, rows, offsets, "none", [], "")
    out = empty_in_large_pages(len(x), len(rows), dtype=x.dtype, device=x.device)
    if not is_onednn:
        return torch.mm(x, rows.T, out=out).add_(offsets)
    for inputs, outputs in zip(x.split(ONEDNN_INPUTS), out.split(ONEDNN_INPUTS)):
        # Larger blocks leave the cache before they are copied, and are memory beside the scores.
        block = ONEDNN_BLOCK // len(inputs)
        for part, *weights in zip(outputs.split(block, dim=1), rows.split(block), offsets.split(block)):
            part.copy_(torch.ops.mkldnn._linear_pointwise(inputs, *weights, "none", [], ""))
    return out


@functools.cache
def _mkl_lags_behind() -> bool:
    """torch multiplies with MKL, which on AMD's processors stays at AVX2; oneDNN takes what they have."""
    processor = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", "")
    return "AMD" in processor and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def strongest_latents(
    chunks: Iterable[tuple[int, torch.Tensor]], k: int, inputs: torch.Tensor | slice = slice(None)
) -> list[torch.Tensor]:
    """
    The k strongest latents of each of these inputs.

    Args:
        chunks (`Iterable`): as from [`pre_activations`].
        k (`int`): latents per input.
        inputs (`torch.Tensor`, *optional*): which inputs; all by default.

    Returns:
        `list[torch.Tensor]`: their pre-activations, the strongest first, and their indices, (inputs, k) each.
    """
    found = []
    for start, latents in chunks:
        latents = latents[inputs]
        values, indices = topk_of_rows(latents, min(k, latents.shape[1]))
        indices += start
        if found:
            candidates = torch.cat([found[0], values], dim=1)
            values, order = candidates.topk(min(k, candidates.shape[1]), dim=1)
            indices = torch.cat([found[1], indices], dim=1).gather(1, order)
        found = [values, indices]
    return found


def latents_above(chunks: Iterable[tuple[int, torch.Tensor]], threshold: torch.Tensor) -> list[torch.Tensor]:
    """
    All latents of each input that are positive and above a threshold.

    Args:
        chunks (`Iterable`): as from [`pre_activations`].
        threshold (`torch.Tensor`): (d_sae,), one for each latent, or ().

    Returns:
        `list[torch.Tensor]`: their pre-activations, the strongest first, and their indices, (inputs, n) each, with n
            the largest number that any input has, at least 1; unused places hold 0.
    """
    parts = []
    for start, latents in chunks:
        least = threshold[start : start + latents.shape[1]] if threshold.ndim else threshold
        # The other way round, so that NaN counts as active and is seen in what comes out.
        inputs, columns = (latents <= least.to(latents.dtype).clamp(min=0)).logical_not_().nonzero(as_tuple=True)
        counts = torch.bincount(inputs, minlength=len(latents))
        places = torch.arange(len(inputs), device=inputs.device) - (counts.cumsum(0) - counts)[inputs]
        values = latents.new_zeros(len(latents), int(places.max()) + 1 if len(places) else 1)
        indices = torch.zeros_like(values, dtype=torch.int64)
        values[inputs, places], indices[inputs, places] = latents[inputs, columns], columns + start
        parts.append((values, indices))
    values, indices = (torch.cat(part, dim=1) for part in zip(*parts))
    values, order = values.sort(dim=1, descending=True)
    used = max(1, int((values != 0).any(dim=0).sum()))
    return [values[:, :used], indices.gather(1, order)[:, :used]]


def distinct_latents(indices: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """
    Each input's places for different latents: those of value 0 get the first latents that are not among the others.

    Args:
        indices (`torch.Tensor`): (inputs, n), different where values are not 0.
        values (`torch.Tensor`): (inputs, n).

    Returns:
        `torch.Tensor`: (inputs, n).
    """
    width, is_used = indices.shape[1], values != 0
    # Of the first n latents, at least as many are free as there are places to fill.
    low = indices.masked_fill(~is_used, width).clamp(max=width)
    taken = torch.zeros(len(indices), width + 1, dtype=torch.uint8, device=indices.device).scatter_(1, low, 1)
    free = taken[:, :width].argsort(dim=1, stable=True)
    return torch.where(is_used, indices, free.gather(1, ((~is_used).cumsum(dim=1) - 1).clamp(min=0)))


def topk_of_rows(x: torch.Tensor, k: int, groups: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """`x.topk(k, dim=1)` for long rows: the k largest lie in the k columns with the largest maxima over groups."""
    if x.shape[1] % groups or x.shape[1] // groups < 4 * k:
        values, indices = x.topk(k, dim=1)
        return values, indices
    folded = x.unflatten(1, (groups, -1))
    columns = folded.amax(dim=1).topk(k, dim=1, sorted=False).indices
    candidates = folded.gather(2, columns.unsqueeze(1).expand(-1, groups, -1)).flatten(1)
    values, places = candidates.topk(k, dim=1)
    return values, columns.gather(1, places % k) + places // k * folded.shape[2]


def weighted_rows(indices: torch.Tensor, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """
    Σ_j values_j weight[indices_j]: (tokens, k), (tokens, k) and (d_sae, d_in) to (tokens, d_in), in the weight's dtype;
    of weights in half precision in float32.
    """
    if weight.dtype.itemsize < 4:
        used, indices = indices.unique(return_inverse=True)
        weight = weight[used].float()
    return F.embedding_bag(indices, weight, per_sample_weights=values.to(weight.dtype), mode="sum")


class SparseEncoder(torch.autograd.Function):
    """ReLU of known pre-activations `values` of scaled − center; the backward costs k rows per input instead of d_sae."""

    @staticmethod
    def forward(
        ctx: Any,
        scaled: torch.Tensor,
        encoder_weight: torch.Tensor,
        b_enc: torch.Tensor,
        center: torch.Tensor,
        values: torch.Tensor,
        indices: torch.Tensor,
    ) -> torch.Tensor:
        values = values.relu()
        ctx.save_for_backward(scaled, encoder_weight, center, values, indices)
        ctx.b_enc_dtype = b_enc.dtype
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled, encoder_weight, center, values, indices = ctx.saved_tensors
        grad = grad_values.to(scaled.dtype) * (values > 0)
        grad_scaled = grad_weight = grad_b_enc = grad_center = None
        if ctx.needs_input_grad[0]:
            grad_scaled = weighted_rows(indices, grad, encoder_weight).to(scaled.dtype)
        # As large as the dictionary: a frozen one has none.
        if any(ctx.needs_input_grad[1:4]):
            grad_weight, grad_b_enc = encoder_gradient(indices, grad, scaled, center, encoder_weight)
            if ctx.needs_input_grad[3]:
                # Summed over the batch, the gradient of the input is one product with the summed gradient of the latents.
                grad_center = -(grad_b_enc @ encoder_weight.to(scaled.dtype)).to(center.dtype)
            grad_weight, grad_b_enc = grad_weight.to(encoder_weight.dtype), grad_b_enc.to(ctx.b_enc_dtype)
        return grad_scaled, grad_weight, grad_b_enc, grad_center, None, None


def encoder_gradient(
    indices: torch.Tensor, grad: torch.Tensor, scaled: torch.Tensor, center: torch.Tensor, encoder_weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Gradients of the encoder's weight and bias from those of the selected latents' values.

    Args:
        indices (`torch.Tensor`): (tokens, k).
        grad (`torch.Tensor`): (tokens, k), gradient of the values.
        scaled (`torch.Tensor`): (tokens, d_in), the encoder's input.
        center (`torch.Tensor`): (d_in,), what the encoder subtracts from it.
        encoder_weight (`torch.Tensor`): (d_sae, d_in).

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: (d_sae, d_in) and (d_sae,).
    """
    if suits_triton(scaled, center, encoder_weight):
        from .sparse_encoder_triton import encoder_gradient_triton

        return encoder_gradient_triton(indices, grad, scaled, center, encoder_weight)
    centered = scaled - center
    grad_weight = empty_in_large_pages(*encoder_weight.shape, dtype=scaled.dtype, device=scaled.device).zero_()
    if suits_numba(grad, centered, grad_weight) and indices.numel():
        from .hierarchical_topk_numba import add_rows_numba

        add_rows_numba(indices, grad, centered, grad_weight)
    else:
        product = torch.empty_like(centered)
        for index, value in zip(indices.t().contiguous(), grad.t().contiguous()):
            grad_weight.index_add_(0, index, torch.mul(centered, value.unsqueeze(1), out=product))
    grad_bias = torch.zeros(len(encoder_weight), dtype=scaled.dtype, device=scaled.device)
    grad_bias.index_add_(0, indices.flatten(), grad.flatten())
    return grad_weight, grad_bias


class TangentGradient(torch.autograd.Function):
    """Identity on unit-norm rows; the gradient loses its part along each row, which normalising would undo."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (weight,) = ctx.saved_tensors
        if suits_triton(grad, weight) and grad.is_contiguous() and weight.is_contiguous():
            from .sparse_encoder_triton import tangent_gradient_triton_

            tangent_gradient_triton_(grad, weight)
            return grad
        # In place: only this node holds the gradient of the weight it passed on. On CPU in blocks that fit the cache.
        block = 1024 if grad.device.type == "cpu" else 8192
        for part, rows in zip(grad.split(block), weight.split(block)):
            along = torch.linalg.vecdot(part, rows).unsqueeze(1)
            part.addcmul_(along, rows, value=-1)
        return grad
