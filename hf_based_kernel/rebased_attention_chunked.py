"""
The form of ReBased's and Based's attention that is linear in length, in PyTorch: scores inside a chunk of tokens, a state
between the chunks. Under torch.compile it is one operator, forward and backward.
"""

import re
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .rebased_features import (
    REBASED,
    accumulation_dtype,
    polynomial,
    state_size,
    unweighted_features,
    unweighted_features_backward,
    weigh,
)


DEFAULT_CHUNK_SIZE = 128
QUERY_ROWS = 64


def rebased_attention_chunked(
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
    coefficients=REBASED,
):
    """`rebased_attention` in linear time: scores inside a chunk of tokens, a state between the chunks."""
    tensors = (q, k, v, initial_state, attention_mask, segment_ids)
    chunk_size = chunk_size or DEFAULT_CHUNK_SIZE
    keep_states = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if torch.compiler.is_compiling():
        out, _, state, _ = _chunked_operator(
            *tensors, scale, eps, list(coefficients), chunk_size, return_state, keep_states
        )
    else:
        out, state = _ChunkedAttention.apply(*tensors, scale, eps, coefficients, chunk_size, return_state, keep_states)
    return (out, state) if return_state else out


class _Segments(NamedTuple):
    """Which tokens of a chunk see what, for every (batch, head): True or False."""

    other: torch.Tensor  # (batch * num_heads, tokens, tokens): query and key are not of one segment
    first: torch.Tensor  # (batch * num_heads, tokens, 1): the segment that the carried state belongs to
    last: torch.Tensor  # (batch * num_heads, tokens, 1): the segment that the next state belongs to
    carry: torch.Tensor  # (batch * num_heads, 1, 1): both are one


def _segments(segment_ids, start, stop, num_heads):
    if segment_ids is None:
        return None
    ids = segment_ids[:, start:stop].repeat_interleave(num_heads, dim=0)
    carried = segment_ids[:, max(start - 1, 0)].repeat_interleave(num_heads, dim=0)[:, None]
    last = ids[:, -1:]
    return _Segments(
        other=ids[:, :, None] != ids[:, None, :],
        first=(ids == carried)[..., None],
        last=(ids == last)[..., None],
        carry=(carried == last)[..., None],
    )


class _Chunk(NamedTuple):
    """Tokens start … stop of all (batch, head), one head after the other, in the accumulation dtype."""

    queries: torch.Tensor  # (batch * num_heads, tokens, feature_dim), scaled
    keys: torch.Tensor  # (batch * num_heads, tokens, feature_dim)
    values: torch.Tensor  # (batch * num_heads, tokens, head_dim)
    padding: torch.Tensor | None  # (batch * num_heads, tokens, 1)
    segments: _Segments | None


def _chunk(q, k, v, attention_mask, segment_ids, *, start, stop, scale):
    num_heads = q.shape[2]
    padding = None
    if attention_mask is not None:
        padding = ~attention_mask[:, start:stop].repeat_interleave(num_heads, dim=0)[..., None]
    return _Chunk(
        queries=_heads_first(q[:, start:stop]) * scale,
        keys=_heads_first(k[:, start:stop]),
        values=_heads_first(v[:, start:stop]),
        padding=padding,
        segments=_segments(segment_ids, start, stop, num_heads),
    )


def _heads_first(x):
    """x: (batch, tokens, num_heads, dim) -> (batch * num_heads, tokens, dim) in the accumulation dtype."""
    return x.to(accumulation_dtype(x)).transpose(1, 2).flatten(0, 1)


def _heads_last(x, batch_size):
    return x.unflatten(0, (batch_size, -1)).transpose(1, 2)


def _query_rows(chunk):
    """Blocks of a chunk's queries. Each forms scores with the keys up to its last token only: a quarter less at 128."""
    tokens = chunk.queries.shape[1]
    return [slice(start, min(start + QUERY_ROWS, tokens)) for start in range(0, tokens, QUERY_ROWS)]


def _scores(chunk, rows):
    return torch.bmm(chunk.queries[:, rows], chunk.keys[:, : rows.stop].mT)


def _visible_weights(scores, chunk, rows, coefficients):
    """The kernel of the scores, 0 where a query does not see a key. Overwrites the scores: memory costs time here."""
    weights = scores.square_() if coefficients == REBASED else polynomial(scores, coefficients)
    weights.tril_(rows.start)
    if chunk.segments is not None:
        weights.masked_fill_(chunk.segments.other[:, rows, : rows.stop], 0)
    # Padding has zero keys, so that only a constant term of the kernel gives it a weight.
    if chunk.padding is not None and coefficients[0]:
        weights.masked_fill_(chunk.padding[:, : rows.stop].mT, 0)
    return weights


