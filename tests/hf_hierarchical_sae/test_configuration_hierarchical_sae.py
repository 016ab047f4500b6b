"""What a configuration accepts, and what it says about what it does not."""

import math

import numpy
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, LlamaConfig

from hf_hierarchical_sae import HierarchicalSaeConfig
from hf_hierarchical_sae.configuration_hierarchical_sae import integer, positive_number


def test_a_saved_configuration_is_found_by_its_type(tmp_path):
    config = HierarchicalSaeConfig(d_in=8, d_sae=32, k=4, budgets=[1, 4], model_name="a/b", layer=3)
    config.save_pretrained(tmp_path)

    loaded = AutoConfig.from_pretrained(tmp_path)

    assert isinstance(loaded, HierarchicalSaeConfig)
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert loaded.hidden_size == 8


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": 900}, r"k must be in \[1, d_sae=512\], got 900"),
        ({"k": 0}, r"k must be in \[1, d_sae=512\], got 0"),
        ({"d_in": 0}, "must be positive"),
        ({"budgets": [4, 2]}, r"budgets must be strictly increasing integers in \[1, 16\], got \[4, 2\]"),
        ({"budgets": [4, 17]}, r"in \[1, 16\], got \[4, 17\]"),
        ({"budgets": []}, "strictly increasing"),
        ({"budgets": "all"}, "budgets"),
        ({"budgets": [1, 16], "budget_weights": [1.0]}, r"one weight per budget \(2\), got 1"),
        ({"budgets": [1, 16], "budget_weights": [1.0, -1.0]}, "not negative"),
        ({"selection": "top_p"}, "selection must be 'topk', 'batch_topk', 'relu' or 'jumprelu', got 'top_p'"),
        ({"selection": "relu"}, r"'relu' keeps any number of latents: it takes k=d_sae and budgets=\[512\], got k=16"),
        (
            {"selection": "jumprelu", "k": 512},
            r"'jumprelu' keeps any number of latents: it takes k=d_sae and budgets=\[512\], got k=512 and budgets=None",
        ),
        ({"selection": "batch_topk"}, r"takes budgets=\[k\]"),
        ({"matryoshka_prefixes": [16, 256], "budgets": [16]}, r"end in d_sae=512, got \[16, 256\]"),
        ({"encoder_chunk_size": 0}, "encoder_chunk_size must be positive"),
        ({"budgets": [True, 16]}, "budgets"),
        ({"budgets": [1.0, 16.0]}, "budgets"),
        ({"k": True}, "k"),
        ({"budgets": [1, 16], "budget_weights": [1.0, math.nan]}, "finite, not negative and not all zero"),
        ({"budgets": [1, 16], "budget_weights": [1.0, math.inf]}, "finite, not negative and not all zero"),
        ({"aux_loss_coefficient": -1.0}, "aux_loss_coefficient must be finite and not negative"),
        ({"aux_loss_coefficient": True}, "aux_loss_coefficient"),
        ({"dead_after_tokens": 0}, "dead_after_tokens must be positive, got 0"),
        ({"dead_after_tokens": -5}, "dead_after_tokens must be positive, got -5"),
        ({"layer": -1}, "layer must be counted from 0, or None, got -1"),
        ({"aux_loss_coefficient": math.nan}, "aux_loss_coefficient must be finite and not negative"),
    ],
)
def test_values_that_do_not_fit_are_refused_in_one_sentence(change, message):
    with pytest.raises(StrictDataclassError, match=message):
        HierarchicalSaeConfig(**{"d_in": 8, "d_sae": 512, "k": 16, **change})


def test_whole_numbers_are_weights_as_a_json_of_other_tools_has_them(tmp_path):
    config = HierarchicalSaeConfig(
        d_in=8, d_sae=32, k=4, budgets=[1, 4], budget_weights=[1, 2], aux_loss_coefficient=1
    )
    config.save_pretrained(tmp_path)

    loaded = HierarchicalSaeConfig.from_pretrained(tmp_path)

    assert (loaded.budget_weights, loaded.aux_loss_coefficient) == ([1, 2], 1)


def test_budgets_are_asked_of_the_config():
    config = HierarchicalSaeConfig(d_in=4, d_sae=32, k=12, budgets=[3, 12])

    assert config.has_budgets and config.trained_budgets == (3, 12)
    assert config.default_budgets == config.check_budgets(None) == [1, 2, 4, 8, 12]
    assert config.check_k(None) == 12 and config.check_k(5) == 5
    assert config.check_budgets([7, 2, 7]) == [2, 7]
    for k in (0, 13):
        with pytest.raises(ValueError, match=rf"k must be in \[1, 12\], the trained budget, got {k}"):
            config.check_k(k)
        with pytest.raises(ValueError, match=rf"budgets must be in \[1, 12\], the trained budget, got \[{k}\]"):
            config.check_budgets([k])


