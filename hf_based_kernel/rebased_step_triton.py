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


# Rows of a state that are read at a time.
ROWS = 64


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
    heads, (feature_dim, head_dim) = q.shape[0] * q.shape[2], (q.shape[-1], v.shape[-1])
    # Few sequences leave most of a GPU idle: their states are split finer.
    block = min(triton.next_power_of_2(head_dim), 64 if heads >= 256 else 16)
    with torch.cuda.device_of(q):
        step_kernel[(heads, triton.cdiv(head_dim, block))](
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
            V=head_dim,
            P=state_size(feature_dim, coefficients),
            KERNEL=(feature_dim, triton.next_power_of_2(feature_dim), *coefficients, packed_size(feature_dim)),
            R=ROWS,
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
    state_shape = (q.shape[0], q.shape[2], rows, v.shape[-1] + 1) if return_state else (0,)
    return (
        torch.empty_like(v, memory_format=torch.contiguous_format),
        q.new_empty(state_shape, dtype=torch.float32),
    )


@triton.jit
def step_kernel(
    q,  # (B, 1, H, D)
    k,  # (B, 1, H, D)
    v,  # (B, 1, H, V)
    mask,  # (B, 1): zero for padding
    state,  # (B, H, P, V + 1)
    out,  # (B, 1, H, V)
    new_state,  # (B, H, P, V + 1)
    scale,
    eps,
    H: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    KERNEL: tl.constexpr,
    R: tl.constexpr,
    BV: tl.constexpr,
    HAS_STATE: tl.constexpr,
    RETURN_STATE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A head and BV of its values; KERNEL is that of `rebased_state_triton.py`."""
    batch_head = tl.program_id(0).to(tl.int64)
    column, element = tl.program_id(1) * BV + tl.arange(0, BV), tl.arange(0, KERNEL[1])
    q, k, v, out = q + batch_head * KERNEL[0], k + batch_head * KERNEL[0], v + batch_head * V, out + batch_head * V
    state, new_state = state + batch_head * (P * (V + 1)), new_state + batch_head * (P * (V + 1))
    query = tl.load(q + element, mask=element < KERNEL[0], other=0.0).to(tl.float32)
    key = tl.load(k + element, mask=element < KERNEL[0], other=0.0).to(tl.float32)
    value = tl.load(v + column, mask=column < V, other=0.0).to(tl.float32)
    one = 1.0
    if MASKED:
        one = tl.load(mask + batch_head // H).to(tl.float32)

    # The token's own term comes from its score: through the features, a score near zero would lose its digits.
    length = tl.sum(query * query, axis=0)
    own = polynomial(tl.sum(query * key, axis=0) * scale, KERNEL)
    own += (KERNEL[4] * KERNEL[5]) * scale * scale * length * tl.sum(key * key, axis=0)
    sums, total = own * value, own * one
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
            # Rows of lower degree have 1 for the factors that they lack.
            features = tl.load(q + first, mask=row < linear, other=1.0).to(tl.float32)
            features *= tl.load(q + second, mask=row < packed, other=1.0).to(tl.float32)
            features = (features + floor_factors(row, KERNEL) * length) * row_factors(row, scale, KERNEL, True)
            sums += tl.sum(features[:, None] * past, axis=0)
            total += tl.sum(features * past_total, axis=0)
        if RETURN_STATE:
            added = tl.load(k + first, mask=row < linear, other=1.0).to(tl.float32)
            added *= tl.load(k + second, mask=row < packed, other=1.0).to(tl.float32)
            added *= row_factors(row, scale, KERNEL, False)
            tl.store(new_state + cells, past + added[:, None] * value[None, :], mask=inside)
            # Every value block has the same totals.
            is_first = tl.program_id(1) == 0
            tl.store(new_state + row * (V + 1) + V, past_total + added * one, mask=(row < P) & is_first)
    tl.store(out + column, sums / (total + eps), mask=column < V)
