"""
Triton form of ReBased and Taylor attention: linear in the sequence length, with the state on chip.

B batch, L tokens, H heads, D feature_dim, V head_dim, P rows of a state (laid out as in `rebased_attention.py`), N spans.
C tokens of a chunk, BV values of a block. KERNEL is (D, padded D, c0, c1, c2) of the kernel c0 + c1 s + c2 s². A state is a
tuple of blocks of its rows: block b has the rows STARTS[b] to STARTS[b + 1].

A program owns one (batch, head, value block), walks its chunks and keeps the state in registers between them. Chunk states
in memory (written, scanned and read: 0.23 GB at B=8 H=12 L=4096 D=16 V=64 C=256) would cost more than the 0.13 GB of inputs
and outputs. Where that leaves half of the device idle, the sequence is cut into N spans: one kernel sums every span on its
own, a second turns the sums into the states before each span, and the spans then run side by side. It is not done sooner
because it repeats the sums over the keys, a third of the work.

Features are products of two elements of x. Both factors are picked from x by a matrix product with 0/1 selectors, which is
exact for half precision, needs no gather, and whose transpose carries the gradient back.
"""

import re

import torch


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("backend='triton' needs triton: pip install triton, or use backend='torch'") from error

# Each copy of this module (the package, a checkpoint's remote code) registers its operators under its own name.
NAMESPACE = re.sub(r"\W", "_", __name__)


@triton.jit
def _polynomial(scores, KERNEL: tl.constexpr):
    return (KERNEL[4] * scores + KERNEL[3]) * scores + KERNEL[2]


@triton.jit
def _shift(start, KERNEL: tl.constexpr, OPERAND: tl.constexpr):
    """Zero. It depends on the chunk where selectors are large, so that they are made anew and not kept on the chip."""
    return tl.minimum(start, 0) if KERNEL[1] > 16 or tl.float32 == OPERAND else 0


