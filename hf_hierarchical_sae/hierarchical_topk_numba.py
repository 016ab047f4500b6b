"""Compiled CPU form of the HierarchicalTopK loss, and the sparse encoder's gradient, in float32.

Both walk token by token, so that a token's residual stays in the cache while its rows of the dictionary pass by; the
torch forms go latent by latent over the whole batch instead. Threads share the columns, so no two write to one entry.
"""

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy
import torch

from .large_pages import empty_in_large_pages
from .once_differentiable import once_differentiable


try:
    from numba import float32, njit
    from numpy.ctypeslib import as_array
except ImportError:
    njit = None


def compiled(function: Callable) -> Callable:
    """Machine code for `function`, kept in a cache on disk; without numba the function itself, which is never run."""
    if njit is None:
        return function
    # Sums may be reordered, which lets them use vector instructions; NaN and infinity keep their meaning.
    options: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # there is no folder to write to: every process compiles anew
        return njit(**options)(function)


@compiled
def _forward(
    start: int,
    stop: int,
    indices: numpy.ndarray,
    values: numpy.ndarray,
    W_dec: numpy.ndarray,
    b_dec: numpy.ndarray,
    target: numpy.ndarray,
    place: numpy.ndarray,
    residual: numpy.ndarray,
    squares: numpy.ndarray,
) -> None:
    # indices, values (B, K), W_dec (F, D), b_dec (D), target, residual (B, D); place (K): which budget ends at latent
    # j, or -1; squares (budgets) float64.
    bias = b_dec[start:stop]
    for b in range(indices.shape[0]):
        r, x = residual[b, start:stop], target[b, start:stop]
        for d in range(len(r)):
            r[d] = bias[d] - x[d]
        for j in range(indices.shape[1]):
            v, row = values[b, j], W_dec[indices[b, j], start:stop]
            square = float32(0)
            for d in range(len(r)):
                moved = r[d] + v * row[d]
                r[d] = moved
                square += moved * moved
            if place[j] >= 0:
                squares[place[j]] += square


@compiled
def _backward(
    start: int,
    stop: int,
    indices: numpy.ndarray,
    values: numpy.ndarray,
    W_dec: numpy.ndarray,
    scales: numpy.ndarray,
    residual: numpy.ndarray,
    grad: numpy.ndarray,
    grad_W_dec: numpy.ndarray,
    grad_values: numpy.ndarray,
) -> None:
    # scales (K): gradient of the loss by the residual's square after latent j, times 2, or 0; residual and grad (B, D)
    # are used up: grad comes as the reconstruction's gradient and ends as that of b_dec; grad_values (B, K); grad_W_dec
    # (F, D), or (1, D) where it is not wanted.
    for b in range(indices.shape[0]):
        r, s = residual[b, start:stop], grad[b, start:stop]
        for j in range(indices.shape[1] - 1, -1, -1):
            v, scale = values[b, j], scales[j]
            row = W_dec[indices[b, j], start:stop]
            grad_row = grad_W_dec[indices[b, j] % len(grad_W_dec), start:stop]
            product = float32(0)
            for d in range(len(r)):
                above = s[d] + scale * r[d]
                s[d] = above
                product += row[d] * above
                grad_row[d] += v * above
                r[d] -= v * row[d]
            grad_values[b, j] = product


@compiled
def _add_rows(
    start: int, stop: int, indices: numpy.ndarray, values: numpy.ndarray, rows: numpy.ndarray, total: numpy.ndarray
) -> None:
    # total[indices[b, j]] += values[b, j] · rows[b]; indices, values (B, K), rows (B, D), total (F, D)
    for b in range(indices.shape[0]):
        row = rows[b, start:stop]
        for j in range(indices.shape[1]):
            v, target = values[b, j], total[indices[b, j], start:stop]
            if v != 0:
                for d in range(len(row)):
                    target[d] += v * row[d]


