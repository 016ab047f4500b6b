"""The language model that is read: its layers, their outputs, edits of them, and whether an autoencoder fits."""

import _thread
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_hierarchical_sae import HierarchicalSaeConfig, HierarchicalSaeModel, evaluate_in_model, iterate_activations
from hf_hierarchical_sae.language_model import (
    check_length,
    check_vocabulary,
    decoder_layers,
    evaluation_mode,
    forward_hook,
    layer_indices,
    next_token_logits,
    resumed,
    resumes,
    unembedding_weight,
)
from hf_hierarchical_sae.sites import find_site, read_sites, site_hook


IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture(scope="module")
def model(tiny_language_model):
    return AutoModelForCausalLM.from_pretrained(tiny_language_model).eval()


def layer_outputs(model, layers, ids, mask):
    return read_sites(model, [find_site(model, layer) for layer in layers], ids, mask)


def edited_output(model, layer, edit):
    return site_hook(find_site(model, layer), edit)


def make_sae(**options):
    return HierarchicalSaeModel(HierarchicalSaeConfig(**{"d_in": 32, "d_sae": 64, "k": 5, **options}))


def test_layers_are_counted_from_either_end(model):
    assert layer_indices(model, 1) == layer_indices(model, [-1]) == [1]
    assert layer_indices(model, [1, 0, 1]) == [1, 0, 1]
    with pytest.raises(ValueError, match=r"layer must be in \[0, 1\], got \[0, 2\]"):
        layer_indices(model, [0, 2])


def test_outputs_are_those_of_the_model_s_own_record_in_the_order_asked_for(model):
    with torch.no_grad():
        # the last entry comes after the final norm, so only the first layer's output is on record
        expected = model(IDS, output_hidden_states=True).hidden_states[1]
    hooks = [list(layer._forward_hooks) for layer in decoder_layers(model)]

    second, first, again = layer_outputs(model, [1, 0, 1], IDS, torch.ones_like(IDS))

    assert torch.equal(first, expected)
    assert torch.equal(second, again) and not torch.equal(second, first)
    assert [list(layer._forward_hooks) for layer in decoder_layers(model)] == hooks


def test_an_edited_output_is_what_later_layers_see_until_the_end(model):
    with torch.no_grad():
        clean = model(IDS).logits
        with edited_output(model, 0, lambda states: states * 0):
            edited = model(IDS).logits
        with edited_output(model, 0, lambda states: None):
            watched = model(IDS).logits

    assert not torch.equal(edited, clean)
    assert torch.equal(watched, clean) and torch.equal(model(IDS).logits, clean)


def test_evaluation_mode_is_left_as_it_was_found(model):
    sae = make_sae().train()
    with evaluation_mode(sae), evaluation_mode(model):
        assert not sae.training and not model.training

    assert sae.training and not model.training


def test_every_part_is_left_in_its_own_mode_by_an_exception_too(model):
    wrapper = torch.nn.Sequential(torch.nn.Dropout().eval(), torch.nn.Sequential(torch.nn.Dropout())).train()
    wrapper[0].eval()
    modes = [part.training for part in wrapper.modules()]
    assert modes == [True, False, True, True]

    with pytest.raises(KeyError), evaluation_mode(wrapper):
        assert not any(part.training for part in wrapper.modules())
        raise KeyError

    assert [part.training for part in wrapper.modules()] == modes


def run_at_once(*functions):
    """Each function in a thread of its own, called with a barrier that all of them pass together."""
    barrier = threading.Barrier(len(functions), timeout=30)
    with ThreadPoolExecutor(len(functions)) as pool:
        return [running.result() for running in [pool.submit(function, barrier) for function in functions]]


def test_threads_see_their_own_edits_only(model):
    def logits():
        with torch.no_grad():
            return model(IDS).logits

    def edited(factor):
        with edited_output(model, 0, lambda states: states * factor):
            return logits()

    def edited_beside_others(factor, barrier):
        with edited_output(model, 0, lambda states: states * factor):
            barrier.wait()
            found = [logits() for _ in range(5)]
            barrier.wait()
        return found

    def unedited_beside_others(barrier):
        barrier.wait()
        found = [logits() for _ in range(5)]
        barrier.wait()
        return found

    def read_beside_others(barrier):
        barrier.wait()
        found = [layer_outputs(model, [0], IDS, torch.ones_like(IDS))[0] for _ in range(5)]
        barrier.wait()
        return found

    expected = [edited(0.0), edited(3.0), logits(), layer_outputs(model, [0], IDS, torch.ones_like(IDS))[0]]
    found = run_at_once(
        partial(edited_beside_others, 0.0),
        partial(edited_beside_others, 3.0),
        unedited_beside_others,
        read_beside_others,
    )

    for tries, one in zip(found, expected):
        assert all(torch.equal(one_try, one) for one_try in tries)


