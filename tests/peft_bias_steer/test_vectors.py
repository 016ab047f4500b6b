"""Vectors come out of an adapter by layer, go back in, or are refused."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from peft_bias_steer import load_vectors, set_steering_vectors, steering_vectors
from peft_bias_steer.vectors import check_vectors
from tests.peft_bias_steer.tiny_models import make_base, steer


def test_vectors_come_out_by_layer_and_go_back_in():
    model = steer(make_base(), layers_to_transform=[0, 2])
    vectors = steering_vectors(model)

    assert list(vectors) == [0, 2]
    assert torch.equal(vectors[2], model.base_model.model.model.layers[2].bias_steer.vector("default"))
    doubled = {index: 2 * vector for index, vector in vectors.items()}
    set_steering_vectors(model, doubled)
    assert all(torch.equal(steering_vectors(model)[index], doubled[index]) for index in doubled)
    vectors[0].zero_()
    assert steering_vectors(model)[0].any(), "the dictionary holds copies"


@pytest.mark.parametrize(
    "vectors, message",
    [
        ({0: torch.ones(32), 1: torch.ones(32)}, r"among \[0, 2\], got some for \[1\]"),
        ({0: torch.ones(32), 2: torch.ones(31)}, r"shape \(32,\) for layer 2, got \(31,\)"),
        ({0: torch.ones(32), 2: torch.full((32,), torch.inf)}, "NaN or infinity in that of layer 2"),
    ],
)
def test_wrong_vectors_are_refused_and_change_nothing(vectors, message):
    model = steer(make_base(), layers_to_transform=[0, 2])
    before = steering_vectors(model)

    with pytest.raises(ValueError, match=message):
        set_steering_vectors(model, vectors)
    after = steering_vectors(model)
    assert all(torch.equal(before[index], after[index]) for index in before)


def test_vectors_of_a_merged_adapter_cannot_be_overwritten():
    model = steer(make_base())
    model.merge_adapter()

    with pytest.raises(ValueError, match="unmerge_adapter"):
        set_steering_vectors(model, {0: torch.ones(32)})


def test_vectors_of_a_missing_or_another_kind_of_adapter_are_refused():
    with pytest.raises(ValueError, match="'other'.*the model has"):
        steering_vectors(steer(make_base()), "other")
    with pytest.raises(ValueError, match="expected the name of a BiasSteer adapter"):
        steering_vectors(get_peft_model(make_base(), LoraConfig(target_modules="all-linear")))
    with pytest.raises(ValueError, match="mlp.down_proj is steered, which has no layer index"):
        steering_vectors(steer(make_base(), target_modules=["down_proj"]))


@pytest.mark.parametrize(
    "vectors, message",
    [
        ({True: torch.ones(32)}, "the index of a layer must be an integer, got True"),
        ({0.0: torch.ones(32)}, "the index of a layer must be an integer, got 0.0"),
        ({"0": torch.ones(32)}, "the index of a layer must be an integer, got '0'"),
        ({0: np.ones(32)}, "a tensor of real numbers for layer 0, got ndarray"),
        ({0: [1.0] * 32}, "a tensor of real numbers for layer 0, got list"),
        ({0: torch.ones(32, dtype=torch.complex64)}, "a tensor of real numbers for layer 0, got torch.complex64"),
        ({0: torch.ones(32, dtype=torch.bool)}, "a tensor of real numbers for layer 0, got torch.bool"),
    ],
)
def test_what_is_no_vector_of_a_layer_is_refused(vectors, message):
    with pytest.raises(TypeError, match=message):
        check_vectors(vectors, num_layers=3, width=32)
    with pytest.raises(TypeError, match=message):
        set_steering_vectors(steer(make_base()), vectors)
    check_vectors({np.int64(0): torch.ones(32)}, num_layers=3, width=32)


@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_vectors_of_a_saved_adapter_are_read_without_its_base(tmp_path, layers):
    model = steer(make_base(), layers_to_transform=layers, exclude_modules=["layers.1"])
    model.save_pretrained(tmp_path)
    vectors, loaded = steering_vectors(model), load_vectors(tmp_path)

    assert list(loaded) == list(vectors) == [0, 2]
    assert all(torch.equal(loaded[index], vectors[index]) for index in vectors)


def change(folder, edit):
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(edit(dict(sorted(weights.items()))), folder / "adapter_model.safetensors", {"format": "pt"})


def without(index):
    return lambda weights: {key: value for key, value in weights.items() if f".{index}." not in key}


@pytest.mark.parametrize(
    "edit, message",
    [
        (without(0), "the adapter's file holds no vector for model.layers.0: copy or save it again"),
        (without(1), "no vector for model.layers.1"),
        (without(2), "no vector for model.layers.2"),
        (lambda weights: {}, "the adapter's file holds no vector: copy or save it again"),
        (lambda weights: {**weights, next(iter(weights)): torch.ones(31)}, r"shape \(31,\) for layer 1, got \(32,\)"),
        (lambda weights: {**weights, next(iter(weights)): torch.full((32,), torch.nan)}, "NaN or infinity in that of"),
        (
            lambda weights: {**weights, next(iter(weights)).replace(".0.", ".3."): torch.ones(32)},
            "holds a vector for model.layers.3, which its config does not steer",
        ),
    ],
)
def test_a_file_that_lacks_a_vector_or_holds_another_is_not_read(tmp_path, edit, message):
    steer(make_base()).save_pretrained(tmp_path)
    change(tmp_path, edit)

    with pytest.raises(ValueError, match=message):
        load_vectors(tmp_path)


def test_the_last_vector_of_chosen_layers_and_of_a_sum_is_missed_too(tmp_path):
    model = steer(make_base(), layers_to_transform=[0, 2])
    model.add_weighted_adapter(["default"], [2.0], "twice")
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "twice"):
        assert list(load_vectors(folder)) == [0, 2]
        change(folder, without(2))
        with pytest.raises(ValueError, match="no vector for model.layers.2"):
            load_vectors(folder)


def test_a_trained_head_beside_the_vectors_is_skipped_on_request_only(tmp_path):
    model = steer(make_base(), modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)

    with pytest.raises(ValueError, match="expected vectors on layers only, got base_model.model.lm_head.weight"):
        load_vectors(tmp_path)
    assert list(load_vectors(tmp_path, skip_modules=True)) == [0, 1, 2]
