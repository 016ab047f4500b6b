"""What users of PEFT expect of any tuner."""

import peft
import pytest
import torch
from packaging import version
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import check_if_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.integrations.peft import MIN_PEFT_VERSION

from peft_bias_steer import BiasSteerConfig, BiasSteerLayer


SMALL_BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@torch.no_grad()
def logits(model, tokens, **kwargs):
    return model.eval()(tokens, **kwargs).logits


@pytest.fixture
def two_adapters(llama, set_vectors):
    model = get_peft_model(llama(), BiasSteerConfig(), adapter_name="first")
    model.add_adapter("second", BiasSteerConfig(layers_to_transform=[0, 2]))
    set_vectors(model, "first")
    set_vectors(model, "second")
    return model.eval()


def of_each(model, function, names=("__base__", "first", "second")):
    results = []
    for name in names:
        if name == "__base__":
            with model.disable_adapter():
                results.append(function(model))
        else:
            model.set_adapter(name)
            results.append(function(model))
    return results


def test_every_row_of_a_batch_can_have_its_own_adapter(two_adapters, tokens):
    expected = of_each(two_adapters, lambda model: logits(model, tokens))
    mixed = logits(two_adapters, tokens, adapter_names=["__base__", "first", "second"])

    for row in range(3):
        torch.testing.assert_close(mixed[row], expected[row][row], rtol=1e-5, atol=1e-6)


def generate(model, inputs, **options):
    return model.generate(
        input_ids=inputs, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0, **options
    )


@pytest.mark.parametrize("num_beams", [1, 3])
def test_mixed_batches_generate_what_each_adapter_generates(two_adapters, tokens, num_beams):
    expected = of_each(two_adapters, lambda model: generate(model, tokens, num_beams=num_beams))
    names = ["__base__", "first", "second"]
    mixed = generate(two_adapters, tokens, num_beams=num_beams, adapter_names=names)

    assert not torch.equal(expected[0][1], expected[1][1])
    for row in range(3):
        assert torch.equal(mixed[row], expected[row][row])
    # no hook is left behind
    assert torch.equal(generate(two_adapters, tokens, num_beams=num_beams), expected[2])


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("as_config", [False, True])
@pytest.mark.parametrize(
    "repeats", [{"num_return_sequences": 3, "do_sample": True}, {"num_return_sequences": 2, "num_beams": 3}]
)
def test_mixed_batches_return_several_sequences_for_each_row(
    llama, tokens, set_vectors, repeats, as_config, task_type
):
    model = get_peft_model(llama(pad_token_id=0), BiasSteerConfig(task_type=task_type)).eval()
    set_vectors(model, std=2.0)
    options = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0, **repeats}
    if options.pop("do_sample", False):
        options |= {"do_sample": True, "top_k": 1}  # sampling from one token: the same for every sample
    if as_config:
        options = {"generation_config": GenerationConfig(**options)}
    expected = of_each(model, lambda model: model.generate(input_ids=tokens, **options), names=("__base__", "default"))
    mixed = model.generate(input_ids=tokens, adapter_names=["default", "__base__", "default"], **options)

    number = repeats["num_return_sequences"]
    assert mixed.shape == (3 * number, 13) and not torch.equal(expected[0], expected[1])
    for row, adapter in enumerate([1, 0, 1]):
        rows = slice(row * number, (row + 1) * number)
        assert torch.equal(mixed[rows], expected[adapter][rows])


def test_a_trained_head_follows_the_names_of_a_batch(tokens, set_vectors):
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**SMALL_BERT, num_labels=3))
    model = get_peft_model(base, BiasSteerConfig(task_type="SEQ_CLS"), adapter_name="first")
    model.add_adapter("second", BiasSteerConfig(task_type="SEQ_CLS"))
    for name in ("first", "second"):
        set_vectors(model, name)
        nn.init.normal_(model.base_model.model.classifier.modules_to_save[name].weight)
    expected = of_each(model, lambda model: logits(model, tokens))
    mixed = logits(model, tokens, adapter_names=["__base__", "first", "second"])

    for row in range(3):
        torch.testing.assert_close(mixed[row], expected[row][row])


