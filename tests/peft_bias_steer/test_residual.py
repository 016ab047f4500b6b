"""The layers of a model are found, or it is named what was looked for."""

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn

from peft_bias_steer import BiasSteerConfig
from peft_bias_steer.residual import find_layers


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


@pytest.mark.parametrize(
    ("model_class", "layers"),
    [
        # whose get_decoder() returns an encoder with a decoder
        ("Florence2ForConditionalGeneration", "model.language_model.decoder.layers"),
        # whose text tower is deeper inside than others
        pytest.param(
            "Qwen2_5OmniForConditionalGeneration", "thinker.model.language_model.layers", marks=pytest.mark.pinned
        ),
        # whose decoder begins with a stack of linear modules
        ("SpeechT5ForTextToSpeech", "speecht5.decoder.wrapped_decoder.layers"),
        ("CsmForConditionalGeneration", "backbone_model.layers"),
        ("BartForConditionalGeneration", "model.decoder.layers"),
        ("BertModel", "encoder.layer"),
    ],
)
def test_layers_are_those_of_the_text_decoder(model_class, layers):
    with torch.device("meta"):
        base = getattr(transformers, model_class)(getattr(transformers, model_class).config_class())

    assert find_layers(base)[0] == layers
    assert next(iter(get_peft_model(base, BiasSteerConfig()).base_model.steering_layers)) == f"{layers}.0"


def test_several_residual_streams_are_refused_by_whatever_name(llama):
    with torch.device("meta"):
        base = transformers.Glm5NextForConditionalGeneration(transformers.Glm5NextConfig())
    with pytest.raises(ValueError, match="glm5_next_text cannot be steered: it has several residual streams"):
        get_peft_model(base, BiasSteerConfig())

    base = llama()
    base.config.hc_mult = 4
    with pytest.raises(ValueError, match=r"its config counts 4 residual streams \(hc_mult\)"):
        get_peft_model(base, BiasSteerConfig())
