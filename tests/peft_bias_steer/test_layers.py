"""Layers that add a vector of their own to each token, without vLLM; tests/peft_bias_steer/serving runs the engine."""

import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from peft_bias_steer.serving.vllm import layers as vllm_layers
from peft_bias_steer.serving.vllm.layers import ROW, SteeredLayers


@pytest.fixture(autouse=True)
def vllm_without_an_engine(monkeypatch):
    """The one class of vLLM that is asked for: what stands where another pipeline stage has a layer."""
    module = types.ModuleType("vllm.model_executor.models.utils")
    module.PPMissingLayer = type("PPMissingLayer", (nn.Identity,), {})
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.PPMissingLayer


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Linear(8, 8)

    def forward(self, hidden, residual):
        return self.mlp(hidden), residual


class Model(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)


def steered(layers=None, **options):
    model = Model([Layer() for _ in range(3)] if layers is None else layers)
    return model, SteeredLayers(model, 4, **{"num_layers": 3, "width": 8, "max_tokens": 16} | options)


def outputs(model, hidden):
    with torch.no_grad():
        return [layer(hidden, hidden)[0] for layer in model.layers]


def test_each_token_moves_by_the_scaled_vector_of_its_own_row():
    model, choice = steered()
    hidden = torch.randn(6, 8)
    plain = outputs(model, hidden)
    vectors = {index: torch.randn(8) for index in range(3)}
    choice.write(2, "math", vectors)
    choice.write(3, "code", {1: torch.ones(8)})
    choice.choose([(0, 2, 2, 1.0), (3, 5, 3, -0.5)], 6)
    moved = outputs(model, hidden)

    for index, (before, after) in enumerate(zip(plain, moved)):
        move = torch.zeros(6, 8)
        move[0:2] = vectors[index]
        move[3:5] = -0.5 if index == 1 else 0.0
        torch.testing.assert_close(after, before + move)
        assert torch.equal(after[[2, 5]], before[[2, 5]])


def test_few_runs_of_tokens_and_many_are_steered_alike(monkeypatch):
    model, choice = steered()
    hidden = torch.randn(12, 8)
    for row in (1, 2, 3):
        choice.write(row, str(row), {index: torch.randn(8) for index in range(3)})
    choices = [(0, 1, 1, 0.5), (1, 2, 1, 0.5), (2, 5, 1, 1.0), (6, 8, 2, 1.0), (8, 12, 3, -2.0)]
    choice.choose(choices, 12)
    assert vllm_layers._runs[choice.device_rows.data_ptr()] == [(0, 2, 1, 0.5), *choices[2:]]
    few = outputs(model, hidden)
    monkeypatch.setattr(vllm_layers, "FEW", 0)

    for one, other in zip(few, outputs(model, hidden), strict=True):
        torch.testing.assert_close(one, other)


def test_what_a_step_before_has_chosen_is_forgotten():
    model, choice = steered()
    hidden = torch.randn(6, 8)
    plain = outputs(model, hidden)
    choice.write(1, "math", {0: torch.ones(8)})
    choice.choose([(0, 6, 1, 1.0)], 6)
    choice.choose([(1, 2, 1, 1.0)], 2)
    assert not choice.device_rows[2:].any(), "tokens that pad a later step are not steered"
    choice.choose([], 6)

    assert all(torch.equal(*pair) for pair in zip(outputs(model, hidden), plain))
    assert not choice.device_rows.any()


def test_half_precision_rounds_once_and_only_what_is_steered():
    model, choice = steered([Layer().bfloat16()], num_layers=1)
    hidden = torch.randn(4, 8, dtype=torch.bfloat16)
    plain = outputs(model, hidden)[0]
    vector = torch.randn(8)
    choice.write(1, "math", {0: vector})
    choice.choose([(0, 2, 1, 0.3)], 4)
    moved = outputs(model, hidden)[0]

    assert torch.equal(moved[:2], (plain[:2].float() + 0.3 * vector).bfloat16())
    assert torch.equal(moved[2:], plain[2:])