def test_mixed_batches_with_beams_leave_the_encoder_unrepeated(tokens, set_vectors):
    torch.manual_seed(0)
    base = BartForConditionalGeneration(
        BartConfig(
            vocab_size=64,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            init_std=0.3,
            forced_eos_token_id=None,
        )
    ).eval()
    config = BiasSteerConfig(target_modules=r"model\.(encoder|decoder)\.layers\.\d+", task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(base, config, adapter_name="first")
    model.add_adapter("second", config)
    set_vectors(model, "first", std=2.0)
    set_vectors(model, "second", std=2.0)
    model.eval()
    expected = of_each(model, lambda model: generate(model, tokens, num_beams=2))
    mixed = generate(model, tokens, num_beams=2, adapter_names=["__base__", "first", "second"])

    for row in range(3):
        assert torch.equal(mixed[row], expected[row][row])


def test_weighted_adapter_is_the_weighted_sum(two_adapters, tokens):
    two_adapters.set_scale("second", 2.0)
    two_adapters.add_weighted_adapter(["first", "second"], [0.5, -1.0], "mix")
    two_adapters.set_adapter("mix")

    for layer in two_adapters.base_model.steering_layers.values():
        expected = 0.5 * layer.vector("first")
        if "second" in layer.bias_steer_vector:
            expected = expected - 2.0 * layer.vector("second")
        torch.testing.assert_close(layer.vector("mix"), expected)
    assert not torch.equal(logits(two_adapters, tokens), of_each(two_adapters, lambda m: logits(m, tokens))[1])


def test_an_adapter_that_is_named_twice_counts_twice(two_adapters):
    two_adapters.add_weighted_adapter(["first", "second", "first"], [0.5, 0.0, 0.25], "mix")

    for layer in two_adapters.base_model.steering_layers.values():
        torch.testing.assert_close(layer.vector("mix"), 0.75 * layer.vector("first"))


@pytest.mark.parametrize("names", [["head"], ["first", "head"]], ids=str)
def test_weighted_adapter_is_refused_where_a_module_was_trained_whole(two_adapters, names):
    two_adapters.add_adapter("head", BiasSteerConfig(modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="adapters of vectors alone, got head with modules_to_save"):
        two_adapters.add_weighted_adapter(names, [1.0] * len(names), "mix")

    assert "mix" not in two_adapters.peft_config
    two_adapters.delete_adapter("head")
    two_adapters.add_weighted_adapter(["first"], [1.0], "mix")


def test_weighted_adapter_is_saved_and_loaded_like_any_other(llama, two_adapters, tokens, tmp_path):
    two_adapters.add_weighted_adapter(["first", "second"], [0.5, 1.0], "mix")
    two_adapters.set_adapter("mix")
    two_adapters.save_pretrained(tmp_path, selected_adapters=["mix"])
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "mix")

    assert torch.equal(logits(loaded, tokens), logits(two_adapters, tokens))


def test_scale_goes_from_the_base_model_to_the_adapter(llama, two_adapters, tokens):
    two_adapters.set_adapter("first")
    full = logits(two_adapters, tokens)
    two_adapters.set_scale("first", 0.0)

    assert torch.equal(logits(two_adapters, tokens), logits(llama(), tokens))
    two_adapters.set_scale("first", 1.0)
    assert torch.equal(logits(two_adapters, tokens), full)


def test_modules_to_save_are_trained_and_saved(tokens, tmp_path):
    def build():
        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig(**SMALL_BERT, num_labels=3))

    model = get_peft_model(build(), BiasSteerConfig(task_type="SEQ_CLS", modules_to_save=["classifier"]))
    assert list(model.base_model.steering_layers) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(tokens, labels=torch.tensor([0, 1, 2])).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(build(), tmp_path)

    assert {key.split(".")[-2] for key in keys} == {"classifier", "bias_steer_vector"}
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), rtol=0, atol=0)
    assert not torch.equal(logits(loaded, tokens), logits(build(), tokens))


def test_encoder_without_a_decoder_is_steered(tokens, set_vectors, add_by_plain_hooks):
    torch.manual_seed(0)
    base, oracle = (BertModel(BertConfig(**SMALL_BERT)).eval() for _ in range(2))
    oracle.load_state_dict(base.state_dict())
    model = get_peft_model(base, BiasSteerConfig(task_type="FEATURE_EXTRACTION"))
    add_by_plain_hooks(oracle.encoder.layer, set_vectors(model))

    torch.testing.assert_close(model(tokens).last_hidden_state, oracle(tokens).last_hidden_state)


