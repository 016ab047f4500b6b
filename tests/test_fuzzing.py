"""Odd values in every place of the public calls: each is answered rightly, or refused with what was expected."""

import copy
import math
import re
from collections.abc import Callable
from contextlib import chdir
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_based_kernel import RebasedConfig, RebasedForCausalLM, rebased_attention, taylor_attention
from hf_based_kernel.associative_recall import make_recall_dataset
from hf_hierarchical_sae import (
    ActivationSettings,
    HierarchicalSaeConfig,
    HierarchicalSaeModel,
    ablate,
    evaluate_budgets,
    hierarchical_topk_loss,
    record_statistics,
    splice,
    steer,
)
from hf_hierarchical_sae.cli import main as hierarchical_sae
from peft_bias_steer import BiasSteerConfig, extract_vectors, set_steering_vectors, steering_vectors
from peft_bias_steer.cli import main as bias_steer


# What a refusal says: what was expected, or which words there are.
HELPFUL = r"expected|must|should|needs? |at (least|most)|has no|choose|not found|only|supports?|invalid|positive|do(es)? not|or give"

numbers = st.one_of(
    st.sampled_from([0, 1, 2, 3, 5, -1, -7, 100, 2**63, True, False]),
    st.sampled_from([0.0, -0.0, 0.5, 1.0, 2.5, -1.5, 1e-30, 1e6, math.nan, math.inf, -math.inf]),
    st.sampled_from([np.int64(2), np.int8(-3), np.float32(0.5), np.float64("nan"), np.bool_(True)]),
)
odd_values = st.one_of(
    numbers,
    st.sampled_from([None, "", "1", "two", b"2", {}, {"a": 1}, (), [], [[1]], object, range(2), {1}, 1j]),
    st.sampled_from([torch.tensor(2), torch.tensor([1, 2]), torch.tensor(0.5), torch.empty(0), np.arange(2)]),
    st.lists(numbers, max_size=3),
)
shapes = st.lists(st.sampled_from([0, 1, 2, 3, 8, 16]), max_size=4)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
odd_tensors = st.builds(lambda shape, dtype: torch.ones(shape, dtype=dtype), shapes, dtypes)


REFUSED = object()


def is_huge(value: Any) -> bool:
    """Whether a size of this is only a matter of memory."""
    return isinstance(value, int) and value > 100


sizes = odd_values.filter(lambda value: not is_huge(value))


def outcome(call: Callable[[], Any]) -> Any:
    """What the call returns, or REFUSED where it says what was expected; any other error fails the test."""
    try:
        return call()
    except (ValueError, TypeError, NotImplementedError, StrictDataclassError) as error:
        if not re.search(HELPFUL, f"{error} {error.__cause__ or ''}", re.IGNORECASE):
            raise
    return REFUSED


def one_odd(valid: dict[str, Any], values: st.SearchStrategy = odd_values) -> st.SearchStrategy:
    """The valid arguments with one of them replaced."""
    return st.builds(lambda name, value: valid | {name: value}, st.sampled_from(sorted(valid)), values)


def fuzzed(*strategies: st.SearchStrategy, examples: int = 60) -> Callable:
    """The same examples in every run."""

    def decorate(test: Callable) -> Callable:
        quick = settings(max_examples=examples, deadline=None, database=None, derandomize=True)
        return quick(given(*strategies)(test))

    return decorate


@pytest.fixture(scope="module")
def llama():
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def sae():
    torch.manual_seed(0)
    return HierarchicalSaeModel(HierarchicalSaeConfig(d_in=16, d_sae=32, k=4, layer=1)).eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.arange(12).view(2, 6)


STEER = {
    "target_modules": ["model.layers.1"],
    "exclude_modules": ["model.layers.0"],
    "layers_to_transform": [0, 2],
    "layers_pattern": "layers",
    "modules_to_save": ["lm_head"],
    "init_weights": True,
    "task_type": "CAUSAL_LM",
    "inference_mode": False,
    "base_model_name_or_path": "base",
}


@fuzzed(st.sampled_from(sorted(STEER)), odd_values, examples=150)
def test_steering_config_that_is_taken_is_saved_and_read_back(tmp_path_factory, name, value):
    config = outcome(lambda: BiasSteerConfig(**{name: value}))

    if config is not REFUSED:
        folder = tmp_path_factory.mktemp("config")
        config.save_pretrained(folder)
        read = BiasSteerConfig.from_pretrained(folder)
        assert getattr(read, name) == getattr(config, name)


