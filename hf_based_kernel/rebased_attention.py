"""
Causal linear attention with a quadratic kernel: ReBased (arXiv 2402.10644) and Based (arXiv 2402.18668).

Both kernels are a polynomial c0 + c1 s + c2 s² of the score s = scale q·k, so both have a state of constant size. The
forms of the operation agree in value and gradient:

- `rebased_attention_reference`: quadratic in length, the specification;
- `rebased_attention_chunked`: linear in length, for training and prefill;
- `rebased_attention_step`: one token, for decoding;
- `rebased_attention_triton` (in `rebased_attention_triton.py`): the chunked form on a GPU.

They share one signature, `form(q, k, v, *, scale, eps, initial_state, return_state, attention_mask, segment_ids,
chunk_size, coefficients)`, and one layout of the state: (batch, num_heads, state_size, head_dim + 1), contiguous, in
float32. Column d < head_dim of row p holds the sum over past tokens of key_features(k)_p v_d, the last column that of
key_features(k)_p. Row r feature_dim + i, r = 0 … feature_dim // 2, is the product k_i k_((i + r) mod feature_dim), with the
weight c2, doubled where 0 < r < feature_dim / 2; then, for a kernel that has these terms, feature_dim rows c1 k_i and one
row c0. Weights are on the key's side only; `scale` is on the query's.
"""

import functools
import importlib.util
import re
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable


# (c0, c1, c2) of the kernel c0 + c1 s + c2 s².
REBASED = (0.0, 0.0, 1.0)
TAYLOR = (1.0, 1.0, 0.5)

DEFAULT_CHUNK_SIZE = 128
QUERY_ROWS = 64


@functools.cache
def is_triton_available() -> bool:
    return importlib.util.find_spec("triton") is not None


def rebased_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    eps: float = 1e-6,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    attention_mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""
    ReBased attention (arXiv 2402.10644, section 3), linear in the sequence length:

    out_i = Σ_{j≤i} (scale q_i·k_j)² v_j / (Σ_{j≤i} (scale q_i·k_j)² + eps)

    q: (batch, seq, num_heads, feature_dim)
    k: (batch, seq, num_heads, feature_dim)
    v: (batch, seq, num_heads, head_dim)
    initial_state: (batch, num_heads, state_size(feature_dim), head_dim + 1)
    attention_mask: (batch, seq)
    segment_ids: (batch, seq)

    Args:
        scale (`float`, *optional*): Factor of every q·k. Defaults to `feature_dim ** -0.5`.
        eps (`float`, *optional*, defaults to 1e-6): Added to the denominator, which can vanish for early tokens.
        initial_state (`torch.Tensor`, *optional*): State returned for the tokens before these.
        return_state (`bool`, *optional*, defaults to `False`): Also return the state after the last token.
        attention_mask (`torch.Tensor`, *optional*): Zero or `False` marks padding: no token sees it, its output is zero.
        segment_ids (`torch.Tensor`, *optional*): Integers that never decrease along the sequence. A token sees only
            its own segment; `initial_state` belongs to the segment of the first token, the returned state to that of
            the last.
        chunk_size (`int`, *optional*): Tokens whose scores are formed at once. Changes speed and memory only.
        backend (`str`, *optional*, defaults to `"auto"`): `"torch"`, `"triton"`, or `"auto"`: Triton for CUDA tensors.

    Returns:
        `torch.Tensor` of shape (batch, seq, num_heads, head_dim) in the dtype of `v`, and with `return_state` the state
        as a second one, in float32 (float64 for float64 inputs). Sums are accumulated in that dtype too.

    Raises:
        `ValueError`: If shapes, dtypes, `segment_ids`, `chunk_size` or `backend` are not as above.
        `ImportError`: If `backend="triton"` and triton is not installed.
    """
    return _attention(
        q,
        k,
        v,
        scale=scale,
        eps=eps,
        initial_state=initial_state,
        return_state=return_state,
        attention_mask=attention_mask,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        backend=backend,
        coefficients=REBASED,
    )


def taylor_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    eps: float = 1e-6,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    attention_mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""
    The attention of Based (arXiv 2402.18668): `rebased_attention` with the kernel 1 + s + s²/2, the Taylor polynomial of
    exp(s), in the place of s². Arguments, results and errors are the same; the state has `feature_dim + 1` more rows.
    """
    return _attention(
        q,
        k,
        v,
        scale=scale,
        eps=eps,
        initial_state=initial_state,
        return_state=return_state,
        attention_mask=attention_mask,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        backend=backend,
        coefficients=TAYLOR,
    )


