"""The language model that is read: its layers, their outputs, edits of them, and whether an autoencoder fits."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_hierarchical_sae import HierarchicalSaeConfig, HierarchicalSaeModel
from hf_hierarchical_sae.language_model import (
    check_fits,
    decoder_layers,
    edited_output,
    evaluation_mode,
    layer_indices,
    layer_outputs,
)


IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture(scope="module")
def model(tiny_language_model):
    return AutoModelForCausalLM.from_pretrained(tiny_language_model).eval()


def make_sae(**options):
    return HierarchicalSaeModel(HierarchicalSaeConfig(**{"d_in": 32, "d_sae": 64, "k": 5, **options}))


def test_layers_are_counted_from_either_end(model):
    assert layer_indices(model, 1) == layer_indices(model, [-1]) == [1]
    assert layer_indices(model, [1, 0, 1]) == [1, 0, 1]
    with pytest.raises(ValueError, match=r"layer must be in \[0, 1\], got \[0, 2\]"):
        layer_indices(model, [0, 2])


def test_outputs_are_those_of_the_model_s_own_record_in_the_order_asked_for(model):
    with torch.no_grad():
        # the last entry comes after the final norm, so only the first layer's output is on record
        expected = model(IDS, output_hidden_states=True).hidden_states[1]
    hooks = [list(layer._forward_hooks) for layer in decoder_layers(model)]

    second, first, again = layer_outputs(model, [1, 0, 1], IDS, torch.ones_like(IDS))

    assert torch.equal(first, expected)
    assert torch.equal(second, again) and not torch.equal(second, first)
    assert [list(layer._forward_hooks) for layer in decoder_layers(model)] == hooks


def test_an_edited_output_is_what_later_layers_see_until_the_end(model):
    with torch.no_grad():
        clean = model(IDS).logits
        with edited_output(model, 0, lambda states: states * 0):
            edited = model(IDS).logits
        with edited_output(model, 0, lambda states: None):
            watched = model(IDS).logits

    assert not torch.equal(edited, clean)
    assert torch.equal(watched, clean) and torch.equal(model(IDS).logits, clean)


def test_evaluation_mode_is_left_as_it_was_found(model):
    sae = make_sae().train()
    with evaluation_mode(sae), evaluation_mode(model):
        assert not sae.training and not model.training

    assert sae.training and not model.training


def test_an_autoencoder_that_fits_is_given_its_layer(model):
    assert check_fits(make_sae(), model, -1) == 1


@pytest.mark.parametrize(
    "options, layer, message",
    [
        ({}, 2, r"layer must be in \[0, 1\], got 2"),
        ({"d_in": 6, "model_name": "other"}, 0, r"size 6 \(it was trained on other\), the .* has hidden_size 32"),
        ({"hook_point": "mlp"}, 0, "read and changed at layer outputs, the autoencoder was trained on 'mlp'"),
    ],
)
def test_an_autoencoder_that_does_not_fit_is_refused(model, options, layer, message):
    with pytest.raises(ValueError, match=message):
        check_fits(make_sae(**options), model, layer)
