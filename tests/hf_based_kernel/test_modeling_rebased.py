import copy
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorWithFlattening,
    DynamicCache,
)

from hf_based_kernel import (
    RebasedCache,
    RebasedConfig,
    RebasedForCausalLM,
    RebasedForSequenceClassification,
    RebasedModel,
)
from hf_based_kernel.cache_rebased import CACHE_NAME


LAYER_TYPES = {
    "rebased": ["conv", "linear_attention"],
    "hybrid": ["conv", "linear_attention", "sliding_attention"],
    "attention_first": ["linear_attention", "conv"],
    "llama": ["full_attention", "linear_attention", "sliding_attention", "full_attention"],
    "converted": ["linear_attention", "full_attention", "linear_attention"],
    "converted_window": ["linear_attention", "full_attention", "linear_attention"],
}
OPTIONS = {
    "llama": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "attention_bias": True,
        "use_softmax_qk_norm": True,
    }
}
OPTIONS["converted"] = {**OPTIONS["llama"], "use_feature_map": True}
OPTIONS["converted_window"] = {**OPTIONS["converted"], "linear_attention_window": 6}
# Float32 sums of some dozen terms of order one, in another order, through a few layers.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def tiny_config(layers="rebased", **options):
    options = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": len(LAYER_TYPES[layers]),
        "layer_types": LAYER_TYPES[layers],
        "num_attention_heads": 2,
        "feature_dim": 4,
        "sliding_window": 5,
        "pad_token_id": 0,
        "eos_token_id": 1,
        # Large enough for the kernel to have contrast, as after training.
        "initializer_range": 0.3,
        **copy.deepcopy(OPTIONS.get(layers, {})),
        **options,
    }
    return RebasedConfig(**options)


def tiny_model(layers="rebased", **options):
    model = RebasedForCausalLM(tiny_config(layers, **options)).eval()
    # Norm parameters start at one and zero: away from there, a swap or a leak shows.
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=float("beta" not in name), std=0.3)
    return model


def tokens(*shape):
    return torch.randint(2, 64, shape)


PILE = {}
RECALL = {
    "vocab_size": 8192,
    "intermediate_size": 0,
    "num_hidden_layers": 2,
    "conv_type": "base",
    "norm_type": "layer_norm",
    "use_position_embeddings": True,
    "max_position_embeddings": 256,
}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (PILE, 147_548_928),
        ({**PILE, "kernel": "taylor"}, 147_542_016),
        (
            {"num_hidden_layers": 12, "layer_types": ["sliding_attention"] * 12, "intermediate_size": 3072},
            151_880_448,
        ),
        ({**RECALL, "hidden_size": 64, "kernel": "taylor"}, 577_984),
        ({**RECALL, "hidden_size": 128, "kernel": "taylor"}, 1_179_520),
        ({**RECALL, "hidden_size": 256, "kernel": "taylor"}, 2_459_392),
        ({**RECALL, "hidden_size": 512, "kernel": "taylor"}, 5_307_904),
        ({**RECALL, "hidden_size": 64}, 577_984 + 768),
        ({**RECALL, "hidden_size": 128}, 1_179_520 + 768),
        ({**RECALL, "hidden_size": 256}, 2_459_392 + 768),
        ({**RECALL, "hidden_size": 512}, 5_307_904 + 768),
    ],
)
def test_parameter_counts_are_the_papers(options, expected):
    with torch.device("meta"):
        model = RebasedForCausalLM(RebasedConfig(**options))
    assert model.num_parameters() == expected