def _attention(
    q, k, v, *, scale, eps, initial_state, return_state, attention_mask, segment_ids, chunk_size, backend, coefficients
):
    _check_tensors(q, k, v, attention_mask, segment_ids)
    _check_state(initial_state, q, v, coefficients)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be a positive number of tokens, got {chunk_size}")
    form = _choose_form(q, initial_state, return_state, backend)
    if attention_mask is not None:
        attention_mask = attention_mask.bool()
        padding = ~attention_mask[:, :, None, None]
        # Selected, not multiplied: a NaN in the padding must not reach the sums.
        q, k, v = (x.masked_fill(padding, 0) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        result = form(
            q,
            k,
            v,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            eps=eps,
            initial_state=initial_state,
            return_state=return_state,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            chunk_size=chunk_size,
            coefficients=coefficients,
        )
    if attention_mask is None:
        return result
    if return_state:
        return result[0].masked_fill(padding, 0), result[1]
    return result.masked_fill(padding, 0)


def _check_tensors(q, k, v, attention_mask, segment_ids):
    if q.dim() != 4 or q.shape != k.shape:
        raise ValueError(
            "q and k must both have the shape (batch, seq, num_heads, feature_dim), "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"v must have the shape (batch, seq, num_heads, head_dim) = ({q.shape[0]}, {q.shape[1]}, {q.shape[2]}, "
            f"head_dim) to go with q, got {tuple(v.shape)}"
        )
    if not (q.is_floating_point() and q.dtype == k.dtype == v.dtype):
        raise ValueError(f"q, k and v must have one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}; cast them")
    if q.shape[1] == 0:
        raise ValueError(f"expected at least one token, got q of shape {tuple(q.shape)}")
    for name, tensor in (("attention_mask", attention_mask), ("segment_ids", segment_ids)):
        if tensor is not None and tensor.shape != q.shape[:2]:
            raise ValueError(
                f"{name} must have the shape (batch, seq) = {tuple(q.shape[:2])}, got {tuple(tensor.shape)}"
            )
    # Reading a value stops a traced graph and waits for a GPU, so the order is only looked at where that is free.
    readable = segment_ids is not None and segment_ids.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and bool((segment_ids.diff(dim=1) < 0).any()):
        raise ValueError("segment_ids must never decrease along the sequence; number the segments from left to right")


def _check_state(initial_state, q, v, coefficients):
    if initial_state is None:
        return
    batch_size, _, num_heads, feature_dim = q.shape
    expected = (batch_size, num_heads, state_size(feature_dim, coefficients), v.shape[-1] + 1)
    if tuple(initial_state.shape) != expected:
        raise ValueError(
            f"initial_state must have the shape (batch, num_heads, state_size, head_dim + 1) = {expected}, got "
            f"{tuple(initial_state.shape)}; it must come from the same kernel and the same sizes"
        )
    if initial_state.dtype != _accumulation_dtype(q):
        raise ValueError(
            f"initial_state must be {_accumulation_dtype(q)} as it was returned, got {initial_state.dtype}; "
            "a rounded state loses the early tokens"
        )


def _choose_form(q, initial_state, return_state, backend):
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f'backend must be "auto", "torch" or "triton", got {backend!r}')
    if backend == "triton" and not is_triton_available():
        raise ImportError('backend="triton" needs triton: `pip install triton`, or choose backend="torch"')
    has_kernel = q.is_cuda and q.dtype != torch.float64 and is_triton_available()
    if backend == "triton" or (backend == "auto" and q.shape[1] > 1 and has_kernel):
        from .rebased_attention_triton import rebased_attention_triton

        return rebased_attention_triton
    if q.shape[1] == 1 and (return_state or initial_state is not None):
        return rebased_attention_step
    return rebased_attention_chunked


# The forms. Their caller has checked the inputs, resolved `scale`, and set q, k and v to zero where `attention_mask` (bool)
# is False; what is left to them is the last column of [v, 1]. Their caller also sets the output of padding to zero.