def test_decoder_of_a_sequence_to_sequence_model_is_steered(tokens, set_vectors, add_by_plain_hooks):
    config = T5Config(vocab_size=64, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0)
    base, oracle = (T5ForConditionalGeneration(config).eval() for _ in range(2))
    oracle.load_state_dict(base.state_dict())
    model = get_peft_model(base, BiasSteerConfig(task_type="SEQ_2_SEQ_LM"))
    add_by_plain_hooks(oracle.decoder.block, set_vectors(model))

    torch.testing.assert_close(logits(model, tokens, labels=tokens), logits(oracle, tokens, labels=tokens))
    torch.testing.assert_close(generate(model, tokens), generate(oracle, tokens))


def test_text_tower_of_a_vision_language_model_is_steered(set_vectors, add_by_plain_hooks):
    text = {**SMALL_BERT, "num_key_value_heads": 2, "head_dim": 8}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=63)
    base, oracle = (Gemma3ForConditionalGeneration(config).eval() for _ in range(2))
    oracle.load_state_dict(base.state_dict())
    model = get_peft_model(base, BiasSteerConfig())
    vectors = set_vectors(model)
    add_by_plain_hooks(oracle.model.language_model.layers, vectors)
    # text, an image of four tokens, text
    inputs = {"tokens": torch.tensor([[5, 63, 63, 63, 63, 9, 3]]), "pixel_values": torch.randn(1, 3, 28, 28)}

    assert [len(vector) for vector in vectors] == [32, 32]
    names = list(model.base_model.steering_layers)
    assert names == ["model.language_model.layers.0", "model.language_model.layers.1"]
    torch.testing.assert_close(logits(model, **inputs), logits(oracle, **inputs))


def test_adapter_can_be_injected_and_its_state_restored_without_peft_model(llama, tokens):
    model = inject_adapter_in_model(BiasSteerConfig(init_weights=False), llama())
    state = get_peft_model_state_dict(model)
    fresh = inject_adapter_in_model(BiasSteerConfig(), llama(), adapter_name="other")
    result = set_peft_model_state_dict(fresh, state, adapter_name="other")

    assert not result.unexpected_keys
    assert torch.equal(logits(fresh, tokens), logits(model, tokens))
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_adapter_can_be_injected_by_the_keys_of_a_state_dict(llama, tokens, low_cpu_mem_usage):
    trained = inject_adapter_in_model(BiasSteerConfig(init_weights=False, layers_to_transform=[0, 2]), llama())
    state = get_peft_model_state_dict(trained)
    model = inject_adapter_in_model(
        BiasSteerConfig(target_modules=["layers.0", "layers.2"]),
        llama(),
        state_dict=state,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    assert {p.device.type for p in model.parameters()} == ({"cpu", "meta"} if low_cpu_mem_usage else {"cpu"})
    set_peft_model_state_dict(model, state, low_cpu_mem_usage=low_cpu_mem_usage)

    assert torch.equal(logits(model, tokens), logits(trained, tokens))


@pytest.mark.skipif(
    version.parse(peft.__version__) < version.parse(MIN_PEFT_VERSION),
    reason="this transformers loads adapters with a newer PEFT only",
)
def test_transformers_loads_the_adapter_natively(llama, tokens, set_vectors, tmp_path):
    peft_model = get_peft_model(llama(), BiasSteerConfig())
    set_vectors(peft_model)
    peft_model.save_pretrained(tmp_path)
    assert check_if_peft_model(str(tmp_path))
    model = llama()
    model.load_adapter(str(tmp_path))

    assert torch.equal(logits(model, tokens), logits(peft_model, tokens))
    model.disable_adapters()
    assert torch.equal(logits(model, tokens), logits(llama(), tokens))
    model.enable_adapters()
    model.delete_adapter("default")
    assert torch.equal(logits(model, tokens), logits(llama(), tokens))


def test_transformers_keeps_the_vectors_of_a_half_precision_model_in_float32(llama, tokens, set_vectors, tmp_path):
    peft_model = get_peft_model(llama().to(torch.bfloat16), BiasSteerConfig())
    set_vectors(peft_model)
    peft_model.save_pretrained(tmp_path)
    model = llama().to(torch.bfloat16)
    model.load_adapter(str(tmp_path))

    assert torch.equal(logits(model, tokens), logits(peft_model, tokens))


def test_hotswapping_replaces_the_vectors_in_place_and_compiles_nothing_anew(llama, tokens, set_vectors):
    model = get_peft_model(llama(), BiasSteerConfig())
    set_vectors(model)
    expected = logits(model, tokens)
    state = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    served = get_peft_model(llama(), BiasSteerConfig())
    parameters = [layer.vector("default") for layer in served.base_model.steering_layers.values()]
    torch.compiler.reset()
    compiled = torch.compile(served, fullgraph=True, backend="eager")
    assert not torch.equal(logits(compiled, tokens), expected)
    set_peft_model_state_dict(served, state)

    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(logits(compiled, tokens), expected)
    after = [layer.vector("default") for layer in served.base_model.steering_layers.values()]
    assert all(new is old for new, old in zip(after, parameters))


@pytest.mark.parametrize("lora_first", [False, True])
def test_beside_lora_each_saves_only_its_own(llama, tokens, lora_first, tmp_path):
    base = llama()
    configs = [BiasSteerConfig(init_weights=False), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)]
    with pytest.warns(UserWarning, match="Already found a `peft_config` attribute"):
        for config, name in zip(configs[:: -1 if lora_first else 1], ["one", "two"]):
            inject_adapter_in_model(config, base, adapter_name=name)
    name = "two" if lora_first else "one"
    state = get_peft_model_state_dict(base, adapter_name=name)

    assert len(state) == 3 and all(key.endswith(".bias_steer.bias_steer_vector.weight") for key in state)
    restored = inject_adapter_in_model(BiasSteerConfig(), llama(), adapter_name=name)
    set_peft_model_state_dict(restored, state, adapter_name=name)
    steering = [m.vector(name) for m in base.modules() if isinstance(m, BiasSteerLayer)]
    again = [m.vector(name) for m in restored.modules() if isinstance(m, BiasSteerLayer)]
    assert all(torch.equal(one, other) for one, other in zip(steering, again))


