"""
Triton kernels of ReBased and Taylor attention: linear in the sequence length, with the state on chip.

B batch, L tokens, H heads, D feature_dim, V head_dim, P rows of a state (laid out as in `rebased_features.py`), N spans.
C tokens of a chunk, BV values of a block. KERNEL is (D, padded D, c0, c1, c2) of the kernel c0 + c1 s + c2 s². A state is a
tuple of blocks of its rows: block b has the rows STARTS[b] to STARTS[b + 1].

A program owns one (batch, head, value block), walks its chunks and keeps the state in registers between them. Chunk states
in memory (written, scanned and read: 0.23 GB at B=8 H=12 L=4096 D=16 V=64 C=256) would cost more than the 0.13 GB of inputs
and outputs. Where that leaves half of the device idle, the sequence is cut into N spans: one kernel sums every span on its
own, a second turns the sums into the states before each span, and the spans then run side by side. It is not done sooner
because it repeats the sums over the keys, a third of the work.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("backend='triton' needs triton: pip install triton, or use backend='torch'") from error

from .rebased_state_triton import (
    add_to_state,
    finite_rows,
    keep_state,
    load,
    load_scalars,
    load_segments,
    load_state,
    polynomial,
    read_state,
    read_state_backward,
    segment_of,
    store,
    store_state,
    zero_shift,
)


@triton.jit
def forward_kernel(
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
    sums, totals = load_state(state, column, V, P, BV, STARTS, HAS_STATE)
    carried = segment_of(segments, token, tl.maximum(first_token - 1, 0), SEGMENTED)
    for start in range(first_token, stop, C):
        shift = zero_shift(start, KERNEL, OPERAND)
        queries = load(q, token, start, head, element, L, H, KERNEL[0], C).to(OPERAND)
        keys = load(k, token, start, head, element, L, H, KERNEL[0], C).to(OPERAND)
        values = load(v, token, start, head, column, L, H, V, C).to(OPERAND)
        ids, valid = load_segments(segments, token, start, L, C, SEGMENTED)

        visible = (i[:, None] >= i[None, :]) & (ids[:, None] == ids[None, :]) & valid[None, :]
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        finite_values, finite = finite_rows(values, SEGMENTED)
        weights = tl.where(visible, tl.where(finite[None, :], polynomial(scores, KERNEL), float("nan")), 0.0)
        earlier, total = read_state(sums, totals, queries, scale, shift, BV, STARTS, KERNEL, PRECISION, True)
        uses_state = ids == carried
        total = tl.where(uses_state, total, 0.0) + tl.sum(weights, axis=1) + eps
        value = tl.where(uses_state[:, None], earlier, 0.0)
        value = tl.dot(weights.to(OPERAND), finite_values, acc=value, input_precision=PRECISION)
        store(out, value / total[:, None], token, start, head, column, L, H, V, C)
        at = denominators + (token + start + i) * H + head
        tl.store(at, total, mask=(start + i < L) & (tl.program_id(1) == 0))

        last = segment_of(segments, token, tl.minimum(start + C, L) - 1, SEGMENTED)
        inside = valid & (ids == last)
        sums, totals = keep_state(sums, totals, carried == last, STARTS)
        value, total = values.to(tl.float32), inside.to(tl.float32)
        sums, totals = add_to_state(
            sums, totals, keys, 1.0, shift, value, total, inside, STARTS, KERNEL, PRECISION, False, SEGMENTED
        )
        carried = last
    if span == spans - 1:
        store_state(final_state + batch_head * P * (V + 1), sums, totals, column, V, P, STARTS)


@triton.jit
def query_gradient_kernel(
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
    sums, totals = load_state(state, column, V, P, BV, STARTS, HAS_STATE)
    carried = segment_of(segments, token, tl.maximum(first_token - 1, 0), SEGMENTED)
    for start in range(first_token, stop, C):
        shift = zero_shift(start, KERNEL, OPERAND)
        queries = load(q, token, start, head, element, L, H, KERNEL[0], C).to(OPERAND)
        keys = load(k, token, start, head, element, L, H, KERNEL[0], C).to(OPERAND)
        values = load(v, token, start, head, column, L, H, V, C).to(OPERAND)
        grads = load(grad_out, token, start, head, column, L, H, V, C).to(OPERAND)
        ids, valid = load_segments(segments, token, start, L, C, SEGMENTED)
        factor = 1.0 / load_scalars(denominators, token, start, head, L, H, 1.0, C)
        # The gradient of [value, total] is factor [grad_out, -delta]; one value block stands for the total.
        delta = load_scalars(deltas, token, start, head, L, H, 0.0, C)
        delta = tl.where(tl.program_id(1) == 0, delta, 0.0)

        visible = (i[:, None] >= i[None, :]) & (ids[:, None] == ids[None, :]) & valid[None, :]
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        grad_scores = tl.dot(grads, tl.trans(values), input_precision=PRECISION) - delta[:, None]
        grad_scores *= (2.0 * KERNEL[4] * scores + KERNEL[3]) * factor[:, None]
        grad_scores = tl.where(visible, grad_scores, 0.0)
        earlier = read_state_backward(
            grads.to(tl.float32), -delta, sums, totals, queries, scale, shift, STARTS, KERNEL, PRECISION, True
        )
        grad = tl.where((ids == carried)[:, None], earlier * factor[:, None], 0.0)
        finite_keys, _ = finite_rows(keys, SEGMENTED)
        grad += tl.dot(grad_scores.to(OPERAND), finite_keys, input_precision=PRECISION) * scale
        store(grad_q, grad, token, start, head, element, L, H, KERNEL[0], C)

        last = segment_of(segments, token, tl.minimum(start + C, L) - 1, SEGMENTED)
        inside = valid & (ids == last)
        sums, totals = keep_state(sums, totals, carried == last, STARTS)
        value, total = values.to(tl.float32), inside.to(tl.float32)
        sums, totals = add_to_state(
            sums, totals, keys, 1.0, shift, value, total, inside, STARTS, KERNEL, PRECISION, False, SEGMENTED
        )
        carried = last


@triton.jit
def key_value_gradient_kernel(
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
    sums, totals = load_state(state, column, V, P, BV, STARTS, HAS_STATE)
    carried = segment_of(segments, token, tl.minimum(stop, L - 1), SEGMENTED)
    chunks = (stop - first_token + C - 1) // C
    for chunk in range(chunks):
        start = first_token + (chunks - 1 - chunk) * C
        shift = zero_shift(start, KERNEL, OPERAND)
        queries = load(q, token, start, head, element, L, H, KERNEL[0], C).to(OPERAND)
        keys = load(k, token, start, head, element, L, H, KERNEL[0], C).to(OPERAND)
        values = load(v, token, start, head, column, L, H, V, C).to(OPERAND)
        grads = load(grad_out, token, start, head, column, L, H, V, C).to(OPERAND)
        ids, valid = load_segments(segments, token, start, L, C, SEGMENTED)
        factor = 1.0 / load_scalars(denominators, token, start, head, L, H, 1.0, C)
        delta = load_scalars(deltas, token, start, head, L, H, 0.0, C)

        # Rows are keys, columns are queries.
        visible = (i[:, None] <= i[None, :]) & (ids[:, None] == ids[None, :]) & valid[:, None]
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale
        finite_grads, finite = finite_rows(grads, SEGMENTED)
        weights = tl.where(finite[None, :], polynomial(scores, KERNEL) * factor[None, :], float("nan"))
        weights = tl.where(visible, weights, 0.0)
        grad_scores = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
        grad_scores -= tl.where(is_first_block, delta, 0.0)[None, :]
        grad_scores *= (2.0 * KERNEL[4] * scores + KERNEL[3]) * factor[None, :]
        grad_scores = tl.where(visible, grad_scores, 0.0)

        later_v, _ = read_state(sums, totals, keys, 1.0, shift, BV, STARTS, KERNEL, PRECISION, False)
        later_k = read_state_backward(
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
        grad = tl.dot(weights.to(OPERAND), finite_grads, acc=grad, input_precision=PRECISION)
        store(grad_v, grad, token, start, head, column, L, H, V, C)
        grad = tl.where(in_state, later_k, 0.0)
        finite_queries, _ = finite_rows(queries, SEGMENTED)
        grad += tl.dot(grad_scores.to(OPERAND), finite_queries, input_precision=PRECISION) * scale
        store(grad_k, grad, token, start, head, element, L, H, KERNEL[0], C)

        first = segment_of(segments, token, start, SEGMENTED)
        sums, totals = keep_state(sums, totals, carried == first, STARTS)
        value, total, inside = grads.to(tl.float32) * factor[:, None], -delta * factor, ids == first
        sums, totals = add_to_state(
            sums, totals, queries, scale, shift, value, total, inside, STARTS, KERNEL, PRECISION, True, SEGMENTED
        )
        carried = first
    if span == 0:
        store_state(grad_initial + batch_head * P * (V + 1), sums, totals, column, V, P, STARTS)


@triton.jit
def span_sums_kernel(
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

    sums, totals = load_state(states, column, V, P, BV, STARTS, False)
    added = segment_of(segments, token, first_token if OF_QUERIES else stop - 1, SEGMENTED)
    for start in range(first_token, stop, C):
        shift = zero_shift(start, KERNEL, OPERAND)
        rows = load(x, token, start, head, element, L, H, KERNEL[0], C).to(OPERAND)
        value = load(values, token, start, head, column, L, H, V, C).to(tl.float32)
        ids, valid = load_segments(segments, token, start, L, C, SEGMENTED)
        inside = valid & (ids == added)
        total = inside.to(tl.float32)
        if OF_QUERIES:
            factor = 1.0 / load_scalars(denominators, token, start, head, L, H, 1.0, C)
            total = -factor * load_scalars(deltas, token, start, head, L, H, 0.0, C)
            value *= factor[:, None]
        sums, totals = add_to_state(
            sums, totals, rows, scale, shift, value, total, inside, STARTS, KERNEL, PRECISION, OF_QUERIES, SEGMENTED
        )
    store_state(states + (batch_head * spans + span) * P * (V + 1), sums, totals, column, V, P, STARTS)


@triton.jit
def scan_kernel(
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
        kept = segment_of(segments, token, before, SEGMENTED) == segment_of(segments, token, last, SEGMENTED)
        state = tl.where(kept, state, 0.0) + added


@triton.jit
def deltas_kernel(grad_out, out, deltas, rows, V, R: tl.constexpr, BV: tl.constexpr):
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