def _scores_forward(chunk, coefficients):
    """Numerators (batch * num_heads, tokens, head_dim) and denominators (…, 1) from a chunk's own scores."""
    numerators, totals = [], []
    for rows in _query_rows(chunk):
        weights = _visible_weights(_scores(chunk, rows), chunk, rows, coefficients)
        numerators.append(torch.bmm(weights, chunk.values[:, : rows.stop]))
        totals.append(weights.sum(-1, keepdim=True))
    return torch.cat(numerators, dim=1), torch.cat(totals, dim=1)


def _scores_backward(chunk, grad_numerators, grad_totals, coefficients):
    """Gradients of a chunk's queries, keys and values, each (tokens, dim), that come through its own scores."""
    grad_queries = torch.empty_like(chunk.queries)
    grad_keys, grad_values = torch.zeros_like(chunk.keys), torch.zeros_like(chunk.values)
    for rows in _query_rows(chunk):
        seen = slice(rows.stop)
        scores = _scores(chunk, rows)
        slopes = scores * (2 * coefficients[2])
        if coefficients[1]:
            slopes += coefficients[1]
        grad_scores = torch.bmm(grad_numerators[:, rows], chunk.values[:, seen].mT).add_(grad_totals[:, rows])
        grad_scores.mul_(slopes).tril_(rows.start)
        if chunk.segments is not None:
            grad_scores.masked_fill_(chunk.segments.other[:, rows, seen], 0)
        weights = _visible_weights(scores, chunk, rows, coefficients)
        grad_queries[:, rows] = torch.bmm(grad_scores, chunk.keys[:, seen])
        grad_keys[:, seen] += torch.bmm(grad_scores.mT, chunk.queries[:, rows])
        grad_values[:, seen] += torch.bmm(weights.mT, grad_numerators[:, rows])
    return grad_queries, grad_keys, grad_values


def _only(selected, x):
    return x if selected is None else torch.where(selected, x, 0)


def _added_to_state(chunk, coefficients):
    """Features (batch * num_heads, state_size, tokens), unweighted, and [v, 1] of the tokens that the next state holds."""
    ones = torch.ones_like(chunk.values[..., :1])
    if chunk.padding is not None:
        ones.masked_fill_(chunk.padding, 0)
    last = chunk.segments and chunk.segments.last
    # Both are selected: a zero does not undo an overflow on the other side of the product.
    keys, values = _only(last, chunk.keys), _only(last, torch.cat([chunk.values, ones], dim=-1))
    return unweighted_features(keys.mT.contiguous(), coefficients), values


def _chunked_forward(
    q,
    k,
    v,
    initial_state,
    attention_mask,
    segment_ids,
    scale,
    eps,
    coefficients,
    chunk_size,
    return_state,
    keep_states,
):
    """Output, denominators (batch, seq, num_heads, 1), final state, and the states before each chunk that has one."""
    spoilt = _spoilt_segments(segment_ids, q, k, v)
    if spoilt is not None:
        q, k, v = (x.masked_fill(spoilt, 0) for x in (q, k, v))
    batch_size, seq_len, num_heads, feature_dim = q.shape
    dtype = accumulation_dtype(q)
    out, denominators = torch.empty_like(v), v.new_empty((batch_size, seq_len, num_heads, 1), dtype=dtype)
    weights = _feature_weights(feature_dim, coefficients, like=denominators)
    state = None if initial_state is None else initial_state.flatten(0, 1)
    states = []
    for start in range(0, seq_len, chunk_size):
        stop = min(start + chunk_size, seq_len)
        chunk = _chunk(q, k, v, attention_mask, segment_ids, start=start, stop=stop, scale=scale)
        segments = chunk.segments
        numerators, totals = _scores_forward(chunk, coefficients)
        if state is not None:
            features = unweighted_features(chunk.queries.mT.contiguous(), coefficients)
            earlier = _only(segments and segments.first, torch.bmm(features.mT, state))
            numerators += earlier[..., :-1]
            totals += earlier[..., -1:]
            if keep_states:
                states.append(state)
        if stop < seq_len or return_state:
            # The weights belong to the features, but the product has fewer columns than a chunk has tokens.
            added = torch.bmm(*_added_to_state(chunk, coefficients)).mul_(weights)
            state = added if state is None else added.add_(_only(segments and segments.carry, state))
        totals += eps
        out[:, start:stop] = _heads_last(numerators.div_(totals), batch_size)
        denominators[:, start:stop] = _heads_last(totals, batch_size)
    state = state.unflatten(0, (batch_size, num_heads)) if return_state else None
    if spoilt is not None:
        out.masked_fill_(spoilt, float("nan"))
        if return_state:
            state.masked_fill_(spoilt[:, -1, :, :, None], float("nan"))
    return out, denominators, state, states


