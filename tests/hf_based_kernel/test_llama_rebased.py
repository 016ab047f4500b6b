"""A Llama, Mistral, Qwen2 or Qwen3 as a ReBased model: the same numbers, whatever is asked of it."""

import copy
import re

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

from hf_based_kernel import RebasedCache, RebasedForCausalLM
from hf_based_kernel.llama_rebased import recorded_attention


SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "factor": 2.0,
    "original_max_position_embeddings": 12,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama, all biases, tied": (
        LlamaForCausalLM,
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama, one head of keys": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 1}),
    "llama, wide heads": (LlamaForCausalLM, LlamaConfig, {"head_dim": 16, "num_key_value_heads": 4}),
    "linear scaling": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
    "dynamic scaling": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    "yarn scaling": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}),
    "llama3 scaling": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3}),
    "longrope scaling": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LONGROPE}),
    "another base": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "mistral, short window": (MistralForCausalLM, MistralConfig, {"sliding_window": 5}),
    "mistral, long window": (MistralForCausalLM, MistralConfig, {"sliding_window": 200}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2, window in some layers": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "qwen3, bias, tied": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
    ),
}
FEW = ["llama", "dynamic scaling", "mistral, short window", "qwen2, window in some layers", "qwen3"]
families = pytest.mark.parametrize("family", FAMILIES)
few_families = pytest.mark.parametrize("family", FEW)
# Float32, the same operations in the same order.
EQUAL = {"rtol": 0, "atol": 1e-5}


def make_teacher(family):
    model_class, config_class, options = FAMILIES[family]
    torch.manual_seed(0)
    # The configuration keeps the dict, and fills it in.
    teacher = model_class(config_class(**{**SIZES, **copy.deepcopy(options)})).eval()
    for name, parameter in teacher.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return teacher


def tokens(*shape):
    return torch.randint(2, 97, shape)


@torch.no_grad()
@families
def test_logits_are_the_teachers(family):
    teacher = make_teacher(family)
    model = RebasedForCausalLM.from_llama(teacher)
    input_ids = tokens(2, 40)

    torch.testing.assert_close(model(input_ids).logits, teacher(input_ids).logits, **EQUAL)
    assert model.num_parameters() == teacher.num_parameters()
    names = {name for name, _ in model.named_parameters()}
    assert names == {name for name, _ in teacher.named_parameters()}


@families
def test_a_saved_model_comes_back_with_the_teachers_logits(family, tmp_path):
    teacher = make_teacher(family)
    RebasedForCausalLM.from_llama(teacher).save_pretrained(tmp_path)
    loaded, input_ids = AutoModelForCausalLM.from_pretrained(tmp_path), tokens(1, 20)

    torch.testing.assert_close(loaded(input_ids).logits, teacher(input_ids).logits, **EQUAL)
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied == teacher.config.tie_word_embeddings


MODES = {
    "cache": {},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "beams without a cache": {"num_beams": 3, "use_cache": False},
    "several beams returned": {"num_beams": 4, "num_return_sequences": 2},
    "prefill in pieces": {"prefill_chunk_size": 4},
}


@few_families
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_tokens_generated_in_any_mode_are_the_teachers(family, mode):
    teacher = make_teacher(family)
    model = RebasedForCausalLM.from_llama(teacher)
    input_ids = tokens(2, 11)
    mask = torch.ones_like(input_ids)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, **mode}

    assert torch.equal(model.generate(input_ids, **options), teacher.generate(input_ids, **options))


@families
def test_greedy_tokens_are_the_teachers(family):
    teacher = make_teacher(family)
    input_ids, options = tokens(2, 11), {"max_new_tokens": 16, "do_sample": False}

    got = RebasedForCausalLM.from_llama(teacher).generate(input_ids, **options)
    assert torch.equal(got, teacher.generate(input_ids, **options))


