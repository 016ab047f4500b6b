"""
Causal linear attention with a quadratic kernel: ReBased (arXiv 2402.10644) and Based (arXiv 2402.18668).

Both kernels are a polynomial of degree 2 in q and in k, so both have a state of constant size. The
forms of the operation agree in value and gradient:

- `rebased_attention_reference`: quadratic in length, the specification;
- `rebased_attention_chunked` (in `rebased_attention_chunked.py`): linear in length, for training and prefill;
- `rebased_attention_step`: one token, for decoding; `rebased_attention_step_triton` (in `rebased_step_triton.py`) on a GPU;
- `rebased_attention_triton` (in `rebased_attention_triton.py`): the chunked form on a GPU.

They share one signature, `form(q, k, v, *, scale, eps, initial_state, return_state, attention_mask, segment_ids,
chunk_size, coefficients)`, and one layout of the state, which `rebased_features.py` describes.
"""

import contextlib
import importlib.util
import math
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .rebased_attention_chunked import rebased_attention_chunked
from .rebased_features import (
    REBASED,
    Coefficients,
    accumulation_dtype,
    autocast_device,
    coefficients_of,
    features,
    key_features,
    polynomial,
    query_features,
    squared_length,
    state_size,
    weigh,
    with_ones,
)


def _has_triton() -> bool:
    """Whether there is a Triton whose compiler can read the kernels: 3.6, or one of a name that is not known here."""
    if importlib.util.find_spec("triton") is None:
        return False
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-windows"):
        with contextlib.suppress(PackageNotFoundError):
            return [int(number) for number in re.findall(r"\d+", version(name))[:2]] >= [3, 6]
    return True


# Asked once, at import: torch.compile cannot trace the question.
_HAS_TRITON = _has_triton()


def is_triton_available() -> bool:
    return _HAS_TRITON


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

        out_i = Σ_{j≤i} w_ij v_j / (Σ_{j≤i} w_ij + eps),    w_ij = scale² ((q_i·k_j)² + 1e-4 |q_i|² |k_j|²)

    The second term is not the paper's. It keeps the output within the values, and its gradient exact, where a query is
    nearly orthogonal to all keys: float32 sums of products would leave rounding of either sign in the place of (q·k)².

    Each head of keys and values, and its state, serves num_heads / num_key_value_heads consecutive query heads.

    q: (batch, seq, num_heads, feature_dim)
    k: (batch, seq, num_key_value_heads, feature_dim)
    v: (batch, seq, num_key_value_heads, head_dim)
    initial_state: (batch, num_key_value_heads, state_size(feature_dim), head_dim + 1)
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
        ValueError: If shapes, dtypes, `segment_ids`, a number or `backend` are not as above.
        ImportError: If `backend="triton"` and triton, 3.6 or newer, is not installed.
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
        coefficients=coefficients_of("rebased"),
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
    exp(s) with s = scale q·k, in the place of w. Arguments, results and errors are the same; the state has `feature_dim + 1` more rows.
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
        coefficients=coefficients_of("taylor"),
    )


class RebasedAttention(torch.nn.Module):
    """
    `rebased_attention` or `taylor_attention` as a layer of the `kernels` library: without parameters, so that it can take the
    place of a model's own.
    """

    # What `kernels` asks of a layer.
    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        kernel: str,
        eps: float,
        initial_state: torch.Tensor | None,
        return_state: bool,
        attention_mask: torch.Tensor | None,
        segment_ids: torch.Tensor | None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        attention = rebased_attention if kernel == "rebased" else taylor_attention
        return attention(
            q,
            k,
            v,
            eps=eps,
            initial_state=initial_state,
            return_state=return_state,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
        )


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None,
    eps: float,
    initial_state: torch.Tensor | None,
    return_state: bool,
    attention_mask: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    chunk_size: int | None,
    backend: str,
    coefficients: Coefficients,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    _check_tensors(q, k, v, attention_mask=attention_mask, segment_ids=segment_ids)
    _check_state(initial_state, k, v, coefficients)
    _check_numbers(scale, eps, chunk_size)
    form = _choose_form(q, k, v, initial_state, return_state=return_state, backend=backend)
    if attention_mask is not None:
        attention_mask = attention_mask.bool()
        padding = ~attention_mask[:, :, None, None]
        # Selected, not multiplied: a NaN in the padding must not reach the sums.
        q, k, v = (x.masked_fill(padding, 0) for x in (q, k, v))
    with torch.autocast(autocast_device(q), enabled=False):
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


