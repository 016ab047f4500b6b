"""Bases that vLLM can steer for TRL, without vLLM; tests/peft_bias_steer/serving drives the engine."""

import json
import types

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from trl import GRPOConfig, GRPOTrainer
from trl.generation import vllm_generation

from peft_bias_steer import BiasSteerConfig, set_steering_vectors, steering_vectors
from peft_bias_steer.serving.trl import check_vllm_sync, prepare_for_vllm, sync_vectors_only
from tests.peft_bias_steer.tiny_models import TWO_STEPS
from tests.peft_bias_steer.vllm_stand_in import StandInEngine


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


@pytest.mark.parametrize("plugin", [False, True])
def test_prepared_base_that_reads_images_too_is_of_its_own_class(plugin, tmp_path):
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    config = LlavaConfig(text_config=LlamaConfig(**SMALL), vision_config=vision, image_token_index=40)
    base = LlavaForConditionalGeneration(config).eval().bfloat16()

    prepared = prepare_for_vllm(base, tmp_path / "ready", plugin=plugin)

    assert type(prepared) is LlavaForConditionalGeneration and prepared.dtype == torch.bfloat16
    weights = prepared.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in base.state_dict().items())


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


@pytest.fixture
def make_trainer(tiny_language_model, tmp_path, monkeypatch):
    """A GRPOTrainer in vLLM's server mode on a base, and the engine that was started from a folder."""
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)

    def build(model, served, **config):
        engine = StandInEngine(served)
        monkeypatch.setattr(vllm_generation, "VLLMClient", lambda **options: engine)
        trainer = GRPOTrainer(
            model=model,
            processing_class=AutoTokenizer.from_pretrained(tiny_language_model, padding_side="left"),
            peft_config=BiasSteerConfig(**config),
            reward_funcs=lambda completions, **_: [sum(map(ord, text)) / 1000 for text in completions],
            train_dataset=Dataset.from_dict({"prompt": [f"{number} " for number in range(40)]}),
            args=GRPOConfig(
                output_dir=str(tmp_path / "out"),
                **TWO_STEPS,
                per_device_train_batch_size=4,
                num_generations=4,
                max_completion_length=4,
                use_vllm=True,
                vllm_mode="server",
            ),
        )
        return trainer, engine

    return build


@pytest.fixture
def prepare(tiny_language_model, tmp_path):
    def prepare(**options):
        return prepare_for_vllm(
            AutoModelForCausalLM.from_pretrained(tiny_language_model), tmp_path / "ready", **options
        )

    return prepare


def test_only_the_vectors_reach_a_server(make_trainer, prepare):
    model = prepare(plugin=True)
    trainer, engine = make_trainer(model, model.name_or_path)
    sync_vectors_only(trainer)

    assert check_vllm_sync(trainer) < 1e-4
    trainer.train()
    trained = steering_vectors(trainer.model)
    assert all(vector.any() for vector in trained.values())
    assert check_vllm_sync(trainer) < 1e-4
    assert engine.syncs[-1].keys() == {f"model.layers.{index}.steering_vector" for index in trained}
    assert all(torch.equal(engine.syncs[-1][f"model.layers.{i}.steering_vector"], v) for i, v in trained.items())

    # the active adapters, at their scales, and zero where no active one has a vector
    trainer.model.base_model.set_scale("default", 0.5)
    trainer.model.add_adapter("last", BiasSteerConfig(layers_to_transform=[1]))
    set_steering_vectors(trainer.model, {1: torch.ones(32)}, "last")
    trainer.model.base_model.set_adapter(["default", "last"])
    trainer.vllm_generation.sync_weights()
    assert torch.equal(engine.syncs[-1]["model.layers.0.steering_vector"], 0.5 * trained[0])
    assert torch.equal(engine.syncs[-1]["model.layers.1.steering_vector"], 0.5 * trained[1] + 1)
    trainer.model.set_adapter("last")
    trainer.vllm_generation.sync_weights()
    assert not engine.syncs[-1]["model.layers.0.steering_vector"].any()
    set_steering_vectors(trainer.model, {1: torch.full((32,), 3e38)}, "last")
    trainer.model.base_model.set_scale("last", 10)
    with pytest.raises(ValueError, match=r"expected finite vectors, got .* in what becomes model\.layers\.1"):
        trainer.vllm_generation.sync_weights()


