import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_bias_steer import BiasSteerConfig
from peft_bias_steer.merging import merge_sites


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@torch.no_grad()
def logits(model, tokens, **kwargs):
    return model.eval()(tokens, **kwargs).logits


def assert_same_state(model, expected: dict):
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.fixture
def steered(llama, set_vectors):
    model = get_peft_model(llama(), BiasSteerConfig())
    set_vectors(model)
    return model


def test_merged_model_computes_the_same_without_hooks_at_work(steered, tokens):
    expected = logits(steered, tokens)
    steered.merge_adapter()

    torch.testing.assert_close(logits(steered, tokens), expected, rtol=1e-4, atol=1e-6)
    hidden = torch.randn(2, 3, 32)
    for layer in steered.base_model.steering_layers.values():
        assert layer.merged_adapters == ["default"] and layer(hidden) is hidden


def test_two_hundred_rounds_in_bfloat16_leave_the_base_weights_identical(llama, tokens, set_vectors):
    base = llama(mlp_bias=True).to(torch.bfloat16)
    for layer in base.model.layers:
        torch.nn.init.normal_(layer.mlp.down_proj.bias, std=0.02)
    model = get_peft_model(base, BiasSteerConfig())
    set_vectors(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    biases = [layer.mlp.down_proj.bias for layer in base.model.layers]
    for _ in range(200):
        model.merge_adapter()
        model.unmerge_adapter()

    assert_same_state(model, before)
    assert all(layer.mlp.down_proj.bias is bias for layer, bias in zip(base.model.layers, biases))


def test_a_bias_is_made_even_for_a_zero_vector(llama):
    model = get_peft_model(llama(), BiasSteerConfig())
    model.merge_adapter()

    for layer in model.get_base_model().model.layers:
        assert torch.equal(layer.mlp.down_proj.bias, torch.zeros(32))


def test_adapters_merge_one_after_the_other_and_unmerge_together(llama, tokens, set_vectors):
    model = get_peft_model(llama(), BiasSteerConfig())
    model.add_adapter("other", BiasSteerConfig())
    set_vectors(model, "default")
    set_vectors(model, "other")
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model, tokens)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        model.merge_adapter(["other"])

    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-6)
    model.unmerge_adapter()
    assert torch.equal(logits(model, tokens), expected)


def test_scale_at_the_time_of_merging_is_merged(steered, tokens):
    steered.set_scale("default", 0.5)
    expected = logits(steered, tokens)
    steered.merge_adapter()

    torch.testing.assert_close(logits(steered, tokens), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="'default' is merged: call unmerge_adapter"):
        steered.set_scale("default", 1.0)


def test_disabling_a_merged_adapter_gives_the_base_model(llama, steered, tokens):
    expected = logits(steered, tokens)
    steered.merge_adapter()
    with steered.disable_adapter():
        assert torch.equal(logits(steered, tokens), logits(llama(), tokens))

    assert torch.equal(logits(steered, tokens), expected)


def test_switching_adapters_takes_out_the_merged_one(llama, tokens, set_vectors):
    model = get_peft_model(llama(), BiasSteerConfig())
    model.add_adapter("other", BiasSteerConfig())
    set_vectors(model, "default")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging"):
        model.set_adapter("other")

    assert torch.equal(logits(model, tokens), logits(llama(), tokens))


def test_merge_and_unload_gives_a_model_without_adapter(llama, steered, tokens):
    expected = logits(steered, tokens)
    merged = steered.merge_and_unload()

    torch.testing.assert_close(logits(merged, tokens), expected, rtol=1e-4, atol=1e-6)
    assert not [name for name, _ in merged.named_modules() if "bias_steer" in name]
    assert not hasattr(merged, "peft_config")
    assert not any(layer._forward_hooks for layer in merged.model.layers)


def test_merged_model_survives_saving_and_loading(steered, tokens, tmp_path):
    from transformers import AutoModelForCausalLM

    merged = steered.merge_and_unload()
    merged.save_pretrained(tmp_path)

    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens), logits(merged, tokens))


