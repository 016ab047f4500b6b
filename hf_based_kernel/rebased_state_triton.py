"""
What the Triton kernels of ReBased and Taylor attention are made of: tiles of tokens, features, and the state on chip.

B batch, L tokens, H heads, D feature_dim, V head_dim, P rows of a state (`rebased_features.py` lists them), N spans.
C tokens of a block, BV values of a block. WHOLE: all blocks are full, of tokens, of elements and of values. KERNEL is (D, padded D, c0, c1, c2, floor, number of products of two elements) of
the kernel c0 + c1 s + c2 (s² + floor |q|² |k|²), where |q| is scaled as s is. A state is made in blocks of its rows, of which block b has the rows STARTS[b] to STARTS[b + 1],
and read R rows at a time.

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
    if KERNEL[2] == 0 and KERNEL[3] == 0:
        return KERNEL[4] * scores * scores
    return (KERNEL[4] * scores + KERNEL[3]) * scores + KERNEL[2]


@triton.jit
def split_scale(scale, KERNEL: tl.constexpr):
    """What scores are multiplied by, and what the kernel is multiplied by after: one of them is 1."""
    if KERNEL[2] == 0 and KERNEL[3] == 0:
        return 1.0, scale * scale
    return scale, 1.0


@triton.jit
def slope(scores, KERNEL: tl.constexpr):
    return 2.0 * KERNEL[4] * scores + KERNEL[3]


@triton.jit
def squared_length(x):
    """x: (C, padded D) -> (C): |x|²."""
    x = x.to(tl.float32)
    return tl.sum(x * x, axis=1)


@triton.jit
def zero_shift(start, KERNEL: tl.constexpr, OPERAND: tl.constexpr):
    """Zero. It depends on the chunk where selectors are large, so that they are made anew and not kept on the chip."""
    return tl.minimum(start, 0) if KERNEL[1] > 16 or tl.float32 == OPERAND else 0


@triton.jit
def degrees(KERNEL: tl.constexpr):
    """How many rows have 2 factors, 1 factor or more, and how many there are."""
    packed: tl.constexpr = KERNEL[6]
    linear = packed + (KERNEL[0] if KERNEL[3] != 0 else 0)
    return packed, linear, linear + (1 if KERNEL[2] != 0 else 0)


@triton.jit
def row_factors(row, scale, KERNEL: tl.constexpr, OF_QUERIES: tl.constexpr):
    """What the product of two picked elements is multiplied by: powers of `scale`, or the key's weights."""
    packed, linear, rows = degrees(KERNEL)
    if OF_QUERIES:
        return tl.where(row < packed, scale * scale, tl.where(row < linear, scale, tl.where(row < rows, 1.0, 0.0)))
    weight = tl.where((row < KERNEL[0]) | (2 * (row // KERNEL[0]) == KERNEL[0]), KERNEL[4], 2.0 * KERNEL[4])
    return tl.where(row < packed, weight, tl.where(row < linear, KERNEL[3], tl.where(row < rows, KERNEL[2], 0.0)))


@triton.jit
def _selectors(row, KERNEL: tl.constexpr, dtype: tl.constexpr, SECOND: tl.constexpr):
    """row: (SIZE) -> (padded D, SIZE): 1 where an element of x is the first, or SECOND, factor of a row, else 0."""
    packed, linear, _ = degrees(KERNEL)
    if SECOND:
        chosen = tl.where(row < packed, (row % KERNEL[0] + row // KERNEL[0]) % KERNEL[0], -1)
    else:
        chosen = tl.where(row < packed, row % KERNEL[0], tl.where(row < linear, row - packed, -1))
    i = tl.arange(0, KERNEL[1])
    return tl.where(i[:, None] == chosen[None, :], tl.full([1, 1], 1.0, dtype), tl.full([1, 1], 0.0, dtype))


@triton.jit
def _factor(x, row, KERNEL: tl.constexpr, PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr, SECOND: tl.constexpr):
    """x: (C, padded D), row: (SIZE) -> a factor of these features in float32, (C, SIZE), or (SIZE, C) if transposed."""
    packed, linear, _ = degrees(KERNEL)
    pick = _selectors(row, KERNEL, x.dtype, SECOND)
    if TRANSPOSED:
        factor = tl.dot(tl.trans(pick), tl.trans(x), input_precision=PRECISION)
    else:
        factor = tl.dot(x, pick, input_precision=PRECISION)
    if KERNEL[2] != 0 or KERNEL[3] != 0:
        # Rows of lower degree have 1 for the factors that they lack.
        one = (row >= (packed if SECOND else linear)).to(tl.float32)
        factor += one[:, None] if TRANSPOSED else one[None, :]
    return factor


@triton.jit
def floor_factors(row, KERNEL: tl.constexpr):
    """What |q|² is multiplied by where it is added to a query's features: the squares among them carry the floor."""
    return tl.where(row < KERNEL[0], KERNEL[5], 0.0)


@triton.jit
def _floor_rows(
    states,
    totals,
    span,
    column,
    P: tl.constexpr,
    V: tl.constexpr,
    WHOLE: tl.constexpr,
    KERNEL: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Floor times the sum of the state's rows that are squares: of the sums (BV), of the totals."""
    row = tl.arange(0, KERNEL[1])
    high, low = _load_rows(states, span, row, column, P, V, WHOLE, OPERAND)
    row_totals = _load_totals(totals, span, row, P)
    is_square = row < KERNEL[0]
    sums = high.to(tl.float32)
    if tl.bfloat16 == OPERAND:
        sums += low.to(tl.float32)
    sums = tl.where(is_square[:, None], sums, 0.0)
    return KERNEL[5] * tl.sum(sums, axis=0), KERNEL[5] * tl.sum(tl.where(is_square, row_totals, 0.0), axis=0)


@triton.jit
def upper_half(x):
    """float32, cut to the bits that bfloat16 has: what is left is finite where x is, and NaN where it is not."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def product(a, b, acc, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b with float32 sums, b exact in OPERAND. For bfloat16, a float32 a goes in two parts, which keeps 16 bits."""
    if tl.bfloat16 == OPERAND:
        if a.dtype == tl.float32:
            high = upper_half(a)
            acc = tl.dot((a - high).to(tl.bfloat16), b, acc=acc)
            acc = tl.dot(high.to(tl.bfloat16), b, acc=acc)
        else:
            acc = tl.dot(a, b, acc=acc)
    else:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc=acc, input_precision=PRECISION)
    return acc


@triton.jit
def _product_with_state(a, high, low, acc, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a (high + low), where `low` is there for bfloat16 only."""
    if tl.bfloat16 == OPERAND:
        acc = tl.dot(a.to(tl.bfloat16), low, acc=acc)
    return product(a, high, acc, OPERAND, PRECISION)


@triton.jit
def read_state(
    states,
    totals,
    span,
    x,
    column,
    scale,
    P: tl.constexpr,
    V: tl.constexpr,
    WHOLE: tl.constexpr,
    R: tl.constexpr,
    BV: tl.constexpr,
    KERNEL: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x: (C, padded D), queries -> their features times the state's sums (C, BV), and times its totals (C)."""
    value, total = tl.zeros([x.shape[0], BV], tl.float32), tl.zeros([x.shape[0]], tl.float32)
    row = tl.arange(0, R)
    first = _factor(x, row, KERNEL, PRECISION, False, False)
    # Read a step ahead: what no product needs is not fetched early by the compiler.
    next_totals = _load_totals(totals, span, row, P)
    for first_row in range(0, P, R):
        row = first_row + tl.arange(0, R)
        row_totals, next_totals = next_totals, _load_totals(totals, span, row + R, P)
        high, low = _load_rows(states, span, row, column, P, V, WHOLE, OPERAND)
        # The first factors of R rows are those of the next R, if both are whole turns of the elements.
        if R % KERNEL[0] != 0 or KERNEL[2] != 0:
            first = _factor(x, row, KERNEL, PRECISION, False, False)
        features = first * _factor(x, row, KERNEL, PRECISION, False, True)
        if KERNEL[2] != 0 or KERNEL[3] != 0:
            features *= row_factors(row, scale, KERNEL, True)[None, :]
        value = _product_with_state(features, high, low, value, OPERAND, PRECISION)
        total += tl.sum(features * row_totals[None, :], axis=1)
    if KERNEL[5] != 0:
        length = squared_length(x)
        floor_sums, floor_total = _floor_rows(states, totals, span, column, P, V, WHOLE, KERNEL, OPERAND)
        value, total = value + length[:, None] * floor_sums[None, :], total + length * floor_total
    return value, total


@triton.jit
def read_state_backward(
    value,
    grad_value,
    grad_total,
    states,
    totals,
    span,
    x,
    column,
    scale,
    P: tl.constexpr,
    V: tl.constexpr,
    WHOLE: tl.constexpr,
    R: tl.constexpr,
    KERNEL: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    OF_QUERIES: tl.constexpr,
):
    """
    grad_value: (C, BV), grad_total: (C) of `read_state` -> gradient of x, transposed: (padded D, C).

    Of keys, also `value` plus the features times the sums, in the same walk; their state has the weights in it already.
    """
    grad_x = tl.zeros([x.shape[1], x.shape[0]], tl.float32)
    row = tl.arange(0, R)
    first = _factor(x, row, KERNEL, PRECISION, False, False)
    next_totals = _load_totals(totals, span, row, P)
    for first_row in range(0, P, R):
        row = first_row + tl.arange(0, R)
        row_totals, next_totals = next_totals, _load_totals(totals, span, row + R, P)
        high, low = _load_rows(states, span, row, column, P, V, WHOLE, OPERAND)
        if R % KERNEL[0] != 0 or KERNEL[2] != 0:
            first = _factor(x, row, KERNEL, PRECISION, False, False)
        second = _factor(x, row, KERNEL, PRECISION, False, True)
        if not OF_QUERIES:
            value = _product_with_state(first * second, high, low, value, OPERAND, PRECISION)
        grad = grad_total[:, None] * row_totals[None, :]
        grad = _product_with_state(grad_value, tl.trans(high), tl.trans(low), grad, OPERAND, PRECISION)
        if OF_QUERIES and (KERNEL[2] != 0 or KERNEL[3] != 0):
            grad *= row_factors(row, scale, KERNEL, True)[None, :]
        pick_first, pick_second = _selectors(row, KERNEL, OPERAND, False), _selectors(row, KERNEL, OPERAND, True)
        grad_x = _transposed_product(pick_first, grad * second, grad_x, OPERAND, PRECISION)
        grad_x = _transposed_product(pick_second, grad * first, grad_x, OPERAND, PRECISION)
    if OF_QUERIES and KERNEL[5] != 0:
        floor_sums, floor_total = _floor_rows(states, totals, span, column, P, V, WHOLE, KERNEL, OPERAND)
        grad_length = tl.sum(grad_value.to(tl.float32) * floor_sums[None, :], axis=1) + grad_total * floor_total
        grad_x += tl.trans(2.0 * grad_length[:, None] * x.to(tl.float32))
    return value, grad_x


@triton.jit
def _transposed_product(a, b, acc, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a bᵀ, as `product`, with a exact in OPERAND and b in float32."""
    if tl.bfloat16 == OPERAND:
        high = upper_half(b)
        acc = tl.dot(a, tl.trans((b - high).to(tl.bfloat16)), acc=acc)
        acc = tl.dot(a, tl.trans(high.to(tl.bfloat16)), acc=acc)
    else:
        acc = tl.dot(a.to(tl.float32), tl.trans(b), acc=acc, input_precision=PRECISION)
    return acc


@triton.jit
def add_to_state(
    sums,
    totals,
    x,
    shift,
    value,
    weight,
    total,
    inside,
    STARTS: tl.constexpr,
    KERNEL: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    OF_QUERIES: tl.constexpr,
    SEGMENTED: tl.constexpr,
):
    """
    The state plus the sum over the tokens `inside` of features(x) weight [value, total]; value: (C, BV), the others: (C).

    Without what `store_state` multiplies its rows by.
    """
    total = tl.where(inside, total, 0.0)
    if SEGMENTED:
        # Selected on both sides of the product: what other segments hold may not be finite.
        x = tl.where(inside[:, None], x, 0.0).to(x.dtype)
        value = tl.where(inside[:, None], value, 0.0).to(value.dtype)
        weight = tl.where(inside, weight, 0.0)
    new_sums = ()
    new_totals = ()
    for b in tl.static_range(len(sums)):
        # Made transposed: turning the product round would cost a trip through shared memory.
        row = STARTS[b] + shift + tl.arange(0, STARTS[b + 1] - STARTS[b])
        features = _factor(x, row, KERNEL, PRECISION, True, False) * _factor(x, row, KERNEL, PRECISION, True, True)
        if OF_QUERIES:
            if KERNEL[5] != 0:
                features += floor_factors(row, KERNEL)[:, None] * squared_length(x)[None, :]
            features *= weight[None, :]
        new_sums = new_sums + (product(features, value, sums[b], OPERAND, PRECISION),)
        new_totals = new_totals + (totals[b] + tl.sum(features * total[None, :], axis=1),)
    return new_sums, new_totals


@triton.jit
def empty_state(BV: tl.constexpr, STARTS: tl.constexpr):
    """Zeros as tuples of blocks of rows: sums of features times values (SIZE, BV), of features (SIZE)."""
    sums = ()
    totals = ()
    for b in tl.static_range(len(STARTS) - 1):
        sums = sums + (tl.zeros([STARTS[b + 1] - STARTS[b], BV], tl.float32),)
        totals = totals + (tl.zeros([STARTS[b + 1] - STARTS[b]], tl.float32),)
    return sums, totals


@triton.jit
def _load_rows(
    states, span, row, column, P: tl.constexpr, V: tl.constexpr, WHOLE: tl.constexpr, OPERAND: tl.constexpr
):
    """Rows of a span's sums (SIZE, BV), or the two parts of them."""
    inside = (row < P)[:, None]
    if not WHOLE:
        inside = inside & (column < V)[None, :]
    cells = row[:, None] * V + column[None, :]
    if tl.bfloat16 == OPERAND:
        states += span * (2 * P * V)
        high = tl.load(states + cells, mask=inside, other=0.0)
        low = tl.load(states + P * V + cells, mask=inside, other=0.0)
    else:
        high = tl.load(states + span * (P * V) + cells, mask=inside, other=0.0)
        low = high
    return high, low


@triton.jit
def _load_totals(totals, span, row, P: tl.constexpr):
    return tl.load(totals + span * P + row, mask=row < P, other=0.0)


@triton.jit
def store_state(
    state,
    sums,
    totals,
    column,
    scale,
    P: tl.constexpr,
    V: tl.constexpr,
    STARTS: tl.constexpr,
    KERNEL: tl.constexpr,
    OF_QUERIES: tl.constexpr,
):
    for b in tl.static_range(len(sums)):
        row = STARTS[b] + tl.arange(0, STARTS[b + 1] - STARTS[b])
        inside = (row < P)[:, None] & (column < V)[None, :]
        factors = row_factors(row, scale, KERNEL, OF_QUERIES)
        tl.store(state + row[:, None] * V + column[None, :], sums[b] * factors[:, None], mask=inside)
        # Every value block has the same totals.
        if tl.program_id(1) == 0:
            tl.store(state + P * V + row, totals[b] * factors, mask=row < P)


@triton.jit
def load(x, token, start, head, column, L, H, W, C: tl.constexpr, WHOLE: tl.constexpr):
    """x: (B, L, H, W) -> its C tokens from `start` on, columns `column`; zeros past either end, where WHOLE has none."""
    t = tl.arange(0, C)
    at = x + ((token + start) * H + head) * W + (t[:, None] * (H * W) + column[None, :])
    if WHOLE:
        return tl.load(at)
    else:
        return tl.load(at, mask=(start + t < L)[:, None] & (column < W)[None, :], other=0.0)


@triton.jit
def store(x, value, token, start, head, column, L, H, W, C: tl.constexpr, WHOLE: tl.constexpr):
    t = tl.arange(0, C)
    at = x + ((token + start) * H + head) * W + (t[:, None] * (H * W) + column[None, :])
    if WHOLE:
        tl.store(at, value)
    else:
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