@fuzzed(odd_values, examples=100)
def test_layers_that_are_taken_are_steered(value):
    config = LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=3, num_attention_heads=1)
    model = outcome(lambda: get_peft_model(LlamaForCausalLM(config), BiasSteerConfig(layers_to_transform=value)))

    if model is not REFUSED:
        wanted = range(3) if value is None else np.atleast_1d(np.asarray(list(value) if np.iterable(value) else value))
        assert set(steering_vectors(model)) == {int(index) % 3 for index in wanted}


@fuzzed(odd_values, examples=100)
def test_scale_that_is_taken_scales(llama, tokens, value):
    model = get_peft_model(llama, BiasSteerConfig(init_weights=False))
    try:
        if outcome(lambda: model.base_model.set_scale("default", value)) is not REFUSED:
            scaled = model(tokens).logits
            vectors = {index: vector * float(value) for index, vector in steering_vectors(model).items()}
            model.base_model.set_scale("default", 1.0)
            if outcome(lambda: set_steering_vectors(model, vectors)) is not REFUSED:
                torch.testing.assert_close(scaled, model(tokens).logits, equal_nan=True)
    finally:
        model.unload()


@fuzzed(st.dictionaries(numbers, st.one_of(odd_tensors, odd_values), max_size=2), examples=80)
def test_vectors_that_are_taken_are_the_vectors(llama, vectors):
    model = get_peft_model(llama, BiasSteerConfig())
    before = steering_vectors(model)
    try:
        taken = outcome(lambda: set_steering_vectors(model, vectors)) is not REFUSED
        after = steering_vectors(model)
        for index, vector in before.items():
            wanted = vectors[index] if taken and index in vectors else vector
            torch.testing.assert_close(after[index], torch.as_tensor(wanted), check_dtype=False)
    finally:
        model.unload()


EXTRACT = {
    "pairs": [{"positive": "ab", "negative": "b"}, {"positive": "a", "negative": "c"}],
    "method": "mean",
    "layers_to_transform": [0, 2],
    "token": -1,
    "batch_size": 2,
}


def letters(text):
    return {"input_ids": [ord(letter) % 50 for letter in text]}


@fuzzed(one_odd(EXTRACT, sizes), examples=30)
def test_pairs_that_are_taken_give_finite_vectors(llama, arguments):
    vectors = outcome(lambda: extract_vectors(llama, letters, **arguments))

    if vectors is not REFUSED:
        assert vectors
        assert all(vector.shape == (16,) and vector.isfinite().all() for vector in vectors.values())


@fuzzed(st.fixed_dictionaries({"positive": odd_values, "negative": odd_values}), examples=20)
def test_prompts_that_are_none_are_refused(llama, pair):
    texts = isinstance(pair["positive"], str) and isinstance(pair["negative"], str)
    taken = outcome(lambda: extract_vectors(llama, letters, [pair])) is not REFUSED

    assert not taken or texts


SAE = {
    "d_in": 16,
    "d_sae": 32,
    "k": 4,
    "budgets": [1, 4],
    "budget_weights": [1.0],
    "selection": "topk",
    "matryoshka_prefixes": [8, 32],
    "normalize_decoder": True,
    "aux_loss_coefficient": 0.0,
    "aux_k": 2,
    "dead_after_tokens": 10,
    "encoder_chunk_size": 8,
    "layer": 1,
}


@fuzzed(st.sampled_from(sorted(SAE)), sizes, examples=150)
def test_autoencoder_of_a_config_that_is_taken_reconstructs(name, value):
    small = {"d_in": 16, "d_sae": 32, "k": 4}
    config = outcome(lambda: HierarchicalSaeConfig(**small | {name: value}))
    if config is not REFUSED:
        model = HierarchicalSaeModel(config)
        assert torch.isfinite(model(torch.randn(64, config.d_in)).loss)
        assert HierarchicalSaeConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@fuzzed(odd_values, examples=100)
def test_budget_that_is_taken_is_the_number_of_latents(sae, value):
    x = torch.randn(5, 16)
    encoded = outcome(lambda: sae.encode(x, k=value))

    if encoded is not REFUSED:
        assert encoded[0].shape == (5, 4 if value is None else int(value))


