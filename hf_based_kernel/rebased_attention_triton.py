"""
Triton form of ReBased and Taylor attention: launch sizes, and the operators that torch sees (`rebased_kernels_triton.py`).
"""

import re
from typing import Any

import torch


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("backend='triton' needs triton: pip install triton, or use backend='torch'") from error

from .rebased_features import REBASED, Coefficients, packed_size, state_size
from .rebased_kernels_triton import (
    deltas_kernel,
    forward_kernel,
    key_value_gradient_kernel,
    query_gradient_kernel,
    scan_kernel,
    span_sums_kernel,
)


# Each copy of this module (the package, a checkpoint's remote code) registers its operators under its own name.
NAMESPACE = re.sub(r"\W", "_", __name__)
# (operands are float32, kernel) -> tokens of a block, and of the blocks that it is compared with, rows of a state that are read
# (or, of span_sums, made) at a time, warps, pipeline stages, most registers of a thread on NVIDIA's cards (0: no limit).
SIZES = {
    (False, "span_sums"): (32, 32, 64, 4, 3, 0),
    (False, "forward"): (64, 64, 32, 4, 3, 128),
    (False, "query_gradient"): (64, 32, 32, 4, 3, 0),
    (False, "key_value_gradient"): (64, 32, 32, 4, 3, 168),
    (True, "span_sums"): (16, 16, 64, 8, 2, 0),
    (True, "forward"): (32, 32, 16, 8, 2, 0),
    (True, "query_gradient"): (16, 16, 16, 4, 2, 0),
    (True, "key_value_gradient"): (16, 16, 16, 4, 2, 0),
}
# The backward pass has more scores to form for each state that it reads.
SPAN_TOKENS = {"forward": 512, "backward": 256}


def rebased_attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    eps: float,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    attention_mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    chunk_size: int | None = None,
    coefficients: Coefficients = REBASED,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """
    `rebased_attention` in Triton kernels, with the arguments of the other forms; float32, bfloat16 and float16.

    float32 inputs keep float32 accuracy. Where they enter a tensor core, the features and the state are rounded to 16 bits for
    bfloat16, and weights and their gradients to 8 bits for bfloat16 and 11 for float16; every sum is in float32.
    """
    check_dtype(q)
    out, _, state = _forward(
        q,
        k,
        v,
        initial_state,
        # Padding has zero keys and values: only a constant term of the kernel could tell it from nothing.
        _code_segments(attention_mask if coefficients[0] else None, segment_ids),
        scale,
        eps,
        list(coefficients),
        chunk_size,
        return_state,
    )
    return (out, state) if return_state else out


def check_dtype(q: torch.Tensor) -> None:
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f'backend="triton" takes float32, bfloat16 or float16, got {q.dtype}; cast the inputs or use backend="torch"'
        )


def _code_segments(attention_mask: torch.Tensor | None, segment_ids: torch.Tensor | None) -> torch.Tensor | None:
    """(batch, seq) int32: the number s of each token's segment, -1 - s for padding; None if there is nothing to tell."""
    if attention_mask is None and segment_ids is None:
        return None
    if segment_ids is None:
        segments = attention_mask.to(torch.int32) - 1
    else:
        changes = torch.nn.functional.pad(segment_ids.diff(dim=1) != 0, (1, 0))
        segments = changes.cumsum(dim=1, dtype=torch.int32)
        segments = segments if attention_mask is None else torch.where(attention_mask, segments, -1 - segments)
    # A mask may lie transposed in memory.
    return segments.contiguous()


def _sizes(q: torch.Tensor, kernel: str) -> dict[str, int]:
    """Tokens of a block, warps and pipeline stages of a kernel, for this dtype and device."""
    *sizes, registers = SIZES[q.dtype != torch.bfloat16, kernel] if q.is_cuda else (16, 8, 16, 4, 2, 0)
    limit = {"maxnreg": registers} if registers and not torch.version.hip else {}
    return dict(zip(("C", "K", "R", "num_warps", "num_stages"), sizes)) | limit


def _largest_block(q: torch.Tensor) -> int:
    return max(_sizes(q, kernel)["C"] for _, kernel in SIZES)


