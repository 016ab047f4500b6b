"""
Triton kernels of ReBased and Taylor attention: linear in the sequence length.

B batch, L tokens, H heads of queries, of which G each share one of the H/G heads of keys, values and states, D feature_dim,
V head_dim, P rows of a state, N spans. C tokens of a block, K of the blocks that it is compared with, BV values of a block. KERNEL is (D, padded D, c0, c1, c2, floor, number of products of two elements) of the kernel c0 + c1 s +
c2 (s² + floor |q|² |k|²), where |q| is scaled as s is. In memory a state is its sums of features times values (P, V), as
float32 or as a bfloat16 number and the bfloat16 rest (2, P, V), and its sums of features (P).

The sequence is cut into spans. `span_sums_kernel` sums the features of every span on its own, `scan_kernel` turns the sums
into the state before each span (or, for the backward pass, its gradient after each span), and then every block of tokens
is worked on by itself: through the scores within its span, through the state for all that came before. A span of S tokens
costs S / 2 scores a token and 4 P (V + 1) / S floats of traffic for the state: at D=16, V=64 both are small beside the
rest from S = 256 to 512. Nothing of this is kept for the backward pass, which sums the spans again.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("backend='triton' needs triton: pip install triton, or use backend='torch'") from error

from .rebased_state_triton import (
    add_to_state,
    empty_state,
    finite_rows,
    load,
    load_scalars,
    load_segments,
    polynomial,
    read_state,
    read_state_backward,
    row_factors,
    segment_of,
    slope,
    split_scale,
    squared_length,
    store,
    store_state,
    zero_shift,
)


@triton.jit
def forward_kernel(
    q,  # (B, L, H, D)
    k,  # (B, L, H/G, D)
    v,  # (B, L, H/G, V)
    segments,  # (B, L)
    states,  # (B, H/G, N, P, V) or (B, H/G, N, 2, P, V): before each span
    totals,  # (B, H/G, N, P)
    out,  # (B, L, H, V)
    denominators,  # (B, L, H)
    scale,
    eps,
    L,
    span_tokens,
    H: tl.constexpr,
    G: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    WHOLE: tl.constexpr,
    SEGMENTED: tl.constexpr,
    HAS_STATE: tl.constexpr,
    KERNEL: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    BV: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    STATE_PRECISION: tl.constexpr,
):
    batch_head, start, first_token, token, head = _block_of_program(L, span_tokens, H, C)
    column, element = tl.program_id(1) * BV + tl.arange(0, BV), tl.arange(0, KERNEL[1])
    queries = load(q, token, start, head, element, L, H, KERNEL[0], C, WHOLE).to(OPERAND)
    ids, _ = load_segments(segments, token, start, L, C, SEGMENTED)

    scale, kernel_scale = split_scale(scale, KERNEL)
    value, total = tl.zeros([C, BV], tl.float32), tl.zeros([C], tl.float32)
    if HAS_STATE:
        span = _span_number(batch_head // G, first_token, L, span_tokens)
        value, total = read_state(
            states, totals, span, queries, column, scale, P, V, WHOLE, R, BV, KERNEL, OPERAND, STATE_PRECISION
        )
        if SEGMENTED:
            uses_state = ids == segment_of(segments, token, tl.maximum(first_token - 1, 0), True)
            value, total = tl.where(uses_state[:, None], value, 0.0), tl.where(uses_state, total, 0.0)
    for key_start in range(first_token, start, K):
        value, total = _attend(
            value, total, queries, ids, k, v, segments, token, start, key_start, head // G, element, column,
            scale, L, H // G, V, SEGMENTED, SEGMENTED, KERNEL, C, K, WHOLE, OPERAND, PRECISION,
        )  # fmt: skip
    for block in tl.static_range(C // K):
        value, total = _attend(
            value, total, queries, ids, k, v, segments, token, start, start + block * K, head // G, element,
            column, scale, L, H // G, V, True, SEGMENTED, KERNEL, C, K, WHOLE, OPERAND, PRECISION,
        )  # fmt: skip
    total = total * kernel_scale + eps
    store(out, value * (kernel_scale / total)[:, None], token, start, head, column, L, H, V, C, WHOLE)
    if tl.program_id(1) == 0:
        i = start + tl.arange(0, C)
        tl.store(denominators + (token + i) * H + head, total, mask=i < L)


@triton.jit
def _attend(
    value,
    total,
    queries,
    ids,
    k,
    v,
    segments,
    token,
    start,
    key_start,
    head,
    element,
    column,
    scale,
    L,
    H: tl.constexpr,
    V: tl.constexpr,
    MASKED: tl.constexpr,
    SEGMENTED: tl.constexpr,
    KERNEL: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    WHOLE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The sums (C, BV) and (C) of a block of queries plus what a block of keys adds."""
    keys = load(k, token, key_start, head, element, L, H, KERNEL[0], K, WHOLE).to(OPERAND)
    values = load(v, token, key_start, head, column, L, H, V, K, WHOLE).to(OPERAND)
    weights = polynomial(tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale, KERNEL)
    if KERNEL[5] != 0:
        weights += _floor_lengths(queries, scale, KERNEL)[:, None] * squared_length(keys)[None, :]
    finite_values, finite = finite_rows(values, SEGMENTED)
    if SEGMENTED:
        weights = tl.where(finite[None, :], weights, float("nan"))
    if MASKED:
        key_ids, valid = load_segments(segments, token, key_start, L, K, SEGMENTED)
        weights = tl.where(_visible(start, key_start, ids, key_ids, valid, C, K, SEGMENTED), weights, 0.0)
    total += tl.sum(weights, axis=1)
    return tl.dot(weights.to(OPERAND), finite_values, acc=value, input_precision=PRECISION), total


