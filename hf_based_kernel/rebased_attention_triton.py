"""
Triton form of ReBased and Taylor attention: launch sizes, and the operators that torch sees (`rebased_kernels_triton.py`).
"""

import re

import torch


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("backend='triton' needs triton: pip install triton, or use backend='torch'") from error

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


def rebased_attention_triton(
    q,
    k,
    v,
    *,
    scale,
    eps,
    initial_state=None,
    return_state=False,
    attention_mask=None,
    segment_ids=None,
    chunk_size=None,
    coefficients=(0.0, 0.0, 1.0),
):
    """
    `rebased_attention` in Triton kernels, with the arguments of the other forms; float32, bfloat16 and float16.

    float32 inputs keep float32 accuracy. Of half-precision inputs, the features and the state are rounded to TF32 (11 bits)
    where they enter a tensor core, the scores' squares to the input's dtype if it is bfloat16; every sum is in float32.
    """
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f'backend="triton" takes float32, bfloat16 or float16, got {q.dtype}; cast the inputs or use backend="torch"'
        )
    batch_size, seq_len, num_heads, feature_dim = q.shape
    chunk = _chunk_tokens(chunk_size, q.dtype)
    value_blocks = triton.cdiv(v.shape[-1], _value_block(feature_dim, v.shape[-1]))
    out, _, state, _ = _forward(
        q,
        k,
        v,
        initial_state,
        # Padding has zero keys and values: only a constant term of the kernel could tell it from nothing.
        _code_segments(attention_mask if coefficients[0] else None, segment_ids),
        scale,
        eps,
        list(coefficients),
        chunk,
        _span_tokens(batch_size * num_heads * value_blocks, seq_len, chunk, q.device),
    )
    return (out, state) if return_state else out


def _code_segments(attention_mask, segment_ids):
    """(batch, seq) int32: the number s of each token's segment, -1 - s for padding; None if there is nothing to tell."""
    if attention_mask is None and segment_ids is None:
        return None
    if segment_ids is None:
        return attention_mask.to(torch.int32) - 1
    changes = torch.nn.functional.pad(segment_ids.diff(dim=1) != 0, (1, 0))
    segments = changes.cumsum(dim=1, dtype=torch.int32)
    return segments if attention_mask is None else torch.where(attention_mask, segments, -1 - segments)


def _chunk_tokens(chunk_size, dtype):
    # The most for which the state of D=16, V=64 stays in the registers of an H100 (float32 spills some at any size).
    largest = 16 if dtype == torch.float32 else 32
    return largest if chunk_size is None else min(max(triton.next_power_of_2(chunk_size), 16), largest)


