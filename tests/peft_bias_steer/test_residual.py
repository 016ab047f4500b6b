"""The layers of a model are found, or it is named what was looked for."""

import pytest
from peft import get_peft_model
from torch import nn

from peft_bias_steer import BiasSteerConfig


def test_model_without_recognisable_layers():
    with pytest.raises(ValueError, match="cannot tell the layers of a Sequential: name the modules in target_modules"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), BiasSteerConfig())


def test_unknown_list_of_layers(llama):
    with pytest.raises(ValueError, match="no nn.ModuleList named towers in LlamaForCausalLM"):
        get_peft_model(llama(), BiasSteerConfig(layers_pattern="towers"))


def test_layers_are_found_by_the_name_of_their_list(llama):
    base = llama()
    base.model.towers = base.model.layers
    del base.model.layers
    model = get_peft_model(base, BiasSteerConfig(layers_pattern="towers", layers_to_transform=[1]))

    assert list(model.base_model.steering_layers) == ["model.towers.1"]