def rebased_attention_reference(
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
    """The formula of `rebased_attention`, with all seq × seq scores: the specification of the other forms."""
    dtype = _accumulation_dtype(q)
    queries, keys, values = q.to(dtype) * scale, k.to(dtype), _with_ones(v)
    if attention_mask is None:
        attention_mask = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
    if segment_ids is None:
        segment_ids = torch.zeros(q.shape[:2], dtype=torch.long, device=q.device)
    position = torch.arange(q.shape[1], device=q.device)
    same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]
    visible = (position[:, None] >= position) & same_segment & attention_mask[:, None, :]

    scores = torch.einsum("bihf,bjhf->bhij", queries, keys)
    weights = torch.where(visible[:, None], _polynomial(scores, coefficients), 0)
    sums = torch.einsum("bhij,bjhd->bihd", weights, values)
    if initial_state is not None:
        earlier = torch.einsum("bihp,bhpd->bihd", query_features(queries, coefficients), initial_state)
        sums = sums + (segment_ids == segment_ids[:, :1])[:, :, None, None] * earlier
    out = (sums[..., :-1] / (sums[..., -1:] + eps)).to(v.dtype) * attention_mask[:, :, None, None]
    if not return_state:
        return out

    in_last = segment_ids == segment_ids[:, -1:]
    kept = (in_last & attention_mask).to(dtype)
    state = torch.einsum("bj,bjhp,bjhd->bhpd", kept, key_features(keys, coefficients), values)
    if initial_state is not None:
        state = state + in_last[:, :1, None, None] * initial_state
    return out, state


