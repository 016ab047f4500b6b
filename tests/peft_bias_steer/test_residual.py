"""The layers of a model are found, or it is named what was looked for."""

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn

from peft_bias_steer import BiasSteerConfig, extract_vectors, from_vectors, steering_vectors
from peft_bias_steer.analysis import residual_ratios
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


def test_layers_that_no_hook_can_see_are_refused():
    sizes = {"embedding_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.SqueezeBertConfig(vocab_size=64, intermediate_size=32, **sizes)
    with pytest.raises(ValueError, match="squeezebert cannot be steered: it has layers that it runs by their method"):
        get_peft_model(transformers.SqueezeBertModel(config), BiasSteerConfig())


def test_of_stacks_that_follow_one_another_the_largest_is_steered():
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.CanineConfig(**sizes, local_transformer_stride=16, num_hash_buckets=64)

    path, layers = find_layers(transformers.CanineModel(config))
    assert (path, len(layers)) == ("encoder.layer", 3)


def test_a_tower_of_another_width_gets_vectors_of_its_own():
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=8, patch_size=4),
        text_config=transformers.LlamaConfig(**{**vision, "hidden_size": 32}, vocab_size=64),
        image_token_index=63,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    towers = r".*vision_tower.*encoder\.layers\.\d+"
    steered = get_peft_model(model, BiasSteerConfig(target_modules=towers, init_weights=False))

    assert {layer.size for layer in steered.base_model.steering_layers.values()} == {16}
    ids = torch.tensor([[1, 63, 63, 63, 63, 2]])
    pixels = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        with_vectors = steered(input_ids=ids, pixel_values=pixels).logits
        with steered.disable_adapter():
            assert not torch.equal(steered(input_ids=ids, pixel_values=pixels).logits, with_vectors)
    own = get_peft_model(transformers.LlavaForConditionalGeneration(config), BiasSteerConfig())
    assert {layer.size for layer in own.base_model.steering_layers.values()} == {32}


def test_layers_under_a_name_of_their_own_are_read_and_steered_alike(tiny_language_model):
    """XLM's lists of layers have no name that is known."""
    config = transformers.XLMConfig(vocab_size=259, emb_dim=32, n_layers=2, n_heads=2, causal=True)
    base = transformers.XLMWithLMHeadModel(config).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_language_model)
    pairs = [{"positive": "happy", "negative": "sad"}, {"positive": "glad", "negative": "bad"}]

    vectors = extract_vectors(base, tokenizer, pairs, layers_pattern="ffns")
    model = from_vectors(vectors, base, layers_pattern="ffns")

    assert list(vectors) == [0, 1] == list(steering_vectors(model))
    assert all(torch.equal(vector, vectors[index]) for index, vector in steering_vectors(model).items())
    ratios = residual_ratios(model, tokenizer, ["a text"])
    assert list(ratios) == [0, 1] and all(ratio > 0 for ratio in ratios.values())


def test_an_adapter_is_loaded_where_the_layers_have_another_place(llama, tokens, tmp_path):
    model = get_peft_model(llama(), BiasSteerConfig(layers_to_transform=[0, 2], init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    expected = model.base_model.model.model(tokens)[0]
    mapped = PeftModel.from_pretrained(llama().model, tmp_path, key_mapping={r"^model\.": ""})
    native = llama().model
    native.load_adapter(str(tmp_path), adapter_name="x")

    assert torch.equal(mapped(tokens)[0], expected) and torch.equal(native(tokens)[0], expected)
    # Without a mapping PEFT finds no vector for its modules: never a model that is not steered.
    with pytest.raises(ValueError, match="no such module is steered in this model: load it into the base model"):
        PeftModel.from_pretrained(llama().model, tmp_path)