def test_layers_of_other_pipeline_stages_are_left_out(vllm_without_an_engine):
    model, choice = steered([vllm_without_an_engine(), Layer(), Layer()])
    choice.write(1, "math", {index: torch.full((8,), float(index)) for index in range(3)})

    assert {index: vector[0].item() for index, vector in choice.vectors(1).items()} == {1: 1.0, 2: 2.0}


def test_weights_of_a_trainer_become_the_vectors_of_the_policy():
    _, choice = steered()
    others = [("model.layers.0.mlp.weight", torch.ones(1)), ("model.norm.weight", torch.ones(1))]
    with pytest.raises(ValueError, match="expected an engine with an adapter named 'policy'"):
        list(choice.take_weights([("model.layers.1.steering_vector", torch.ones(8))]))
    choice.write(3, "policy", {})

    assert (
        list(choice.take_weights([others[0], ("model.layers.1.steering_vector", torch.ones(8)), others[1]])) == others
    )
    assert [vector.sum().item() for vector in choice.vectors(3).values()] == [0.0, 8.0, 0.0]
    with pytest.raises(ValueError, match=r"shape \(8,\) for layer 1, got \(7,\)"):
        list(choice.take_weights([("model.layers.1.steering_vector", torch.ones(7))]))


def request(row=None, pooling=False):
    arguments = None if row is None else {ROW: row}
    params = types.SimpleNamespace(extra_kwargs=arguments, extra_args=arguments)
    return types.SimpleNamespace(
        sampling_params=None if pooling else params, pooling_params=params if pooling else None
    )


def test_tokens_of_a_step_are_told_by_where_each_request_stands():
    requests = {
        "reads": request((1, 1.0, "prompt")),  # 4 tokens from position 2; its prompt has 5
        "plain": request(),
        "writes": request((2, 0.5, "generated")),  # one token, after its prompt
        "reads more": request((3, 1.0, "generated")),  # 3 tokens from position 0; the last was generated once before
        "all": request((4, 2.0, "all"), pooling=True),
    }
    batch = types.SimpleNamespace(
        req_ids=list(requests),
        num_prompt_tokens=np.array([5, 9, 6, 2, 2]),
        num_computed_tokens_cpu=np.array([2, 0, 7, 0, 0]),
    )
    runner = types.SimpleNamespace(input_batch=batch, requests=requests)

    assert list(vllm_layers._choices(runner, np.array([4, 2, 1, 3, 2]))) == [
        (0, 3, 1, 1.0),
        (6, 7, 2, 0.5),
        (9, 10, 3, 1.0),
        (10, 12, 4, 2.0),
    ]


@pytest.mark.parametrize(
    "architecture, model_impl", [("NewForCausalLM", "auto"), ("Qwen3ForCausalLM", "transformers")]
)
def test_class_that_was_not_proven_is_refused(architecture, model_impl):
    hf_config = types.SimpleNamespace(architectures=[architecture])
    config = types.SimpleNamespace(hf_config=hf_config, model_impl=model_impl)
    worker = types.SimpleNamespace(
        model_runner=None, vllm_config=types.SimpleNamespace(model_config=config), get_model=lambda: None
    )

    with pytest.raises(ValueError, match=f"it was not verified that vLLM's {architecture} is steered exactly"):
        vllm_layers.install(worker, 2)


def test_tables_stand_where_the_layers_are():
    class WithTower(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = nn.Linear(8, 8, device="meta")
            self.layers = nn.ModuleList(Layer() for _ in range(3))

    model = WithTower()
    choice = SteeredLayers(model, 4, num_layers=3, width=8, max_tokens=16)

    assert choice.device_rows.device.type == "cpu" and choice.vectors(0).keys() == {0, 1, 2}