@torch.no_grad()
@few_families
def test_a_cache_that_is_fed_forked_and_reordered_gives_the_teachers_logits(family):
    teacher = make_teacher(family)
    model = RebasedForCausalLM.from_llama(teacher)
    prompt, ours, theirs = tokens(2, 9), RebasedCache(model.config), DynamicCache(config=teacher.config)
    for piece in prompt.split([6, 1, 2], dim=1):
        got = model(piece, past_key_values=ours).logits
        torch.testing.assert_close(got, teacher(piece, past_key_values=theirs).logits, **EQUAL)
    branch = ours.fork().detach()
    model(tokens(2, 5), past_key_values=ours)
    order = torch.tensor([1, 0])
    branch.reorder_cache(order)
    theirs.reorder_cache(order)
    more = tokens(2, 3)

    got = model(more, past_key_values=branch).logits
    torch.testing.assert_close(got, teacher(more, past_key_values=theirs).logits, **EQUAL)


@torch.no_grad()
@few_families
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_bfloat16_and_half_precision_stay_the_teachers(family, attn_implementation):
    teacher = make_teacher(family)
    teacher.set_attn_implementation(attn_implementation)
    for dtype in (torch.bfloat16, torch.float16):
        # Frequencies of a model that is cast are rounded too.
        low = copy.deepcopy(teacher).to(dtype)
        model = RebasedForCausalLM.from_llama(low)
        model.set_attn_implementation(attn_implementation)
        input_ids = tokens(1, 20)

        assert (model.dtype, model.config._attn_implementation) == (dtype, attn_implementation)
        assert torch.equal(model(input_ids).logits, low(input_ids).logits)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_are_the_teachers_with_checkpointing_too(use_reentrant):
    teacher = make_teacher("qwen3").train()
    model, input_ids = RebasedForCausalLM.from_llama(teacher), tokens(2, 12)
    assert model.training
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})

    for each in (model, teacher):
        each(input_ids, labels=input_ids).loss.backward()

    expected = {name: p.grad for name, p in teacher.named_parameters()}
    for name, parameter in model.named_parameters():
        # Sums in another order, where gradients of the order of one meet.
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_a_head_that_was_untied_by_hand_stays_itself():
    teacher = make_teacher("qwen3, bias, tied")
    teacher.lm_head.weight = torch.nn.Parameter(torch.randn(97, 32))
    model, input_ids = RebasedForCausalLM.from_llama(teacher), tokens(1, 9)

    torch.testing.assert_close(model(input_ids).logits, teacher(input_ids).logits, **EQUAL)


def test_what_is_converted_is_a_copy_with_the_settings_of_generation():
    teacher = make_teacher("llama")
    teacher.generation_config.temperature = 0.3
    model = RebasedForCausalLM.from_llama(teacher)
    before = model.lm_head.weight.clone()
    torch.nn.init.zeros_(teacher.lm_head.weight)
    teacher.generation_config.temperature = 1.0

    assert torch.equal(model.lm_head.weight, before)
    assert model.generation_config.temperature == 0.3
    ids = ("pad_token_id", "bos_token_id", "eos_token_id")
    assert [getattr(model.config, name) for name in ids] == [getattr(teacher.config, name) for name in ids]


@few_families
@pytest.mark.parametrize("window", [0, 4])
def test_a_replaced_layer_keeps_all_projections_and_trains(family, window, tmp_path):
    teacher = make_teacher(family)
    options = {"feature_dim": 6, "linear_attention_window": window}
    model = RebasedForCausalLM.from_llama(teacher, layers=[1], **options).train()
    kinds = RebasedForCausalLM.from_llama(teacher).config.layer_types

    assert model.config.layer_types == [kinds[0], "linear_attention", kinds[2]]
    new, old = (x.model.layers[1].self_attn.state_dict() for x in (model, teacher))
    assert all(torch.equal(new[name], old[name]) for name in old)
    assert {name.split(".")[0] for name in new.keys() - old.keys()} == {"q_map", "k_map"} | (
        {"window_gate"} if window else set()
    )
    assert new["k_map.weight"].shape == (2, model.config.head_dim, 6)
    model(tokens(2, 12), labels=tokens(2, 12)).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    model.eval().save_pretrained(tmp_path)
    input_ids = tokens(1, 9)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(input_ids).logits, model(input_ids).logits, **EQUAL)


