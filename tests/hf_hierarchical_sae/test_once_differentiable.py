"""Second derivatives, of which the hand-written gradients have none."""

import pytest
import torch

from hf_hierarchical_sae import HierarchicalSaeConfig, HierarchicalSaeModel


@pytest.mark.parametrize("numba", [False, True])
@pytest.mark.parametrize("what", ["loss", "encode", "reconstruction"])
def test_a_gradient_of_gradients_is_refused_and_no_term_of_it_is_left_out(what, numba, monkeypatch):
    if not numba:
        monkeypatch.setattr("hf_hierarchical_sae.hierarchical_topk.suits_numba", lambda *tensors: False)
    sae = HierarchicalSaeModel(HierarchicalSaeConfig(d_in=16, d_sae=32, k=4)).eval()
    x = torch.randn(6, 16, requires_grad=True)

    for take in (torch.Tensor.backward, lambda penalty: torch.autograd.grad(penalty, sae.encoder_weight)):
        value = sae.encode(x)[1].sum() if what == "encode" else sae(x)[what].mean()
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        with pytest.raises(RuntimeError, match="hand-written gradients of HierarchicalSaeModel have no derivative"):
            take(gradient.square().sum())


def test_first_derivatives_that_could_be_differentiated_are_those_that_could_not():
    sae = HierarchicalSaeModel(HierarchicalSaeConfig(d_in=16, d_sae=32, k=4)).eval()
    x = torch.randn(6, 16, requires_grad=True)
    inputs = (x, *sae.parameters())
    plain, graphed = (torch.autograd.grad(sae(x).loss, inputs, create_graph=asked) for asked in (False, True))

    assert all(torch.equal(one, other) for one, other in zip(plain, graphed))
    assert all(gradient.requires_grad for gradient in graphed)