def test_safe_merge_refuses_what_is_not_finite_and_changes_nothing(steered, tokens):
    broken = list(steered.base_model.steering_layers.values())[1]
    with torch.no_grad():
        broken.vector("default")[3] = float("nan")
    before = {name: tensor.clone() for name, tensor in steered.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"The adapter default seems to be broken: its vector at model.layers.1 is not finite"
    ):
        steered.merge_adapter(safe_merge=True)
    with pytest.raises(ValueError, match="Nothing was merged"):
        steered.merge_and_unload(safe_merge=True)
    with pytest.raises(ValueError, match="nothing was merged into this layer"):
        broken.merge(safe_merge=True)

    broken.vector("default").data.nan_to_num_()
    before["base_model.model.model.layers.1.bias_steer.bias_steer_vector.default.weight"].nan_to_num_()
    assert_same_state(steered, before)
    assert not any(layer.merged for layer in steered.base_model.steering_layers.values())


def test_safe_merge_refuses_a_bias_that_overflows_and_changes_nothing(tokens):
    base = GraniteForCausalLM(GraniteConfig(**SMALL, residual_multiplier=0.22)).half().eval()
    model = get_peft_model(base, BiasSteerConfig())
    first, second = model.base_model.steering_layers.values()
    with torch.no_grad():
        first.vector("default")[0], second.vector("default")[0] = 1.0, 2e4
    expected = logits(model, tokens)
    assert expected.isfinite().all()
    with pytest.raises(
        ValueError, match="model.layers.1 has no room for the vectors in its dtype. Nothing was merged"
    ):
        model.merge_adapter(safe_merge=True)

    assert not first.merged and torch.equal(logits(model, tokens), expected)


def test_architecture_without_a_place_for_the_bias_is_named(tokens, set_vectors):
    base = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8))
    model = get_peft_model(base, BiasSteerConfig())
    set_vectors(model)
    expected = logits(model, tokens)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            ValueError, match="Gemma2DecoderLayer has no known place for a bias.*keep the adapter unme"
        ):
            merge()

    assert torch.equal(logits(model, tokens), expected)


def test_a_layer_of_the_same_name_from_elsewhere_is_not_trusted(llama):
    layer = llama().model.layers[0]
    namesake = type("LlamaDecoderLayer", (type(layer),), {"__module__": "transformers_modules.mine"})
    assert merge_sites(layer)
    layer.__class__ = namesake

    with pytest.raises(ValueError, match="LlamaDecoderLayer has no known place"):
        merge_sites(layer)


def scaled_residual():
    return GraniteForCausalLM(GraniteConfig(**SMALL, residual_multiplier=0.25))


def layer_norm_last():
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=64,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            do_layer_norm_before=False,
        )
    )


def all_experts():
    return GptOssForCausalLM(GptOssConfig(**SMALL, head_dim=8, num_local_experts=4))


@pytest.mark.parametrize("build", [scaled_residual, layer_norm_last, all_experts])
def test_families_that_need_another_site_merge_exactly(build, tokens, set_vectors):
    torch.manual_seed(0)
    base = build()
    for parameter in base.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, BiasSteerConfig())
    set_vectors(model)
    expected = logits(model, tokens)
    model.merge_adapter()

    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert_same_state(model.unload(), before)


def test_sequence_to_sequence_decoder_merges_exactly(tokens, set_vectors):
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )
    model = get_peft_model(base, BiasSteerConfig(task_type="SEQ_2_SEQ_LM"))
    set_vectors(model)
    expected = logits(model, tokens, decoder_input_ids=tokens)

    assert all(name.startswith("decoder.block.") for name in model.base_model.steering_layers)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, tokens, decoder_input_ids=tokens), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrapper", ["ModulesToSaveWrapper", "Linear"])