def _span_tokens(chunk_size: int | None, q: torch.Tensor, direction: str) -> int:
    """Tokens of a span: `chunk_size`, or what costs least, in whole blocks of every kernel."""
    block = _largest_block(q)
    if chunk_size is None:
        chunk_size = SPAN_TOKENS[direction] if q.is_cuda else 2 * block
    return triton.cdiv(min(chunk_size, q.shape[1]), block) * block


def _row_starts(rows: int, largest: int) -> tuple[int, ...]:
    """Powers of two, 16 (the least that a tensor core takes) to `largest`, that cover the rows: 144 -> (0, 128, 144)."""
    starts = [0]
    while starts[-1] < rows:
        left = rows - starts[-1]
        starts.append(starts[-1] + min(max(1 << (left.bit_length() - 1), 16), largest))
    return tuple(starts)


def _value_block(feature_dim: int, head_dim: int) -> int:
    # At most 64 registers a thread for the state.
    block = 64
    while block > 16 and packed_size(feature_dim) * block > 128 * 128:
        block //= 2
    return min(block, max(triton.next_power_of_2(head_dim), 16))


def _constants(
    q: torch.Tensor, v: torch.Tensor, segments: torch.Tensor | None, coefficients: list[float]
) -> dict[str, Any]:
    """Compile-time arguments that all kernels over blocks share."""
    feature_dim = q.shape[-1]
    half_precision = "ieee" if torch.version.hip else "tf32"
    full_precision = "ieee" if torch.version.hip else "tf32x3"
    return {
        "H": q.shape[2],
        "G": q.shape[2] // v.shape[2],
        "SEGMENTED": segments is not None,
        "V": v.shape[-1],
        "P": state_size(feature_dim, coefficients),
        "KERNEL": (feature_dim, max(triton.next_power_of_2(feature_dim), 16), *coefficients, packed_size(feature_dim)),
        "BV": _value_block(feature_dim, v.shape[-1]),
        "WHOLE": feature_dim == max(triton.next_power_of_2(feature_dim), 16)
        and v.shape[-1] % _value_block(feature_dim, v.shape[-1]) == 0
        and q.shape[1] % _largest_block(q) == 0,
        # Squared scores leave the range of float16. The interpreter (CPU) multiplies bfloat16 as if it were integers.
        "OPERAND": tl.bfloat16 if q.dtype == torch.bfloat16 and q.is_cuda else tl.float32,
        "PRECISION": full_precision if q.dtype == torch.float32 else half_precision,
        # What is read from a state may be small beside the products that it is the sum of.
        "STATE_PRECISION": full_precision,
    }


