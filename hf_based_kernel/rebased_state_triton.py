"""
What the Triton kernels of ReBased and Taylor attention are made of: tiles of tokens, features, and the state on chip.

B batch, L tokens, H heads, D feature_dim, V head_dim, P rows of a state (laid out as in `rebased_features.py`), N spans.
C tokens of a chunk, BV values of a block. KERNEL is (D, padded D, c0, c1, c2) of the kernel c0 + c1 s + c2 s². A state is a
tuple of blocks of its rows: block b has the rows STARTS[b] to STARTS[b + 1].

Features are products of two elements of x. Both factors are picked from x by a matrix product with 0/1 selectors, which is
exact for half precision, needs no gather, and whose transpose carries the gradient back.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("backend='triton' needs triton: pip install triton, or use backend='torch'") from error


@triton.jit
def polynomial(scores, KERNEL: tl.constexpr):
    return (KERNEL[4] * scores + KERNEL[3]) * scores + KERNEL[2]


@triton.jit
def zero_shift(start, KERNEL: tl.constexpr, OPERAND: tl.constexpr):
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
def read_state(
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
def read_state_backward(
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
    """grad_value: (C, BV), grad_total: (C) of `read_state` -> gradient of x, (C, padded D)."""
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
def add_to_state(
    sums,
    totals,
    x,
    scale,
    shift,
    value,
    total,
    inside,
    STARTS: tl.constexpr,
    KERNEL: tl.constexpr,
    PRECISION: tl.constexpr,
    OF_QUERIES: tl.constexpr,
    SEGMENTED: tl.constexpr,
):
    """The state plus features(x) [value, total], summed over the tokens `inside`; value: (C, BV), total, inside: (C)."""
    total = tl.where(inside, total, 0.0)
    if SEGMENTED:
        # Selected on both sides of the product: what other segments hold may not be finite.
        x = tl.where(inside[:, None], x, 0.0)
        value = tl.where(inside[:, None], value, 0.0)
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
def keep_state(sums, totals, kept, STARTS: tl.constexpr):
    """The state, or zeros where the scalar `kept` is false. Selected: what is left behind may not be finite."""
    new_sums = ()
    new_totals = ()
    for b in tl.static_range(len(sums)):
        new_sums = new_sums + (tl.where(kept, sums[b], 0.0),)
        new_totals = new_totals + (tl.where(kept, totals[b], 0.0),)
    return new_sums, new_totals


@triton.jit
def load_state(state, column, V, P, BV: tl.constexpr, STARTS: tl.constexpr, HAS_STATE: tl.constexpr):
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
def store_state(state, sums, totals, column, V, P, STARTS: tl.constexpr):
    for b in tl.static_range(len(sums)):
        row = STARTS[b] + tl.arange(0, STARTS[b + 1] - STARTS[b])
        at = state + row * (V + 1)
        inside = (row < P)[:, None] & (column < V)[None, :]
        tl.store(at[:, None] + column[None, :], sums[b], mask=inside)
        # Every value block has the same totals.
        tl.store(at + V, totals[b], mask=(row < P) & (tl.program_id(1) == 0))


@triton.jit
def load(x, token, start, head, column, L, H, W, C: tl.constexpr):
    """x: (B, L, H, W) -> its C tokens from `start` on, columns `column`; zeros past either end."""
    t = tl.arange(0, C)
    at = x + ((token + start) * H + head) * W + (t[:, None] * (H * W) + column[None, :])
    return tl.load(at, mask=(start + t < L)[:, None] & (column < W)[None, :], other=0.0)


@triton.jit
def store(x, value, token, start, head, column, L, H, W, C: tl.constexpr):
    t = tl.arange(0, C)
    at = x + ((token + start) * H + head) * W + (t[:, None] * (H * W) + column[None, :])
    tl.store(at, value, mask=(start + t < L)[:, None] & (column < W)[None, :])


@triton.jit
def load_scalars(x, token, start, head, L, H, other, C: tl.constexpr):
    """x: (B, L, H) -> its C tokens from `start` on."""
    t = tl.arange(0, C)
    return tl.load(x + (token + start + t) * H + head, mask=start + t < L, other=other)


@triton.jit
def load_segments(segments, token, start, L, C: tl.constexpr, SEGMENTED: tl.constexpr):
    """segments: (B, L) -> (C) the number of each token's segment, (C) whether it is a token and not padding."""
    t = tl.arange(0, C)
    if SEGMENTED:
        coded = tl.load(segments + token + start + t, mask=start + t < L, other=-1)
        return tl.where(coded < 0, -1 - coded, coded), coded >= 0
    return tl.zeros([C], tl.int32), start + t < L


@triton.jit
def finite_rows(x, SEGMENTED: tl.constexpr):
    """x: (C, columns) with zeros for the rows that are not finite, and (C) which are: 0 · NaN would reach other segments."""
    if SEGMENTED:
        finite = tl.sum(x.to(tl.float32) * 0.0, axis=1) == 0.0
        return tl.where(finite[:, None], x, 0.0).to(x.dtype), finite
    return x, tl.full([x.shape[0]], True, tl.int1)


@triton.jit
def segment_of(segments, token, position, SEGMENTED: tl.constexpr):
    if SEGMENTED:
        coded = tl.load(segments + token + position)
        return tl.where(coded < 0, -1 - coded, coded)
    return 0