@triton.jit
def _degrees(shift, b: tl.constexpr, STARTS: tl.constexpr, KERNEL: tl.constexpr):
    """The rows of a block, and how many there are with 2 factors, with 1 factor or more, and in all."""
    D: tl.constexpr = KERNEL[0]
    packed = D * (D // 2 + 1)
    linear = packed + (D if KERNEL[3] != 0 else 0)
    rows = linear + (1 if KERNEL[2] != 0 else 0)
    return STARTS[b] + shift + tl.arange(0, STARTS[b + 1] - STARTS[b]), packed, linear, rows


@triton.jit
def _row_factors(scale, shift, b: tl.constexpr, STARTS: tl.constexpr, KERNEL: tl.constexpr, OF_QUERIES: tl.constexpr):
    """(SIZE): what the product of two picked elements is multiplied by: powers of `scale`, or the key's weights."""
    row, packed, linear, rows = _degrees(shift, b, STARTS, KERNEL)
    if OF_QUERIES:
        return tl.where(row < packed, scale * scale, tl.where(row < linear, scale, tl.where(row < rows, 1.0, 0.0)))
    weight = tl.where((row < KERNEL[0]) | (2 * (row // KERNEL[0]) == KERNEL[0]), KERNEL[4], 2.0 * KERNEL[4])
    return tl.where(row < packed, weight, tl.where(row < linear, KERNEL[3], tl.where(row < rows, KERNEL[2], 0.0)))


@triton.jit
def _selectors(shift, b: tl.constexpr, STARTS: tl.constexpr, KERNEL: tl.constexpr, dtype: tl.constexpr):
    """(padded D, SIZE) twice: 1 where an element of x is the first, the second factor of a row, else 0."""
    row, packed, linear, _ = _degrees(shift, b, STARTS, KERNEL)
    first = tl.where(row < packed, row % KERNEL[0], tl.where(row < linear, row - packed, -1))
    second = tl.where(row < packed, (row % KERNEL[0] + row // KERNEL[0]) % KERNEL[0], -1)
    i = tl.arange(0, KERNEL[1])[:, None]
    return (i == first[None, :]).to(dtype), (i == second[None, :]).to(dtype)


@triton.jit
def _factors(
    x,
    shift,
    b: tl.constexpr,
    STARTS: tl.constexpr,
    KERNEL: tl.constexpr,
    PRECISION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """x: (C, padded D) -> both factors of its features in float32, (C, SIZE), or (SIZE, C) if transposed."""
    first, second = _selectors(shift, b, STARTS, KERNEL, x.dtype)
    if TRANSPOSED:
        first = tl.dot(tl.trans(first), tl.trans(x), input_precision=PRECISION)
        second = tl.dot(tl.trans(second), tl.trans(x), input_precision=PRECISION)
    else:
        first = tl.dot(x, first, input_precision=PRECISION)
        second = tl.dot(x, second, input_precision=PRECISION)
    if STARTS[b + 1] > KERNEL[0] * (KERNEL[0] // 2 + 1):
        # Rows of lower degree have 1 for the factors that they lack.
        row, packed, linear, _ = _degrees(shift, b, STARTS, KERNEL)
        one_first, one_second = (row >= linear).to(tl.float32), (row >= packed).to(tl.float32)
        first += one_first[:, None] if TRANSPOSED else one_first[None, :]
        second += one_second[:, None] if TRANSPOSED else one_second[None, :]
    return first, second


@triton.jit
def _read_state(
    sums,
    totals,
    x,
    scale,
    shift,
    BV: tl.constexpr,
    STARTS: tl.constexpr,
    KERNEL: tl.constexpr,
    PRECISION: tl.constexpr,
    OF_QUERIES: tl.constexpr,
):
    """x: (C, padded D) -> its features times the state: (C, BV), (C)."""
    value = tl.zeros([x.shape[0], BV], tl.float32)
    total = tl.zeros([x.shape[0]], tl.float32)
    for b in tl.static_range(len(sums)):
        first, second = _factors(x, shift, b, STARTS, KERNEL, PRECISION, False)
        features = first * second * _row_factors(scale, shift, b, STARTS, KERNEL, OF_QUERIES)[None, :]
        value = tl.dot(features, sums[b], acc=value, input_precision=PRECISION)
        total += tl.sum(features * totals[b][None, :], axis=1)
    return value, total


@triton.jit
def _read_state_backward(
    grad_value,
    grad_total,
    sums,
    totals,
    x,
    scale,
    shift,
    STARTS: tl.constexpr,
    KERNEL: tl.constexpr,
    PRECISION: tl.constexpr,
    OF_QUERIES: tl.constexpr,
):
    """grad_value: (C, BV), grad_total: (C) of `_read_state` -> gradient of x, (C, padded D)."""
    grad_x = tl.zeros(x.shape, tl.float32)
    for b in tl.static_range(len(sums)):
        first, second = _factors(x, shift, b, STARTS, KERNEL, PRECISION, False)
        grad = tl.dot(grad_value, tl.trans(sums[b]), input_precision=PRECISION)
        grad += grad_total[:, None] * totals[b][None, :]
        grad *= _row_factors(scale, shift, b, STARTS, KERNEL, OF_QUERIES)[None, :]
        pick_first, pick_second = _selectors(shift, b, STARTS, KERNEL, tl.float32)
        grad_x = tl.dot(grad * second, tl.trans(pick_first), acc=grad_x, input_precision=PRECISION)
        grad_x = tl.dot(grad * first, tl.trans(pick_second), acc=grad_x, input_precision=PRECISION)
    return grad_x


@triton.jit
def _add_to_state(
    sums,
    totals,
    x,
    scale,
    shift,
    value,
    total,
    STARTS: tl.constexpr,
    KERNEL: tl.constexpr,
    PRECISION: tl.constexpr,
    OF_QUERIES: tl.constexpr,
):
    """The state with the sums over C tokens of features(x) [value, total] added; value: (C, BV), total: (C)."""
    new_sums = ()
    new_totals = ()
    for b in tl.static_range(len(sums)):
        # Made transposed: turning the product round would cost a trip through shared memory.
        first, second = _factors(x, shift, b, STARTS, KERNEL, PRECISION, True)
        features = first * second * _row_factors(scale, shift, b, STARTS, KERNEL, OF_QUERIES)[:, None]
        new_sums = new_sums + (tl.dot(features, value, acc=sums[b], input_precision=PRECISION),)
        new_totals = new_totals + (totals[b] + tl.sum(features * total[None, :], axis=1),)
    return new_sums, new_totals


@triton.jit
def _keep_state(sums, totals, kept, STARTS: tl.constexpr):
    """The state, or zeros where the scalar `kept` is false. Selected: what is left behind may not be finite."""
    new_sums = ()
    new_totals = ()
    for b in tl.static_range(len(sums)):
        new_sums = new_sums + (tl.where(kept, sums[b], 0.0),)
        new_totals = new_totals + (tl.where(kept, totals[b], 0.0),)
    return new_sums, new_totals


@triton.jit
def _load_state(state, column, V, P, BV: tl.constexpr, STARTS: tl.constexpr, HAS_STATE: tl.constexpr):
    """state: (P, V + 1), column: (BV) -> tuples of blocks: sums of features times values (SIZE, BV), of features (SIZE)."""
    sums = ()
    totals = ()
    for b in tl.static_range(len(STARTS) - 1):
        row = STARTS[b] + tl.arange(0, STARTS[b + 1] - STARTS[b])
        if HAS_STATE:
            at = state + row * (V + 1)
            inside = (row < P)[:, None] & (column < V)[None, :]
            sums = sums + (tl.load(at[:, None] + column[None, :], mask=inside, other=0.0),)
            totals = totals + (tl.load(at + V, mask=row < P, other=0.0),)
        else:
            sums = sums + (tl.zeros([row.shape[0], BV], tl.float32),)
            totals = totals + (tl.zeros([row.shape[0]], tl.float32),)
    return sums, totals


@triton.jit
def _store_state(state, sums, totals, column, V, P, STARTS: tl.constexpr):
    for b in tl.static_range(len(sums)):
        row = STARTS[b] + tl.arange(0, STARTS[b + 1] - STARTS[b])
        at = state + row * (V + 1)
        inside = (row < P)[:, None] & (column < V)[None, :]
        tl.store(at[:, None] + column[None, :], sums[b], mask=inside)
        # Every value block has the same totals.
        tl.store(at + V, totals[b], mask=(row < P) & (tl.program_id(1) == 0))


@triton.jit
def _load(x, token, start, head, column, L, H, W, C: tl.constexpr):
    """x: (B, L, H, W) -> its C tokens from `start` on, columns `column`; zeros past either end."""
    t = tl.arange(0, C)
    at = x + ((token + start) * H + head) * W + (t[:, None] * (H * W) + column[None, :])
    return tl.load(at, mask=(start + t < L)[:, None] & (column < W)[None, :], other=0.0)


@triton.jit
def _store(x, value, token, start, head, column, L, H, W, C: tl.constexpr):
    t = tl.arange(0, C)
    at = x + ((token + start) * H + head) * W + (t[:, None] * (H * W) + column[None, :])
    tl.store(at, value, mask=(start + t < L)[:, None] & (column < W)[None, :])


@triton.jit
def _load_scalars(x, token, start, head, L, H, other, C: tl.constexpr):
    """x: (B, L, H) -> its C tokens from `start` on."""
    t = tl.arange(0, C)
    return tl.load(x + (token + start + t) * H + head, mask=start + t < L, other=other)


@triton.jit
def _load_segments(segments, token, start, L, C: tl.constexpr, SEGMENTED: tl.constexpr):
    """segments: (B, L) -> (C) the number of each token's segment, (C) whether it is a token and not padding."""
    t = tl.arange(0, C)
    if SEGMENTED:
        coded = tl.load(segments + token + start + t, mask=start + t < L, other=-1)
        return tl.where(coded < 0, -1 - coded, coded), coded >= 0
    return tl.zeros([C], tl.int32), start + t < L


@triton.jit
def _segment_of(segments, token, position, SEGMENTED: tl.constexpr):
    if SEGMENTED:
        coded = tl.load(segments + token + position)
        return tl.where(coded < 0, -1 - coded, coded)
    return 0


@triton.jit
def _forward_kernel(
    q,  # (B, L, H, D)
    k,  # (B, L, H, D)
    v,  # (B, L, H, V)
    segments,  # (B, L)
    states,  # (B, H, N, P, V + 1): before each span
    out,  # (B, L, H, V)
    denominators,  # (B, L, H)
    final_state,  # (B, H, P, V + 1)
    scale,
    eps,
    L,
    span_tokens,
    H: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    SEGMENTED: tl.constexpr,
    HAS_STATE: tl.constexpr,
    KERNEL: tl.constexpr,
    STARTS: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batch_head, span, spans = tl.program_id(0).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    token, head = batch_head // H * L, batch_head % H
    column, element = tl.program_id(1) * BV + tl.arange(0, BV), tl.arange(0, KERNEL[1])
    i = tl.arange(0, C)
    first_token = span * span_tokens
    stop = tl.minimum(first_token + span_tokens, L)

    state = states + (batch_head * spans + span) * P * (V + 1)
    sums, totals = _load_state(state, column, V, P, BV, STARTS, HAS_STATE)
    carried = _segment_of(segments, token, tl.maximum(first_token - 1, 0), SEGMENTED)
    for start in range(first_token, stop, C):
        shift = _shift(start, KERNEL, OPERAND)
        queries = _load(q, token, start, head, element, L, H, KERNEL[0], C).to(OPERAND)
        keys = _load(k, token, start, head, element, L, H, KERNEL[0], C).to(OPERAND)
        values = _load(v, token, start, head, column, L, H, V, C).to(OPERAND)
        ids, valid = _load_segments(segments, token, start, L, C, SEGMENTED)

        visible = (i[:, None] >= i[None, :]) & (ids[:, None] == ids[None, :]) & valid[None, :]
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        weights = tl.where(visible, _polynomial(scores, KERNEL), 0.0)
        earlier, total = _read_state(sums, totals, queries, scale, shift, BV, STARTS, KERNEL, PRECISION, True)
        uses_state = ids == carried
        total = tl.where(uses_state, total, 0.0) + tl.sum(weights, axis=1) + eps
        value = tl.where(uses_state[:, None], earlier, 0.0)
        value = tl.dot(weights.to(OPERAND), values, acc=value, input_precision=PRECISION)
        _store(out, value / total[:, None], token, start, head, column, L, H, V, C)
        at = denominators + (token + start + i) * H + head
        tl.store(at, total, mask=(start + i < L) & (tl.program_id(1) == 0))

        last = _segment_of(segments, token, tl.minimum(start + C, L) - 1, SEGMENTED)
        factor = (valid & (ids == last)).to(tl.float32)
        sums, totals = _keep_state(sums, totals, carried == last, STARTS)
        value = values.to(tl.float32) * factor[:, None]
        sums, totals = _add_to_state(sums, totals, keys, 1.0, shift, value, factor, STARTS, KERNEL, PRECISION, False)
        carried = last
    if span == spans - 1:
        _store_state(final_state + batch_head * P * (V + 1), sums, totals, column, V, P, STARTS)


@triton.jit
def _query_gradient_kernel(
    q,  # (B, L, H, D)
    k,  # (B, L, H, D)
    v,  # (B, L, H, V)
    segments,  # (B, L)
    states,  # (B, H, N, P, V + 1): before each span
    grad_out,  # (B, L, H, V)
    denominators,  # (B, L, H)
    deltas,  # (B, L, H): grad_out · out
    grad_q,  # (value blocks, B, L, H, D)
    scale,
    L,
    span_tokens,
    H: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    SEGMENTED: tl.constexpr,
    HAS_STATE: tl.constexpr,
    KERNEL: tl.constexpr,
    STARTS: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batch_head, span, spans = tl.program_id(0).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    token, head = batch_head // H * L, batch_head % H
    column, element = tl.program_id(1) * BV + tl.arange(0, BV), tl.arange(0, KERNEL[1])
    i = tl.arange(0, C)
    first_token = span * span_tokens
    stop = tl.minimum(first_token + span_tokens, L)
    grad_q += tl.program_id(1) * tl.num_programs(0).to(tl.int64) * L * KERNEL[0]

    state = states + (batch_head * spans + span) * P * (V + 1)
    sums, totals = _load_state(state, column, V, P, BV, STARTS, HAS_STATE)
    carried = _segment_of(segments, token, tl.maximum(first_token - 1, 0), SEGMENTED)
    for start in range(first_token, stop, C):
        shift = _shift(start, KERNEL, OPERAND)
        queries = _load(q, token, start, head, element, L, H, KERNEL[0], C).to(OPERAND)
        keys = _load(k, token, start, head, element, L, H, KERNEL[0], C).to(OPERAND)
        values = _load(v, token, start, head, column, L, H, V, C).to(OPERAND)
        grads = _load(grad_out, token, start, head, column, L, H, V, C).to(OPERAND)
        ids, valid = _load_segments(segments, token, start, L, C, SEGMENTED)
        factor = 1.0 / _load_scalars(denominators, token, start, head, L, H, 1.0, C)
        # The gradient of [value, total] is factor [grad_out, -delta]; one value block stands for the total.
        delta = _load_scalars(deltas, token, start, head, L, H, 0.0, C)
        delta = tl.where(tl.program_id(1) == 0, delta, 0.0)

        visible = (i[:, None] >= i[None, :]) & (ids[:, None] == ids[None, :]) & valid[None, :]
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        grad_scores = tl.dot(grads, tl.trans(values), input_precision=PRECISION) - delta[:, None]
        grad_scores *= (2.0 * KERNEL[4] * scores + KERNEL[3]) * factor[:, None]
        grad_scores = tl.where(visible, grad_scores, 0.0)
        earlier = _read_state_backward(
            grads.to(tl.float32), -delta, sums, totals, queries, scale, shift, STARTS, KERNEL, PRECISION, True
        )
        grad = tl.where((ids == carried)[:, None], earlier * factor[:, None], 0.0)
        grad += tl.dot(grad_scores.to(OPERAND), keys, input_precision=PRECISION) * scale
        _store(grad_q, grad, token, start, head, element, L, H, KERNEL[0], C)

        last = _segment_of(segments, token, tl.minimum(start + C, L) - 1, SEGMENTED)
        factor = (valid & (ids == last)).to(tl.float32)
        sums, totals = _keep_state(sums, totals, carried == last, STARTS)
        value = values.to(tl.float32) * factor[:, None]
        sums, totals = _add_to_state(sums, totals, keys, 1.0, shift, value, factor, STARTS, KERNEL, PRECISION, False)
        carried = last


@triton.jit
def _key_value_gradient_kernel(
    q,  # (B, L, H, D)
    k,  # (B, L, H, D)
    v,  # (B, L, H, V)
    segments,  # (B, L)
    grad_states,  # (B, H, N, P, V + 1): gradient of the state after each span
    grad_out,  # (B, L, H, V)
    denominators,  # (B, L, H)
    deltas,  # (B, L, H): grad_out · out
    grad_k,  # (value blocks, B, L, H, D)
    grad_v,  # (B, L, H, V)
    grad_initial,  # (B, H, P, V + 1)
    scale,
    L,
    span_tokens,
    H: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    SEGMENTED: tl.constexpr,
    HAS_STATE: tl.constexpr,
    KERNEL: tl.constexpr,
    STARTS: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batch_head, span, spans = tl.program_id(0).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    token, head = batch_head // H * L, batch_head % H
    column, element = tl.program_id(1) * BV + tl.arange(0, BV), tl.arange(0, KERNEL[1])
    i = tl.arange(0, C)
    first_token = span * span_tokens
    stop = tl.minimum(first_token + span_tokens, L)
    is_first_block = tl.program_id(1) == 0
    grad_k += tl.program_id(1) * tl.num_programs(0).to(tl.int64) * L * KERNEL[0]

    # The state here is the gradient of the state that later tokens read, so the chunks come last to first.
    state = grad_states + (batch_head * spans + span) * P * (V + 1)
    sums, totals = _load_state(state, column, V, P, BV, STARTS, HAS_STATE)
    carried = _segment_of(segments, token, tl.minimum(stop, L - 1), SEGMENTED)
    chunks = (stop - first_token + C - 1) // C
    for chunk in range(chunks):
        start = first_token + (chunks - 1 - chunk) * C
        shift = _shift(start, KERNEL, OPERAND)
        queries = _load(q, token, start, head, element, L, H, KERNEL[0], C).to(OPERAND)
        keys = _load(k, token, start, head, element, L, H, KERNEL[0], C).to(OPERAND)
        values = _load(v, token, start, head, column, L, H, V, C).to(OPERAND)
        grads = _load(grad_out, token, start, head, column, L, H, V, C).to(OPERAND)
        ids, valid = _load_segments(segments, token, start, L, C, SEGMENTED)
        factor = 1.0 / _load_scalars(denominators, token, start, head, L, H, 1.0, C)
        delta = _load_scalars(deltas, token, start, head, L, H, 0.0, C)

        # Rows are keys, columns are queries.
        visible = (i[:, None] <= i[None, :]) & (ids[:, None] == ids[None, :]) & valid[:, None]
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale
        weights = tl.where(visible, _polynomial(scores, KERNEL) * factor[None, :], 0.0)
        grad_scores = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
        grad_scores -= tl.where(is_first_block, delta, 0.0)[None, :]
        grad_scores *= (2.0 * KERNEL[4] * scores + KERNEL[3]) * factor[None, :]
        grad_scores = tl.where(visible, grad_scores, 0.0)

        later_v, _ = _read_state(sums, totals, keys, 1.0, shift, BV, STARTS, KERNEL, PRECISION, False)
        later_k = _read_state_backward(
            values.to(tl.float32),
            tl.where(is_first_block & valid, 1.0, 0.0),
            sums,
            totals,
            keys,
            1.0,
            shift,
            STARTS,
            KERNEL,
            PRECISION,
            False,
        )
        in_state = ((ids == carried) & valid)[:, None]
        grad = tl.where(in_state, later_v, 0.0)
        grad = tl.dot(weights.to(OPERAND), grads, acc=grad, input_precision=PRECISION)
        _store(grad_v, grad, token, start, head, column, L, H, V, C)
        grad = tl.where(in_state, later_k, 0.0)
        grad += tl.dot(grad_scores.to(OPERAND), queries, input_precision=PRECISION) * scale
        _store(grad_k, grad, token, start, head, element, L, H, KERNEL[0], C)

        first = _segment_of(segments, token, start, SEGMENTED)
        factor = tl.where(ids == first, factor, 0.0)
        sums, totals = _keep_state(sums, totals, carried == first, STARTS)
        value = grads.to(tl.float32) * factor[:, None]
        sums, totals = _add_to_state(
            sums, totals, queries, scale, shift, value, -delta * factor, STARTS, KERNEL, PRECISION, True
        )
        carried = first
    if span == 0:
        _store_state(grad_initial + batch_head * P * (V + 1), sums, totals, column, V, P, STARTS)


@triton.jit
def _span_sums_kernel(
    x,  # (B, L, H, D): keys, or queries
    values,  # (B, L, H, V): values, or gradients of the output
    segments,  # (B, L)
    denominators,  # (B, L, H), read for queries only
    deltas,  # (B, L, H), read for queries only
    states,  # (B, H, N, P, V + 1): what each span adds to the state
    scale,
    L,
    span_tokens,
    H: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    SEGMENTED: tl.constexpr,
    OF_QUERIES: tl.constexpr,
    KERNEL: tl.constexpr,
    STARTS: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batch_head, span, spans = tl.program_id(0).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    token, head = batch_head // H * L, batch_head % H
    column, element = tl.program_id(1) * BV + tl.arange(0, BV), tl.arange(0, KERNEL[1])
    first_token = span * span_tokens
    stop = tl.minimum(first_token + span_tokens, L)

    sums, totals = _load_state(states, column, V, P, BV, STARTS, False)
    added = _segment_of(segments, token, first_token if OF_QUERIES else stop - 1, SEGMENTED)
    for start in range(first_token, stop, C):
        shift = _shift(start, KERNEL, OPERAND)
        rows = _load(x, token, start, head, element, L, H, KERNEL[0], C).to(OPERAND)
        value = _load(values, token, start, head, column, L, H, V, C).to(tl.float32)
        ids, valid = _load_segments(segments, token, start, L, C, SEGMENTED)
        factor = (valid & (ids == added)).to(tl.float32)
        total = factor
        if OF_QUERIES:
            factor /= _load_scalars(denominators, token, start, head, L, H, 1.0, C)
            total = -factor * _load_scalars(deltas, token, start, head, L, H, 0.0, C)
        value *= factor[:, None]
        sums, totals = _add_to_state(
            sums, totals, rows, scale, shift, value, total, STARTS, KERNEL, PRECISION, OF_QUERIES
        )
    _store_state(states + (batch_head * spans + span) * P * (V + 1), sums, totals, column, V, P, STARTS)


@triton.jit
def _scan_kernel(
    states,  # (B, H, N, size): what each span adds -> the state that its programs begin with
    boundary,  # (B, H, size): the state before the first span, or of the gradient after the last
    segments,  # (B, L)
    L,
    span_tokens,
    spans,
    size,
    H: tl.constexpr,
    SEGMENTED: tl.constexpr,
    HAS_STATE: tl.constexpr,
    OF_QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch_head = tl.program_id(0).to(tl.int64)
    token = batch_head // H * L
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    state = tl.zeros([BLOCK], tl.float32)
    if HAS_STATE:
        state = tl.load(boundary + batch_head * size + i, mask=i < size, other=0.0)
    for step in range(spans):
        span = spans - 1 - step if OF_QUERIES else step
        before = tl.maximum(span * span_tokens - 1, 0)
        last = tl.minimum((span + 1) * span_tokens, L) - 1
        if OF_QUERIES:
            before, last = tl.minimum(last + 1, L - 1), span * span_tokens
        at = states + (batch_head * spans + span) * size + i
        added = tl.load(at, mask=i < size, other=0.0)
        tl.store(at, state, mask=i < size)
        kept = _segment_of(segments, token, before, SEGMENTED) == _segment_of(segments, token, last, SEGMENTED)
        state = tl.where(kept, state, 0.0) + added


@triton.jit
def _deltas_kernel(grad_out, out, deltas, rows, V, R: tl.constexpr, BV: tl.constexpr):
    """grad_out, out: (rows, V) -> deltas: (rows), their products."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    total = tl.zeros([R], tl.float32)
    for first_column in range(0, V, BV):
        column = first_column + tl.arange(0, BV)
        at = row[:, None] * V + column[None, :]
        inside = (row < rows)[:, None] & (column < V)[None, :]
        grad = tl.load(grad_out + at, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(grad * tl.load(out + at, mask=inside, other=0.0).to(tl.float32), axis=1)
    tl.store(deltas + row, total, mask=row < rows)


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
    _span_sums_kernel[grid](
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
    _scan_kernel[(grid[0], triton.cdiv(rows * columns, 1024))](
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
        _forward_kernel[(batch_size * num_heads, triton.cdiv(v.shape[-1], constants["BV"]), spans)](
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
        _deltas_kernel[(triton.cdiv(deltas.numel(), 64),)](grad_out, out, deltas, deltas.numel(), v.shape[-1], **block)
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
        _query_gradient_kernel[grid](
            *inputs,
            deltas if before is None else before,
            grad_out,
            denominators,
            deltas,
            grad_q,
            *sizes,
            **constants | {"HAS_STATE": before is not None},
        )
        _key_value_gradient_kernel[grid](
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