def test_a_server_that_was_started_from_another_checkpoint_is_found_out(make_trainer, prepare, tiny_language_model):
    trainer, _ = make_trainer(prepare(plugin=True), tiny_language_model)
    sync_vectors_only(trainer)
    with pytest.raises(RuntimeError, match="does not sample from the steered policy.*start vLLM from the same folder"):
        check_vllm_sync(trainer)
    assert not any(vector.any() for vector in steering_vectors(trainer.model).values())


def test_sync_of_biases_alone_adds_the_vectors_to_those_of_the_base(make_trainer, prepare):
    model = prepare()
    torch.nn.init.normal_(model.model.layers[1].mlp.down_proj.bias)
    trainer, engine = make_trainer(model, model.name_or_path)
    with pytest.raises(ValueError, match=r"takes biases only together with the weights .* plugin=True"):
        sync_vectors_only(trainer)
    # a colocated engine takes them alone
    trainer.vllm_generation.mode = "colocate"
    sync_vectors_only(trainer)
    start = model.model.layers[1].mlp.down_proj.bias.clone()
    set_steering_vectors(trainer.model, {1: torch.ones(32)})
    biases = dict(trainer.vllm_generation._iter_named_params())
    assert list(biases) == ["model.layers.0.mlp.down_proj.bias", "model.layers.1.mlp.down_proj.bias"]
    assert torch.equal(biases["model.layers.1.mlp.down_proj.bias"], start + 1)
    assert torch.equal(model.model.layers[1].mlp.down_proj.bias, start), "nothing is merged"


def test_a_module_that_is_trained_whole_would_never_reach_vllm(make_trainer, prepare):
    model = prepare(plugin=True)
    trainer, engine = make_trainer(model, model.name_or_path, modules_to_save=["lm_head"])

    with pytest.raises(ValueError, match="vectors alone travel, and lm_head is trained too.*keep TRL's own sync"):
        sync_vectors_only(trainer)
    assert not engine.syncs


def test_what_cannot_be_synced_is_refused(make_trainer, tiny_language_model):
    trainer, _ = make_trainer(AutoModelForCausalLM.from_pretrained(tiny_language_model), tiny_language_model)
    trainer.vllm_generation.mode = "colocate"
    with pytest.raises(ValueError, match="the base has no biases that could receive the vectors"):
        sync_vectors_only(trainer)
    trainer.is_fsdp_enabled = True
    trainer.accelerator.state.fsdp_plugin = types.SimpleNamespace(fsdp_version=1)
    try:
        with pytest.raises(ValueError, match="set fsdp_version: 2"):
            sync_vectors_only(trainer)
    finally:
        del trainer.accelerator.state.fsdp_plugin


class SleepyEngine:
    """Keeps a record of what a colocated vLLM is told about its sleep."""

    def __init__(self):
        self.told = []

    def sleep(self, level):
        self.told.append(("sleep", level))

    def wake_up(self, tags):
        self.told.append(("wake_up", tags))

    def collective_rpc(self, method):
        self.told.append((method,))


def test_sleeping_engine_reads_the_base_again_and_keeps_it_from_then_on(make_trainer, prepare):
    model = prepare()
    trainer, _ = make_trainer(model, model.name_or_path)
    generation = trainer.vllm_generation
    generation.mode, generation.enable_sleep_mode, generation.llm = "colocate", True, SleepyEngine()
    generation.llm.sleep(level=2)  # so TRL leaves it, without weights
    sync_vectors_only(trainer)
    generation.llm.sleep(level=2)
    assert generation.llm.told == [("sleep", 2), ("wake_up", ["weights"]), ("reload_weights",), ("sleep", 1)]