def test_a_thread_that_is_given_the_context_sees_its_edits(model):
    with torch.no_grad(), edited_output(model, 0, lambda states: states * 0), ThreadPoolExecutor(1) as pool:
        expected = model(IDS).logits
        inside = pool.submit(copy_context().run, model, IDS).result().logits

    torch.testing.assert_close(inside.detach(), expected, rtol=0, atol=0)


def test_edits_are_seen_where_autograd_repeats_a_pass_in_a_thread_of_its_own(model):
    # Backward passes on a GPU run in threads that Python did not start, gradient checkpointing with them.
    found, done = [], threading.Event()

    def repeat():
        with torch.no_grad():
            found.append(model(IDS).logits)
        done.set()

    with edited_output(model, 0, lambda states: states * 0):
        with torch.no_grad():
            expected = model(IDS).logits
        _thread.start_new_thread(repeat, ())
        assert done.wait(30)

    assert torch.equal(found[0], expected)


def test_edits_end_in_any_order(model):
    with torch.no_grad():
        clean = model(IDS).logits
        first, second = (edited_output(model, 0, lambda states: states * 0) for _ in range(2))
        first.__enter__(), second.__enter__()
        first.__exit__(None, None, None), second.__exit__(None, None, None)

        assert torch.equal(model(IDS).logits, clean)


@pytest.mark.parametrize("layer", [True, 1.0, [1, 0.0], "1", None])
def test_what_is_no_layer_number_is_refused(model, layer):
    with pytest.raises(ValueError, match=r"layer must be (an integer|integers), got"):
        layer_indices(model, layer)


def test_layer_numbers_of_numpy_are_numbers(model):
    assert layer_indices(model, numpy.int64(-1)) == layer_indices(model, numpy.array([1])) == [1]
    assert all(type(index) is int for index in layer_indices(model, numpy.array([1, 0])))


def test_contexts_longer_than_a_model_s_positions_are_refused(model):
    gpt2 = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=1, n_positions=16)
    )
    bloom = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", hidden_size=8, n_layer=1, n_head=1))

    check_length(gpt2, "context_length", 16), check_length(bloom, "context_length", 10**6)
    with pytest.raises(ValueError, match="has 16 positions: context_length must be at most 16, got 17"):
        check_length(gpt2, "context_length", 17)


def test_tokens_outside_the_vocabulary_are_refused(model):
    size = model.config.vocab_size
    check_vocabulary(model, torch.tensor([[size - 1]])), check_vocabulary(model, torch.empty(0, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"the tokenizer gave the token {size}, .* a vocabulary of {size}"):
        check_vocabulary(model, torch.tensor([[0, size]]))


SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
LLAMA_LIKE = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
# Layers return a tensor, a tuple or a list; windows, states, experts and biases are made in the model or in a layer.
RESUMED = {
    "llama": LLAMA_LIKE,
    "gemma2": LLAMA_LIKE,
    "gemma3_text": {**LLAMA_LIKE, "sliding_window": 4, "sliding_window_pattern": 2},
    "qwen3": LLAMA_LIKE,
    "phi": SIZES,
    "mixtral": {**LLAMA_LIKE, "num_local_experts": 3},
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2},
    "bloom": {"hidden_size": 16, "n_layer": 3, "n_head": 2},
    "openai-gpt": {"n_embd": 16, "n_layer": 3, "n_head": 2},
    "jamba": {
        **LLAMA_LIKE,
        "num_experts": 2,
        "use_mamba_kernels": False,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_dt_rank": 2,
    },
    "lfm2": {**LLAMA_LIKE, "full_attn_idxs": [1]},
    "recurrent_gemma": {**LLAMA_LIKE, "lru_width": 16},
}


