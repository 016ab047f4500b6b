"""What a user gets wrong is answered with what was expected, what came and what to do, and harms nothing."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_bias_steer import BiasSteerConfig


@pytest.fixture
def saved(llama, set_vectors, tmp_path):
    model = get_peft_model(llama(), BiasSteerConfig())
    set_vectors(model)
    model.save_pretrained(tmp_path)
    return tmp_path


def assert_unharmed(base, llama, tokens):
    with torch.no_grad():
        assert torch.equal(base(tokens).logits, llama()(tokens).logits)


@pytest.mark.parametrize("index", [3, -4, [0, 7]])
def test_layer_index_out_of_range(llama, tokens, index):
    base = llama()
    with pytest.raises(ValueError, match=r"indices in \[-3, 2\], got \[(3|-4|7)\]"):
        get_peft_model(base, BiasSteerConfig(layers_to_transform=index))
    assert_unharmed(base, llama, tokens)


def test_no_layer_index(llama):
    with pytest.raises(ValueError, match=r"indices in \[-3, 2\], got \[\]"):
        get_peft_model(llama(), BiasSteerConfig(layers_to_transform=[]))


def test_target_modules_that_match_nothing(llama, tokens):
    base = llama()
    with pytest.raises(ValueError, match="Target modules .*no_such_module.* not found in the base model"):
        get_peft_model(base, BiasSteerConfig(target_modules=["no_such_module"]))
    assert_unharmed(base, llama, tokens)


def test_target_modules_of_an_unsupported_kind(llama):
    with pytest.raises(TypeError, match="embed_tokens is a Embedding, expected a decoder layer, nn.Linear or Conv1D"):
        get_peft_model(llama(), BiasSteerConfig(target_modules=["embed_tokens"]))


def test_a_bad_target_among_good_ones_leaves_nothing_behind(llama, set_vectors):
    base = llama()
    with pytest.raises(TypeError, match="norm is a LlamaRMSNorm"):
        get_peft_model(base, BiasSteerConfig(target_modules=["o_proj", "norm"]))
    assert {name for name, _ in base.named_modules()} == {name for name, _ in llama().named_modules()}

    model = get_peft_model(base, BiasSteerConfig(target_modules=["o_proj"]))
    with pytest.raises(TypeError, match="norm is a LlamaRMSNorm"):
        model.add_adapter("other", BiasSteerConfig(target_modules=["o_proj", "q_proj", "norm"]))
    assert len(model.base_model.steering_layers) == 3
    assert all(set(layer.bias_steer_vector) == {"default"} for layer in model.base_model.steering_layers.values())


def test_model_without_recognisable_layers():
    with pytest.raises(ValueError, match="cannot tell the layers of a Sequential: name the modules in target_modules"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), BiasSteerConfig())


def test_unknown_list_of_layers(llama):
    with pytest.raises(ValueError, match="no nn.ModuleList named towers in LlamaForCausalLM"):
        get_peft_model(llama(), BiasSteerConfig(layers_pattern="towers"))


def test_vectors_of_another_size(llama, saved, tokens):
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    ).eval()
    with torch.no_grad():
        expected = base(tokens).logits
    with pytest.raises(ValueError, match=r"expected a vector of shape \(16,\) for .*layers.0.*, got \(32,\): load it"):
        PeftModel.from_pretrained(base, saved)
    with torch.no_grad():
        assert torch.equal(base(tokens).logits, expected)


def test_one_vector_of_a_wrong_size_leaves_all_others_as_they_were(llama, saved, tokens):
    weights = load_file(saved / "adapter_model.safetensors")
    last = "base_model.model.model.layers.2.bias_steer.bias_steer_vector.weight"
    save_file({**weights, last: torch.zeros(31)}, saved / "adapter_model.safetensors")
    base = llama()
    with pytest.raises(ValueError, match=r"\(32,\) for .*layers.2.*, got \(31,\)"):
        PeftModel.from_pretrained(base, saved)
    assert_unharmed(base, llama, tokens)


def test_adapter_of_a_deeper_base(llama, saved, tokens):
    weights = load_file(saved / "adapter_model.safetensors")
    extra = "base_model.model.model.layers.3.bias_steer.bias_steer_vector.weight"
    save_file({**weights, extra: torch.zeros(32)}, saved / "adapter_model.safetensors")
    base = llama()
    with pytest.raises(ValueError, match="the checkpoint holds .*layers.3.*, but no such module is steered"):
        PeftModel.from_pretrained(base, saved)
    assert_unharmed(base, llama, tokens)


@pytest.mark.parametrize("content", [b"", b"not a safetensors file", None])
def test_damaged_adapter_file_is_refused_before_the_model_is_touched(llama, saved, content):
    file = saved / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10] if content is None else content)
    base = llama()
    with pytest.raises(ValueError, match=r"should be a complete safetensors file, got \d+ bytes that do not parse"):
        PeftModel.from_pretrained(base, saved)
    assert not hasattr(base, "peft_config") and not hasattr(base.model.layers[0], "bias_steer")


def test_unknown_adapter_names(llama, tokens):
    model = get_peft_model(llama(), BiasSteerConfig()).eval()

    with pytest.raises(ValueError, match=r"Adapter\(s\) \['other'\] do not exist, expected some of \['default'\]"):
        model.set_scale("other", 2.0)
    with pytest.raises(ValueError, match=r"\['other'\] do not exist"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    with pytest.raises(ValueError, match="non-existing adapter.*other"):
        model(tokens, adapter_names=["default", "other", "default"])


def test_adapter_names_that_do_not_fit_the_batch(llama, tokens):
    model = get_peft_model(llama(), BiasSteerConfig()).eval()

    with pytest.raises(ValueError, match="one adapter per row, got 2 for 3"):
        model(tokens, adapter_names=["default", "__base__"])
    with pytest.raises(ValueError, match="in training mode"):
        model.train()(tokens, adapter_names=["default"] * 3)


def test_weights_that_do_not_fit_the_adapters(llama):
    model = get_peft_model(llama(), BiasSteerConfig())

    with pytest.raises(ValueError, match="one weight per adapter, got 2 weights for 1 adapters"):
        model.add_weighted_adapter(["default"], [1.0, 2.0], "sum")