def _check_numbers(scale: float | None, eps: float, chunk_size: int | None) -> None:
    if chunk_size is not None and (not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1):
        raise ValueError(f"chunk_size must be a positive number of tokens, got {chunk_size!r}")
    # Without it a token of padding is 0 / 0, whose gradient reaches the others.
    if not (_is_finite(eps) and eps > 0):
        raise ValueError(f"eps must be a finite number above 0, got {eps!r}")
    if not (scale is None or _is_finite(scale)):
        raise ValueError(f"scale must be a finite number, got {scale!r}")


def _is_finite(number: Any) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and -math.inf < number < math.inf


def _check_tensors(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
) -> None:
    if not all(isinstance(x, torch.Tensor) for x in (q, k, v)):
        raise ValueError(f"q, k and v must be tensors, got {', '.join(type(x).__name__ for x in (q, k, v))}")
    if q.dim() != 4 or k.dim() != 4 or (*q.shape[:2], q.shape[3]) != (*k.shape[:2], k.shape[3]):
        raise ValueError(
            "q must have the shape (batch, seq, num_heads, feature_dim) and k, which may have fewer heads, "
            f"(batch, seq, num_key_value_heads, feature_dim), got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(f"the heads of q must be a multiple of those of k, got {q.shape[2]} and {k.shape[2]}")
    if v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v must have the shape (batch, seq, num_key_value_heads, head_dim) = ({', '.join(map(str, k.shape[:3]))}, "
            f"head_dim) to go with k, got {tuple(v.shape)}"
        )
    if not (q.is_floating_point() and q.dtype == k.dtype == v.dtype):
        raise ValueError(f"q, k and v must have one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}; cast them")
    if 0 in (*q.shape, v.shape[3]):
        raise ValueError(
            f"expected at least one sequence, token, head and number of each, got q and v of shapes {tuple(q.shape)} and "
            f"{tuple(v.shape)}"
        )
    for name, tensor in (("attention_mask", attention_mask), ("segment_ids", segment_ids)):
        if tensor is not None and (not isinstance(tensor, torch.Tensor) or tensor.shape != q.shape[:2]):
            raise ValueError(
                f"{name} must have the shape (batch, seq) = {tuple(q.shape[:2])}, got {_shape_of(tensor)}"
            )
    integers = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    if segment_ids is not None and segment_ids.dtype not in integers:
        raise ValueError(
            f"segment_ids must be integers, signed or uint8, got {segment_ids.dtype}; number the segments from left to right"
        )
    # Reading a value stops a traced graph, waits for a GPU and fails under vmap: the order is looked at where that is free.
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    readable = segment_ids is not None and segment_ids.device.type == "cpu" and not traced
    if readable and bool((segment_ids[:, 1:] < segment_ids[:, :-1]).any()):
        raise ValueError("segment_ids must never decrease along the sequence; number the segments from left to right")


def _shape_of(tensor: Any) -> str:
    return str(tuple(tensor.shape)) if isinstance(tensor, torch.Tensor) else type(tensor).__name__


def _check_state(
    initial_state: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor, coefficients: Coefficients
) -> None:
    if initial_state is None:
        return
    batch_size, _, num_heads, feature_dim = k.shape
    expected = (batch_size, num_heads, state_size(feature_dim, coefficients), v.shape[-1] + 1)
    if not isinstance(initial_state, torch.Tensor) or tuple(initial_state.shape) != expected:
        raise ValueError(
            f"initial_state must have the shape (batch, num_key_value_heads, state_size, head_dim + 1) = {expected}, got "
            f"{_shape_of(initial_state)}; it must come from the same kernel and the same sizes"
        )
    if initial_state.dtype != accumulation_dtype(k):
        raise ValueError(
            f"initial_state must be {accumulation_dtype(k)} as it was returned, got {initial_state.dtype}; "
            "a rounded state loses the early tokens"
        )


def _choose_form(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    initial_state: torch.Tensor | None,
    *,
    return_state: bool,
    backend: str,
) -> Callable:
    if not isinstance(return_state, bool):
        raise TypeError(f"return_state must be True or False, got {return_state!r}")
    if not isinstance(backend, str) or backend not in ("auto", "torch", "triton"):
        raise ValueError(f'backend must be "auto", "torch" or "triton", got {backend!r}')
    if backend == "triton" and not is_triton_available():
        raise ImportError('backend="triton" needs triton 3.6: `pip install "triton>=3.6"`, or choose backend="torch"')
    has_kernel = q.is_cuda and q.dtype != torch.float64 and is_triton_available()
    uses_kernel = backend == "triton" or (backend == "auto" and has_kernel)
    is_step = q.shape[1] == 1 and (return_state or initial_state is not None)
    inputs = [x for x in (q, k, v, initial_state) if x is not None]
    if uses_kernel and is_step and not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs)):
        from .rebased_step_triton import rebased_attention_step_triton

        return rebased_attention_step_triton
    if backend == "triton" or (uses_kernel and q.shape[1] > 1):
        from .rebased_attention_triton import rebased_attention_triton

        return rebased_attention_triton
    return rebased_attention_step if is_step else rebased_attention_chunked


