"""The HierarchicalTopK loss: one dictionary, the reconstruction error at every sparsity budget.

Source: "Train One Sparse Autoencoder Across Multiple Sparsity Budgets", arXiv 2505.24473.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.utils import is_triton_available

from .configuration_hierarchical_sae import increasing_integers
from .large_pages import empty_in_large_pages
from .once_differentiable import once_differentiable


BudgetErrors = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def hierarchical_topk_loss(
    top_indices: torch.Tensor,
    top_values: torch.Tensor,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor,
    target: torch.Tensor,
    *,
    budgets: Sequence[int] | None = None,
    budget_weights: Sequence[float] | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    r"""
    Mean squared error of the reconstruction, averaged over sparsity budgets:

        x̂ʲ = Σ_{i ≤ j} v_i W_dec[index_i] + b_dec,    L = Σ_{j ∈ budgets} w_j · mean (x̂ʲ − target)²

    where the mean runs over batch and `d_in`. Latents come in order of decreasing strength, so budget j uses the j
    strongest latents of each input. Extra memory is O(batch × d_in), whatever `k` is. Source: arXiv 2505.24473.

    Args:
        top_indices (`torch.Tensor`): (batch, k), integers in [0, d_sae); repeats are allowed.
        top_values (`torch.Tensor`): (batch, k), activations, already rectified.
        W_dec (`torch.Tensor`): (d_sae, d_in).
        b_dec (`torch.Tensor`): (d_in,).
        target (`torch.Tensor`): (batch, d_in).
        budgets (`Sequence[int]`, *optional*): strictly increasing budgets in [1, k], a tensor or an array too; every
            prefix 1…k by default. `(k,)` is the plain TopK loss.
        budget_weights (`Sequence[float]`, *optional*): one weight per budget, normalised to sum 1; equal by default.
        backend (`str`, defaults to `"auto"`): `"torch"`, `"triton"`, `"numba"`, or `"auto"`: Triton for CUDA tensors,
            numba for float32 on CPU, each where it is installed, and torch for the rest.

    Returns:
        `torch.Tensor`: the loss, a float32 scalar (float64 for float64 inputs).

    Raises:
        `ValueError`: If shapes, budgets or weights do not fit together, or the backend is unknown or unsuitable.
        `ImportError`: If triton or numba is asked for and not installed.
        `IndexError`: If, with numba, indices are outside [0, d_sae).
    """
    _check_shapes(top_indices, top_values, W_dec, b_dec, target=target)
    top_indices = as_indices(top_indices)
    budgets = resolve_budgets(budgets, top_indices.shape[1])
    budget_errors = choose_form(backend, top_values, W_dec, b_dec, target)
    errors, _ = budget_errors(top_indices, top_values, W_dec, b_dec, target, budgets)
    return (errors * normalized_weights(budget_weights, budgets, like=errors)).sum()


def hierarchical_topk_loss_reference(
    top_indices: torch.Tensor,
    top_values: torch.Tensor,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor,
    target: torch.Tensor,
    *,
    budgets: Sequence[int] | None = None,
    budget_weights: Sequence[float] | None = None,
) -> torch.Tensor:
    """The formula of [`hierarchical_topk_loss`] written down: the specification, at batch × k × d_in memory."""
    dtype = torch.promote_types(W_dec.dtype, torch.float32)
    budgets = resolve_budgets(budgets, top_indices.shape[1])
    contributions = top_values.to(dtype).unsqueeze(-1) * W_dec.to(dtype)[top_indices]
    reconstructions = contributions.cumsum(dim=1) + b_dec.to(dtype)
    errors = (reconstructions - target.to(dtype).unsqueeze(1)).square().mean(dim=(0, 2))
    chosen = errors[torch.tensor(budgets, device=errors.device) - 1]
    return (chosen * normalized_weights(budget_weights, budgets, like=chosen)).sum()


def choose_form(backend: str, *tensors: torch.Tensor) -> BudgetErrors:
    """
    The function that computes the terms of [`hierarchical_topk_loss`] before weighting. Its arguments are top_indices
    and top_values (batch, k), W_dec (d_sae, d_in), b_dec (d_in,), target (batch, d_in) and strictly increasing budgets
    in [1, k]; it returns the mean squared error at each budget, (budgets,), and the reconstruction with all k latents,
    (batch, d_in), which they leave behind for free. Both are differentiable.

    Args:
        backend (`str`): as in [`hierarchical_topk_loss`].
        tensors (`torch.Tensor`): top_values, W_dec, b_dec and target, which `"auto"` goes by.

    Raises:
        `ValueError`: If the backend is unknown.
        `ImportError`: If triton is asked for and not installed.
    """
    if not isinstance(backend, str) or backend not in ("auto", "torch", "triton", "numba"):
        raise ValueError(f"backend must be 'auto', 'torch', 'triton' or 'numba', got {backend!r}")
    if backend == "triton" or (backend == "auto" and suits_triton(tensors[1])):
        from .hierarchical_topk_triton import budget_errors_triton

        return budget_errors_triton
    if backend == "numba" or (backend == "auto" and suits_numba(*tensors)):
        from .hierarchical_topk_numba import HierarchicalTopKNumba

        return HierarchicalTopKNumba.apply
    return HierarchicalTopK.apply


def suits_triton(*tensors: torch.Tensor) -> bool:
    """Whether the Triton kernels take these tensors: in at most single precision on a GPU, and triton is installed."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return all(tensor.is_cuda and tensor.dtype in dtypes for tensor in tensors) and is_triton_available()