def test_a_lora_of_the_same_name_inside_stays_out_of_the_checkpoint(llama, tmp_path):
    with_lora = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).base_model.model
    with pytest.warns(UserWarning, match="Already found"):
        model = get_peft_model(with_lora, BiasSteerConfig())
    model.save_pretrained(tmp_path)

    assert list(load_file(tmp_path / "adapter_model.safetensors")) == [
        f"base_model.model.model.layers.{i}.bias_steer.bias_steer_vector.weight" for i in range(3)
    ]


def test_vectors_and_lora_on_the_same_module_both_act(llama, tokens):
    model = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), llama(), "lora")
    alone = [layer.self_attn.q_proj(torch.ones(1, 32)) for layer in model.model.layers]
    with pytest.warns(UserWarning, match="Already found"):
        inject_adapter_in_model(BiasSteerConfig(target_modules=["q_proj"], init_weights=False), model, "steer")
    layers = [module for module in model.modules() if isinstance(module, BiasSteerLayer)]
    for layer in layers:
        layer.set_adapter("steer")

    assert len(layers) == 3
    for steering, decoder, expected in zip(layers, model.model.layers, alone):
        assert decoder.self_attn.q_proj.active_adapters == ["lora"]
        torch.testing.assert_close(decoder.self_attn.q_proj(torch.ones(1, 32)), expected + steering.vector("steer"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_get_float32_vectors(llama, tokens, set_vectors, add_by_plain_hooks, dtype):
    model = get_peft_model(llama().to(dtype), BiasSteerConfig())
    vectors = set_vectors(model)
    oracle = llama().to(dtype)
    add_by_plain_hooks(oracle.model.layers, vectors)

    assert all(vector.dtype == torch.float32 for vector in vectors)
    assert logits(model, tokens).dtype == dtype
    assert torch.equal(logits(model, tokens), logits(oracle, tokens))


def test_vectors_take_the_dtype_of_the_base_on_request(llama):
    model = get_peft_model(llama().to(torch.bfloat16), BiasSteerConfig(), autocast_adapter_dtype=False)

    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(two_adapters, tokens, backend):
    two_adapters.base_model.set_adapter(["first", "second"])
    expected = logits(two_adapters, tokens)
    torch.compiler.reset()
    compiled = torch.compile(two_adapters, fullgraph=True, backend=backend)
    with torch.no_grad():
        output = compiled(tokens).logits

    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["function", "method"])
def test_what_was_compiled_before_is_steered_every_time(llama, tokens, how):
    base = llama().requires_grad_(False)  # nothing but the hooks then tells a steered model from the base
    compiled = torch.compile(base, backend="eager")
    if how == "method":
        base.compile(backend="eager")
        compiled = base
    plain = logits(llama(), tokens)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(tokens).logits, plain)
            model = get_peft_model(base, BiasSteerConfig(init_weights=False)).eval()
            with torch.compiler.set_stance("force_eager"):
                expected = base(tokens).logits
            assert (expected - plain).abs().max() > 0.01
            torch.testing.assert_close(compiled(tokens).logits, expected)
            assert model.unload() is base