@pytest.mark.parametrize("layers", LAYER_TYPES)
@pytest.mark.parametrize("kernel", ["rebased", "taylor"])
def test_cached_decoding_matches_full_forward(layers, kernel):
    model = tiny_model(layers, kernel=kernel)
    input_ids = tokens(2, 14)
    expected = model(input_ids).logits
    cache, logits = None, []
    for piece in input_ids.split([6, 1, 1, 4, 1, 1], dim=1):
        outputs = model(piece, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        logits.append(outputs.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **CLOSE)
    assert cache.get_seq_length() == 14


@pytest.mark.parametrize("layers", LAYER_TYPES)
@pytest.mark.parametrize("conv_type", ["gated", "base"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("learned_positions", [False, True])
def test_padding_does_not_change_the_other_tokens(layers, conv_type, side, learned_positions):
    model = tiny_model(layers, conv_type=conv_type, norm_type="layer_norm", use_position_embeddings=learned_positions)
    for name, parameter in model.named_parameters():
        if "bias" in name or "beta" in name:
            torch.nn.init.normal_(parameter)
    input_ids = tokens(1, 7)
    expected = model(input_ids).logits
    before, after = (3, 0) if side == "left" else (0, 3)
    padded = torch.nn.functional.pad(input_ids, (before, after), value=9)
    mask = torch.nn.functional.pad(torch.ones_like(input_ids), (before, after))
    got = model(padded, attention_mask=mask).logits[:, before : before + 7]
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("layers", LAYER_TYPES)
def test_packed_sequences_match_separate_ones(layers):
    model = tiny_model(layers)
    rows = [tokens(length).tolist() for length in (5, 1, 7)]
    batch = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": row} for row in rows])
    got = model(batch["input_ids"], position_ids=batch["position_ids"]).logits
    expected = torch.cat([model(torch.tensor([row])).logits for row in rows], dim=1)
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("layers", LAYER_TYPES)
def test_packed_rows_may_be_padded(layers):
    model = tiny_model(layers)
    first, second = tokens(1, 4), tokens(1, 3)
    input_ids = torch.cat([torch.zeros(1, 2, dtype=torch.long), first, second], dim=1)
    position_ids = torch.tensor([[0, 0, 0, 1, 2, 3, 0, 1, 2]])
    attention_mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]])
    got = model(input_ids, position_ids=position_ids, attention_mask=attention_mask).logits[:, 2:]
    torch.testing.assert_close(got, torch.cat([model(first).logits, model(second).logits], dim=1), **CLOSE)


@pytest.mark.parametrize("layers", ["rebased", "attention_first"])
@pytest.mark.parametrize("conv_type", ["gated", "base"])
def test_bad_numbers_stay_in_their_packed_sequence(layers, conv_type):
    model = tiny_model(layers, conv_type=conv_type)
    position_ids = torch.tensor([[*range(4), *range(3), *range(5)]])
    results = []
    for bad in (False, True):
        embedded = model.get_input_embeddings()(torch.arange(2, 14)[None]).detach()
        if bad:
            embedded[0, 5, 0] = float("nan")
        embedded.requires_grad_()
        logits = model(inputs_embeds=embedded, position_ids=position_ids).logits
        others = torch.cat([logits[:, :4], logits[:, 7:]], dim=1)
        results.append((others, torch.autograd.grad(others.sum(), embedded)[0][:, [0, 1, 2, 3, *range(7, 12)]]))
        assert logits[0, 5].isfinite().all() != bad
    for expected, got in zip(*results):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("layers", [name for name, kinds in LAYER_TYPES.items() if "full_attention" not in kinds])
def test_decoding_state_does_not_grow(layers):
    model = tiny_model(layers)

    def state_bytes(seq_len):
        cache = model(tokens(1, seq_len), use_cache=True).past_key_values
        return sum(x.numel() * x.element_size() for layer in cache.layers for x in layer.tensors())

    assert state_bytes(300) == state_bytes(20) > 0


def test_state_is_float32_in_a_bfloat16_model():
    model = tiny_model().to(torch.bfloat16)
    outputs = model(tokens(2, 9), use_cache=True)
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.past_key_values.get_recurrent_state(1).dtype == torch.float32