class HierarchicalTopKNumba(torch.autograd.Function):
    """
    Numba form of the loss, see `choose_form`, for float32 tensors on CPU. It raises an `ImportError` if numba is not
    installed, a `ValueError` for other tensors, and an `IndexError` if indices are outside [0, d_sae).
    """

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
        _check(top_indices, len(W_dec), (top_values, W_dec, b_dec, target))
        top_indices, top_values = top_indices.long().contiguous(), top_values.contiguous()
        W_dec, b_dec, target = W_dec.contiguous(), b_dec.contiguous(), target.contiguous()
        place = torch.full((top_indices.shape[1],), -1)
        place[torch.tensor(budgets) - 1] = torch.arange(len(budgets))
        residual = torch.empty_like(target)
        squares = torch.zeros(torch.get_num_threads(), len(budgets), dtype=torch.float64)
        tensors = (top_indices, top_values, W_dec, b_dec, target, place, residual)
        _share_columns(_forward, target.shape[1], tensors, squares)
        ctx.save_for_backward(top_indices, top_values, W_dec, residual, place)
        ctx.set_materialize_grads(False)
        return (squares.sum(dim=0) / residual.numel()).float(), residual + target

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_errors: torch.Tensor | None, grad_reconstruction: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        top_indices, top_values, W_dec, last_residual, place = ctx.saved_tensors
        scales = torch.zeros(len(place))
        if grad_errors is not None:
            scales[place >= 0] = grad_errors * (2 / last_residual.numel())
        grad = torch.zeros_like(last_residual) if grad_reconstruction is None else grad_reconstruction.clone()
        grad_values = torch.empty(torch.get_num_threads(), *top_values.shape)
        rows = len(W_dec) if ctx.needs_input_grad[2] else 1
        grad_W_dec = empty_in_large_pages(rows, grad.shape[1], dtype=W_dec.dtype, device=W_dec.device).zero_()
        tensors = (top_indices, top_values, W_dec, scales, last_residual.clone(), grad, grad_W_dec)
        _share_columns(_backward, grad.shape[1], tensors, grad_values)
        grad_target = None
        if ctx.needs_input_grad[4]:
            grad_target = -grad if grad_reconstruction is None else grad_reconstruction - grad
        grad_W_dec = grad_W_dec if ctx.needs_input_grad[2] else None
        return None, grad_values.sum(dim=0), grad_W_dec, grad.sum(dim=0), grad_target, None


def add_rows_numba(indices: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, total: torch.Tensor) -> None:
    """
    total[indices[b, j]] += values[b, j] · rows[b], in place, without autograd.

    Args:
        indices (`torch.Tensor`): (batch, k).
        values (`torch.Tensor`): (batch, k).
        rows (`torch.Tensor`): (batch, d_in).
        total (`torch.Tensor`): (d_sae, d_in), contiguous.
    """
    _check(indices, len(total), (values, rows, total))
    tensors = (indices.long().contiguous(), values.contiguous(), rows.contiguous(), total)
    _share_columns(_add_rows, rows.shape[1], tensors)


def _check(indices: torch.Tensor, d_sae: int, tensors: Sequence[torch.Tensor]) -> None:
    if njit is None:
        raise ImportError("backend='numba' needs the package numba: `pip install numba`, or use backend='torch'")
    if any(tensor.dtype != torch.float32 or tensor.device.type != "cpu" for tensor in tensors):
        found = ", ".join(f"{tensor.dtype} on {tensor.device}" for tensor in tensors)
        raise ValueError(f"backend='numba' needs float32 on cpu, got {found}: use backend='torch'")
    # Compiled code does not check what it addresses.
    low, high = (int(bound) for bound in indices.aminmax())
    if low < 0 or high >= d_sae:
        raise IndexError(f"top_indices must be in [0, d_sae={d_sae}), got {low} to {high}")


def _share_columns(
    kernel: Callable[..., None], width: int, tensors: Sequence[torch.Tensor], private: torch.Tensor | None = None
) -> None:
    """
    Calls a kernel in each thread with the first column of its slice and the one after the last, the tensors that all
    share, and its part of `private`, which no other thread writes to.
    """
    threads = torch.get_num_threads()
    bounds = [width * thread // threads for thread in range(threads + 1)]
    shared = [_as_array(tensor) for tensor in tensors]
    own = [()] * threads if private is None else [(_as_array(part),) for part in private]
    calls = [(start, end, *shared, *mine) for start, end, mine in zip(bounds, bounds[1:], own)]
    if threads == 1:
        # A thread takes longer to start than a small batch to compute.
        kernel(*calls[0])
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(kernel, *zip(*calls)))


def _as_array(tensor: torch.Tensor) -> Any:
    """The tensor's memory as a numpy array. Not `tensor.numpy()`: that fixes the storage, which FSDP wants to free."""
    kind = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double, torch.int64: ctypes.c_int64}[tensor.dtype]
    return as_array((kind * tensor.numel()).from_address(tensor.data_ptr())).reshape(tensor.shape)