def test_the_result_of_compile_says_what_to_do_first(llama):
    with pytest.raises(ValueError, match="not compiled, got the result of torch.compile: steer first, then compile"):
        get_peft_model(torch.compile(llama()), BiasSteerConfig())


def test_another_tuner_in_the_model_is_disabled_with_it(llama, tokens, set_vectors):
    plain = logits(llama(), tokens)
    model = get_peft_model(llama(), BiasSteerConfig())
    set_vectors(model)
    lora = LoraConfig(init_lora_weights=False, target_modules=["q_proj"])
    inject_adapter_in_model(lora, model.base_model.model)
    both = logits(model, tokens)

    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), plain)
    assert torch.equal(logits(model, tokens), both)


def test_all_layers_agree_on_who_follows_a_deleted_adapter(llama, tokens):
    config = {"init_weights": False, "target_modules": ["down_proj"]}
    first, both, last = ([0], [0, 1], [1])
    model = get_peft_model(llama(), BiasSteerConfig(**config, layers_to_transform=first), adapter_name="a")
    for name, layers in (("b", both), ("c", last)):
        model.add_adapter(name, BiasSteerConfig(**config, layers_to_transform=layers))
    for deleted, follower in (("b", "a"), ("a", "c")):
        model.set_adapter(deleted)
        model.delete_adapter(deleted)
        found = logits(model, tokens)
        assert model.active_adapter == follower and model.base_model.active_adapters == [follower]
        model.set_adapter(follower)
        assert torch.equal(found, logits(model, tokens))
    model.delete_adapter("c")
    assert torch.equal(logits(model.base_model.model, tokens), logits(llama(), tokens))


def test_vectors_beside_another_tuner_are_saved_as_without_it(llama, tokens, tmp_path):
    def with_lora():
        torch.manual_seed(0)
        return inject_adapter_in_model(LoraConfig(init_lora_weights=False, target_modules=["down_proj"]), llama())

    config = BiasSteerConfig(init_weights=False, target_modules=["down_proj"])
    model = get_peft_model(with_lora(), config)
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(llama(), tmp_path)

    assert torch.equal(logits(PeftModel.from_pretrained(with_lora(), tmp_path), tokens), expected)
    assert not any("base_layer" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    for name, vector in get_peft_model_state_dict(plain).items():
        assert torch.equal(vector, get_peft_model_state_dict(model)[name])
    again = llama()
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits(again, tokens), logits(plain, tokens))


def test_gradient_checkpointing_gives_the_same_gradients(llama, tokens):
    gradients = []
    for use_reentrant in (None, False, True):
        model = get_peft_model(llama(), BiasSteerConfig(init_weights=False)).train()
        torch.manual_seed(3)
        for layer in model.base_model.steering_layers.values():
            nn.init.normal_(layer.vector("default"))
        if use_reentrant is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(tokens, labels=tokens).loss.backward()
        gradients.append([layer.vector("default").grad for layer in model.base_model.steering_layers.values()])

    for other in gradients[1:]:
        for gradient, expected in zip(other, gradients[0]):
            torch.testing.assert_close(gradient, expected)


def test_adapter_file_of_thirty_layers_is_at_most_eighty_kilobytes(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8, hidden_size=576, intermediate_size=8, num_hidden_layers=30, num_attention_heads=9
    )
    get_peft_model(LlamaForCausalLM(config), BiasSteerConfig()).save_pretrained(tmp_path)

    assert (tmp_path / "adapter_model.safetensors").stat().st_size <= 80_000