@pytest.mark.parametrize("switch", ["use_qk_norm", "use_gamma", "use_beta", "qk_norm_per_head"])
def test_ablation_switches_change_the_feature_map(switch):
    config = tiny_config(**{switch: switch == "qk_norm_per_head"})
    norm = RebasedModel(config).layers[1].self_attn.q_norm
    x = torch.randn(2, 3, 8)
    names = {name for name, _ in norm.named_parameters()}
    if norm.gamma is not None:
        torch.nn.init.normal_(norm.gamma)
    if norm.beta is not None:
        torch.nn.init.normal_(norm.beta)
    groups = x.unflatten(-1, (2, 4)) if switch == "qk_norm_per_head" else x
    expected = groups - groups.mean(-1, keepdim=True)
    expected = expected / (expected.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
    expected = (x if switch == "use_qk_norm" else expected.reshape(2, 3, 8)) * (
        1 if norm.gamma is None else norm.gamma
    )
    expected = expected + (0 if norm.beta is None else norm.beta)
    assert names == {"gamma", "beta"} - {switch.removeprefix("use_")}
    torch.testing.assert_close(norm(x), expected.unflatten(-1, (2, 4)), **CLOSE)


@pytest.mark.parametrize("layers", ["hybrid", "llama"])
def test_every_parameter_gets_a_gradient(layers):
    model = tiny_model(layers, mlp_bias=layers == "llama").train()
    input_ids = tokens(2, 12)
    model(input_ids, labels=input_ids).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


def test_training_makes_no_cache():
    assert tiny_model().train()(tokens(1, 4)).past_key_values is None


@pytest.mark.parametrize("layers", ["hybrid", "llama"])
@torch.no_grad()
def test_cache_can_be_copied_branched_and_reset(layers):
    model = tiny_model(layers)
    prompt, continuation = tokens(1, 6), tokens(1, 3)
    cache = model(prompt, use_cache=True).past_key_values
    branch = copy.deepcopy(cache)
    expected = model(torch.cat([prompt, continuation], dim=1)).logits[:, 6:]
    torch.testing.assert_close(model(continuation, past_key_values=branch).logits, expected, **CLOSE)
    torch.testing.assert_close(model(continuation, past_key_values=cache).logits, expected, **CLOSE)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.get_recurrent_state(1).shape[0] == 1
    fresh = RebasedCache(model.config)
    model(prompt, past_key_values=fresh)
    fresh.reset()
    assert fresh.get_seq_length() == 0 and fresh.get_recurrent_state(1) is None


@pytest.mark.parametrize("layers", LAYER_TYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"prefill_chunk_size": 4},
        {"num_beams": 2, "num_return_sequences": 2},
        {"repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_generate_with_state_matches_generate_without(layers, options):
    model = tiny_model(layers, eos_token_id=None)
    input_ids = tokens(2, 9)
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    options = {**options, "attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    got = model.generate(input_ids, **options)
    options.pop("prefill_chunk_size", None)
    assert torch.equal(got, model.generate(input_ids, use_cache=False, **options))
    assert got.shape[1] == 21


@pytest.mark.parametrize("names", [("past_key_values", "cache"), ("cache", "past_key_values")])
def test_a_cache_has_two_names(names):
    """Which one transformers uses depends on its version: both are understood by each."""
    model = tiny_model("hybrid")
    prompt, continuation = tokens(1, 6), tokens(1, 3)
    output = model(prompt, use_cache=True)
    assert isinstance(output[CACHE_NAME], RebasedCache) and CACHE_NAME in model.config.keys_to_ignore_at_inference
    caches = [output[CACHE_NAME], model.model(prompt, use_cache=True)[CACHE_NAME]]
    expected = model(torch.cat([prompt, continuation], dim=1)).logits[:, 6:]
    torch.testing.assert_close(model(continuation, **{names[0]: caches[0]}).logits, expected, **CLOSE)
    hidden = model.model(continuation, **{names[1]: caches[1]}).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), expected, **CLOSE)
    for part in (model, model.model):
        with pytest.raises(ValueError, match="past_key_values and cache are two names of one thing"):
            part(continuation, **dict.fromkeys(names, caches[0]))


@pytest.mark.parametrize("layers", ["hybrid", "llama"])
def test_generate_continues_from_a_cache(layers):
    model = tiny_model(layers, eos_token_id=None)
    options = {"do_sample": False, "return_dict_in_generate": True}
    first = model.generate(tokens(2, 5), max_new_tokens=4, **options)
    more = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=3, **options)
    expected = model.generate(first.sequences, max_new_tokens=3, use_cache=False, **options)
    assert torch.equal(more.sequences, expected.sequences)


@pytest.mark.parametrize("layers", ["hybrid", "llama"])
def test_saved_model_loads_through_the_auto_classes(tmp_path, layers):
    model = tiny_model(layers, num_labels=3)
    model.save_pretrained(tmp_path)
    input_ids = tokens(2, 6)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, RebasedForCausalLM)
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(classifier, RebasedForSequenceClassification)
    assert classifier(input_ids).logits.shape == (2, 3)


REMOTE = """
import sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "hf_based_kernel" not in sys.modules
inputs, expected = torch.load(sys.argv[2])
assert torch.equal(model(inputs).logits, expected)
"""


@pytest.mark.parametrize("layers", ["hybrid", "llama"])
def test_saved_model_carries_its_code(tmp_path, layers):
    model = tiny_model(layers)
    model.save_pretrained(tmp_path / "model")
    input_ids = tokens(2, 6)
    torch.save((input_ids, model(input_ids).logits.detach()), tmp_path / "expected.pt")
    # -P and another working directory: the package's source is not on the path; -S would hide transformers too.
    blocked = "import sys; sys.modules['hf_based_kernel'] = None\n" + REMOTE.replace(
        'assert "hf_based_kernel" not in sys.modules', ""
    )
    command = [sys.executable, "-P", "-c", blocked, str(tmp_path / "model"), str(tmp_path / "expected.pt")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.suffix for path in (tmp_path / "model").iterdir() if path.suffix in (".bin", ".pt")) == []


