"""Bases that vLLM can steer for TRL, without vLLM; tests/peft_bias_steer/serving drives the engine."""

import json

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from peft_bias_steer import BiasSteerConfig, set_steering_vectors
from peft_bias_steer.serving.trl import prepare_for_vllm, sync_vectors_only


SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def make_base(model_type, **config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SMALL, **config})).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 13)[None]).logits


@pytest.mark.parametrize(
    "model_type, config, architecture, adapters",
    [
        ("llama", {}, "LlamaForCausalLM", None),
        ("mistral", {"sliding_window": None}, "LlamaForCausalLM", None),
        ("qwen3", {}, "Qwen3ForCausalLM", {"policy": None}),
        ("gemma2", {}, "Gemma2ForCausalLM", {"policy": None}),
    ],
)
def test_prepared_base_is_the_same_model_with_a_place_for_vectors(
    model_type, config, architecture, adapters, tmp_path
):
    base = make_base(model_type, **config)
    prepared = prepare_for_vllm(base, tmp_path / "ready")

    written = json.loads((tmp_path / "ready" / "config.json").read_text())
    assert written["architectures"] == [architecture]
    assert written.get("bias_steer", {}).get("adapters") == adapters
    assert prepared.name_or_path == str(tmp_path / "ready")
    torch.testing.assert_close(logits(prepared), logits(base))


def test_base_that_vllm_cannot_steer_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(
        ValueError, match="vLLM cannot hold steering vectors of BloomForCausalLM: .* Set use_vllm=False"
    ):
        prepare_for_vllm(make_base("bloom"), tmp_path / "ready")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("keep me")
    with pytest.raises(ValueError, match="must be empty"):
        prepare_for_vllm(make_base("qwen3"), tmp_path / "full")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "note"]


class Trainer:
    is_fsdp_enabled = is_deepspeed_enabled = False

    def __init__(self, model, sleeps=False):
        self.vllm_generation = type("Generation", (), {"model": model, "enable_sleep_mode": sleeps})()


def test_only_the_vectors_are_sent(tmp_path):
    model = get_peft_model(prepare_for_vllm(make_base("llama"), tmp_path / "llama"), BiasSteerConfig())
    set_steering_vectors(model, {1: torch.ones(32)})
    trainer = Trainer(model)
    sync_vectors_only(trainer)
    biases = dict(trainer.vllm_generation._iter_named_params())
    assert list(biases) == ["model.layers.0.mlp.down_proj.bias", "model.layers.1.mlp.down_proj.bias"]
    assert torch.equal(biases["model.layers.1.mlp.down_proj.bias"], torch.ones(32))
    assert not model.base_model.steering_layers["model.layers.0"].merged

    model = get_peft_model(prepare_for_vllm(make_base("gemma2"), tmp_path / "gemma2"), BiasSteerConfig())
    set_steering_vectors(model, {1: torch.ones(32)})
    trainer = Trainer(model)
    sync_vectors_only(trainer)
    vectors = dict(trainer.vllm_generation._iter_named_params())
    assert list(vectors) == ["model.layers.0.steering_vector", "model.layers.1.steering_vector"]
    assert torch.equal(vectors["model.layers.1.steering_vector"], torch.ones(32))


def test_engine_that_loses_its_weights_needs_them_all():
    with pytest.raises(ValueError, match="vllm_enable_sleep_mode=False"):
        sync_vectors_only(Trainer(None, sleeps=True))
