"""Quantised bases, each where it runs on a CPU: steered and merged without touching the quantised weights."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from peft_bias_steer import BiasSteerConfig
from peft_bias_steer.serving.stock_checkpoint import zero_biased_weights
from peft_bias_steer.stock_forms import find_stock_form
from tests.peft_bias_steer.tiny_models import SMALL, make_base


def bitsandbytes_4bit():
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)


def bitsandbytes_8bit():
    return BitsAndBytesConfig(load_in_8bit=True)


def torchao_int8():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


@pytest.mark.pinned
@pytest.mark.parametrize("quantization", [bitsandbytes_4bit, bitsandbytes_8bit, torchao_int8])
def test_quantised_base_is_steered_and_merged(llama, tokens, tmp_path, set_vectors, add_by_plain_hooks, quantization):
    # on a CPU with bfloat16 instructions bitsandbytes packs 4-bit weights by blocks of 64 inputs
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)

    def load():
        config = quantization()
        return AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16).eval()

    model = get_peft_model(load(), BiasSteerConfig())
    vectors = set_vectors(model)
    oracle = load()
    add_by_plain_hooks(oracle.model.layers, vectors)
    with torch.no_grad():
        steered, expected = model(tokens).logits, oracle(tokens).logits
        model.merge_adapter()
        merged = model(tokens).logits
        model.unmerge_adapter()
        again = model(tokens).logits
        unloaded = model.merge_and_unload()(tokens).logits

    assert all(vector.dtype == torch.float32 for vector in vectors)
    assert torch.equal(steered, expected)
    # a merged vector is rounded to the bfloat16 that the quantised module computes in
    torch.testing.assert_close(merged, steered, rtol=0, atol=0.02 * steered.abs().max().item())
    assert torch.equal(again, steered) and torch.equal(unloaded, merged)


@pytest.mark.parametrize(
    ("target_modules", "dtype"), [(None, torch.bfloat16), (["mlp.down_proj"], torch.float32)], ids=str
)
def test_no_vector_or_bias_is_stored_in_one_byte(target_modules, dtype):
    def load():
        base = make_base("qwen2", **SMALL).to(torch.bfloat16)
        for module in base.model.layers.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(module.weight.to(torch.float8_e4m3fn), requires_grad=False)
        return base

    config = BiasSteerConfig(target_modules=target_modules, init_weights=False)
    model = get_peft_model(load(), config, autocast_adapter_dtype=False)
    model.merge_adapter()

    layers = model.base_model.steering_layers.values()
    assert {layer.vector("default").dtype for layer in layers} == {dtype}
    for layer, host in zip(layers, model.get_base_model().model.layers, strict=True):
        assert torch.equal(host.mlp.down_proj.bias, layer.vector("default").float())
        assert host.mlp.down_proj.bias.dtype == torch.float32
    stock = find_stock_form(load(), zero_biased_weights(load()))
    assert stock.weights["model.layers.0.self_attn.o_proj.bias"].dtype == torch.float32