@pytest.mark.parametrize("budgets", [torch.tensor([7, 2, 7]), numpy.array([2, 7]), [numpy.int64(7), 2], {2, 7}])
def test_budgets_of_any_integer_kind_are_the_same_budgets(budgets):
    assert HierarchicalSaeConfig(d_in=4, d_sae=32, k=12).check_budgets(budgets) == [2, 7]


@pytest.mark.parametrize("numbers", [[True], [2.5], [2.0], torch.tensor([True]), numpy.array([0.5]), ["2"], "2", 2])
def test_what_is_no_list_of_integers_is_no_budget(numbers):
    config = HierarchicalSaeConfig(d_in=4, d_sae=32, k=12)

    with pytest.raises(ValueError, match="budgets must be integers, got"):
        config.check_budgets(numbers)


@pytest.mark.parametrize("k", [True, 2.5, 2.0, "2", [2], math.nan])
def test_what_is_no_integer_is_no_k(k):
    with pytest.raises(ValueError, match=r"k must be an integer in \[1, 12\], got"):
        HierarchicalSaeConfig(d_in=4, d_sae=32, k=12).check_k(k)


@pytest.mark.parametrize("number", [3, numpy.int64(3), numpy.uint8(3), torch.tensor(3)])
def test_integers_of_numpy_are_integers(number):
    found = integer("layer", number, least=3)

    assert found == 3 and type(found) is int


@pytest.mark.parametrize("number", [True, numpy.True_, 3.0, numpy.float32(3), "3", None, torch.tensor(True)])
def test_booleans_and_fractions_are_no_integers(number):
    with pytest.raises(ValueError, match="layer must be an integer, got"):
        integer("layer", number)


def test_an_integer_below_the_least_is_refused():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        integer("steps", 0, least=1)


def test_the_config_of_a_language_model_is_refused(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)

    with pytest.raises(ValueError, match="model_type 'hierarchical_sae', got model_type 'llama'"):
        HierarchicalSaeConfig.from_pretrained(tmp_path)


def test_a_batch_topk_config_has_one_budget():
    config = HierarchicalSaeConfig(d_in=4, d_sae=32, k=12, budgets=[12], selection="batch_topk")

    assert not config.has_budgets and config.default_budgets == config.check_budgets(None) == [12]
    with pytest.raises(ValueError, match="selects by a threshold and has one budget, k=12, got 3"):
        config.check_k(3)
    with pytest.raises(ValueError, match=r"budgets must be in \[12, 12\], the trained budget, got \[3\]"):
        config.check_budgets([3])


@pytest.mark.parametrize("selection", ["relu", "jumprelu"])
def test_what_keeps_any_number_of_latents_has_no_budget(selection):
    config = HierarchicalSaeConfig(d_in=4, d_sae=32, k=32, budgets=[32], selection=selection)

    assert not config.has_budgets and not config.is_trainable
    assert config.check_k(None) == 32 and config.default_budgets == config.check_budgets(None) == [32]
    for budget in (3, 40):
        with pytest.raises(
            ValueError, match=f"a {selection} SAE keeps any number of latents: it has no budget, got {budget}"
        ):
            config.check_k(budget)
        with pytest.raises(
            ValueError, match=f"a {selection} SAE keeps any number of latents: it has no budget, got {budget}"
        ):
            config.check_budgets([32, budget])
    with pytest.raises(ValueError, match="budgets must be in"):
        config.check_budgets([])
    with pytest.raises(ValueError, match="k must be an integer"):
        config.check_k(True)


@pytest.mark.parametrize("number", [2, 2.5, math.inf, numpy.float32(2.5), torch.tensor(2.5)])
def test_a_positive_number_of_any_kind_is_that_number(number):
    assert positive_number("scale", number) == number and type(positive_number("scale", number)) is float


@pytest.mark.parametrize("number", [0, -1.0, math.nan, True, numpy.True_, "2", None, [2.0], torch.tensor([2.0])])
def test_what_is_no_positive_number_is_refused(number):
    with pytest.raises(ValueError, match="scale must be a positive number, got"):
        positive_number("scale", number)
