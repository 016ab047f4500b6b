"""Explained variance: over all data, at every budget."""

import pytest
import torch

from hf_hierarchical_sae import HierarchicalSaeConfig, HierarchicalSaeModel, explained_variance


def make_sae():
    return HierarchicalSaeModel(HierarchicalSaeConfig(d_in=6, d_sae=24, k=5)).eval()


def test_it_is_one_minus_the_ratio_of_sums_over_all_tokens():
    sae, x = make_sae(), torch.randn(50, 6) + 3
    x[:5] *= 10
    expected = {}
    for budget in (1, 2, 4, 5):
        errors = (x - sae(x, k=budget).reconstruction.detach()).square().sum()
        expected[budget] = float(1 - errors / (x - x.mean(dim=0)).square().sum())

    assert explained_variance(sae, x) == pytest.approx(expected, abs=1e-6)


def test_batches_and_pieces_do_not_change_it():
    sae, x = make_sae(), torch.randn(50, 6) * torch.linspace(1, 9, 50).unsqueeze(1)
    whole = explained_variance(sae, x)

    assert explained_variance(sae, x, batch_size=7) == pytest.approx(whole, abs=1e-6)
    assert explained_variance(sae, iter([x[:13], x[13:]])) == pytest.approx(whole, abs=1e-6)


def test_a_large_common_offset_does_not_change_it():
    sae, x = make_sae(), torch.randn(200, 6)
    sae.initialize_from_activations(x)
    near = explained_variance(sae, x, [5])
    with torch.no_grad():
        sae.b_dec += 4096 * sae.input_scale

    # float32 keeps 2^-11 of an activation near 4096.
    assert explained_variance(sae, x + 4096, [5]) == pytest.approx(near, abs=5e-3)


def test_it_leaves_the_mode_and_the_counters_alone():
    sae = make_sae().train()

    explained_variance(sae, torch.randn(50, 6))

    assert sae.training and (sae.tokens_since_fired == 0).all()


def test_too_little_data_is_refused():
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        explained_variance(make_sae(), torch.randn(1, 6))
