"""The strongest latents, sums of their rows and the sparse encoder's gradient: each against a dense computation."""

import pytest
import torch
import torch.nn.functional as F

from hf_hierarchical_sae import sparse_latents
from hf_hierarchical_sae.sparse_latents import (
    SparseEncoder,
    TangentGradient,
    encoder_gradient,
    pre_activations,
    strongest_latents,
    topk_of_rows,
    weighted_rows,
)


def make_encoder(tokens=7, d_sae=40, d_in=6, dtype=torch.float32):
    return torch.randn(tokens, d_in, dtype=dtype), torch.randn(d_sae, d_in, dtype=dtype), torch.randn(d_sae).to(dtype)


@pytest.mark.parametrize("width, k", [(640, 5), (640, 10), (641, 5), (64, 3), (16, 16), (1, 1)])
def test_topk_of_rows_is_topk(width, k):
    x = torch.stack([torch.randperm(width) for _ in range(9)]).float()

    values, indices = topk_of_rows(x, k)

    assert torch.equal(values, x.topk(k, dim=1).values)
    assert torch.equal(x.gather(1, indices), values)


@pytest.mark.parametrize("chunk_size", [1, 7, 40, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_give_the_strongest_of_all_latents(chunk_size, dtype):
    x, weight, bias = make_encoder(dtype=dtype)
    expected = F.linear(x, weight, bias).topk(5, dim=1)

    values, indices = strongest_latents(pre_activations(x, weight, bias, chunk_size), 5)
    some = strongest_latents(pre_activations(x, weight, bias, chunk_size), 5, torch.tensor([4, 1]))

    torch.testing.assert_close(values, expected.values)
    assert torch.equal(indices, expected.indices) and torch.equal(some[1], indices[[4, 1]])


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 700])
def test_products_of_either_library_are_float32_ones(onednn, tokens, monkeypatch):
    called = []
    operator = torch.ops.mkldnn._linear_pointwise

    def counted(*arguments):
        called.append(arguments)
        return operator(*arguments)

    monkeypatch.setattr(sparse_latents, "_mkl_lags_behind", lambda: onednn)
    monkeypatch.setattr(sparse_latents, "ONEDNN_BLOCK", 1000 * 512)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    x, weight, bias = make_encoder(tokens, d_sae=4321, d_in=577)
    exact = F.linear(x.double(), weight.double(), bias.double())
    size = F.linear(x.double().abs(), weight.double().abs(), bias.double().abs())

    ((_, found),) = pre_activations(x, weight, bias, len(weight))
    with torch.backends.mkldnn.flags(enabled=False):
        ((_, without),) = pre_activations(x, weight, bias, len(weight))

    # 512 inputs with 1000 latents at a time and 188 with 2723, or all at once.
    assert len(called) == onednn * (5 + 2 if tokens == 700 else 1)
    for each in (found, without):
        assert each.shape == exact.shape and each.dtype == torch.float32
        assert ((each.double() - exact).abs() <= 2e-6 * size).all()


def test_weighted_rows_are_a_sum_over_latents():
    weight, indices, values = torch.randn(40, 6), torch.randint(40, (7, 3)), torch.randn(7, 3)

    torch.testing.assert_close(
        weighted_rows(indices, values, weight), (values.unsqueeze(2) * weight[indices]).sum(dim=1)
    )


def test_the_sparse_encoder_has_the_gradients_of_the_dense_one():
    x, weight, bias = make_encoder(dtype=torch.float64)
    b_dec = torch.randn(6, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias, b_dec)]
    dense = F.linear(x - b_dec, weight, bias)
    values, indices = dense.topk(38, dim=1)
    weights = torch.randn(7, 38, dtype=torch.float64)

    sparse = SparseEncoder.apply(*inputs, values.detach(), indices)

    assert torch.equal(sparse, values.relu()) and (values < 0).any()
    for found, expected in zip(
        torch.autograd.grad((sparse * weights).sum(), inputs),
        torch.autograd.grad((values.relu() * weights).sum(), inputs),
    ):
        torch.testing.assert_close(found, expected)


def test_the_gradient_of_a_frozen_sparse_encoder_is_that_of_its_input_alone(monkeypatch):
    monkeypatch.setattr(sparse_latents, "encoder_gradient", lambda *arguments: pytest.fail("not wanted"))
    x, weight, bias = make_encoder(dtype=torch.float64)
    x.requires_grad_()
    values, indices = F.linear(x, weight, bias).topk(5, dim=1)

    sparse = SparseEncoder.apply(x, weight, bias, torch.zeros(6, dtype=torch.float64), values.detach(), indices)

    expected = torch.autograd.grad(values.relu().sum(), x)
    torch.testing.assert_close(torch.autograd.grad(sparse.sum(), x), expected)


@pytest.mark.parametrize("use_numba", [False, True])
def test_every_form_of_the_encoder_gradient_equals_float64(use_numba, monkeypatch):
    if use_numba:
        pytest.importorskip("numba")
    monkeypatch.setattr(sparse_latents, "suits_numba", lambda *tensors: use_numba)
    scaled, weight, _ = make_encoder()
    indices, grad, b_dec = torch.randint(40, (7, 3)), torch.randn(7, 3), torch.randn(6)
    expected, expected_bias = torch.zeros(40, 6, dtype=torch.float64), torch.zeros(40, dtype=torch.float64)
    for token in range(7):
        for latent, value in zip(indices[token], grad[token].double()):
            expected[latent] += value * (scaled[token].double() - b_dec.double())
            expected_bias[latent] += value

    grad_weight, grad_bias = encoder_gradient(indices, grad, scaled, b_dec, weight)

    # float32 sums of at most 21 terms
    torch.testing.assert_close(grad_weight.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad_bias.double(), expected_bias, atol=1e-5, rtol=1e-5)


def test_the_tangent_gradient_is_orthogonal_to_each_row_and_changes_nothing_else():
    weight = F.normalize(torch.randn(1500, 6, dtype=torch.float64), dim=1).requires_grad_()
    grad = torch.randn(1500, 6, dtype=torch.float64)

    passed = TangentGradient.apply(weight)
    (found,) = torch.autograd.grad(passed, weight, grad.clone())

    rows = weight.detach()
    assert torch.equal(passed, weight)
    torch.testing.assert_close(found, grad - (grad * rows).sum(dim=1, keepdim=True) * rows)