def causal(architecture, dtype=torch.float32, **sizes):
    config = AutoConfig.for_model(
        architecture, vocab_size=300, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Far from uniform predictions: a change then shows.
            parameter.mul_(6.0 if parameter.ndim == 2 else 1.0)
    return model


def shrink(states):
    return 0.5 * states + 0.1


def both_ways(model, layer, edit=shrink):
    """Logits with an edited output: from whole passes, and from what comes after the layer, twice in turn."""
    ids, mask = IDS, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    outputs = []
    with (
        torch.no_grad(),
        forward_hook(decoder_layers(model)[layer], lambda module, args, output: outputs.append(output)),
    ):
        layer_outputs(model, [layer], ids, mask)
    with torch.no_grad(), edited_output(model, layer, edit):
        whole = next_token_logits(model, ids, mask)
    with torch.no_grad():
        rest = [next_token_logits(resumed(model, layer, outputs[0], edit), ids, mask) for _ in range(2)]
        clean = next_token_logits(model, ids, mask)
    assert not torch.equal(whole, clean)
    return whole, *rest


@pytest.mark.parametrize("architecture", RESUMED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_comes_after_a_layer_gives_the_logits_of_a_whole_pass_to_the_bit(architecture, dtype):
    model = causal(architecture, dtype, **RESUMED[architecture])

    for layer in range(3):
        assert resumes(model, layer, IDS, torch.ones_like(IDS))
        whole, rest, again = both_ways(model, layer)
        assert torch.equal(rest, whole) and torch.equal(again, whole)


def test_only_what_comes_after_the_layer_is_computed_and_the_model_is_left_alone():
    model, called = causal("llama", **LLAMA_LIKE), []
    for index, layer in enumerate(decoder_layers(model)):
        layer.mlp.register_forward_hook(lambda *given, index=index: called.append(index))
    before = {name: (part, list(vars(part))) for name, part in model.named_modules()}
    states = layer_outputs(model, [1], IDS, torch.ones_like(IDS))[0]
    called.clear()

    next_token_logits(resumed(model, 1, states, shrink), IDS, torch.ones_like(IDS))

    assert called == [2]
    assert {name: (part, list(vars(part))) for name, part in model.named_modules()} == before
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, next_token_logits(model, IDS, torch.ones_like(IDS)))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_what_others_changed_in_the_same_layers_is_there_once(layer):
    model = causal("llama", **LLAMA_LIKE)

    with edited_output(model, 1, lambda states: 3 * states), edited_output(model, 0, lambda states: -states):
        assert resumes(model, layer, IDS, torch.ones_like(IDS))
        whole, rest, _ = both_ways(model, layer)

    assert torch.equal(rest, whole)


def test_a_peft_model_is_resumed():
    model = causal("llama", **LLAMA_LIKE)
    adapted = get_peft_model(model, LoraConfig(target_modules=["v_proj"], init_lora_weights=False)).eval()

    assert resumes(adapted, 1, IDS, torch.ones_like(IDS))
    whole, rest, _ = both_ways(adapted, 1)
    assert torch.equal(rest, whole)


def share_keys_and_values():
    sizes = {"num_kv_shared_layers": 1, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 300}
    return causal("gemma4_text", **LLAMA_LIKE, **sizes, global_head_dim=8, layer_types=["full_attention"] * 3)


def bind_forward():
    """As accelerate does where a model is spread over devices: what a copy runs is the model itself."""
    model = causal("llama", **LLAMA_LIKE)
    model.model.forward = model.model.forward
    return model


def run_the_first_layer_again():
    model = causal("llama", **LLAMA_LIKE)

    def again(module, args, output):
        rotation = torch.ones(1, 4, 8), torch.zeros(1, 4, 8)
        output.last_hidden_state = module.layers[0](output.last_hidden_state, position_embeddings=rotation)

    model.model.register_forward_hook(again)
    return model


@pytest.mark.parametrize("build", [share_keys_and_values, bind_forward, run_the_first_layer_again])
def test_a_model_that_uses_its_first_layers_otherwise_takes_whole_passes(build):
    assert not resumes(build(), 1, IDS, torch.ones_like(IDS))


@pytest.mark.parametrize("on_disk", [["model.layers.0"], ["model.embed_tokens", "lm_head", "model.norm"]])
def test_a_model_with_weights_on_disk_is_read_and_evaluated_as_one_in_memory(
    model, tiny_language_model, tmp_path, on_disk
):
    parts = ["embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb"]
    places = dict.fromkeys(["lm_head", *(f"model.{part}" for part in parts)], "cpu")
    spread = AutoModelForCausalLM.from_pretrained(
        tiny_language_model, device_map={**places, **dict.fromkeys(on_disk, "disk")}, offload_folder=tmp_path
    ).eval()
    assert any(parameter.is_meta for parameter in spread.parameters())
    tokenizer, texts = AutoTokenizer.from_pretrained(tiny_language_model), ["to be or not to be"] * 3
    sae = make_sae(layer=0)
    streams = [iterate_activations(each, tokenizer, texts, 0, show_progress=False) for each in (model, spread)]

    assert torch.equal(*(next(stream) for stream in streams))
    one, other = (evaluate_in_model(sae, stream, [2]).to_dict() for stream in streams)
    assert one == other
    assert torch.equal(*map(unembedding_weight, (model, spread)))


@pytest.mark.parametrize("quantize", ["torchao", "dynamic"])
def test_the_unembedding_is_read_in_whatever_form_it_is_quantised(tiny_language_model, quantize):
    model = AutoModelForCausalLM.from_pretrained(tiny_language_model).eval()
    expected = unembedding_weight(model)
    if quantize == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    else:
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})

    found = unembedding_weight(model)
    assert found.shape == expected.shape and (found - expected).abs().max() < 0.01 * expected.abs().max()
