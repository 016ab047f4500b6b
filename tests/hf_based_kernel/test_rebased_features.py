"""The features whose scalar product is the kernel, and their gradients."""

import pytest
import torch

from hf_based_kernel.rebased_features import (
    REBASED,
    TAYLOR,
    features,
    key_features,
    packed_size,
    query_features,
    state_size,
    unweighted_features,
    unweighted_features_backward,
)


# Sums of a few hundred float64 terms of order one, formed in another order.
TIGHT = {"rtol": 1e-9, "atol": 1e-10}


@pytest.mark.parametrize("coefficients", [REBASED, TAYLOR], ids=["rebased", "taylor"])
@pytest.mark.parametrize("feature_dim", [1, 2, 3, 4, 7, 16])
def test_product_of_features_is_the_kernel(feature_dim, coefficients):
    x, y = torch.randn(2, 5, feature_dim, dtype=torch.float64)
    s = (x * y).sum(-1)
    c0, c1, c2, floor = coefficients
    product = (query_features(x, coefficients) * key_features(y, coefficients)).sum(-1)
    least = c2 * floor * (x * x).sum(-1) * (y * y).sum(-1)
    torch.testing.assert_close(product, c0 + c1 * s + c2 * s**2 + least, **TIGHT)
    assert query_features(x, coefficients).shape == (5, state_size(feature_dim, coefficients))


def test_packing_needs_144_numbers_for_16_features():
    assert packed_size(16) == 144
    assert state_size(16, TAYLOR) == 144 + 16 + 1


@pytest.mark.parametrize("coefficients", [REBASED, TAYLOR], ids=["rebased", "taylor"])
@pytest.mark.parametrize("feature_dim", [1, 2, 5, 8])
def test_features_with_tokens_last_are_the_same_with_their_gradient(feature_dim, coefficients):
    x = torch.randn(3, feature_dim, 7, dtype=torch.float64, requires_grad=True)
    rows, columns = features(x.mT, coefficients), unweighted_features(x.detach(), coefficients)
    torch.testing.assert_close(columns.mT, rows, rtol=0, atol=0)
    grad = torch.randn_like(columns)
    (expected,) = torch.autograd.grad(rows.mT, x, grad)
    torch.testing.assert_close(unweighted_features_backward(grad, x.detach(), coefficients), expected, **TIGHT)