def _chunked_backward(
    grad_out,
    grad_state,
    q,
    k,
    v,
    attention_mask,
    segment_ids,
    out,
    denominators,
    states,
    scale,
    coefficients,
    chunk_size,
):
    """Gradients of q, k, v, and of the state before the first chunk if there is one."""
    spoilt = _spoilt_segments(segment_ids, q, k, v, out, grad_out)
    if spoilt is not None:
        q, k, v, out, grad_out = (x.masked_fill(spoilt, 0) for x in (q, k, v, out, grad_out))
        denominators = denominators.masked_fill(spoilt, 1)
    batch_size, seq_len, num_heads, feature_dim = q.shape
    weights = _feature_weights(feature_dim, coefficients, like=denominators)
    grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
    grad_state = None if grad_state is None else grad_state.flatten(0, 1)
    starts = range(0, seq_len, chunk_size)
    for start, state in zip(reversed(starts), [*reversed(states), None]):
        stop = min(start + chunk_size, seq_len)
        chunk = _chunk(q, k, v, attention_mask, segment_ids, start=start, stop=stop, scale=scale)
        segments = chunk.segments
        grad_numerators = _heads_first(grad_out[:, start:stop]) / _heads_first(denominators[:, start:stop])
        grad_totals = -(grad_numerators * _heads_first(out[:, start:stop])).sum(-1, keepdim=True)
        grad_queries, grad_keys, grad_values = _scores_backward(chunk, grad_numerators, grad_totals, coefficients)
        if grad_state is not None:
            weighted = grad_state * weights
            features, values = _added_to_state(chunk, coefficients)
            last = segments and segments.last
            grad_values += _only(last, torch.bmm(features.mT, weighted[..., :-1]))
            grad_features = torch.bmm(weighted, values.mT)
            grad_keys += _only(
                last, unweighted_features_backward(grad_features, chunk.keys.mT.contiguous(), coefficients).mT
            )
            grad_state = _only(segments and segments.carry, grad_state)
        if state is not None:
            first = segments and segments.first
            queries = _only(first, chunk.queries).mT.contiguous()
            grad_earlier = _only(first, torch.cat([grad_numerators, grad_totals], dim=-1))
            grad_features = torch.bmm(state, grad_earlier.mT)
            grad_queries += _only(first, unweighted_features_backward(grad_features, queries, coefficients).mT)
            added = torch.bmm(unweighted_features(queries, coefficients), grad_earlier)
            grad_state = added if grad_state is None else added.add_(grad_state)
        grad_q[:, start:stop] = _heads_last(grad_queries.mul_(scale), batch_size)
        grad_k[:, start:stop] = _heads_last(grad_keys, batch_size)
        grad_v[:, start:stop] = _heads_last(grad_values, batch_size)
    if grad_state is not None:
        grad_state = grad_state.unflatten(0, (batch_size, num_heads))
    if spoilt is not None:
        for gradient in (grad_q, grad_k, grad_v):
            gradient.masked_fill_(spoilt, float("nan"))
        if grad_state is not None:
            grad_state.masked_fill_(spoilt[:, 0, :, :, None], float("nan"))
    return grad_q, grad_k, grad_v, grad_state


def _feature_weights(feature_dim, coefficients, like):
    return weigh(like.new_ones(state_size(feature_dim, coefficients)), feature_dim, coefficients)[:, None]


def _spoilt_segments(segment_ids, *tensors):
    """(batch, seq, num_heads, 1): True in segments where some element of the tensors is not finite; None if all are."""
    if segment_ids is None or all(x.sum(dtype=accumulation_dtype(x)).isfinite() for x in tensors):
        return None
    spoilt = torch.stack([~x.isfinite().all(dim=-1) for x in tensors]).any(dim=0)
    number = torch.nn.functional.pad(segment_ids.diff(dim=1) != 0, (1, 0)).cumsum(dim=1)
    number = number[..., None].expand_as(spoilt)
    in_segment = torch.zeros_like(spoilt, dtype=torch.uint8).scatter_reduce_(1, number, spoilt.byte(), "amax")
    return in_segment.gather(1, number).bool()[..., None]


