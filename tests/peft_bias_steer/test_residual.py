"""The layers of a model are found, or it is named what was looked for."""

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn

from peft_bias_steer import BiasSteerConfig, extract_vectors
from peft_bias_steer.residual import find_layers


def test_model_without_recognisable_layers():
    base = nn.Sequential(nn.Linear(4, 4), nn.ModuleList([nn.Sequential(nn.Linear(4, 4))]))
    with pytest.raises(ValueError, match="cannot tell the layers of a Sequential: name the modules in target_modules"):
        get_peft_model(base, BiasSteerConfig())
    with pytest.raises(TypeError, match=r"1\.0 is a Sequential, expected a decoder layer, nn.Linear or Conv1D: leave"):
        get_peft_model(base, BiasSteerConfig(target_modules=["1.0"]))
    assert list(get_peft_model(base, BiasSteerConfig(target_modules=["1.0.0"])).base_model.steering_layers) == [
        "1.0.0"
    ]


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


def test_rows_that_cannot_be_told_from_tokens_are_refused():
    config = transformers.XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48)
    model = get_peft_model(transformers.XLNetLMHeadModel(config), BiasSteerConfig(init_weights=False)).eval()
    square = torch.arange(1, 10).view(3, 3)  # no shape tells
    names = ["default", "__base__", "default"]

    reason = (
        r"return \(batch, seq, hidden_size\) for {}, got xlnet, whose layers return \(seq, batch, hidden_size\): {}"
    )
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=reason.format("adapter_names", "give each adapter a batch of its own")):
            call(input_ids=square, adapter_names=names)
    refused = pytest.raises(ValueError, match=reason.format("steer_tokens", "steer all tokens"))
    with refused, model.steer_tokens("generated", prompt_lengths=[3, 0, 0]):
        pass
    with pytest.raises(ValueError, match=reason.format("extract_vectors", "train its vectors")):
        extract_vectors(model, lambda text: {"input_ids": [1, 2, 3]}, [{"positive": "a", "negative": "b"}])
    with model.steer_tokens("all"):
        assert model(input_ids=square).logits.shape == (3, 3, 64)


def test_an_encoder_of_such_layers_is_no_reason_to_refuse():
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    encoder = transformers.XLNetModel(
        transformers.XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48)
    )
    decoder = transformers.BertLMHeadModel(transformers.BertConfig(**sizes, is_decoder=True, add_cross_attention=True))
    base = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder)
    model = get_peft_model(base, BiasSteerConfig(init_weights=False)).eval()
    inputs = {"input_ids": torch.arange(1, 7).view(2, 3), "decoder_input_ids": torch.arange(1, 5).view(2, 2)}
    got = model(**inputs, adapter_names=["default", "__base__"]).logits

    torch.testing.assert_close(got[0], model(**inputs).logits[0])
    with model.disable_adapter():
        torch.testing.assert_close(got[1], model(**inputs).logits[1])
