"""
One token of ReBased and Taylor attention in one Triton kernel: the recurrent form on a GPU, where a step of many small
operations would wait for their launches.
"""

import torch


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("backend='triton' needs triton: pip install triton, or use backend='torch'") from error

from .rebased_attention_triton import NAMESPACE, check_dtype
from .rebased_features import REBASED, Coefficients, packed_size, state_size
from .rebased_state_triton import degrees, floor_factors, polynomial, row_factors


# Rows of a state that are read at a time: by one query, by several.
ROWS, SHARED_ROWS = 64, 32
# Of the queries that share a state, what a program takes at most: its code is as long as they are many.
QUERIES = 8


def rebased_attention_step_triton(
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
    """`rebased_attention_step` in one Triton kernel, in float32 whatever the dtype of q, k and v; without gradients."""
    check_dtype(q)
    # An operator costs several times what the kernel does; only a trace needs it.
    run = _step_operator if torch.compiler.is_compiling() else _step
    # Padding has zero keys and values: only a constant term of the kernel could tell it from nothing.
    mask = attention_mask if coefficients[0] else None
    out, state = run(q, k, v, initial_state, mask, scale, eps, list(coefficients), return_state)
    return (out, state) if return_state else out


def _step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    initial_state: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    scale: float,
    eps: float,
    coefficients: list[float],
    return_state: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the state after the token, which is empty if it is not wanted."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, state = _empty_results(q, k, v, initial_state, attention_mask, scale, eps, coefficients, return_state)
    heads, (feature_dim, head_dim) = k.shape[0] * k.shape[2], (q.shape[-1], v.shape[-1])
    group_size = q.shape[2] // k.shape[2]
    # Few sequences leave most of a GPU idle: their states are split finer.
    block = min(triton.next_power_of_2(head_dim), 64 if heads >= 256 else 16)
    with torch.cuda.device_of(q):
        step_kernel[(heads, triton.cdiv(head_dim, block), triton.cdiv(group_size, QUERIES))](
            q,
            k,
            v,
            q if attention_mask is None else attention_mask.contiguous().view(torch.uint8),
            q if initial_state is None else initial_state.contiguous(),
            out,
            state,
            scale,
            eps,
            H=q.shape[2],
            G=group_size,
            M=min(group_size, QUERIES),
            V=head_dim,
            P=state_size(feature_dim, coefficients),
            KERNEL=(feature_dim, triton.next_power_of_2(feature_dim), *coefficients, packed_size(feature_dim)),
            R=ROWS if group_size == 1 else SHARED_ROWS,
            BV=block,
            HAS_STATE=initial_state is not None,
            RETURN_STATE=return_state,
            MASKED=attention_mask is not None,
        )
    return out, state


_step_operator = torch.library.custom_op(f"{NAMESPACE}::step", _step, mutates_args=())


@_step_operator.register_fake
def _empty_results(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    initial_state: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    scale: float,
    eps: float,
    coefficients: list[float],
    return_state: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = state_size(q.shape[-1], coefficients)
    state_shape = (v.shape[0], v.shape[2], rows, v.shape[-1] + 1) if return_state else (0,)
    return (
        v.new_empty((*q.shape[:3], v.shape[-1])),
        q.new_empty(state_shape, dtype=torch.float32),
    )


@triton.jit
def step_kernel(
    q,  # (B, 1, H, D)
    k,  # (B, 1, H/G, D)
    v,  # (B, 1, H/G, V)
    mask,  # (B, 1): zero for padding
    state,  # (B, H/G, P, V + 1)
    out,  # (B, 1, H, V)
    new_state,  # (B, H/G, P, V + 1)
    scale,
    eps,
    H: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    KERNEL: tl.constexpr,
    R: tl.constexpr,
    BV: tl.constexpr,
    HAS_STATE: tl.constexpr,
    RETURN_STATE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """
    A head of keys, BV of its values, and M of the G queries that share it; KERNEL is that of `rebased_state_triton.py`.
    """
    batch_head = tl.program_id(0).to(tl.int64)
    column, element = tl.program_id(1) * BV + tl.arange(0, BV), tl.arange(0, KERNEL[1])
    first_member = 0
    if G > M:
        # The last program repeats what others do rather than be of another size.
        first_member = tl.minimum(tl.program_id(2) * M, G - M)
    first_query = batch_head * G + first_member
    q, k, v, out = q + first_query * KERNEL[0], k + batch_head * KERNEL[0], v + batch_head * V, out + first_query * V
    state, new_state = state + batch_head * (P * (V + 1)), new_state + batch_head * (P * (V + 1))
    queries = ()
    for member in tl.static_range(M):
        query = tl.load(q + member * KERNEL[0] + element, mask=element < KERNEL[0], other=0.0)
        queries = queries + (query.to(tl.float32),)
    key = tl.load(k + element, mask=element < KERNEL[0], other=0.0).to(tl.float32)
    value = tl.load(v + column, mask=column < V, other=0.0).to(tl.float32)
    one = 1.0
    if MASKED:
        one = tl.load(mask + batch_head // (H // G)).to(tl.float32)

    # The token's own term comes from its score: through the features, a score near zero would lose its digits.
    lengths = ()
    sums = ()
    totals = ()
    for member in tl.static_range(M):
        length = tl.sum(queries[member] * queries[member], axis=0)
        own = polynomial(tl.sum(queries[member] * key, axis=0) * scale, KERNEL)
        own += (KERNEL[4] * KERNEL[5]) * scale * scale * length * tl.sum(key * key, axis=0)
        lengths = lengths + (length,)
        sums = sums + (own * value,)
        totals = totals + (own * one,)
    packed, linear, _ = degrees(KERNEL)
    for first_row in range(0, P, R):
        row = first_row + tl.arange(0, R)
        first = tl.where(row < packed, row % KERNEL[0], row - packed)
        second = (row % KERNEL[0] + row // KERNEL[0]) % KERNEL[0]
        cells = row[:, None] * (V + 1) + column[None, :]
        inside = (row < P)[:, None] & (column < V)[None, :]
        past, past_total = tl.zeros([R, BV], tl.float32), tl.zeros([R], tl.float32)
        if HAS_STATE:
            past = tl.load(state + cells, mask=inside, other=0.0)
            past_total = tl.load(state + row * (V + 1) + V, mask=row < P, other=0.0)
            new_sums = ()
            new_totals = ()
            for member in tl.static_range(M):
                # Rows of lower degree have 1 for the factors that they lack.
                at = q + member * KERNEL[0]
                features = tl.load(at + first, mask=row < linear, other=1.0).to(tl.float32)
                features *= tl.load(at + second, mask=row < packed, other=1.0).to(tl.float32)
                features += floor_factors(row, KERNEL) * lengths[member]
                features *= row_factors(row, scale, KERNEL, True)
                new_sums = new_sums + (sums[member] + tl.sum(features[:, None] * past, axis=0),)
                new_totals = new_totals + (totals[member] + tl.sum(features * past_total, axis=0),)
            sums, totals = new_sums, new_totals
        if RETURN_STATE and first_member == 0:
            added = tl.load(k + first, mask=row < linear, other=1.0).to(tl.float32)
            added *= tl.load(k + second, mask=row < packed, other=1.0).to(tl.float32)
            added *= row_factors(row, scale, KERNEL, False)
            tl.store(new_state + cells, past + added[:, None] * value[None, :], mask=inside)
            # Every value block has the same totals.
            if tl.program_id(1) == 0:
                tl.store(new_state + row * (V + 1) + V, past_total + added * one, mask=row < P)
    for member in tl.static_range(M):
        tl.store(out + member * V + column, sums[member] / (totals[member] + eps), mask=column < V)
