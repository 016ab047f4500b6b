"""
The kernels of ReBased and Based as polynomials of the score, the features behind them, and the layout of their state.

With q scaled and s = q·k, both are c0 + c1 s + c2 (s² + floor |q|² |k|²) = query_features(q) · key_features(k). A state is
(batch, num_heads, state_size, head_dim + 1), contiguous, in float32. Column d < head_dim of row p holds the sum over past
tokens of key_features(k)_p v_d, the last column that of key_features(k)_p. Row r feature_dim + i, r = 0 … feature_dim // 2, is
the product k_i k_((i + r) mod feature_dim), with the weight c2, doubled where 0 < r < feature_dim / 2; then, for a kernel that
has these terms, feature_dim rows c1 k_i and one row c0. Weights are on the key's side only, `scale` and the floor on the
query's: |k|² is the sum of the rows with r = 0, so the floor adds floor |q|² to these features of the query.

The floor is there because s² comes out of a state as a sum of products of order |q|² |k|² that cancel: of queries nearly
orthogonal to all keys, float32 would leave rounding, of either sign, where the denominator should be.
"""

import torch


# (c0, c1, c2, floor) of the kernel c0 + c1 s + c2 (s² + floor |q|² |k|²).
Coefficients = tuple[float, float, float, float]


def coefficients_of(kernel: str) -> Coefficients:
    """Of `"rebased"`, or `"taylor"`, whose least weight is 1/2: written where they are used, as `torch.compile(dynamic=True)`
    takes the floats of a constant outside for inputs, and fails at the second layer."""
    return (0.0, 0.0, 1.0, 1e-4) if kernel == "rebased" else (1.0, 1.0, 0.5, 0.0)


REBASED, TAYLOR = coefficients_of("rebased"), coefficients_of("taylor")


def packed_size(feature_dim: int) -> int:
    """Number of products x_i x_((i + r) mod feature_dim), r = 0 … feature_dim // 2."""
    return feature_dim * (feature_dim // 2 + 1)


def state_size(feature_dim: int, coefficients: Coefficients = REBASED) -> int:
    """Rows of a head's state: the packed products, then `feature_dim` and 1 more if the kernel has such terms."""
    # Integers: before torch 2.11 a size that is traced cannot be multiplied by a truth value.
    return packed_size(feature_dim) + feature_dim * int(coefficients[1] != 0) + int(coefficients[0] != 0)


def features(x: torch.Tensor, coefficients: Coefficients) -> torch.Tensor:
    """x: (..., feature_dim) -> (..., state_size): every product once, then x and 1 if the kernel has such terms."""
    windows = torch.cat([x, x[..., : x.shape[-1] // 2]], dim=-1).unfold(-1, x.shape[-1], 1)
    rows = [(x[..., None, :] * windows).flatten(-2)]
    if coefficients[1]:
        rows.append(x)
    if coefficients[0]:
        rows.append(torch.ones_like(x[..., :1]))
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)


def query_features(x: torch.Tensor, coefficients: Coefficients) -> torch.Tensor:
    """x: (..., feature_dim) -> (..., state_size): `features` with the kernel's floor."""
    return add_floor(features(x, coefficients), x.shape[-1], coefficients, dim=-1)


def key_features(x: torch.Tensor, coefficients: Coefficients) -> torch.Tensor:
    """x: (..., feature_dim) -> (..., state_size): `features`, weighted so that the product with a query's is the kernel."""
    return weigh(features(x, coefficients), x.shape[-1], coefficients)


def add_floor(features: torch.Tensor, feature_dim: int, coefficients: Coefficients, dim: int) -> torch.Tensor:
    """Add floor |x|² in place to the squares among a query's features; a symmetric map, so of their gradient as well."""
    if coefficients[3]:
        squares = features.narrow(dim, 0, feature_dim)
        squares.add_(squares.sum(dim, keepdim=True), alpha=coefficients[3])
    return features


def squared_length(x: torch.Tensor) -> torch.Tensor:
    """x: (..., feature_dim) -> (..., 1): |x|². The kernel's floor is c2 floor |q|² |k|²."""
    return x.square().sum(-1, keepdim=True)


def weigh(features: torch.Tensor, feature_dim: int, coefficients: Coefficients) -> torch.Tensor:
    """Multiply features (..., state_size) in place by the weights that belong to the keys' side."""
    c0, c1, c2, _ = coefficients
    packed = packed_size(feature_dim)
    # A product with 0 < r < feature_dim / 2 stands for itself and its mirror image.
    features[..., feature_dim : feature_dim * ((feature_dim + 1) // 2)].mul_(2)
    for weight, rows in ((c2, slice(packed)), (c1, slice(packed, packed + feature_dim)), (c0, slice(-1, None))):
        if weight not in (0, 1):
            features[..., rows].mul_(weight)
    return features


def _doubled(x: torch.Tensor) -> torch.Tensor:
    """x: (..., feature_dim, tokens) -> rows r … r + feature_dim of it are x, rolled by r = 0 … feature_dim // 2 rows."""
    return torch.cat([x, x[..., : x.shape[-2] // 2, :]], dim=-2)


def unweighted_features(x: torch.Tensor, coefficients: Coefficients) -> torch.Tensor:
    """x: (..., feature_dim, tokens) -> (..., state_size, tokens), unweighted: `features`, tokens last."""
    feature_dim, tokens = x.shape[-2:]
    windows = _doubled(x).unfold(-2, feature_dim, 1).transpose(-1, -2)
    rows = x.new_empty((*x.shape[:-2], state_size(feature_dim, coefficients), tokens))
    packed = packed_size(feature_dim)
    # Left to itself, the product takes the order of the windows' strides, and is slow and copied once more.
    torch.mul(x.unsqueeze(-3), windows, out=rows[..., :packed, :].unflatten(-2, (-1, feature_dim)))
    if coefficients[1]:
        rows[..., packed : packed + feature_dim, :] = x
    if coefficients[0]:
        rows[..., -1, :] = 1
    return rows


def unweighted_features_backward(grad: torch.Tensor, x: torch.Tensor, coefficients: Coefficients) -> torch.Tensor:
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


def polynomial(scores: torch.Tensor, coefficients: Coefficients) -> torch.Tensor:
    """The kernel of the scores without its floor."""
    c0, c1, c2, _ = coefficients
    if c0 == c1 == 0:
        return scores.square() if c2 == 1 else c2 * scores.square()
    return (c2 * scores + c1) * scores + c0


def accumulation_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def autocast_device(x: torch.Tensor) -> str:
    """Where torch.autocast has to be switched off for operations on x. Of meta tensors it knows nothing."""
    return "cpu" if x.is_meta else x.device.type


def with_ones(v: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """v: (batch, seq, num_heads, head_dim) -> (..., head_dim + 1): the last column, 0 for padding, sums to the denominator."""
    values = torch.nn.functional.pad(v.to(accumulation_dtype(v)), (0, 1), value=1.0)
    if attention_mask is not None:
        values[..., -1] = attention_mask[:, :, None]
    return values