# The forms. Their caller has checked the inputs, resolved `scale`, and set q, k and v to zero where `attention_mask` (bool)
# is False; what is left to them is the last column of [v, 1]. Their caller also sets the output of padding to zero.


def rebased_attention_reference(
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
    """The formula of `rebased_attention`, with all seq × seq scores: the specification of the other forms."""
    dtype = accumulation_dtype(q)
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    queries, keys, values = q.to(dtype) * scale, k.to(dtype), with_ones(v)
    if attention_mask is None:
        attention_mask = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
    if segment_ids is None:
        segment_ids = torch.zeros(q.shape[:2], dtype=torch.long, device=q.device)
    position = torch.arange(q.shape[1], device=q.device)
    same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]
    visible = (position[:, None] >= position) & same_segment & attention_mask[:, None, :]

    scores = torch.einsum("bihf,bjhf->bhij", queries, keys)
    lengths = torch.einsum("bihx,bjhx->bhij", squared_length(queries), squared_length(keys))
    kernel = polynomial(scores, coefficients) + coefficients[2] * coefficients[3] * lengths
    weights = torch.where(visible[:, None], kernel, 0)
    sums = torch.einsum("bhij,bjhd->bihd", weights, values)
    if initial_state is not None:
        states = initial_state.repeat_interleave(groups, dim=1)
        earlier = torch.einsum("bihp,bhpd->bihd", query_features(queries, coefficients), states)
        sums = sums + (segment_ids == segment_ids[:, :1])[:, :, None, None] * earlier
    out = (sums[..., :-1] / (sums[..., -1:] + eps)).to(v.dtype) * attention_mask[:, :, None, None]
    if not return_state:
        return out

    in_last = segment_ids == segment_ids[:, -1:]
    kept = (in_last & attention_mask).to(dtype)
    keys, values = keys[:, :, ::groups], values[:, :, ::groups]
    state = torch.einsum("bj,bjhp,bjhd->bhpd", kept, key_features(keys, coefficients), values)
    if initial_state is not None:
        state = state + in_last[:, :1, None, None] * initial_state
    return out, state


def rebased_attention_step(
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
    """`rebased_attention` of a single token: the recurrent form, whose cost does not depend on what came before."""
    dtype, groups = accumulation_dtype(q), q.shape[2] // k.shape[2]
    # Of each key-value head, its queries and then its key.
    queries = q.to(dtype).reshape(-1, groups, q.shape[-1]) * scale
    keys = k.to(dtype).reshape(-1, 1, k.shape[-1])
    values = with_ones(v, attention_mask).view(-1, 1, v.shape[-1] + 1)
    rows = features(torch.cat([queries, keys], dim=1), coefficients)
    # The token's own term comes from its score: through the features, a score near zero would lose its digits.
    own = polynomial((queries * keys).sum(-1, keepdim=True), coefficients)
    _, _, c2, floor = coefficients
    if floor:
        squares = rows[..., : q.shape[-1]]
        lengths = squares.sum(-1, keepdim=True)
        own = torch.addcmul(own, lengths[:, :-1], lengths[:, -1:], value=c2 * floor)
        squares[:, :-1].add_(lengths[:, :-1], alpha=floor)
    weigh(rows[:, -1], q.shape[-1], coefficients)
    sums = own * values
    state = None if initial_state is None else initial_state.flatten(0, 1)
    if state is not None:
        sums = torch.baddbmm(sums, rows[:, :-1], state)
    out = (sums[..., :-1] / (sums[..., -1:] + eps)).to(v.dtype).view(*q.shape[:3], v.shape[-1])
    if not return_state:
        return out
    added = rows[:, -1, :, None]
    state = added * values if state is None else torch.addcmul(state, added, values)
    return out, state.unflatten(0, (k.shape[0], k.shape[2]))