def suits_numba(*tensors: torch.Tensor) -> bool:
    """Whether the compiled CPU form takes these tensors: float32 on CPU, and numba is installed."""
    fits = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
    # Not transformers' is_numba_available: it also asks for the numpy of an old librosa.
    return fits and not torch.compiler.is_compiling() and importlib.util.find_spec("numba") is not None


def as_indices(integers: torch.Tensor) -> torch.Tensor:
    """The same integers in a type that torch indexes with: int32 or int64."""
    return integers if integers.dtype in (torch.int32, torch.int64) else integers.long()


def resolve_budgets(budgets: Sequence[int] | None, k: int) -> tuple[int, ...]:
    """Every prefix 1…k for `None`, else the given budgets, checked to be strictly increasing and in [1, k]."""
    return increasing_integers("budgets", range(1, k + 1) if budgets is None else budgets, k)


def normalized_weights(
    budget_weights: Sequence[float] | None, budgets: Sequence[int], like: torch.Tensor
) -> torch.Tensor:
    """(budgets,) non-negative weights that sum to 1, equal ones for `None`; dtype and device are those of `like`."""
    if budget_weights is None:
        return like.new_full((len(budgets),), 1 / len(budgets))
    weights = torch.as_tensor(budget_weights, dtype=torch.float64, device="cpu")
    if weights.shape != (len(budgets),):
        got = len(weights) if weights.ndim == 1 else f"shape {tuple(weights.shape)}"
        raise ValueError(f"budget_weights needs one weight per budget ({len(budgets)}), got {got}")
    if not bool((weights >= 0).all()) or not 0 < float(weights.sum()) < float("inf"):
        raise ValueError(f"budget_weights must be finite, not negative and not all zero, got {weights.tolist()}")
    # Without non_blocking, the host would wait for all that a GPU has still to do.
    return (weights / weights.sum()).to(like, non_blocking=True)


def _check_shapes(
    top_indices: torch.Tensor,
    top_values: torch.Tensor,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor,
    *,
    target: torch.Tensor,
) -> None:
    for name, tensor in [
        ("top_indices", top_indices),
        ("top_values", top_values),
        ("W_dec", W_dec),
        ("b_dec", b_dec),
        ("target", target),
    ]:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    batch, d_in = target.shape if target.ndim == 2 else (None, None)
    if target.ndim != 2 or W_dec.ndim != 2 or W_dec.shape[1] != d_in or b_dec.shape != (d_in,):
        raise ValueError(
            "expected target (batch, d_in), W_dec (d_sae, d_in) and b_dec (d_in,), "
            f"got {tuple(target.shape)}, {tuple(W_dec.shape)} and {tuple(b_dec.shape)}"
        )
    if top_indices.ndim != 2 or top_indices.shape != top_values.shape or len(top_indices) != batch:
        raise ValueError(
            f"expected top_indices and top_values of one shape (batch={batch}, k), "
            f"got {tuple(top_indices.shape)} and {tuple(top_values.shape)}"
        )
    if top_indices.is_floating_point() or top_indices.is_complex() or top_indices.dtype == torch.bool:
        raise ValueError(f"top_indices must be integers, got {top_indices.dtype}")
    if 0 in top_indices.shape:
        raise ValueError(f"the batch and k must not be empty, got top_indices of shape {tuple(top_indices.shape)}")