@pytest.mark.parametrize("layers", [[1], [0, 2], range(3)])
@pytest.mark.parametrize("window", [0, 4])
def test_generation_with_replaced_layers_needs_no_cache(layers, window):
    teacher = make_teacher("mistral, short window")
    model = RebasedForCausalLM.from_llama(teacher, layers=layers, linear_attention_window=window)
    input_ids = tokens(2, 9)
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False}

    assert torch.equal(model.generate(input_ids, **options), model.generate(input_ids, use_cache=False, **options))


@few_families
@pytest.mark.parametrize("feature_dim", [3, 20])
def test_maps_start_as_the_principal_directions_of_queries_and_keys(family, feature_dim):
    teacher, input_ids = make_teacher(family), tokens(3, 14)
    model = RebasedForCausalLM.from_llama(teacher, [0, 2], input_ids=input_ids, feature_dim=feature_dim)
    seen = {}
    for i in (0, 2):
        teacher.model.layers[i].self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, i=i: seen.update({i: kwargs}), with_kwargs=True
        )
    with torch.no_grad():
        teacher(input_ids)

    for i in (0, 2):
        mixer, kept = model.model.layers[i].self_attn, min(feature_dim, model.config.head_dim)
        query, key, _ = mixer.project(seen[i]["hidden_states"], seen[i]["position_embeddings"])
        group = query.shape[1] // key.shape[1]
        for head in range(key.shape[1]):
            queries = query[:, head * group : (head + 1) * group].reshape(-1, query.shape[-1])
            rows = torch.cat([queries / group**0.5, key[:, head].reshape(-1, query.shape[-1])])
            captured = (rows @ mixer.k_map.weight[head][:, :kept]).square().sum()
            best = torch.linalg.svdvals(rows)[:kept].square().sum()
            torch.testing.assert_close(captured, best, rtol=1e-4, atol=1e-4)
        shared = mixer.k_map.weight[..., :kept].repeat_interleave(group, dim=0)
        assert torch.equal(mixer.q_map.weight[..., :kept], shared)
    assert not teacher.training


def test_generation_settings_that_need_another_cache_stay_behind():
    teacher = make_teacher("llama")
    teacher.generation_config.update(cache_implementation="static", prompt_lookup_num_tokens=3, max_new_tokens=4)
    model = RebasedForCausalLM.from_llama(teacher)

    assert model.generate(tokens(1, 9)).shape == (1, 13)
    assert teacher.generation_config.cache_implementation == "static"


def test_what_is_converted_has_no_name_for_adapters_and_cards_to_point_to(tmp_path):
    make_teacher("llama").save_pretrained(tmp_path)
    model = RebasedForCausalLM.from_llama(AutoModelForCausalLM.from_pretrained(tmp_path))

    assert (model.name_or_path, model.config.name_or_path) == ("", "")
    # PEFT's adapter_config.json and Trainer's card leave such a name out.
    assert not get_peft_model(model, LoraConfig()).peft_config["default"].base_model_name_or_path


def test_of_several_dtypes_all_weights_get_the_first():
    teacher = make_teacher("llama").to(torch.bfloat16)
    teacher.lm_head.float()
    model = RebasedForCausalLM.from_llama(teacher, layers=[1])

    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model(tokens(1, 9))


def test_new_maps_are_no_missing_weights(capfd):
    verbosity = logging.get_verbosity()
    RebasedForCausalLM.from_llama(make_teacher("llama"), layers=[1])

    assert "MISSING" not in "".join(capfd.readouterr())
    assert logging.get_verbosity() == verbosity


def test_what_attention_did_is_recorded_while_the_context_is_open():
    teacher, input_ids = make_teacher("qwen3"), tokens(2, 9)
    with torch.no_grad(), recorded_attention(teacher, [1]) as calls:
        teacher(input_ids)
        call = calls[1]
        teacher(tokens(1, 4))
    again, _ = teacher.model.layers[1].self_attn(call.hidden_states, call.position_embeddings, None)

    assert list(calls) == [1] and calls[1].output.shape == (1, 4, 32)
    # Without a mask, transformers' attention is causal.
    torch.testing.assert_close(again, call.output, **EQUAL)