def rebased_attention_step(
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
    """`rebased_attention` of a single token: the recurrent form, whose cost does not depend on what came before."""
    dtype = _accumulation_dtype(q)
    queries, keys = (x.reshape(-1, x.shape[-1]).to(dtype) for x in (q, k))
    queries = queries * scale
    values = _with_ones(v, attention_mask).view(-1, 1, v.shape[-1] + 1)
    rows = query_features(torch.stack([queries, keys]), coefficients)
    _weigh(rows[1], q.shape[-1], coefficients)
    # The token's own term comes from its score: through the features, a score near zero would lose its digits.
    sums = _polynomial((queries * keys).sum(-1)[:, None, None], coefficients) * values
    state = None if initial_state is None else initial_state.flatten(0, 1)
    if state is not None:
        sums = torch.baddbmm(sums, rows[0][:, None], state)
    out = (sums[..., :-1] / (sums[..., -1:] + eps)).to(v.dtype).view_as(v)
    if not return_state:
        return out
    features = rows[1][..., None]
    state = features * values if state is None else torch.addcmul(state, features, values)
    return out, state.unflatten(0, (q.shape[0], q.shape[2]))


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


# Features: kernel(q·k) = query_features(q) · key_features(k).


def packed_size(feature_dim: int) -> int:
    """Number of products x_i x_((i + r) mod feature_dim), r = 0 … feature_dim // 2."""
    return feature_dim * (feature_dim // 2 + 1)


def state_size(feature_dim: int, coefficients: tuple[float, float, float] = REBASED) -> int:
    """Rows of a head's state: the packed products, then `feature_dim` and 1 more if the kernel has such terms."""
    return packed_size(feature_dim) + feature_dim * (coefficients[1] != 0) + (coefficients[0] != 0)


def query_features(x: torch.Tensor, coefficients: tuple[float, float, float]) -> torch.Tensor:
    """x: (..., feature_dim) -> (..., state_size): every product once, then x and 1 if the kernel has such terms."""
    windows = torch.cat([x, x[..., : x.shape[-1] // 2]], dim=-1).unfold(-1, x.shape[-1], 1)
    return _with_lower_terms((x[..., None, :] * windows).flatten(-2), x, coefficients, dim=-1)


def key_features(x: torch.Tensor, coefficients: tuple[float, float, float]) -> torch.Tensor:
    """x: (..., feature_dim) -> (..., state_size): as `query_features`, weighted so that the product is the kernel."""
    return _weigh(query_features(x, coefficients), x.shape[-1], coefficients)


def _weigh(features, feature_dim, coefficients):
    """Multiply features (..., state_size) in place by the weights that belong to the keys' side."""
    c0, c1, c2 = coefficients
    packed = packed_size(feature_dim)
    # A product with 0 < r < feature_dim / 2 stands for itself and its mirror image.
    features[..., feature_dim : feature_dim * ((feature_dim + 1) // 2)].mul_(2)
    for weight, rows in ((c2, slice(packed)), (c1, slice(packed, packed + feature_dim)), (c0, slice(-1, None))):
        if weight not in (0, 1):
            features[..., rows].mul_(weight)
    return features


def _with_lower_terms(products, x, coefficients, dim):
    rows = [products]
    if coefficients[1]:
        rows.append(x)
    if coefficients[0]:
        rows.append(torch.ones_like(x.narrow(dim, 0, 1)))
    return products if len(rows) == 1 else torch.cat(rows, dim=dim)


def _doubled(x):
    """x: (..., feature_dim, tokens) -> rows r … r + feature_dim of it are x, rolled by r = 0 … feature_dim // 2 rows."""
    return torch.cat([x, x[..., : x.shape[-2] // 2, :]], dim=-2)


def _features(x, coefficients):
    """x: (..., feature_dim, tokens) -> (..., state_size, tokens), unweighted: `query_features`, tokens last."""
    windows = _doubled(x).unfold(-2, x.shape[-2], 1).transpose(-1, -2)
    return _with_lower_terms((x.unsqueeze(-3) * windows).flatten(-3, -2), x, coefficients, dim=-2)


def _features_backward(grad, x, coefficients):
    """grad: (..., state_size, tokens), x: (..., feature_dim, tokens) -> gradient of x, like x."""
    feature_dim, doubled = x.shape[-2], _doubled(x)
    overhang = feature_dim // 2
    grad_x, grad_doubled = torch.zeros_like(x), torch.zeros_like(doubled)
    # Product (r, i) sends its gradient to row i, times row i + r, and to row i + r, times row i.
    for r in range(overhang + 1):
        products = grad[..., r * feature_dim : (r + 1) * feature_dim, :]
        grad_x.addcmul_(products, doubled[..., r : r + feature_dim, :])
        grad_doubled[..., r : r + feature_dim, :].addcmul_(products, x)
    grad_x += grad_doubled[..., :feature_dim, :]
    grad_x[..., :overhang, :] += grad_doubled[..., feature_dim:, :]
    if coefficients[1]:
        linear = packed_size(feature_dim)
        grad_x += grad[..., linear : linear + feature_dim, :]
    return grad_x


def _polynomial(scores, coefficients):
    c0, c1, c2 = coefficients
    if c0 == c1 == 0:
        return scores.square() if c2 == 1 else c2 * scores.square()
    return (c2 * scores + c1) * scores + c0


def _accumulation_dtype(q):
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _with_ones(v, attention_mask=None):
    """v: (batch, seq, num_heads, head_dim) -> (..., head_dim + 1): the last column, 0 for padding, sums to the denominator."""
    values = torch.nn.functional.pad(v.to(_accumulation_dtype(v)), (0, 1), value=1.0)
    if attention_mask is not None:
        values[..., -1] = attention_mask[:, :, None]
    return values


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
    return x.to(_accumulation_dtype(x)).transpose(1, 2).flatten(0, 1)


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
    weights = scores.square_() if coefficients == REBASED else _polynomial(scores, coefficients)
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
    return _features(keys.mT.contiguous(), coefficients), values


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
    dtype = _accumulation_dtype(q)
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
            features = _features(chunk.queries.mT.contiguous(), coefficients)
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
            grad_keys += _only(last, _features_backward(grad_features, chunk.keys.mT.contiguous(), coefficients).mT)
            grad_state = _only(segments and segments.carry, grad_state)
        if state is not None:
            first = segments and segments.first
            queries = _only(first, chunk.queries).mT.contiguous()
            grad_earlier = _only(first, torch.cat([grad_numerators, grad_totals], dim=-1))
            grad_features = torch.bmm(state, grad_earlier.mT)
            grad_queries += _only(first, _features_backward(grad_features, queries, coefficients).mT)
            added = torch.bmm(_features(queries, coefficients), grad_earlier)
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
    return _weigh(like.new_ones(state_size(feature_dim, coefficients)), feature_dim, coefficients)[:, None]


def _spoilt_segments(segment_ids, *tensors):
    """(batch, seq, num_heads, 1): True in segments where some element of the tensors is not finite; None if all are."""
    if segment_ids is None or all(x.sum(dtype=_accumulation_dtype(x)).isfinite() for x in tensors):
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
    dtype = _accumulation_dtype(q)
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