def _blocks(residual: torch.Tensor) -> list[slice]:
    """Slices of the batch: on CPU a few hundred inputs, whose residuals stay in the cache, elsewhere all of it."""
    size = 512 if residual.device.type == "cpu" else len(residual)
    return [slice(start, start + size) for start in range(0, len(residual), size)]


class HierarchicalTopK(torch.autograd.Function):
    """Keeps one residual: updated latent by latent going forward, undone latent by latent going backward."""

    @staticmethod
    def forward(
        ctx: Any,
        top_indices: torch.Tensor,
        top_values: torch.Tensor,
        W_dec: torch.Tensor,
        b_dec: torch.Tensor,
        target: torch.Tensor,
        budgets: tuple[int, ...],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = torch.promote_types(W_dec.dtype, torch.float32)
        # One latent of every input at a time: its indices and values have to be contiguous.
        indices, values = top_indices.t().contiguous(), top_values.t().to(dtype).contiguous()
        residual = b_dec.to(dtype) - target.to(dtype)
        errors = torch.zeros(len(budgets), dtype=dtype, device=target.device)
        position = {budget: place for place, budget in enumerate(budgets)}
        for block in _blocks(residual):
            part = residual[block]
            rows = torch.empty_like(part, dtype=W_dec.dtype)
            for j in range(len(indices)):
                # index_select is several times faster on CPU than W_dec[indices[j]].
                torch.index_select(W_dec, 0, indices[j, block], out=rows)
                part.addcmul_(rows.to(dtype), values[j, block].unsqueeze(1))
                if j + 1 in position:
                    errors[position[j + 1]] += torch.linalg.vector_norm(part, dim=1).square().sum()
        errors /= residual.numel()
        ctx.save_for_backward(indices, values, W_dec, residual)
        ctx.position, ctx.target_dtype, ctx.b_dec_dtype = position, target.dtype, b_dec.dtype
        ctx.values_dtype = top_values.dtype
        ctx.set_materialize_grads(False)
        return errors, residual + target

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_errors: torch.Tensor | None, grad_reconstruction: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        indices, values, W_dec, last_residual = ctx.saved_tensors
        dtype = last_residual.dtype
        scales = None if grad_errors is None else (grad_errors * (2 / last_residual.numel())).tolist()
        residual = last_residual.clone()
        # The gradient of everything from latent j on, with respect to the residual after latent j.
        grad = torch.zeros_like(residual) if grad_reconstruction is None else grad_reconstruction.to(dtype).clone()
        grad_values = torch.empty_like(values)
        grad_W_dec = None
        if ctx.needs_input_grad[2]:
            grad_W_dec = empty_in_large_pages(*W_dec.shape, dtype=dtype, device=W_dec.device).zero_()
        for block in _blocks(residual):
            part, suffix = residual[block], grad[block]
            rows, scaled = torch.empty_like(part, dtype=W_dec.dtype), torch.empty_like(part)
            for j in reversed(range(len(indices))):
                if scales is not None and j + 1 in ctx.position:
                    suffix.add_(part, alpha=scales[ctx.position[j + 1]])
                value = values[j, block].unsqueeze(1)
                torch.index_select(W_dec, 0, indices[j, block], out=rows)
                row = rows.to(dtype)
                # Several times faster on CPU than a product of matrices of one row and one column.
                torch.sum(torch.mul(suffix, row, out=scaled), dim=1, out=grad_values[j, block])
                part.addcmul_(row, value, value=-1)
                if grad_W_dec is not None:
                    grad_W_dec.index_add_(0, indices[j, block], torch.mul(suffix, value, out=scaled))
        grad_target = None
        if ctx.needs_input_grad[4]:
            grad_target = (-grad if grad_reconstruction is None else grad_reconstruction - grad).to(ctx.target_dtype)
        return (
            None,
            grad_values.t().to(ctx.values_dtype),
            None if grad_W_dec is None else grad_W_dec.to(W_dec.dtype),
            grad.sum(dim=0).to(ctx.b_dec_dtype),
            grad_target,
            None,
        )
