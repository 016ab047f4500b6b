"""Vectors come out of an adapter by layer, go back in, or are refused."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_bias_steer import set_steering_vectors, steering_vectors
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