@pytest.mark.parametrize(
    ("layers", "options", "sentence"),
    [
        ([1], {"hidden_size": 3}, "options may be feature_dim, .*, linear_attention_window, got hidden_size"),
        ([], {"feature_dim": 8}, "feature_dim are options of replaced layers, of which there are none; give layers"),
        ([], {"input_ids": tokens(2, 9)}, "input_ids are options of replaced layers, of which there are none"),
        ([1], {"input_ids": tokens(1, 9)[0]}, r"input_ids must be a tensor \(rows, seq\) .* got \(9,\)"),
        ([1], {"input_ids": [[2, 3]]}, r"input_ids must be a tensor \(rows, seq\) .* got list"),
        ([1], {"input_ids": tokens(1, 9)[:, :0]}, r"at least one row and token, .* got \(1, 0\)"),
        ([1], {"input_ids": tokens(1, 9).float()}, r"integers from 0 to \d+, got torch.float32"),
        ([1], {"input_ids": tokens(1, 9) + 10**6}, r"got some from 10000\d+ to 10000\d+"),
        ([1], {"linear_attention_window": -1}, "linear_attention_window must be at least 0, got -1"),
        ([1], {"kernel": "softmax"}, "kernel must be one of rebased, taylor, got 'softmax'"),
    ],
)
def test_options_of_replaced_layers_are_checked(layers, options, sentence):
    with pytest.raises((ValueError, StrictDataclassError), match=sentence):
        RebasedForCausalLM.from_llama(make_teacher("llama"), layers, **options)


def with_adapter():
    return inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), make_teacher("llama"))


def test_autocast_mixes_the_window_with_values_in_full_precision():
    model = RebasedForCausalLM.from_llama(make_teacher("llama"), layers=[1], linear_attention_window=8)
    attention, ids = model.model.layers[1].self_attn, tokens(2, 20)
    expected = model(ids, labels=ids).loss
    # As a projection in 4 bits does, whatever autocast says.
    attention.v_proj.register_forward_hook(lambda module, args, output: output.float())

    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    assert all(parameter.grad.isfinite().all() for parameter in attention.parameters())


def quantised():
    teacher = make_teacher("llama")
    teacher.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(48, 32, dtype=torch.uint8), False)
    return teacher


class Packed(torch.Tensor):
    """A weight that says it is floating, as a quantised one of torchao does."""


def quantised_by_torchao():
    teacher = make_teacher("llama")
    teacher.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(48, 32).as_subclass(Packed))
    return teacher


def with_gelu():
    return LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="gelu"))


def another_family():
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8))


@pytest.mark.parametrize(
    ("make", "layers", "sentence"),
    [
        (another_family, (), "model must be a LlamaForCausalLM, .* or Qwen3ForCausalLM, got Gemma2ForCausalLM"),
        (lambda: make_teacher("llama").model, (), "model must be a LlamaForCausalLM, .*, got LlamaModel"),
        *(
            (
                lambda: make_teacher("llama"),
                layers,
                f"layers must be a list of indices from 0 to 2, got {re.escape(repr(layers))}",
            )
            for layers in ([3], [-1], [1.0], [True], [0, "1"], [[1]], 1, None, "01")
        ),
        (with_gelu, (), "hidden_act of the model must be silu, got 'gelu'"),
        (with_adapter, (), "got 12 others or missing: .*q_proj.*; merge or remove its adapters"),
        (quantised, (), "weights of model must be in memory and not quantised"),
        (quantised_by_torchao, (), "weights of model must be in memory and not quantised"),
        (lambda: make_teacher("llama").to("meta"), (), "weights of model must be in memory and not quantised"),
    ],
)
def test_what_cannot_be_converted_is_refused_in_a_sentence(make, layers, sentence):
    with pytest.raises(ValueError, match=sentence):
        RebasedForCausalLM.from_llama(make(), layers)


@torch.no_grad()
@pytest.mark.slow
def test_smollm2_speaks_as_before(smollm2):
    teacher = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2, padding_side="left")
    model = RebasedForCausalLM.from_llama(teacher)
    texts = ["The three primary colours are", "Why is the sky blue during the day, and red in the evening?"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 12, "do_sample": False}

    torch.testing.assert_close(model(**inputs).logits, teacher(**inputs).logits, **EQUAL)
    assert torch.equal(model.generate(**inputs, **options), teacher.generate(**inputs, **options))