@fuzzed(odd_tensors, examples=60)
def test_activations_that_are_taken_are_measured(sae, x):
    result = outcome(lambda: evaluate_budgets(sae, x, [1, 4]))
    recorded = outcome(lambda: record_statistics(HierarchicalSaeModel(sae.config), x))

    if result is not REFUSED:
        assert result.tokens == x.numel() // 16
    if recorded is not REFUSED:
        assert x.shape[-1] == 16 and x.numel()


LOSS = {
    "top_indices": torch.tensor([[0, 3, 5], [7, 1, 2]]),
    "top_values": torch.tensor([[3.0, 2.0, 1.0], [2.0, 1.0, 0.5]]),
    "W_dec": torch.arange(32.0).view(8, 4).sin(),
    "b_dec": torch.ones(4),
    "target": torch.ones(2, 4),
}
LOSS_OPTIONS = {"budgets": [1, 3], "budget_weights": [0.5, 1.5], "backend": "torch"}


def plain_loss(budgets=(1, 3), weights=(0.5, 1.5)):
    """The loss of LOSS, budget by budget."""
    total = 0.0
    for budget, weight in zip(budgets, weights):
        rows = LOSS["W_dec"][LOSS["top_indices"][:, :budget]] * LOSS["top_values"][:, :budget, None]
        error = LOSS["b_dec"] + rows.sum(1) - LOSS["target"]
        total += weight * error.square().mean().item()
    return total / sum(weights)


@fuzzed(one_odd(LOSS | LOSS_OPTIONS), one_odd(LOSS, odd_tensors), examples=150)
def test_loss_is_the_loss_or_a_refusal(options, tensors):
    for arguments in (options, LOSS_OPTIONS | tensors):
        loss = outcome(partial(hierarchical_topk_loss, **arguments))
        if loss is not REFUSED and all(arguments[name] is LOSS[name] for name in LOSS):
            budgets = arguments["budgets"]
            budgets = [1, 2, 3] if budgets is None else [int(b) for b in budgets]
            weights = arguments["budget_weights"]
            weights = [1.0] * len(budgets) if weights is None else [float(w) for w in weights]
            assert loss.item() == pytest.approx(plain_loss(budgets, weights), rel=1e-5)


READ = {
    "text_column": "text",
    "context_length": 8,
    "batch_tokens": 16,
    "max_tokens": 10,
    "shuffle_tokens": 0,
    "seed": 0,
    "skip_first_position": True,
    "skip_special_tokens": False,
    "skip_tokens": [1],
    "max_norm_ratio": 5.0,
    "show_progress": False,
}


@fuzzed(one_odd(READ), examples=150)
def test_settings_of_reading_that_are_taken_are_plain(values):
    taken = outcome(lambda: ActivationSettings(**values))

    if taken is not REFUSED:
        for name in ("context_length", "batch_tokens", "shuffle_tokens", "seed"):
            assert type(getattr(taken, name)) is int and getattr(taken, name) == values[name]
        assert taken.skip_tokens is None or type(taken.skip_tokens) is list


EDIT = {"layer": 1, "k": 2, "max_norm": 3.0, "keep_error": False}
STEERED = {"layer": 1, "latent": 3, "strength": 1.0, "typical_activation": 2.0}
ABLATED = {"layer": 1, "latents": [1, 2], "k": 2, "max_norm": 3.0}
edits = [(splice, EDIT), (steer, STEERED), (ablate, ABLATED)]


@fuzzed(st.one_of([st.tuples(st.just(call), one_odd(valid)) for call, valid in edits]), examples=200)
def test_edits_give_finite_logits_and_leave_nothing_behind(llama, sae, tokens, edit):
    (call, options), before = edit, llama(tokens).logits

    def edited():
        with call(llama, sae, **options):
            return llama(tokens).logits

    logits = outcome(edited)

    assert logits is REFUSED or torch.isfinite(logits).all()
    assert torch.equal(llama(tokens).logits, before)