class _ChunkedAttention(torch.autograd.Function):
    """Keeps the state before each chunk and computes everything else anew in the backward pass."""

    @staticmethod
    def forward(
        ctx,
        q,
        k,
        v,
        initial_state,
        attention_mask,
        segment_ids,
        scale,
        eps,
        coefficients,
        chunk_size,
        return_state,
        keep_states,
    ):
        out, denominators, state, states = _chunked_forward(
            q,
            k,
            v,
            initial_state,
            attention_mask,
            segment_ids,
            scale,
            eps,
            coefficients,
            chunk_size,
            return_state,
            keep_states,
        )
        if keep_states:
            ctx.save_for_backward(q, k, v, attention_mask, segment_ids, out, denominators, *states)
            ctx.options = scale, coefficients, chunk_size
            ctx.has_initial_state = initial_state is not None
        return out, state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_state):
        q, k, v, attention_mask, segment_ids, out, denominators, *states = ctx.saved_tensors
        saved = (q, k, v, attention_mask, segment_ids, out, denominators, states)
        with torch.autocast(grad_out.device.type, enabled=False):
            *gradients, grad_initial = _chunked_backward(grad_out, grad_state, *saved, *ctx.options)
        return *gradients, grad_initial if ctx.has_initial_state else None, *(None,) * 8


# Under torch.compile the same two functions are operators: traced, their loops would be unrolled chunk by chunk.

NAMESPACE = re.sub(r"\W", "_", __name__)


@torch.library.custom_op(f"{NAMESPACE}::chunked_forward", mutates_args=())
def _chunked_operator(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    initial_state: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    scale: float,
    eps: float,
    coefficients: list[float],
    chunk_size: int,
    return_state: bool,
    keep_states: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = (q, k, v, initial_state, attention_mask, segment_ids)
    out, denominators, state, states = _chunked_forward(
        *inputs, scale, eps, tuple(coefficients), chunk_size, return_state, keep_states
    )
    results = _empty_results(*inputs, scale, eps, coefficients, chunk_size, return_state, keep_states)
    return (
        out.contiguous(),
        denominators,
        results[2] if state is None else state,
        torch.stack(states) if states else results[3],
    )


@_chunked_operator.register_fake
def _empty_results(
    q,
    k,
    v,
    initial_state,
    attention_mask,
    segment_ids,
    scale,
    eps,
    coefficients,
    chunk_size,
    return_state,
    keep_states,
):
    batch_size, seq_len, num_heads, feature_dim = q.shape
    dtype = accumulation_dtype(q)
    sizes = (state_size(feature_dim, coefficients), v.shape[-1] + 1)
    chunks = (seq_len + chunk_size - 1) // chunk_size - (initial_state is None)
    return (
        v.new_empty(v.shape),
        v.new_empty((batch_size, seq_len, num_heads, 1), dtype=dtype),
        v.new_empty((batch_size, num_heads, *sizes) if return_state else 0, dtype=dtype),
        v.new_empty((chunks if keep_states else 0, batch_size * num_heads, *sizes), dtype=dtype),
    )


@torch.library.custom_op(f"{NAMESPACE}::chunked_backward", mutates_args=())
def _chunked_backward_operator(
    grad_out: torch.Tensor,
    grad_state: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention_mask: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    out: torch.Tensor,
    denominators: torch.Tensor,
    states: torch.Tensor,
    scale: float,
    coefficients: list[float],
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    saved = (q, k, v, attention_mask, segment_ids, out, denominators, states.unbind())
    *gradients, grad_initial = _chunked_backward(grad_out, grad_state, *saved, scale, tuple(coefficients), chunk_size)
    if grad_initial is None:
        grad_initial = denominators.new_empty(q.shape[0], q.shape[2], *states.shape[2:])
    return *(x.contiguous() for x in gradients), grad_initial


@_chunked_backward_operator.register_fake
def _empty_gradients(grad_out, grad_state, q, k, v, attention_mask, segment_ids, out, denominators, states, *options):
    grad_initial = denominators.new_empty(q.shape[0], q.shape[2], *states.shape[2:])
    return *(x.new_empty(x.shape) for x in (q, k, v)), grad_initial


def _save_for_backward(ctx, inputs, output):
    q, k, v, initial_state, attention_mask, segment_ids, scale, _, coefficients, chunk_size, *_ = inputs
    out, denominators, _, states = output
    ctx.mark_non_differentiable(denominators, states)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, attention_mask, segment_ids, out, denominators, states)
    ctx.options = scale, coefficients, chunk_size
    ctx.has_initial_state = initial_state is not None


def _call_backward(ctx, grad_out, _, grad_state, __):
    if grad_out is None:
        grad_out = torch.zeros_like(ctx.saved_tensors[2])
    *gradients, grad_initial = _chunked_backward_operator(grad_out, grad_state, *ctx.saved_tensors, *ctx.options)
    return *gradients, grad_initial if ctx.has_initial_state else None, *(None,) * 8


_chunked_operator.register_autograd(_call_backward, setup_context=_save_for_backward)
