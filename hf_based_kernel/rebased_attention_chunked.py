"""
The form of ReBased's and Based's attention that is linear in length, in PyTorch: scores inside a chunk of tokens, a state
between the chunks. torch.compile sees its forward and its backward pass as one operator each.
"""

import re
from typing import Any, NamedTuple

import torch

from .rebased_features import (
    REBASED,
    Coefficients,
    accumulation_dtype,
    add_floor,
    autocast_device,
    polynomial,
    squared_length,
    state_size,
    unweighted_features,
    unweighted_features_backward,
    weigh,
)


DEFAULT_CHUNK_SIZE = 128
QUERY_ROWS = 64


def rebased_attention_chunked(
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
    """`rebased_attention` in linear time: scores inside a chunk of tokens, a state between the chunks."""
    inputs = _Inputs(q, k, v, initial_state, attention_mask, segment_ids)
    # An exported program has no backward pass.
    has_backward = torch.is_grad_enabled() and not torch.compiler.is_exporting()
    keep_states = has_backward and any(x is not None and x.requires_grad for x in inputs)
    options = _Options(scale, eps, coefficients, chunk_size or DEFAULT_CHUNK_SIZE, return_state, keep_states)
    # What torch's own `Function.apply` asks.
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    function = _TransformedAttention if transformed else _ChunkedAttention
    out, state, *_ = function.apply(options, *inputs)
    return (out, state) if return_state else out


class _Inputs(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    initial_state: torch.Tensor | None
    attention_mask: torch.Tensor | None
    segment_ids: torch.Tensor | None


class _Options(NamedTuple):
    scale: float
    eps: float
    coefficients: Coefficients
    chunk_size: int
    return_state: bool
    keep_states: bool


class _ChunkedAttention(torch.autograd.Function):
    """Keeps the state before each chunk and computes everything else anew in the backward pass."""

    @staticmethod
    def forward(ctx: Any, options: _Options, *inputs: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        # Traced, the loop over chunks would be unrolled; called directly, an operator costs a short sequence 4-7 %.
        run = _forward_operator if torch.compiler.is_compiling() else _forward
        results = run(*inputs, *options)
        _save(ctx, (options, *inputs), results)
        return results[:2]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple:
        (grad_out, grad_state, *_), saved = gradients, ctx.saved_tensors
        grad_out = torch.zeros_like(saved[6]) if grad_out is None else grad_out
        run = _backward_operator if torch.compiler.is_compiling() else _backward_of_any
        # Only gradients that are to have gradients need the function that refuses them.
        run = _ChunkedGradients.apply if torch.is_grad_enabled() and not torch.compiler.is_compiling() else run
        with torch.autocast(autocast_device(grad_out), enabled=False):
            *of_inputs, grad_initial = run(grad_out, grad_state, *saved[:6], *ctx.options, *saved[6:])
        return None, *of_inputs, None if saved[3] is None else grad_initial, None, None


class _TransformedAttention(torch.autograd.Function):
    """The same as torch.func's transforms want it, which costs a short sequence a third."""

    @staticmethod
    def forward(options: _Options, *inputs: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        return _forward(*inputs, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[2:])
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple:
        return _ChunkedAttention.backward(ctx, *gradients)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
        return _over_batch(_TransformedAttention, info.batch_size, in_dims, arguments)


def _save(ctx: Any, arguments: tuple, results: tuple[torch.Tensor, ...]) -> None:
    ctx.options, *inputs = arguments
    out, _, denominators, states = results
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, out, denominators, states)


class _ChunkedGradients(torch.autograd.Function):
    """The backward pass, which torch's function transforms see as one step."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[torch.Tensor, ...]:
        return _backward_of_any(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, ...]) -> None:
        """Nothing is saved: there is no backward pass of it."""

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        raise NotImplementedError(
            "gradients of gradients are not implemented for linear attention; compute them with "
            "rebased_attention_reference, which torch differentiates"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
        return _over_batch(_ChunkedGradients, info.batch_size, in_dims, arguments)


def _over_batch(
    function: type[torch.autograd.Function], size: int, in_dims: tuple, arguments: tuple
) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
    """Apply the function to all of the mapped dimension as so many more sequences of a batch."""
    merged = []
    for argument, dim in zip(arguments, in_dims):
        if isinstance(argument, torch.Tensor):
            mapped = argument.expand(size, *argument.shape) if dim is None else argument.movedim(dim, 0)
            argument = mapped.flatten(0, 1)
        merged.append(argument)
    results = function.apply(*merged)
    return tuple(x.unflatten(0, (size, -1)) for x in results), (0,) * len(results)


class _Segments(NamedTuple):
    """Which tokens of a chunk see what, for every (batch, head): True or False."""

    other: torch.Tensor  # (heads, 1, tokens, tokens): query and key are not of one segment
    first: torch.Tensor  # (heads, 1, tokens, 1): the segment that the carried state belongs to
    last: torch.Tensor  # (heads, tokens, 1): the segment that the next state belongs to
    carry: torch.Tensor  # (heads, 1, 1): both are one


def _segments(segment_ids: torch.Tensor | None, start: int, stop: int, num_heads: int) -> _Segments | None:
    if segment_ids is None:
        return None
    ids = segment_ids[:, start:stop].repeat_interleave(num_heads, dim=0)
    carried = segment_ids[:, max(start - 1, 0)].repeat_interleave(num_heads, dim=0)[:, None]
    last = ids[:, -1:]
    return _Segments(
        other=(ids[:, :, None] != ids[:, None, :])[:, None],
        first=(ids == carried)[:, None, :, None],
        last=(ids == last)[..., None],
        carry=(carried == last)[..., None],
    )


class _Chunk(NamedTuple):
    """
    Tokens start … stop in the accumulation dtype, one of the batch * num_key_value_heads heads after the other. A head has
    num_heads / num_key_value_heads queries a token, its group.
    """

    queries: torch.Tensor  # (heads, group, tokens, feature_dim), scaled
    keys: torch.Tensor  # (heads, tokens, feature_dim)
    values: torch.Tensor  # (heads, tokens, head_dim)
    query_lengths: torch.Tensor  # (heads, group, tokens, 1): |q|²
    key_lengths: torch.Tensor  # (heads, 1, tokens): |k|²
    padding: torch.Tensor | None  # (heads, tokens, 1)
    segments: _Segments | None


def _chunk(inputs: _Inputs, start: int, stop: int, scale: float) -> _Chunk:
    num_heads = inputs.k.shape[2]
    padding = None
    if inputs.attention_mask is not None:
        padding = ~inputs.attention_mask[:, start:stop].repeat_interleave(num_heads, dim=0)[..., None]
    queries = _grouped(inputs.q[:, start:stop], num_heads) * scale
    keys = _heads_first(inputs.k[:, start:stop])
    return _Chunk(
        queries=queries,
        keys=keys,
        values=_heads_first(inputs.v[:, start:stop]),
        query_lengths=squared_length(queries),
        key_lengths=squared_length(keys).mT.contiguous(),
        padding=padding,
        segments=_segments(inputs.segment_ids, start, stop, num_heads),
    )


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """x: (batch, tokens, num_key_value_heads, dim) -> (heads, tokens, dim) in the accumulation dtype."""
    return x.to(accumulation_dtype(x)).transpose(1, 2).flatten(0, 1)


def _heads_last(x: torch.Tensor, batch_size: int) -> torch.Tensor:
    return x.unflatten(0, (batch_size, -1)).transpose(1, 2)


def _grouped(x: torch.Tensor, num_key_value_heads: int) -> torch.Tensor:
    """x: (batch, tokens, num_heads, dim) -> (heads, group, tokens, dim) in the accumulation dtype."""
    return _heads_first(x).unflatten(0, (x.shape[0] * num_key_value_heads, -1))


def _ungrouped(x: torch.Tensor, batch_size: int) -> torch.Tensor:
    return _heads_last(x.flatten(0, 1), batch_size)


def _query_rows(chunk: _Chunk) -> list[slice]:
    """Blocks of a chunk's queries. Each forms scores with the keys up to its last token only: a quarter less at 128."""
    tokens = chunk.keys.shape[1]
    return [slice(start, min(start + QUERY_ROWS, tokens)) for start in range(0, tokens, QUERY_ROWS)]


def _scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """(heads, group, rows, dim), (heads, keys, dim) -> (heads, group, rows, keys)"""
    return torch.bmm(queries.flatten(1, 2), keys.mT).unflatten(1, queries.shape[1:3])


def _combine(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """(heads, group, rows, keys), (heads, keys, dim) -> (heads, group, rows, dim)"""
    return torch.bmm(weights.flatten(1, 2), values).unflatten(1, weights.shape[1:3])


def _hide(x: torch.Tensor, chunk: _Chunk, rows: slice) -> torch.Tensor:
    """x: (heads, group, rows, keys) with 0, in place, where a query comes before a key or is of another segment."""
    x.tril_(rows.start)
    if chunk.segments is not None:
        x.masked_fill_(chunk.segments.other[..., rows, : rows.stop], 0)
    return x


def _visible_weights(scores: torch.Tensor, chunk: _Chunk, rows: slice, coefficients: Coefficients) -> torch.Tensor:
    """The kernel of the scores, 0 where a query does not see a key. Overwrites the scores: memory costs time here."""
    c0, c1, c2, floor = coefficients
    weights = scores.square_() if (c0, c1, c2) == REBASED[:3] else polynomial(scores, coefficients)
    if floor:
        lengths = chunk.key_lengths[:, None, :, : rows.stop]
        weights.addcmul_(chunk.query_lengths[:, :, rows], lengths, value=c2 * floor)
    _hide(weights, chunk, rows)
    # Padding has zero keys, so that only a constant term of the kernel gives it a weight.
    if chunk.padding is not None and coefficients[0]:
        weights.masked_fill_(chunk.padding[:, None, : rows.stop].mT, 0)
    return weights


def _scores_forward(chunk: _Chunk, coefficients: Coefficients) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerators (heads, group, tokens, head_dim) and denominators (…, 1) from a chunk's own scores."""
    numerators, totals = [], []
    for rows in _query_rows(chunk):
        scores = _scores(chunk.queries[:, :, rows], chunk.keys[:, : rows.stop])
        weights = _visible_weights(scores, chunk, rows, coefficients)
        numerators.append(_combine(weights, chunk.values[:, : rows.stop]))
        totals.append(weights.sum(-1, keepdim=True))
    return torch.cat(numerators, dim=2), torch.cat(totals, dim=2)


def _scores_backward(
    chunk: _Chunk, grad_numerators: torch.Tensor, grad_totals: torch.Tensor, coefficients: Coefficients
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of a chunk's queries, keys and values that come through its own scores."""
    _, c1, c2, floor = coefficients
    # The kernel's slope is 2 c2 (s + c1 / (2 c2)).
    queries, keys = chunk.queries * (2 * c2), chunk.keys * (2 * c2)
    grad_queries = torch.empty_like(queries)
    grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(chunk.values)
    for rows in _query_rows(chunk):
        seen, grad_rows = slice(rows.stop), grad_numerators[:, :, rows]
        scores = _scores(chunk.queries[:, :, rows], chunk.keys[:, seen])
        grad_weights = _scores(grad_rows, chunk.values[:, seen]).add_(grad_totals[:, :, rows])
        _hide(grad_weights, chunk, rows)
        if floor:
            # Rows times matrices: bmm takes several times as long for matrices times columns.
            flat = grad_weights.flatten(1, 2)
            grad_query_lengths = torch.bmm(chunk.key_lengths[..., seen], flat.mT).mT.unflatten(1, scores.shape[1:3])
            grad_key_lengths = torch.bmm(chunk.query_lengths[:, :, rows].flatten(1, 2).mT, flat).mT
        grad_scores = grad_weights.mul_(scores + c1 / (2 * c2) if c1 else scores)
        grad_queries[:, :, rows] = _combine(grad_scores, keys[:, seen])
        grad_keys[:, seen] += torch.bmm(grad_scores.flatten(1, 2).mT, queries[:, :, rows].flatten(1, 2))
        if floor:
            grad_queries[:, :, rows].addcmul_(grad_query_lengths, queries[:, :, rows], value=floor)
            grad_keys[:, seen].addcmul_(grad_key_lengths, keys[:, seen], value=floor)
        weights = _visible_weights(scores, chunk, rows, coefficients)
        grad_values[:, seen] += torch.bmm(weights.flatten(1, 2).mT, grad_rows.flatten(1, 2))
    return grad_queries, grad_keys, grad_values


def _only(selected: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return x if selected is None else torch.where(selected, x, 0)


def _added_to_state(chunk: _Chunk, coefficients: Coefficients) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (heads, state_size, tokens), unweighted, and [v, 1] of the tokens that the next state holds."""
    ones = torch.ones_like(chunk.values[..., :1])
    if chunk.padding is not None:
        ones.masked_fill_(chunk.padding, 0)
    last = chunk.segments and chunk.segments.last
    # Both are selected: a zero does not undo an overflow on the other side of the product.
    keys, values = _only(last, chunk.keys), _only(last, torch.cat([chunk.values, ones], dim=-1))
    return unweighted_features(keys.mT.contiguous(), coefficients), values


def _columns(queries: torch.Tensor) -> torch.Tensor:
    """queries: (heads, group, tokens, feature_dim) -> (heads, feature_dim, group * tokens)"""
    return queries.flatten(1, 2).mT.contiguous()


def _query_features(queries: torch.Tensor, coefficients: Coefficients) -> torch.Tensor:
    """queries: (…, feature_dim, tokens) -> (…, state_size, tokens)"""
    return add_floor(unweighted_features(queries, coefficients), queries.shape[-2], coefficients, dim=-2)


def _feature_weights(feature_dim: int, coefficients: Coefficients, like: torch.Tensor) -> torch.Tensor:
    return weigh(like.new_ones(state_size(feature_dim, coefficients)), feature_dim, coefficients)[:, None]


def _damaged_segments(inputs: _Inputs, *others: torch.Tensor) -> torch.Tensor | None:
    """
    (batch, seq, num_key_value_heads, 1): True in segments where |q|², |k|², v or one of the others, which have the heads of q, is
    not finite; None if all are.
    """
    if inputs.segment_ids is None or inputs.q.is_meta:
        return None
    # The squares of q and k are factors of the floor's gradient.
    lengths = [x.to(accumulation_dtype(x)).square().sum(-1, keepdim=True) for x in inputs[:2]]
    tensors, num_heads = (*lengths, inputs.v, *others), inputs.k.shape[2]
    if all(x.sum(dtype=accumulation_dtype(x)).isfinite() for x in tensors):
        return None
    finite = [x.isfinite().unflatten(2, (num_heads, -1)).flatten(3).all(dim=-1) for x in tensors]
    damaged = ~torch.stack(finite).all(dim=0)
    segment_ids = inputs.segment_ids
    number = torch.nn.functional.pad(segment_ids.diff(dim=1) != 0, (1, 0)).cumsum(dim=1)
    number = number[..., None].expand_as(damaged)
    in_segment = torch.zeros_like(damaged, dtype=torch.uint8).scatter_reduce_(1, number, damaged.byte(), "amax")
    return in_segment.gather(1, number).bool()[..., None]


def _without(damaged: torch.Tensor, inputs: _Inputs) -> tuple[_Inputs, torch.Tensor]:
    """The inputs with 0 in the damaged segments, and (batch, seq, num_heads, 1): which these are for the queries."""
    of_queries = damaged.repeat_interleave(inputs.q.shape[2] // inputs.k.shape[2], dim=2)
    masks = (of_queries, damaged, damaged)
    return _Inputs(*(x.masked_fill(mask, 0) for x, mask in zip(inputs[:3], masks)), *inputs[3:]), of_queries


def _forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Output, final state (empty if unwanted), denominators (batch, seq, num_heads, 1), and the states before the later chunks
    (heads, chunks - 1, state_size, head_dim + 1), none of them if they are not to be kept.
    """
    inputs, options = _Inputs(*arguments[:6]), _Options(*arguments[6:])
    damaged = _damaged_segments(inputs)
    if damaged is not None:
        inputs, damaged_queries = _without(damaged, inputs)
    coefficients = tuple(options.coefficients)
    batch_size, seq_len, num_heads, feature_dim = inputs.k.shape
    out, last, denominators, states = _empty_results(*inputs, *options)
    weights = _feature_weights(feature_dim, coefficients, like=denominators)
    state = None if inputs.initial_state is None else inputs.initial_state.flatten(0, 1)
    for start in range(0, seq_len, options.chunk_size):
        stop = min(start + options.chunk_size, seq_len)
        chunk = _chunk(inputs, start, stop, options.scale)
        segments = chunk.segments
        numerators, totals = _scores_forward(chunk, coefficients)
        if state is not None:
            features = _query_features(_columns(chunk.queries), coefficients)
            earlier = torch.bmm(features.mT, state).unflatten(1, chunk.queries.shape[1:3])
            earlier = _only(segments and segments.first, earlier)
            numerators += earlier[..., :-1]
            totals += earlier[..., -1:]
        if stop < seq_len or options.return_state:
            # The weights belong to the features, but the product has fewer columns than a chunk has tokens.
            kept = states[:, start // options.chunk_size] if options.keep_states and stop < seq_len else None
            added = torch.bmm(*_added_to_state(chunk, coefficients), out=kept).mul_(weights)
            state = added if state is None else added.add_(_only(segments and segments.carry, state))
        totals += options.eps
        out[:, start:stop] = _ungrouped(numerators.div_(totals), batch_size)
        denominators[:, start:stop] = _ungrouped(totals, batch_size)
    if options.return_state:
        last = state.unflatten(0, (batch_size, num_heads))
    if damaged is not None:
        out.masked_fill_(damaged_queries, float("nan"))
        if options.return_state:
            last.masked_fill_(damaged[:, -1, :, :, None], float("nan"))
    return out, last, denominators, states


def _backward_of_any(*arguments: Any) -> tuple[torch.Tensor, ...]:
    """`_backward`, also of what `torch.autograd.grad(is_grads_batched=True)` gives it."""
    # torch hands an operator each of the gradients in turn.
    batched = any(x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in arguments[:2])
    return (_backward_operator if batched else _backward)(*arguments)


def _backward(grad_out: torch.Tensor, grad_state: torch.Tensor | None, *arguments: Any) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k, v, and of the state before the first chunk: an empty one if there is none."""
    inputs, options = _Inputs(*arguments[:6]), _Options(*arguments[6:12])
    out, denominators, states = arguments[12:]
    damaged = _damaged_segments(inputs, out, grad_out)
    if damaged is not None:
        inputs, damaged_queries = _without(damaged, inputs)
        out, grad_out, denominators = (
            out.masked_fill(damaged_queries, 0),
            grad_out.masked_fill(damaged_queries, 0),
            denominators.masked_fill(damaged_queries, 1),
        )
    if not options.keep_states:
        # torch.func can hide from the forward pass that there will be this one.
        *_, states = _forward(*inputs, *options._replace(keep_states=True))
    coefficients = tuple(options.coefficients)
    batch_size, seq_len, num_heads, feature_dim = inputs.k.shape
    weights = _feature_weights(feature_dim, coefficients, like=denominators)
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in inputs[:3])
    grad_state = grad_state.flatten(0, 1) if options.return_state and grad_state is not None else None
    before = [None if inputs.initial_state is None else inputs.initial_state.flatten(0, 1), *states.unbind(1)]
    for start, state in zip(reversed(range(0, seq_len, options.chunk_size)), reversed(before)):
        stop = min(start + options.chunk_size, seq_len)
        chunk = _chunk(inputs, start, stop, options.scale)
        segments = chunk.segments
        grad_numerators, outputs, totals = (
            _grouped(x[:, start:stop], num_heads) for x in (grad_out, out, denominators)
        )
        grad_numerators = grad_numerators / totals
        grad_totals = -(grad_numerators * outputs).sum(-1, keepdim=True)
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
            queries = _columns(_only(first, chunk.queries))
            grad_earlier = _only(first, torch.cat([grad_numerators, grad_totals], dim=-1)).flatten(1, 2)
            grad_features = add_floor(torch.bmm(state, grad_earlier.mT), feature_dim, coefficients, dim=-2)
            from_state = unweighted_features_backward(grad_features, queries, coefficients).mT
            grad_queries += _only(first, from_state.unflatten(1, grad_queries.shape[1:3]))
            added = torch.bmm(_query_features(queries, coefficients), grad_earlier)
            grad_state = added if grad_state is None else added.add_(grad_state)
        grad_q[:, start:stop] = _ungrouped(grad_queries.mul_(options.scale), batch_size)
        grad_k[:, start:stop] = _heads_last(grad_keys, batch_size)
        grad_v[:, start:stop] = _heads_last(grad_values, batch_size)
    if damaged is not None:
        for gradient, mask in ((grad_q, damaged_queries), (grad_k, damaged), (grad_v, damaged)):
            gradient.masked_fill_(mask, float("nan"))
    if inputs.initial_state is None:
        return grad_q, grad_k, grad_v, grad_q.new_empty(batch_size, 0)
    grad_initial = grad_state.unflatten(0, (batch_size, num_heads))
    if damaged is not None:
        grad_initial.masked_fill_(damaged[:, 0, :, :, None], float("nan"))
    return grad_q, grad_k, grad_v, grad_initial


# Operators take no tuples: these list what `_Inputs` and `_Options` hold.
NAMESPACE = re.sub(r"\W", "_", __name__)
INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? initial_state, Tensor? attention_mask, Tensor? segment_ids"
OPTIONS = "float scale, float eps, float[] coefficients, SymInt chunk_size, bool return_state, bool keep_states"
SAVED = "Tensor out, Tensor denominators, Tensor states"

_forward_operator = torch.library.custom_op(
    f"{NAMESPACE}::chunked_forward",
    _forward,
    mutates_args=(),
    schema=f"({INPUTS}, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_forward_operator.register_fake
def _empty_results(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `_forward` returns, not yet filled."""
    inputs, options = _Inputs(*arguments[:6]), _Options(*arguments[6:])
    batch_size, seq_len, num_heads, feature_dim = inputs.k.shape
    out = inputs.v.new_empty((*inputs.q.shape[:3], inputs.v.shape[-1]))
    denominators = out.new_empty((*inputs.q.shape[:3], 1), dtype=accumulation_dtype(out))
    sizes = (state_size(feature_dim, options.coefficients), out.shape[-1] + 1)
    later_chunks = (seq_len - 1) // options.chunk_size if options.keep_states else 0
    states = denominators.new_empty(batch_size * num_heads, later_chunks, *sizes)
    state = denominators.new_empty((batch_size, num_heads, *sizes) if options.return_state else (batch_size, 0))
    return out, state, denominators, states


_backward_operator = torch.library.custom_op(
    f"{NAMESPACE}::chunked_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor? grad_state, {INPUTS}, {OPTIONS}, {SAVED}) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_backward_operator.register_fake
def _empty_gradients(grad_out: torch.Tensor, grad_state: torch.Tensor | None, *arguments: Any) -> tuple:
    inputs = _Inputs(*arguments[:6])
    grad_initial = inputs.q.new_empty(inputs.q.shape[0], 0) if inputs.initial_state is None else inputs.initial_state
    return tuple(x.new_empty(x.shape) for x in (*inputs[:3], grad_initial))