def _state_rows(feature_dim, coefficients):
    return feature_dim * (feature_dim // 2 + 1) + feature_dim * (coefficients[1] != 0) + (coefficients[0] != 0)


def _row_starts(rows):
    """Powers of two, 16 (the least that a tensor core takes) to 128, that cover the rows: 144 -> (0, 128, 144)."""
    starts = [0]
    while starts[-1] < rows:
        left = rows - starts[-1]
        starts.append(starts[-1] + min(max(1 << (left.bit_length() - 1), 16), 128))
    return tuple(starts)


def _value_block(feature_dim, head_dim):
    # At most 64 registers a thread for the state.
    block = 64
    while block > 16 and feature_dim * (feature_dim // 2 + 1) * block > 128 * 128:
        block //= 2
    return min(block, max(triton.next_power_of_2(head_dim), 16))


def _span_tokens(programs, seq_len, chunk, device):
    """Tokens of a span: the whole sequence, or, where the programs leave half of the device idle, a part of it."""
    units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    chunks = triton.cdiv(seq_len, chunk)
    # Below 8 chunks a span, the state's way through memory costs more than the idle units.
    spans = max(min(units // programs, chunks // 8), 1)
    return triton.cdiv(chunks, spans) * chunk


def _constants(q, v, segments, coefficients, chunk):
    """Compile-time arguments that all kernels over chunks share."""
    feature_dim = q.shape[-1]
    half_precision = "ieee" if torch.version.hip else "tf32"
    full_precision = "ieee" if torch.version.hip else "tf32x3"
    return {
        "H": q.shape[2],
        "SEGMENTED": segments is not None,
        "V": v.shape[-1],
        "P": _state_rows(feature_dim, coefficients),
        "KERNEL": (feature_dim, max(triton.next_power_of_2(feature_dim), 16), *coefficients),
        "STARTS": _row_starts(_state_rows(feature_dim, coefficients)),
        "C": chunk,
        "BV": _value_block(feature_dim, v.shape[-1]),
        # Squared scores leave the range of float16. The interpreter (CPU) multiplies bfloat16 as if it were integers.
        "OPERAND": tl.bfloat16 if q.dtype == torch.bfloat16 and q.is_cuda else tl.float32,
        "PRECISION": full_precision if q.dtype == torch.float32 else half_precision,
        "num_warps": 4 if torch.version.hip else 8,
        "num_stages": 2,
    }


def _empty_states(q, v, coefficients, *spans):
    rows = _state_rows(q.shape[-1], coefficients)
    return q.new_empty((q.shape[0], q.shape[2], *spans, rows, v.shape[-1] + 1), dtype=torch.float32)


def _span_states(x, values, denominators, deltas, boundary, segments, scale, constants, *, span_tokens, of_queries):
    """(batch, num_heads, spans, rows, head_dim + 1): the state before each span, or its gradient after each span."""
    batch_size, seq_len, num_heads, _ = x.shape
    spans = triton.cdiv(seq_len, span_tokens)
    states = _empty_states(x, values, constants["KERNEL"][2:], spans)
    rows, columns = states.shape[-2:]
    grid = (batch_size * num_heads, triton.cdiv(values.shape[-1], constants["BV"]), spans)
    span_sums_kernel[grid](
        x,
        values,
        x if segments is None else segments,
        states if denominators is None else denominators,
        states if deltas is None else deltas,
        states,
        scale,
        seq_len,
        span_tokens,
        **constants | {"OF_QUERIES": of_queries},
    )
    flags = {
        "H": num_heads,
        "SEGMENTED": segments is not None,
        "HAS_STATE": boundary is not None,
        "OF_QUERIES": of_queries,
        "BLOCK": 1024,
    }
    scan_kernel[(grid[0], triton.cdiv(rows * columns, 1024))](
        states,
        states if boundary is None else boundary,
        x if segments is None else segments,
        seq_len,
        span_tokens,
        spans,
        rows * columns,
        **flags,
    )
    return states


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
    chunk: int,
    span_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, denominators (batch, seq, num_heads), final state, and the states before each span if there are several."""
    out, denominators, final_state, states = _empty_results(
        q, k, v, initial_state, segments, scale, eps, coefficients, chunk, span_tokens
    )
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    batch_size, seq_len, num_heads, _ = q.shape
    spans = triton.cdiv(seq_len, span_tokens)
    constants = _constants(q, v, segments, coefficients, chunk)
    with torch.cuda.device_of(q):
        before = None if initial_state is None else initial_state.contiguous()
        if spans > 1:
            before = states = _span_states(
                k, v, None, None, before, segments, 1.0, constants, span_tokens=span_tokens, of_queries=False
            )
        forward_kernel[(batch_size * num_heads, triton.cdiv(v.shape[-1], constants["BV"]), spans)](
            q,
            k,
            v,
            q if segments is None else segments,
            denominators if before is None else before,
            out,
            denominators,
            final_state,
            scale,
            eps,
            seq_len,
            span_tokens,
            **constants | {"HAS_STATE": before is not None},
        )
    return out, denominators, final_state, states


@_forward.register_fake
def _empty_results(q, k, v, initial_state, segments, scale, eps, coefficients, chunk, span_tokens):
    spans = triton.cdiv(q.shape[1], span_tokens)
    return (
        torch.empty_like(v, memory_format=torch.contiguous_format),
        q.new_empty(q.shape[:3], dtype=torch.float32),
        _empty_states(q, v, coefficients),
        _empty_states(q, v, coefficients, spans if spans > 1 else 0),
    )


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
    states: torch.Tensor,
    scale: float,
    coefficients: list[float],
    chunk: int,
    span_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v and the initial state."""
    q, k, v, grad_out = q.contiguous(), k.contiguous(), v.contiguous(), grad_out.contiguous()
    batch_size, seq_len, num_heads, _ = q.shape
    constants = _constants(q, v, segments, coefficients, chunk)
    spans, blocks = triton.cdiv(seq_len, span_tokens), triton.cdiv(v.shape[-1], constants["BV"])
    grid = (batch_size * num_heads, blocks, spans)
    # Several value blocks each have a part of these.
    grad_q, grad_k = (
        torch.empty_like(x) if blocks == 1 else x.new_empty((blocks, *x.shape), dtype=torch.float32) for x in (q, k)
    )
    grad_v, grad_initial = torch.empty_like(v), _empty_states(q, v, coefficients)
    deltas = torch.empty_like(denominators)
    before, after = states, grad_state
    if spans == 1:
        before = None if initial_state is None else initial_state.contiguous()
    with torch.cuda.device_of(q):
        block = {"R": 64, "BV": 64}
        deltas_kernel[(triton.cdiv(deltas.numel(), 64),)](grad_out, out, deltas, deltas.numel(), v.shape[-1], **block)
        if grad_state is not None:
            after = grad_state.contiguous()
        if spans > 1:
            after = _span_states(
                q,
                grad_out,
                denominators,
                deltas,
                after,
                segments,
                scale,
                constants,
                span_tokens=span_tokens,
                of_queries=True,
            )
        sizes = (scale, seq_len, span_tokens)
        inputs = (q, k, v, q if segments is None else segments)
        query_gradient_kernel[grid](
            *inputs,
            deltas if before is None else before,
            grad_out,
            denominators,
            deltas,
            grad_q,
            *sizes,
            **constants | {"HAS_STATE": before is not None},
        )
        key_value_gradient_kernel[grid](
            *inputs,
            deltas if after is None else after,
            grad_out,
            denominators,
            deltas,
            grad_k,
            grad_v,
            grad_initial,
            *sizes,
            **constants | {"HAS_STATE": after is not None, "C": 16},
        )
    if blocks > 1:
        grad_q, grad_k = grad_q.sum(0).to(q.dtype), grad_k.sum(0).to(k.dtype)
    return grad_q, grad_k, grad_v, grad_initial


@_backward.register_fake
def _empty_gradients(
    grad_out,
    grad_state,
    q,
    k,
    v,
    initial_state,
    segments,
    out,
    denominators,
    states,
    scale,
    coefficients,
    chunk,
    span_tokens,
):
    gradients = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return *gradients, _empty_states(q, v, coefficients)


def _save_for_backward(ctx, inputs, output):
    q, k, v, initial_state, segments, scale, _, coefficients, chunk, span_tokens = inputs
    out, denominators, _, states = output
    ctx.mark_non_differentiable(denominators, states)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, initial_state, segments, out, denominators, states)
    ctx.options = scale, coefficients, chunk, span_tokens


def _call_backward(ctx, grad_out, _, grad_state, __):
    q, k, v, initial_state, *others = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(v)
    *gradients, grad_initial = _backward(grad_out, grad_state, q, k, v, initial_state, *others, *ctx.options)
    return *gradients, None if initial_state is None else grad_initial, *(None,) * 6


_forward.register_autograd(_call_backward, setup_context=_save_for_backward)