def test_a_module_that_something_else_wraps_takes_no_bias(llama, tokens, set_vectors, wrapper):
    base = llama()
    if wrapper == "Linear":  # LoRA's
        base = get_peft_model(base, LoraConfig(target_modules=["down_proj"])).base_model.model
    saved = ["down_proj"] if wrapper == "ModulesToSaveWrapper" else None
    model = get_peft_model(base, BiasSteerConfig(modules_to_save=saved))
    set_vectors(model)
    expected = logits(model, tokens)

    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=f"no place in the {wrapper} that PEFT .* keep the adapter unmerged"):
            merge()
    assert torch.equal(logits(model, tokens), expected)


@pytest.mark.parametrize("target", ["down_proj", "q_proj"])
def test_steered_linear_modules_merge_into_their_own_bias(llama, tokens, set_vectors, target):
    model = get_peft_model(llama(), BiasSteerConfig(target_modules=[target]))
    set_vectors(model)
    expected = logits(model, tokens)
    model.merge_adapter()

    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-6)


def test_self_check_accepts_an_exact_merge_and_leaves_the_model_unmerged(steered, tokens):
    expected = logits(steered, tokens)

    assert steered.check_merge(tokens) < 1e-5
    assert torch.equal(logits(steered, tokens), expected)


def test_self_check_of_a_model_in_training_is_not_misled_by_dropout(llama, tokens, set_vectors):
    model = get_peft_model(llama(attention_dropout=0.5), BiasSteerConfig())
    set_vectors(model)
    model.train()
    model.get_base_model().model.layers[1].eval()

    assert model.check_merge(tokens) < 1e-5
    modes = {name: module.training for name, module in model.named_modules()}
    assert {name for name in modes if not modes[name]} == {name for name in modes if "model.layers.1" in name}


def test_self_check_refuses_an_inexact_merge(steered, tokens, monkeypatch):
    layer = steered.get_base_model().model.layers[0]
    layer.mlp.register_forward_hook(lambda module, args, output: 0.9 * output)
    with pytest.raises(ValueError, match="merging changes the output by .*, expected at most 1.0e-03"):
        steered.check_merge(tokens)

    assert not any(layer.merged for layer in steered.base_model.steering_layers.values())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, "6.2e-02"), (torch.float16, "7.8e-03")])
def test_self_check_allows_the_roundings_of_the_models_type(llama, tokens, set_vectors, dtype, tolerance):
    model = get_peft_model(llama().to(dtype), BiasSteerConfig())
    set_vectors(model)
    assert 0 < model.check_merge(tokens) < 8 * torch.finfo(dtype).eps

    model.get_base_model().model.layers[0].mlp.register_forward_hook(lambda module, args, output: 0.2 * output)
    with pytest.raises(ValueError, match=f"merging changes the output by .*, expected at most {tolerance}"):
        model.check_merge(tokens)
    with pytest.raises(ValueError, match="expected at most 1.0e-06"):
        model.check_merge(tokens, tolerance=1e-6)


def test_copies_of_a_merged_model_unmerge_on_their_own(llama, steered, tokens):
    expected = logits(steered, tokens)
    steered.merge_adapter()
    merged = logits(steered, tokens)
    clone = copy.deepcopy(steered)
    clone.unmerge_adapter()

    assert torch.equal(logits(clone, tokens), expected)
    assert torch.equal(logits(steered, tokens), merged)
    assert clone.get_base_model().model.layers[0].mlp.down_proj.bias is None


@pytest.mark.parametrize("calls", [[None], [["default"], ["inner"]], [["inner"], ["default"]]])
def test_a_layer_and_a_module_in_it_give_one_bias_back(tokens, calls):
    base = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    without = logits(base, tokens)
    model = get_peft_model(base, BiasSteerConfig(init_weights=False, task_type="CAUSAL_LM"))
    model.add_adapter(
        "inner", BiasSteerConfig(init_weights=False, task_type="CAUSAL_LM", target_modules=["down_proj"])
    )
    model.base_model.set_adapter(["default", "inner"])
    expected = logits(model, tokens)
    for names in calls:
        model.merge_adapter(names)
    torch.testing.assert_close(logits(model, tokens), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), without)
    for names in calls:
        model.merge_adapter(names)
    model.unmerge_adapter()
    assert base.model.layers[0].mlp.down_proj.bias is None and torch.equal(logits(model, tokens), expected)
    model.base_model.check_merge(tokens)
    assert torch.equal(logits(model, tokens), expected)