def _span_states(
    x: torch.Tensor,
    values: torch.Tensor,
    denominators: torch.Tensor | None,
    deltas: torch.Tensor | None,
    *,
    boundary: torch.Tensor | None,
    segments: torch.Tensor | None,
    scale: float,
    constants: dict[str, Any],
    span_tokens: int,
    of_queries: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The state before each span, as sums and totals, and that after the last; or the gradients after each, and the first.
    """
    batch_size, seq_len, num_heads, _ = x.shape
    # Every key is added to a state of its own head, every query to the gradient of the one that its group reads.
    constants = constants | {"H": num_heads, "G": constants["G"] if of_queries else 1}
    num_heads //= constants["G"]
    sizes = _sizes(x, "span_sums")
    del sizes["K"]
    starts = _row_starts(constants["P"], sizes.pop("R"))
    spans, rows, columns = triton.cdiv(seq_len, span_tokens), constants["P"], constants["V"]
    leading = (batch_size, num_heads, spans)
    sums_of_spans = x.new_empty((*leading, rows * (columns + 1)), dtype=torch.float32)
    if constants["OPERAND"] == tl.bfloat16:
        states = x.new_empty((*leading, 2, rows, columns), dtype=torch.bfloat16)
    else:
        states = x.new_empty((*leading, rows, columns), dtype=torch.float32)
    totals = x.new_empty((*leading, rows), dtype=torch.float32)
    result = x.new_empty((batch_size, num_heads, rows, columns + 1), dtype=torch.float32)
    span_sums_kernel[(batch_size * num_heads * spans, triton.cdiv(columns, constants["BV"]))](
        x,
        values,
        x if segments is None else segments,
        totals if denominators is None else denominators,
        totals if deltas is None else deltas,
        sums_of_spans,
        scale,
        seq_len,
        span_tokens,
        **constants | sizes | {"OF_QUERIES": of_queries, "STARTS": starts},
    )
    shared = {name: constants[name] for name in ("V", "P", "SEGMENTED", "KERNEL", "OPERAND")}
    scan_kernel[(batch_size * num_heads, triton.cdiv(rows * (columns + 1), 1024))](
        sums_of_spans,
        states,
        totals,
        totals if boundary is None else boundary.contiguous(),
        result,
        x if segments is None else segments,
        seq_len,
        span_tokens,
        spans,
        **shared
        | {"H": num_heads, "HAS_STATE": boundary is not None, "OF_QUERIES": of_queries, "BLOCK": 1024, "AHEAD": 8},
    )
    return states, totals, result


@torch.library.custom_op(f"{NAMESPACE}::forward", mutates_args=())
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    initial_state: torch.Tensor | None,
    segments: torch.Tensor | None,
    scale: float,
    eps: float,
    coefficients: list[float],
    chunk_size: int | None,
    return_state: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, denominators (batch, seq, num_heads), and the final state, which is empty if it is not wanted."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, denominators, final_state = _empty_results(
        q, k, v, initial_state, segments, scale, eps, coefficients, chunk_size, return_state
    )
    span_tokens = _span_tokens(chunk_size, q, "forward")
    constants, states, totals = _constants(q, v, segments, coefficients), None, None
    shared = {"segments": segments, "constants": constants, "span_tokens": span_tokens}
    with torch.cuda.device_of(q):
        if initial_state is not None or return_state or q.shape[1] > span_tokens:
            states, totals, last = _span_states(
                k, v, None, None, boundary=initial_state, scale=1.0, of_queries=False, **shared
            )
            final_state = last if return_state else final_state
        sizes = _sizes(q, "forward")
        forward_kernel[_blocks(q, v, sizes)](
            q,
            k,
            v,
            q if segments is None else segments,
            denominators if states is None else states,
            denominators if totals is None else totals,
            out,
            denominators,
            scale,
            eps,
            q.shape[1],
            span_tokens,
            **constants | sizes | {"HAS_STATE": states is not None},
        )
    return out, denominators, final_state


@_forward.register_fake
def _empty_results(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    initial_state: torch.Tensor | None,
    segments: torch.Tensor | None,
    scale: float,
    eps: float,
    coefficients: list[float],
    chunk_size: int | None,
    return_state: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = state_size(q.shape[-1], coefficients)
    state_shape = (v.shape[0], v.shape[2], rows, v.shape[-1] + 1) if return_state else (0,)
    return (
        v.new_empty((*q.shape[:3], v.shape[-1])),
        q.new_empty(q.shape[:3], dtype=torch.float32),
        q.new_empty(state_shape, dtype=torch.float32),
    )


def _blocks(x: torch.Tensor, v: torch.Tensor, sizes: dict[str, int]) -> tuple[int, int]:
    """The grid of the kernels over blocks of queries or keys x: neighbours share a span, and so its state."""
    batch_size, seq_len, num_heads, feature_dim = x.shape
    value_blocks = triton.cdiv(v.shape[-1], _value_block(feature_dim, v.shape[-1]))
    return batch_size * num_heads * triton.cdiv(seq_len, sizes["C"]), value_blocks


@torch.library.custom_op(f"{NAMESPACE}::backward", mutates_args=())
def _backward(
    grad_out: torch.Tensor,
    grad_state: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    initial_state: torch.Tensor | None,
    segments: torch.Tensor | None,
    out: torch.Tensor,
    denominators: torch.Tensor,
    scale: float,
    coefficients: list[float],
    chunk_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v and the initial state; the last is empty if there is none."""
    q, k, v, grad_out = q.contiguous(), k.contiguous(), v.contiguous(), grad_out.contiguous()
    span_tokens = _span_tokens(chunk_size, q, "backward")
    constants = _constants(q, v, segments, coefficients)
    shared = {"segments": segments, "constants": constants, "span_tokens": span_tokens}
    of_queries, of_keys = _sizes(q, "query_gradient"), _sizes(q, "key_value_gradient")
    _, blocks = _blocks(q, v, of_queries)
    # Several value blocks each have a part of these.
    grad_q, grad_k = (
        torch.empty_like(x) if blocks == 1 else x.new_empty((blocks, *x.shape), dtype=torch.float32) for x in (q, k)
    )
    grad_v, grad_initial = torch.empty_like(v), q.new_empty(0, dtype=torch.float32)
    deltas = torch.empty_like(denominators)
    before, after, totals_before, totals_after = None, None, deltas, deltas
    has_spans = q.shape[1] > span_tokens
    with torch.cuda.device_of(q):
        deltas_kernel[(triton.cdiv(deltas.numel(), 64),)](
            grad_out, out, deltas, deltas.numel(), v.shape[-1], R=64, BV=64
        )
        if initial_state is not None or has_spans:
            before, totals_before, _ = _span_states(
                k, v, None, None, boundary=initial_state, scale=1.0, of_queries=False, **shared
            )
        if initial_state is not None or grad_state is not None or has_spans:
            after, totals_after, first = _span_states(
                q, grad_out, denominators, deltas, boundary=grad_state, scale=scale, of_queries=True, **shared
            )
            grad_initial = grad_initial if initial_state is None else first
        inputs, sizes = (q, k, v, q if segments is None else segments), (scale, q.shape[1], span_tokens)
        query_gradient_kernel[_blocks(q, v, of_queries)](
            *inputs,
            deltas if before is None else before,
            totals_before,
            grad_out,
            denominators,
            deltas,
            grad_q,
            *sizes,
            q.numel(),
            **constants | of_queries | {"HAS_STATE": before is not None},
        )
        key_value_gradient_kernel[_blocks(k, v, of_keys)](
            *inputs,
            deltas if after is None else after,
            totals_after,
            grad_out,
            denominators,
            deltas,
            grad_k,
            grad_v,
            *sizes,
            k.numel(),
            **constants | of_keys | {"HAS_STATE": after is not None},
        )
    if blocks > 1:
        grad_q, grad_k = grad_q.sum(0).to(q.dtype), grad_k.sum(0).to(k.dtype)
    return grad_q, grad_k, grad_v, grad_initial


@_backward.register_fake
def _empty_gradients(
    grad_out: torch.Tensor,
    grad_state: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    initial_state: torch.Tensor | None,
    segments: torch.Tensor | None,
    out: torch.Tensor,
    denominators: torch.Tensor,
    scale: float,
    coefficients: list[float],
    chunk_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    state_shape = (0,) if initial_state is None else initial_state.shape
    return grad_q, grad_k, grad_v, q.new_empty(state_shape, dtype=torch.float32)


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, initial_state, segments, scale, _, coefficients, chunk_size, _ = inputs
    out, denominators, _ = output
    ctx.mark_non_differentiable(denominators)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, initial_state, segments, out, denominators)
    ctx.options = scale, coefficients, chunk_size


def _call_backward(
    ctx: Any, grad_out: torch.Tensor | None, _: torch.Tensor | None, grad_state: torch.Tensor | None
) -> tuple:
    q, k, v, initial_state, *others = ctx.saved_tensors
    if grad_out is None:
        grad_out = v.new_zeros((*q.shape[:3], v.shape[-1]))
    # A state that was not wanted is empty, and so is what torch.library's checks hand back for it.
    if grad_state is not None and grad_state.numel() == 0:
        grad_state = None
    *gradients, grad_initial = _backward(grad_out, grad_state, q, k, v, initial_state, *others, *ctx.options)
    return *gradients, None if initial_state is None else grad_initial, *(None,) * 6


_forward.register_autograd(_call_backward, setup_context=_save_for_backward)