def save_without(path, *names):
    """A saved model whose file lacks the tensors of these names."""
    tiny_model("hybrid").save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    save_file({k: x for k, x in tensors.items() if k not in names}, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("loaded_class", [AutoModelForCausalLM, RebasedForCausalLM, RebasedForSequenceClassification])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.k_norm.beta"])
def test_a_file_that_lacks_a_tensor_is_refused(tmp_path, loaded_class, name):
    save_without(tmp_path, name)

    with pytest.raises(ValueError, match=f"lacks 1 tensors of Rebased.*: {name}; save the model again"):
        loaded_class.from_pretrained(tmp_path)


def test_a_file_that_lacks_most_is_refused_with_the_first_names(tmp_path):
    save_without(tmp_path, *(f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkvo"))

    with pytest.raises(ValueError, match=r"lacks 4 tensors .*k_proj.weight, .*o_proj.weight, .*q_proj.weight …"):
        RebasedModel.from_pretrained(tmp_path)


def test_a_head_is_new_only_where_the_checkpoint_has_another_one(tmp_path):
    RebasedModel(tiny_config(tie_word_embeddings=False)).save_pretrained(tmp_path / "base")
    _, info = RebasedForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    classifier = RebasedForSequenceClassification.from_pretrained(tmp_path / "base")
    classifier.save_pretrained(tmp_path / "classifier")
    tensors = load_file(tmp_path / "classifier" / "model.safetensors")
    save_file({k: x for k, x in tensors.items() if k != "score.weight"}, tmp_path / "classifier" / "model.safetensors")

    with pytest.raises(ValueError, match="lacks 1 tensors of RebasedForSequenceClassification: score.weight"):
        RebasedForSequenceClassification.from_pretrained(tmp_path / "classifier")


def test_the_folder_of_another_model_is_refused(tiny_language_model):
    with pytest.raises(ValueError, match="expected the configuration of a rebased model, got model_type='llama'"):
        RebasedForCausalLM.from_pretrained(tiny_language_model)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(), "exactly one of input_ids and inputs_embeds"),
        (
            lambda m: m(tokens(1, 3), past_key_values=DynamicCache()),
            "past_key_values must be a RebasedCache, got Dynamic",
        ),
        (
            lambda m: m(tokens(2, 3), attention_mask=torch.ones(2, 2)),
            r"attention_mask must have the shape .* got \(2, 2\)",
        ),
        (
            lambda m: m(tokens(1, 3), attention_mask=torch.ones(1, 1, 3, 3)),
            r"attention_mask must have the shape .* got \(1, 1, 3, 3\)",
        ),
        (lambda m: m.generate(tokens(1, 3), cache_implementation="static"), "cache_implementation must be None"),
        (lambda m: m.generate_batch([[2, 3], [4]]), "RebasedForCausalLM has no continuous batching"),
        (lambda m: RebasedCache(m.config).crop(1), "cannot forget single tokens"),
        (
            lambda m: RebasedCache(tiny_config("llama", layer_types=["full_attention"] * 4)).crop(-1),
            "cannot forget single tokens",
        ),
        (lambda m: m.generate(tokens(1, 3), prompt_lookup_num_tokens=2), "not supported with stateful models"),
        (
            lambda m: m.generate(tokens(1, 3), assistant_model=tiny_model(), max_new_tokens=3),
            "not supported with stateful models",
        ),
    ],
)
def test_bad_input_is_one_clear_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_model())


def test_learned_positions_say_where_they_end():
    model = tiny_model(use_position_embeddings=True, max_position_embeddings=8)
    assert model(tokens(1, 8)).logits.isfinite().all()
    with pytest.raises(ValueError, match="learned positions for max_position_embeddings=8 tokens, got 9"):
        model(tokens(1, 9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "softmax"}, "kernel must be one of rebased, taylor, got 'softmax'"),
        ({"initializer_range": -1.0}, "initializer_range must be a finite number that is not negative"),
        ({"attention_eps": 0.0}, "attention_eps must be a finite number above 0"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused_when_a_model_is_loaded_with_it(tmp_path, options, message):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    RebasedForCausalLM(RebasedConfig(**sizes)).save_pretrained(tmp_path)

    assert RebasedForCausalLM.from_pretrained(tmp_path, kernel="taylor").config.kernel == "taylor"
    with pytest.raises(ValueError, match=message):
        RebasedForCausalLM.from_pretrained(tmp_path, **options)