def test_taking_out_one_of_two_that_share_a_bias_leaves_the_other(tokens):
    base = LlamaForCausalLM(LlamaConfig(**SMALL, mlp_bias=True)).eval()
    model = get_peft_model(base, BiasSteerConfig(init_weights=False))
    model.add_adapter("inner", BiasSteerConfig(init_weights=False, target_modules=["down_proj"]))
    down_proj = base.model.layers[0].mlp.down_proj
    original = down_proj.bias
    down_proj.bias_steer.merge(adapter_names=["inner"])
    base.model.layers[0].bias_steer.merge(adapter_names=["default"])
    down_proj.bias_steer.unmerge()
    assert torch.equal(down_proj.bias, original + base.model.layers[0].bias_steer.vector("default"))
    base.model.layers[0].bias_steer.unmerge()
    assert down_proj.bias is original


def test_a_model_that_was_cast_while_merged_gets_its_biases_back_in_its_own_type(tokens, set_vectors):
    base = LlamaForCausalLM(LlamaConfig(**SMALL, mlp_bias=True)).eval()
    original = base.model.layers[0].mlp.down_proj.bias
    model = get_peft_model(base, BiasSteerConfig())
    set_vectors(model)
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    bias = base.model.layers[0].mlp.down_proj.bias
    assert torch.equal(bias, original.bfloat16()) and logits(model, tokens).isfinite().all()


@pytest.mark.parametrize("saved", [None, ["norm"]])
def test_nothing_is_merged_where_adapters_are_disabled(llama, tokens, set_vectors, saved):
    model = get_peft_model(llama(), BiasSteerConfig(modules_to_save=saved))
    set_vectors(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with model.disable_adapter(), pytest.raises(ValueError, match="merge outside of disable_adapter"):
            merge()
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), logits(llama(), tokens))


@pytest.mark.parametrize("saved", ["mlp", "self_attn", "norm"])
def test_a_container_that_is_trained_whole_is_merged_and_unloaded(tokens, set_vectors, saved):
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SMALL)), BiasSteerConfig(modules_to_save=[saved]))
    set_vectors(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    expected = logits(model, tokens)
    merged = model.merge_and_unload()

    torch.testing.assert_close(logits(merged, tokens), expected)
    assert not [name for name, _ in merged.named_modules() if "modules_to_save" in name or "bias_steer" in name]


@pytest.mark.parametrize("mlp_bias", [False, True])
def test_a_second_adapter_merges_into_a_model_that_was_cast_meanwhile(llama, tokens, set_vectors, mlp_bias):
    model = get_peft_model(llama(mlp_bias=mlp_bias), BiasSteerConfig()).eval()
    model.add_adapter("second", BiasSteerConfig())
    expected = llama(mlp_bias=mlp_bias).bfloat16().state_dict()
    for name in ("default", "second"):
        set_vectors(model, name)
    model.base_model.merge_adapter(["default"])
    model.bfloat16()
    model.base_model.merge_adapter(["second"])

    assert model(tokens).logits.dtype == torch.bfloat16
    bias = model.get_base_model().model.layers[0].mlp.down_proj.bias
    assert bias.dtype == torch.bfloat16
    layer = model.get_base_model().model.layers[0].bias_steer
    added = (layer.vector("default").float() + layer.vector("second").float()).detach()
    own = expected["model.layers.0.mlp.down_proj.bias"].float() if mlp_bias else 0.0
    torch.testing.assert_close(bias.float(), added + own, atol=0.03, rtol=0.02)
    model.unmerge_adapter()
    found = {name: tensor for name, tensor in model.get_base_model().state_dict().items() if "steer" not in name}
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