@triton.jit
def query_gradient_kernel(
    q,  # (B, L, H, D)
    k,  # (B, L, H/G, D)
    v,  # (B, L, H/G, V)
    segments,  # (B, L)
    states,  # (B, H/G, N, P, V) or (B, H/G, N, 2, P, V): before each span
    totals,  # (B, H/G, N, P)
    grad_out,  # (B, L, H, V)
    denominators,  # (B, L, H)
    deltas,  # (B, L, H): grad_out · out
    grad_q,  # (value blocks, B, L, H, D)
    scale,
    L,
    span_tokens,
    value_block_stride,
    H: tl.constexpr,
    G: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    WHOLE: tl.constexpr,
    SEGMENTED: tl.constexpr,
    HAS_STATE: tl.constexpr,
    KERNEL: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    BV: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    STATE_PRECISION: tl.constexpr,
):
    batch_head, start, first_token, token, head = _block_of_program(L, span_tokens, H, C)
    column, element = tl.program_id(1) * BV + tl.arange(0, BV), tl.arange(0, KERNEL[1])
    queries = load(q, token, start, head, element, L, H, KERNEL[0], C, WHOLE).to(OPERAND)
    grads = load(grad_out, token, start, head, column, L, H, V, C, WHOLE).to(OPERAND)
    ids, valid = load_segments(segments, token, start, L, C, SEGMENTED)
    # The gradient of [value, total] is factor [grad_out, -delta]; one value block stands for the total.
    delta = load_scalars(deltas, token, start, head, L, H, 0.0, C)
    delta = tl.where(tl.program_id(1) == 0, delta, 0.0)

    scale, kernel_scale = split_scale(scale, KERNEL)
    # Transposed: Triton 3.6 miscompiles Hopper's product of 64 rows that is 16 columns wide.
    grad = tl.zeros([element.shape[0], C], tl.float32)
    if HAS_STATE:
        span = _span_number(batch_head // G, first_token, L, span_tokens)
        _, grad = read_state_backward(
            0.0, grads, -delta, states, totals, span, queries, column, scale, P, V, WHOLE, R, KERNEL, OPERAND,
            STATE_PRECISION, True,
        )  # fmt: skip
        if SEGMENTED:
            uses_state = ids == segment_of(segments, token, tl.maximum(first_token - 1, 0), True)
            grad = tl.where(uses_state[None, :], grad, 0.0)
    inner, length = tl.zeros([element.shape[0], C], tl.float32), tl.zeros([C], tl.float32)
    for key_start in range(first_token, start, K):
        inner, length = _pull(
            inner, length, queries, grads, delta, ids, k, v, segments, token, start, key_start, head // G, element, column,
            scale, L, H // G, V, SEGMENTED, SEGMENTED, KERNEL, C, K, WHOLE, OPERAND, PRECISION,
        )  # fmt: skip
    for block in tl.static_range(C // K):
        inner, length = _pull(
            inner, length, queries, grads, delta, ids, k, v, segments, token, start, start + block * K, head // G, element,
            column, scale, L, H // G, V, True, SEGMENTED, KERNEL, C, K, WHOLE, OPERAND, PRECISION,
        )  # fmt: skip
    if KERNEL[5] != 0:
        inner += tl.trans((2.0 * KERNEL[4] * KERNEL[5]) * scale * length[:, None] * queries.to(tl.float32))
    factor = kernel_scale / load_scalars(denominators, token, start, head, L, H, 1.0, C)
    grad_q += tl.program_id(1).to(tl.int64) * value_block_stride
    grad = tl.trans((grad + inner * scale) * factor[None, :])
    store(grad_q, grad, token, start, head, element, L, H, KERNEL[0], C, WHOLE)


@triton.jit
def _pull(
    grad,
    length,
    queries,
    grads,
    delta,
    ids,
    k,
    v,
    segments,
    token,
    start,
    key_start,
    head,
    element,
    column,
    scale,
    L,
    H: tl.constexpr,
    V: tl.constexpr,
    MASKED: tl.constexpr,
    SEGMENTED: tl.constexpr,
    KERNEL: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    WHOLE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """
    The gradient (padded D, C) of a block of queries plus what a block of keys adds, but for `scale` and the factor; and that of
    the floor (C), as a factor of the queries.
    """
    keys = load(k, token, key_start, head, element, L, H, KERNEL[0], K, WHOLE).to(OPERAND)
    values = load(v, token, key_start, head, column, L, H, V, K, WHOLE).to(OPERAND)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
    grad_weights = tl.dot(grads, tl.trans(values), input_precision=PRECISION) - delta[:, None]
    grad_scores, grad_floor = grad_weights * slope(scores, KERNEL), grad_weights * squared_length(keys)[None, :]
    if MASKED:
        key_ids, valid = load_segments(segments, token, key_start, L, K, SEGMENTED)
        visible = _visible(start, key_start, ids, key_ids, valid, C, K, SEGMENTED)
        grad_scores, grad_floor = tl.where(visible, grad_scores, 0.0), tl.where(visible, grad_floor, 0.0)
    if KERNEL[5] != 0:
        length += tl.sum(grad_floor, axis=1)
    finite_keys, _ = finite_rows(keys, SEGMENTED)
    grad = tl.dot(tl.trans(finite_keys), tl.trans(grad_scores.to(OPERAND)), acc=grad, input_precision=PRECISION)
    return grad, length


@triton.jit
def key_value_gradient_kernel(
    q,  # (B, L, H, D)
    k,  # (B, L, H/G, D)
    v,  # (B, L, H/G, V)
    segments,  # (B, L)
    grad_states,  # (B, H/G, N, P, V) or (B, H/G, N, 2, P, V): gradient of the state after each span
    grad_totals,  # (B, H/G, N, P)
    grad_out,  # (B, L, H, V)
    denominators,  # (B, L, H)
    deltas,  # (B, L, H): grad_out · out
    grad_k,  # (value blocks, B, L, H/G, D)
    grad_v,  # (B, L, H/G, V)
    scale,
    L,
    span_tokens,
    value_block_stride,
    H: tl.constexpr,
    G: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    WHOLE: tl.constexpr,
    SEGMENTED: tl.constexpr,
    HAS_STATE: tl.constexpr,
    KERNEL: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    BV: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    STATE_PRECISION: tl.constexpr,
):
    batch_head, start, first_token, token, head = _block_of_program(L, span_tokens, H // G, C)
    column, element = tl.program_id(1) * BV + tl.arange(0, BV), tl.arange(0, KERNEL[1])
    keys = load(k, token, start, head, element, L, H // G, KERNEL[0], C, WHOLE).to(OPERAND)
    values = load(v, token, start, head, column, L, H // G, V, C, WHOLE).to(OPERAND)
    ids, valid = load_segments(segments, token, start, L, C, SEGMENTED)
    is_first_block = tl.program_id(1) == 0
    stop = tl.minimum(first_token + span_tokens, L)

    scale, kernel_scale = split_scale(scale, KERNEL)
    grad_value, grad_key = tl.zeros([C, BV], tl.float32), tl.zeros([element.shape[0], C], tl.float32)
    if HAS_STATE:
        span = _span_number(batch_head, first_token, L, span_tokens)
        one = tl.where(is_first_block & valid, 1.0, 0.0)
        grad_value, grad_key = read_state_backward(
            grad_value, values, one, grad_states, grad_totals, span, keys, column, 1.0, P, V, WHOLE, R, KERNEL, OPERAND,
            STATE_PRECISION, False,
        )  # fmt: skip
        in_state = valid
        if SEGMENTED:
            in_state = valid & (ids == segment_of(segments, token, tl.minimum(stop, L - 1), True))
        grad_value = tl.where(in_state[:, None], grad_value, 0.0)
        grad_key = tl.where(in_state[None, :], grad_key, 0.0)
    inner, length = tl.zeros([element.shape[0], C], tl.float32), tl.zeros([C], tl.float32)
    for member in range(G):
        for block in tl.static_range(C // K):
            grad_value, inner, length = _push(
                grad_value, inner, length, keys, values, ids, valid, q, grad_out, segments, denominators, deltas, token,
                start + block * K, start, head * G + member, element, column, scale, kernel_scale, L, H, V, True, SEGMENTED,
                KERNEL, C, K, WHOLE, OPERAND, PRECISION,
            )  # fmt: skip
    for member in range(G):
        for query_start in range(start + C, stop, K):
            grad_value, inner, length = _push(
                grad_value, inner, length, keys, values, ids, valid, q, grad_out, segments, denominators, deltas, token,
                query_start, start, head * G + member, element, column, scale, kernel_scale, L, H, V, SEGMENTED, SEGMENTED,
                KERNEL, C, K, WHOLE, OPERAND, PRECISION,
            )  # fmt: skip
    if KERNEL[5] != 0:
        grad_key += tl.trans(2.0 * length[:, None] * keys.to(tl.float32))
    store(grad_v, grad_value, token, start, head, column, L, H // G, V, C, WHOLE)
    grad_k += tl.program_id(1).to(tl.int64) * value_block_stride
    store(grad_k, tl.trans(grad_key + inner * scale), token, start, head, element, L, H // G, KERNEL[0], C, WHOLE)


@triton.jit
def _push(
    grad_value,
    grad_key,
    length,
    keys,
    values,
    ids,
    valid,
    q,
    grad_out,
    segments,
    denominators,
    deltas,
    token,
    query_start,
    start,
    head,
    element,
    column,
    scale,
    kernel_scale,
    L,
    H: tl.constexpr,
    V: tl.constexpr,
    MASKED: tl.constexpr,
    SEGMENTED: tl.constexpr,
    KERNEL: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    WHOLE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """
    Gradients (C, BV), (padded D, C) of a block of values and keys plus what a block of queries adds, but for `scale`; and that
    of the floor (C), as a factor of the keys.
    """
    queries = load(q, token, query_start, head, element, L, H, KERNEL[0], K, WHOLE).to(OPERAND)
    grads = load(grad_out, token, query_start, head, column, L, H, V, K, WHOLE).to(OPERAND)
    factor = kernel_scale / load_scalars(denominators, token, query_start, head, L, H, 1.0, K)
    delta = load_scalars(deltas, token, query_start, head, L, H, 0.0, K)
    delta = tl.where(tl.program_id(1) == 0, delta, 0.0)
    # Rows are keys, columns are queries. Past the end of the sequence, queries and gradients are zeros.
    scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale
    finite_grads, finite = finite_rows(grads, SEGMENTED)
    floor = _floor_lengths(queries, scale, KERNEL) * factor
    weights = polynomial(scores, KERNEL) * factor[None, :]
    if KERNEL[5] != 0:
        weights += squared_length(keys)[:, None] * floor[None, :]
    if SEGMENTED:
        weights = tl.where(finite[None, :], weights, float("nan"))
    grad_weights = tl.dot(values, tl.trans(grads), input_precision=PRECISION) - delta[None, :]
    grad_scores, grad_floor = grad_weights * (slope(scores, KERNEL) * factor[None, :]), grad_weights * floor[None, :]
    if MASKED:
        visible = (start + tl.arange(0, C))[:, None] <= (query_start + tl.arange(0, K))[None, :]
        if SEGMENTED:
            query_ids, _ = load_segments(segments, token, query_start, L, K, SEGMENTED)
            visible = visible & (ids[:, None] == query_ids[None, :]) & valid[:, None]
        weights = tl.where(visible, weights, 0.0)
        grad_scores, grad_floor = tl.where(visible, grad_scores, 0.0), tl.where(visible, grad_floor, 0.0)
    if KERNEL[5] != 0:
        length += tl.sum(grad_floor, axis=1)
    grad_value = tl.dot(weights.to(OPERAND), finite_grads, acc=grad_value, input_precision=PRECISION)
    finite_queries, finite = finite_rows(queries, SEGMENTED)
    grad_scores = tl.trans(grad_scores.to(OPERAND))
    grad_key = tl.dot(tl.trans(finite_queries), grad_scores, acc=grad_key, input_precision=PRECISION)
    return grad_value, grad_key, length


@triton.jit
def _floor_lengths(queries, scale, KERNEL: tl.constexpr):
    """(C): what |k|² is multiplied by in the kernel's floor."""
    return (KERNEL[4] * KERNEL[5]) * scale * scale * squared_length(queries)


@triton.jit
def _block_of_program(L, span_tokens, H: tl.constexpr, C: tl.constexpr):
    """Sequence and head, first token of the block and of its span, offset of the sequence, head."""
    blocks = (L + C - 1) // C
    batch_head, start = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * C
    return batch_head, start, start // span_tokens * span_tokens, batch_head // H * L, batch_head % H


@triton.jit
def _span_number(batch_head, first_token, L, span_tokens):
    return batch_head * ((L + span_tokens - 1) // span_tokens) + first_token // span_tokens


@triton.jit
def _visible(start, key_start, ids, key_ids, valid, C: tl.constexpr, K: tl.constexpr, SEGMENTED: tl.constexpr):
    """(queries, keys): whether the query sees the key."""
    visible = (start + tl.arange(0, C))[:, None] >= (key_start + tl.arange(0, K))[None, :]
    if SEGMENTED:
        visible = visible & (ids[:, None] == key_ids[None, :]) & valid[None, :]
    return visible


@triton.jit
def span_sums_kernel(
    x,  # (B, L, H, D): keys (G is 1), or queries
    values,  # (B, L, H, V): values, or gradients of the output
    segments,  # (B, L)
    denominators,  # (B, L, H), read for queries only
    deltas,  # (B, L, H), read for queries only
    sums_of_spans,  # (B, H/G, N, P (V + 1)): what each span adds to the state
    scale,
    L,
    span_tokens,
    H: tl.constexpr,
    G: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    WHOLE: tl.constexpr,
    SEGMENTED: tl.constexpr,
    OF_QUERIES: tl.constexpr,
    KERNEL: tl.constexpr,
    STARTS: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    STATE_PRECISION: tl.constexpr,
):
    spans = (L + span_tokens - 1) // span_tokens
    batch_head, first_token = (tl.program_id(0) // spans).to(tl.int64), tl.program_id(0) % spans * span_tokens
    token, head = batch_head // (H // G) * L, batch_head % (H // G)
    column, element = tl.program_id(1) * BV + tl.arange(0, BV), tl.arange(0, KERNEL[1])
    stop = tl.minimum(first_token + span_tokens, L)

    sums, totals = empty_state(BV, STARTS)
    added = segment_of(segments, token, first_token if OF_QUERIES else stop - 1, SEGMENTED)
    for member in range(G):
        for start in range(first_token, stop, C):
            shift = zero_shift(start, KERNEL, OPERAND)
            rows = load(x, token, start, head * G + member, element, L, H, KERNEL[0], C, WHOLE).to(OPERAND)
            value = load(values, token, start, head * G + member, column, L, H, V, C, WHOLE).to(OPERAND)
            ids, valid = load_segments(segments, token, start, L, C, SEGMENTED)
            inside = valid & (ids == added)
            weight, total = tl.full([C], 1.0, tl.float32), inside.to(tl.float32)
            if OF_QUERIES:
                weight = 1.0 / load_scalars(denominators, token, start, head * G + member, L, H, 1.0, C)
                total = -load_scalars(deltas, token, start, head * G + member, L, H, 0.0, C)
            sums, totals = add_to_state(
                sums,
                totals,
                rows,
                shift,
                value,
                weight,
                total,
                inside,
                STARTS,
                KERNEL,
                OPERAND,
                STATE_PRECISION,
                OF_QUERIES,
                SEGMENTED,
            )
    state = sums_of_spans + _span_number(batch_head, first_token, L, span_tokens) * (P * (V + 1))
    store_state(state, sums, totals, column, scale, P, V, STARTS, KERNEL, OF_QUERIES)


@triton.jit
def scan_kernel(
    sums_of_spans,  # (B, H, N, P (V + 1)): what each span adds to the state
    states,  # (B, H, N, P, V) or (B, H, N, 2, P, V): the state that each span's programs begin with
    totals,  # (B, H, N, P)
    boundary,  # (B, H, P, V + 1): the state before the first span, or the gradient of that after the last
    result,  # (B, H, P, V + 1): the state after the last span, or the gradient of that before the first
    segments,  # (B, L)
    L,
    span_tokens,
    spans,
    H: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    SEGMENTED: tl.constexpr,
    HAS_STATE: tl.constexpr,
    OF_QUERIES: tl.constexpr,
    KERNEL: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    size: tl.constexpr = P * (V + 1)
    batch_head = tl.program_id(0).to(tl.int64)
    token = batch_head // H * L
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_sum = i < P * V
    # Where number i of a span's state stands in (P, V + 1).
    outside = batch_head * size + tl.where(is_sum, i // V * (V + 1) + i % V, (i - P * V) * (V + 1) + V)
    # Keys read the gradient of a state with the weights of their features in it.
    weight = tl.full([BLOCK], 1.0, tl.float32)
    if OF_QUERIES:
        weight = row_factors(tl.where(is_sum, i // V, i - P * V), 1.0, KERNEL, False)
    state = tl.zeros([BLOCK], tl.float32)
    if HAS_STATE:
        state = tl.load(boundary + outside, mask=i < size, other=0.0)
    for first_step in range(0, spans, AHEAD):
        # Read before any is written: the reads do not wait for one another.
        added = ()
        for j in tl.static_range(AHEAD):
            ahead = batch_head * spans + (spans - 1 - first_step - j if OF_QUERIES else first_step + j)
            there = tl.where(first_step + j < spans, size, 0)
            added = added + (tl.load(sums_of_spans + ahead * size + i, mask=i < there, other=0.0),)
        for j in tl.static_range(AHEAD):
            if first_step + j < spans:
                span = spans - 1 - first_step - j if OF_QUERIES else first_step + j
                number = batch_head * spans + span
                weighted = state * weight
                tl.store(totals + number * P + i - P * V, weighted, mask=(i < size) & (i >= P * V))
                if tl.bfloat16 == OPERAND:
                    high = weighted.to(tl.bfloat16)
                    at = states + number * (2 * P * V) + i
                    tl.store(at, high, mask=is_sum)
                    tl.store(at + P * V, (weighted - high.to(tl.float32)).to(tl.bfloat16), mask=is_sum)
                else:
                    tl.store(states + number * (P * V) + i, weighted, mask=is_sum)
                if SEGMENTED:
                    before = tl.maximum(span * span_tokens - 1, 0)
                    last = tl.minimum((span + 1) * span_tokens, L) - 1
                    if OF_QUERIES:
                        before, last = tl.minimum(last + 1, L - 1), span * span_tokens
                    kept = segment_of(segments, token, before, True) == segment_of(segments, token, last, True)
                    state = tl.where(kept, state, 0.0)
                state += added[j]
    tl.store(result + outside, state, mask=i < size)


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
