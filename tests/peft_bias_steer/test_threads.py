"""Threads that share a model each get what they asked for."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from weakref import WeakKeyDictionary

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaForSequenceClassification

from peft_bias_steer import BiasSteerConfig, layer


@pytest.fixture
def shared(llama, set_vectors):
    model = get_peft_model(llama(), BiasSteerConfig(task_type="CAUSAL_LM"), adapter_name="x")
    model.add_adapter("y", BiasSteerConfig(layers_to_transform=[0, 2]))
    set_vectors(model, "x")
    set_vectors(model, "y")
    return model.eval()


@torch.no_grad()
def logits(model, tokens, **kwargs):
    return model(tokens, **kwargs).logits


def meet_in_the_middle(model, first, second):
    """Runs both at once. Each waits for the other in the middle of its forward pass: neither is alone in it."""
    both = threading.Barrier(2, timeout=60)

    def wait(module, args):
        both.wait()

    handle = model.get_base_model().model.layers[1].register_forward_pre_hook(wait)
    try:
        with ThreadPoolExecutor(2) as pool:
            return [future.result() for future in [pool.submit(first), pool.submit(second)]]
    finally:
        handle.remove()


def with_names(model, tokens, name):
    return lambda: logits(model, tokens, adapter_names=[name] * len(tokens))


def disabled(model, tokens):
    def run():
        with model.disable_adapter():
            return logits(model, tokens)

    return run


def at_scale(model, tokens, scale):
    def run():
        model.set_scale("x", scale)
        return logits(model, tokens)

    return run


def test_each_thread_gets_its_own_adapters(shared, tokens):
    calls = [with_names(shared, tokens, name) for name in ("x", "y")]
    for result, call in zip(meet_in_the_middle(shared, *calls), calls):
        assert torch.equal(result, call())


def test_names_in_one_thread_leave_the_active_adapter_to_another(shared, tokens):
    calls = [with_names(shared, tokens, "y"), lambda: logits(shared, tokens)]
    for result, call in zip(meet_in_the_middle(shared, *calls), calls):
        assert torch.equal(result, call())


def test_disabling_in_one_thread_leaves_the_adapter_to_another(shared, llama, tokens):
    steered = logits(shared, tokens)
    off, on = meet_in_the_middle(shared, disabled(shared, tokens), lambda: logits(shared, tokens))
    assert torch.equal(off, logits(llama(), tokens)) and torch.equal(on, steered)

    off, named = meet_in_the_middle(shared, disabled(shared, tokens), with_names(shared, tokens, "y"))
    assert torch.equal(off, logits(llama(), tokens)) and torch.equal(named, with_names(shared, tokens, "y")())


def test_two_threads_that_disable_leave_the_model_enabled(shared, tokens):
    steered, named = logits(shared, tokens), with_names(shared, tokens, "y")()
    inside, outside = threading.Barrier(2, timeout=60), threading.Event()

    def first():
        with shared.disable_adapter():
            inside.wait()
        outside.set()

    def second():
        with shared.disable_adapter():
            inside.wait()
            assert outside.wait(60)

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(first), pool.submit(second)]:
            future.result()
    assert torch.equal(logits(shared, tokens), steered)
    assert torch.equal(with_names(shared, tokens, "y")(), named)


def test_each_thread_gets_its_own_scale_and_others_follow_the_last_one(shared, tokens):
    shared.set_scale("x", 0.25)
    expected = {scale: at_scale(shared, tokens, scale)() for scale in (0.5, 2.0)}
    calls = [at_scale(shared, tokens, scale) for scale in (0.5, 2.0)]
    for result, scale in zip(meet_in_the_middle(shared, *calls), (0.5, 2.0)):
        assert torch.equal(result, expected[scale])

    shared.set_scale("x", 0.5)
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(logits, shared, tokens).result(), expected[0.5])


def test_setting_a_scale_copies_those_of_the_thread_once_for_all_layers(shared, monkeypatch):
    copies = []

    def copy(scales):
        copies.append(WeakKeyDictionary(scales))
        return copies[-1]

    monkeypatch.setattr(layer, "WeakKeyDictionary", copy)
    shared.set_scale("x", 0.5)
    shared.set_scale("y", 2.0)

    assert len(copies) == 2


def test_a_new_adapter_of_an_old_name_starts_at_scale_one(shared, tokens, set_vectors):
    shared.set_scale("y", 0.5)
    shared.delete_adapter("y")
    shared.add_adapter("y", BiasSteerConfig())
    vectors = set_vectors(shared, "y")

    layers = shared.base_model.steering_layers.values()
    assert all(torch.equal(layer.sum_vectors(["y"]), vector) for layer, vector in zip(layers, vectors))


def test_each_thread_generates_with_its_own_adapters(shared, tokens):
    def generate(name):
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return shared.generate(input_ids=tokens, adapter_names=[name] * len(tokens), **options)

    expected = {name: generate(name) for name in ("x", "y", "__base__")}
    assert not torch.equal(expected["x"], expected["y"])
    results = meet_in_the_middle(shared, lambda: generate("x"), lambda: generate("y"))
    assert torch.equal(results[0], expected["x"]) and torch.equal(results[1], expected["y"])


def test_a_thread_started_with_a_copy_of_the_context_sees_what_its_starter_asked_for(shared, llama, tokens):
    with ThreadPoolExecutor(1) as pool, shared.disable_adapter():
        unsteered = pool.submit(copy_context().run, logits, shared, tokens).result()

    assert torch.equal(unsteered, logits(llama(), tokens))


def test_one_model_is_disabled_and_no_other(shared, llama, tokens, set_vectors):
    other = get_peft_model(llama(), BiasSteerConfig()).eval()
    set_vectors(other)
    expected = logits(other, tokens)

    with shared.disable_adapter():
        assert torch.equal(logits(other, tokens), expected)


def test_disabling_ends_with_an_exception_and_can_be_nested(shared, llama, tokens):
    steered, base = logits(shared, tokens), logits(llama(), tokens)
    with pytest.raises(KeyError), shared.disable_adapter():
        with shared.disable_adapter():
            shared.set_scale("x", 1.0)
        assert torch.equal(logits(shared, tokens), base)
        raise KeyError
    assert torch.equal(logits(shared, tokens), steered)


def test_disabling_keeps_what_is_frozen(shared):
    shared.set_adapter("x", inference_mode=True)
    with shared.disable_adapter():
        pass

    assert not any(parameter.requires_grad for parameter in shared.parameters())


def test_a_merged_model_or_one_with_a_trained_head_is_disabled_as_a_whole(llama, tokens, set_vectors):
    merged = get_peft_model(llama(), BiasSteerConfig()).eval()
    set_vectors(merged)
    merged.merge_adapter()
    with merged.disable_adapter():
        torch.testing.assert_close(logits(merged, tokens), logits(llama(), tokens))

    def classifier():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(llama(num_labels=3, pad_token_id=0).config).eval()

    model = get_peft_model(classifier(), BiasSteerConfig(task_type="SEQ_CLS", init_weights=False)).eval()
    nn.init.ones_(model.base_model.model.score.modules_to_save["default"].weight)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), logits(classifier(), tokens))


def test_a_compiled_model_follows_disabling_and_scales(shared, llama, tokens):
    expected = {scale: at_scale(shared, tokens, scale)() for scale in (1.0, 0.5)}
    torch.compiler.reset()
    compiled = torch.compile(shared, fullgraph=True, backend="eager")

    for scale in (1.0, 0.5):
        shared.set_scale("x", scale)
        torch.testing.assert_close(logits(compiled, tokens), expected[scale])
    with shared.disable_adapter():
        torch.testing.assert_close(logits(compiled, tokens), logits(llama(), tokens))
    torch.testing.assert_close(logits(compiled, tokens), expected[0.5])


def test_a_compiled_base_follows_the_names_of_a_batch(shared, tokens):
    expected = with_names(shared, tokens, "y")()
    torch.compiler.reset()
    shared.get_base_model().model.compile(fullgraph=True, backend="eager")

    torch.testing.assert_close(with_names(shared, tokens, "y")(), expected)


def test_replicas_of_data_parallel_follow_disabling(shared, llama, tokens):
    with shared.disable_adapter():
        replicas = [layer._replicate_for_data_parallel() for layer in shared.base_model.steering_layers.values()]
        with ThreadPoolExecutor(1) as pool:  # replicas run in threads of their own
            assert all(pool.submit(lambda replica=replica: replica.call.disabled).result() for replica in replicas)
    assert not any(layer.call.disabled for layer in shared.base_model.steering_layers.values())