REBASED = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "feature_dim": 4,
    "head_dim": 8,
    "sliding_window": 4,
    "conv_kernel_size": 3,
    "norm_eps": 1e-5,
    "attention_eps": 1e-6,
    "max_position_embeddings": 32,
    "use_position_embeddings": False,
    "use_gamma": True,
    "use_beta": True,
    "use_qk_norm": True,
    "kernel": "rebased",
    "layer_types": ["conv", "linear_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "attention_bias": True,
    "attention_out_bias": False,
    "attention_dropout": 0.0,
    "use_softmax_qk_norm": True,
    "mlp_bias": False,
    "initializer_range": 0.02,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 2.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
rotations = st.one_of(one_odd(YARN), one_odd(LLAMA3), one_odd({"rope_type": "dynamic", "factor": 2.0}))


@fuzzed(st.one_of(one_odd(REBASED, sizes), rotations.map(lambda x: REBASED | {"rope_parameters": x})), examples=300)
def test_language_model_of_a_config_that_is_taken_predicts(values):
    config = outcome(lambda: RebasedConfig(**copy.deepcopy(values)))
    if config is not REFUSED:
        model = RebasedForCausalLM(config).eval()
        ids = torch.arange(6)[None] % config.vocab_size
        assert torch.isfinite(model(ids).logits).all()
        assert RebasedConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


QKV = {"q": torch.ones(1, 6, 2, 4), "k": torch.ones(1, 6, 2, 4), "v": torch.arange(96.0).view(1, 6, 2, 8)}
ATTENTION_OPTIONS = {
    "scale": 0.5,
    "eps": 1e-6,
    "initial_state": None,
    "return_state": False,
    "attention_mask": torch.ones(1, 6),
    "segment_ids": torch.zeros(1, 6, dtype=torch.int64),
    "chunk_size": 2,
    "backend": "torch",
}


@fuzzed(
    st.sampled_from([rebased_attention, taylor_attention]),
    st.one_of(
        one_odd(QKV | ATTENTION_OPTIONS), one_odd(QKV, odd_tensors), one_odd(QKV | ATTENTION_OPTIONS, odd_tensors)
    ),
    examples=250,
)
def test_attention_averages_values_or_refuses(attention, arguments):
    result = outcome(lambda: attention(**arguments))

    if result is not REFUSED and all(arguments[name] is QKV[name] for name in QKV):
        out = result[0] if isinstance(result, tuple) else result
        assert out.shape == QKV["v"].shape
        # an average of the values so far, or nothing where every key is hidden
        assert ((out >= -1e-3) & (out <= QKV["v"].amax() * 1.001)).all()


RECALL = {
    "num_examples": 3,
    "seq_len": 16,
    "num_pairs": 2,
    "vocab_size": 20,
    "power": 0.01,
    "random_non_queries": True,
    "seed": 0,
}


@fuzzed(one_odd(RECALL, sizes), examples=100)
def test_recall_examples_or_a_refusal(values):
    dataset = outcome(lambda: make_recall_dataset(**values))

    if dataset is not REFUSED:
        assert len(dataset) == values["num_examples"]
        assert all(len(row["input_ids"]) == values["seq_len"] for row in dataset)


odd_words = st.sampled_from(
    ["0", "-1", "nan", "inf", "-inf", "1.5", "two", "", "1e400", "99999999999999999999", "no/such/folder", "\x00", "é"]
)
COMMANDS = {
    bias_steer: {
        "inspect": ["--plot"],
        "lens": ["--top_k", "--reading", "--base_model"],
        "report": ["--data", "--output", "--rows", "--group_size", "--scales", "--top_k", "--compare_to"],
        "routes": ["--base_model"],
        "export": ["--format", "--output", "--gguf_in"],
    },
    hierarchical_sae: {
        "harvest": ["--tokens", "--context_length", "--dtype", "--layer", "--shard_tokens", "--max_norm_ratio"],
        "train": ["--layer", "--d_sae", "--k", "--budgets", "--steps", "--batch_size", "--learning_rate", "--seed"],
        "evaluate": ["--harvest", "--tokens", "--layer", "--budgets"],
        "dashboard": ["--layer", "--latents", "--max_megabytes", "--model"],
        "convert": ["--from", "--to", "--k"],
    },
}
calls = st.sampled_from([(main, command) for main, commands in COMMANDS.items() for command in commands])


@fuzzed(calls, st.data(), examples=150)
def test_command_lines_end_in_a_sentence(tmp_path_factory, call, data):
    (main, command), folder = call, tmp_path_factory.mktemp("folder")
    option = data.draw(st.sampled_from(COMMANDS[main][command]))
    positions = data.draw(st.lists(st.one_of(odd_words, st.just(str(folder))), max_size=2))
    with chdir(folder), pytest.raises(SystemExit) as stopped:
        main([command, *positions, option, data.draw(odd_words)])

    assert stopped.value.code not in (0, None)
