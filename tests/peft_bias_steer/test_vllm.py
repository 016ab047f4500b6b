"""The half of the vLLM plugin that needs no vLLM; tests/peft_bias_steer/serving runs the engine."""

import copy
import types

import pytest
import torch
from torch import nn

import peft_bias_steer.serving.vllm as vllm_plugin
from peft_bias_steer.serving.vllm import (
    SteeredModel,
    SteeringWorker,
    set_steering_scale,
    set_steering_vectors,
    vllm_overrides,
)


def test_steered_layer_class_adds_the_scaled_vector_to_what_a_layer_returns(llama, tokens, add_by_plain_hooks):
    base = llama()
    steered, oracle = copy.deepcopy(base), copy.deepcopy(base)
    vectors = torch.randn(3, 32)
    add_by_plain_hooks(oracle.model.layers, 0.5 * vectors)
    for layer, vector in zip(steered.model.layers, vectors):
        layer.register_buffer("steering_vector", vector)
        layer.register_buffer("steering_scale", torch.tensor(0.5))
        layer.__class__ = vllm_plugin._steered_layer_class(type(layer))

    with torch.no_grad():
        torch.testing.assert_close(steered(tokens).logits, oracle(tokens).logits)
        assert (steered(tokens).logits - base(tokens).logits).abs().max() > 0.1


def test_layer_that_hands_on_the_residual_apart_keeps_it():
    class Layer(nn.Module):
        def forward(self, hidden, residual):
            return hidden, residual

    layer = vllm_plugin._steered_layer_class(Layer)()
    layer.register_buffer("steering_vector", torch.ones(4))
    layer.register_buffer("steering_scale", torch.tensor(2.0))
    hidden, residual = layer(torch.zeros(3, 4, dtype=torch.bfloat16), torch.full((3, 4), 5.0))

    assert torch.equal(hidden, torch.full((3, 4), 2.0, dtype=torch.bfloat16))
    assert torch.equal(residual, torch.full((3, 4), 5.0))


class Engine:
    """Stands in for `vllm.LLM`: calls the worker's methods in this process, as vLLM does."""

    def __init__(self, model, cache_is_emptied=True, extension=""):
        self.worker = types.SimpleNamespace(get_model=lambda: model)
        config = types.SimpleNamespace(parallel_config=types.SimpleNamespace(worker_extension_cls=extension))
        self.llm_engine = types.SimpleNamespace(vllm_config=config)
        self.reset_prefix_cache = lambda: cache_is_emptied

    def collective_rpc(self, method, args):
        method = getattr(SteeringWorker, method) if isinstance(method, str) else method
        return [method(self.worker, *args)]


def steered_model(*held: int) -> SteeredModel:
    """A model of four layers of width 8, of which this pipeline stage holds some."""
    model = object.__new__(SteeredModel)
    model.num_steerable_layers = 4
    layer = lambda: types.SimpleNamespace(steering_vector=torch.zeros(8), steering_scale=torch.ones(()))  # noqa: E731
    model.steered_layers = {index: layer() for index in held}
    return model


@pytest.mark.parametrize("extension", ["", "peft_bias_steer.serving.vllm.SteeringWorker"])
def test_each_pipeline_stage_takes_its_own_layers(extension):
    model = steered_model(2, 3)
    set_steering_vectors(Engine(model, extension=extension), {1: torch.ones(8), 2: torch.full((8,), 2.0)})
    set_steering_scale(Engine(model, extension=extension), 0.25)

    assert torch.equal(model.steered_layers[2].steering_vector, torch.full((8,), 2.0))
    assert not model.steered_layers[3].steering_vector.any()
    assert [layer.steering_scale.item() for layer in model.steered_layers.values()] == [0.25, 0.25]


@pytest.mark.parametrize(
    "vectors, message",
    [
        ({4: torch.ones(8)}, "layers 0 to 3, got one for layer 4"),
        ({2: torch.ones(7)}, r"shape \(8,\) for layer 2, got \(7,\)"),
        ({2: torch.full((8,), torch.nan)}, "finite vectors, got NaN or infinity in that of layer 2"),
    ],
)
def test_vectors_of_another_model_change_nothing(vectors, message):
    model = steered_model(2, 3)

    with pytest.raises(ValueError, match=message):
        set_steering_vectors(Engine(model), {3: torch.ones(8), **vectors})
    assert not any(layer.steering_vector.any() for layer in model.steered_layers.values())


def test_engine_with_a_stock_class_is_refused():
    class Qwen3ForCausalLM:
        pass

    with pytest.raises(ValueError, match="BiasSteerQwen3ForCausalLM"):
        set_steering_vectors(Engine(Qwen3ForCausalLM()), {0: torch.ones(8)})


def test_a_prefix_cache_that_stays_full_is_an_error():
    with pytest.raises(RuntimeError, match="requests are running"):
        set_steering_vectors(Engine(steered_model(0), cache_is_emptied=False), {0: torch.ones(8)})
    with pytest.raises(ValueError, match="finite scale, got inf"):
        set_steering_scale(Engine(steered_model(0)), float("inf"))


def test_a_class_that_would_drop_the_vectors_gets_no_overrides():
    assert vllm_overrides("adapter", "Qwen3ForCausalLM")["architectures"] == ["BiasSteerQwen3ForCausalLM"]
    with pytest.raises(ValueError, match="got BloomForCausalLM: vLLM would drop the vectors"):
        vllm_overrides("adapter", "BloomForCausalLM")
    with pytest.raises(AttributeError, match="BiasSteerBloomForCausalLM"):
        vllm_plugin.BiasSteerBloomForCausalLM  # noqa: B018
