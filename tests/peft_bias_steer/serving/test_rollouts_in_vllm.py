"""TRL's trainer with vLLM on a CPU samples from the steered policy. Run by `make test-serving`."""

import os


os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

import functools
import gc

import pytest


vllm = pytest.importorskip("vllm", reason="make test-serving runs it in an environment of its own")

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl.generation import vllm_generation  # noqa: E402

from peft_bias_steer import BiasSteerConfig, set_steering_vectors, steering_vectors  # noqa: E402
from peft_bias_steer.serving.trl import check_vllm_sync, prepare_for_vllm, sync_vectors_only  # noqa: E402
from tests.conftest import byte_tokenizer  # noqa: E402
from tests.peft_bias_steer.tiny_models import TWO_STEPS  # noqa: E402


@pytest.fixture
def base(tmp_path):
    """Builds a tiny random base of a model type, with a byte-level tokenizer."""
    tokenizer = byte_tokenizer()

    def build(model_type, **config):
        torch.manual_seed(0)
        ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        options = {**sizes, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, **ids, **config}
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **options)
        )
        model.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base")

    yield build
    gc.collect()


@pytest.fixture
def make_trainer(monkeypatch, tmp_path):
    """Builds a GRPOTrainer whose vLLM runs in float32, which TRL has no setting for; vLLM would choose bfloat16."""
    engine = functools.partial(vllm.LLM, dtype="float32", enforce_eager=True)
    monkeypatch.setattr(vllm_generation, "LLM", engine)

    def build(model, **options):
        return GRPOTrainer(
            model=model,
            processing_class=byte_tokenizer(),
            peft_config=BiasSteerConfig(),
            reward_funcs=lambda completions, **_: [sum(map(ord, text)) / 1000 for text in completions],
            train_dataset=Dataset.from_dict({"prompt": [f"{number} " for number in range(40)]}),
            args=GRPOConfig(
                output_dir=str(tmp_path / "out"),
                **TWO_STEPS,
                per_device_train_batch_size=4,
                num_generations=4,
                max_completion_length=4,
                use_vllm=True,
                vllm_mode="colocate",
                vllm_max_model_length=64,
                **options,
            ),
        )

    return build


def sent(trainer) -> dict[str, torch.Tensor]:
    """What TRL's own weight iterator yields for the next sync."""
    return {name: weight.clone() for name, weight in trainer.vllm_generation._iter_named_params()}


def test_stock_class_with_biases_follows_the_policy_in_training(base, make_trainer, tmp_path):
    trainer = make_trainer(prepare_for_vllm(base("llama"), tmp_path / "ready"))
    set_steering_vectors(trainer.model, {0: torch.ones(64)})
    whole = sent(trainer)
    set_steering_vectors(trainer.model, {0: torch.zeros(64)})
    sync_vectors_only(trainer)

    assert check_vllm_sync(trainer) < 1e-4
    assert all(not vector.any() for vector in steering_vectors(trainer.model).values()), "the probe is taken back"
    trainer.train()
    assert all(vector.any() for vector in steering_vectors(trainer.model).values())
    assert check_vllm_sync(trainer) < 1e-4

    # of what TRL itself sends, vLLM takes on a CPU only what it has not packed for its kernels: the biases
    biases = {name: weight for name, weight in whole.items() if name.endswith("mlp.down_proj.bias")}
    assert biases.keys() == sent(trainer).keys() == {f"model.layers.{index}.mlp.down_proj.bias" for index in range(2)}
    trainer.vllm_generation._iter_named_params = biases.items
    trainer.vllm_generation.sync_weights()
    engine = trainer.vllm_generation.llm.apply_model(lambda model: model.model.layers[0].mlp.down_proj.bias.clone())
    assert torch.equal(engine[0], torch.ones(64))


@pytest.mark.parametrize("model_type", ["qwen3", "gemma2"])
def test_plugin_class_is_sent_the_vectors_and_nothing_else(base, make_trainer, tmp_path, model_type):
    trainer = make_trainer(prepare_for_vllm(base(model_type), tmp_path / "ready"))
    sync_vectors_only(trainer)

    assert check_vllm_sync(trainer) < 1e-4
    assert {name: tuple(weight.shape) for name, weight in sent(trainer).items()} == {
        "model.layers.0.steering_vector": (64,),
        "model.layers.1.steering_vector": (64,),
    }
    trainer.train()
    assert check_vllm_sync(trainer) < 1e-4


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_vectors_arrive_as_a_server_takes_weights(base, make_trainer, tmp_path, model_type):
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    trainer = make_trainer(prepare_for_vllm(base(model_type), tmp_path / "ready", plugin=True))
    sync_vectors_only(trainer)
    generation = trainer.vllm_generation

    def sync():
        """What vLLM's NCCLWeightTransferEngine does with a transfer, but for the broadcast."""
        engine = generation.llm.llm_engine
        model = engine.model_executor.driver_worker.model_runner.get_model()
        initialize_layerwise_reload(model)
        model.load_weights(list(generation._iter_named_params()))
        finalize_layerwise_reload(model, engine.model_config)
        generation.llm.reset_prefix_cache()

    generation.sync_weights = sync
    assert check_vllm_sync(trainer) < 1e-4
    trainer.train()
    assert check_vllm_sync(trainer) < 1e-4


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_engine_that_sleeps_keeps_the_base_and_follows_the_policy(
    base, make_trainer, tmp_path, monkeypatch, model_type
):
    """vLLM on a CPU does not sleep: here level 2 overwrites the weights, as it drops them on a GPU."""

    class Engine(vllm.LLM):
        def __init__(self, enable_sleep_mode, **options):
            assert enable_sleep_mode
            super().__init__(**options, dtype="float32", enforce_eager=True)
            self.levels = []

        def sleep(self, level):
            self.levels.append(level)
            if level == 2:
                self.apply_model(
                    lambda model: [parameter.data.fill_(1e3) for parameter in model.parameters()] and None
                )
            super().sleep(level=level)

    ready = prepare_for_vllm(base(model_type), tmp_path / "ready")
    monkeypatch.setattr(vllm_generation, "LLM", Engine)
    trainer = make_trainer(ready, vllm_enable_sleep_mode=True)
    sync_vectors_only(trainer)

    assert check_vllm_sync(trainer) < 1e-4
    trainer.train()
    assert check_vllm_sync(trainer) < 1e-4
    levels = trainer.vllm_generation.llm.levels
    assert levels[0] == 2 and len(levels) > 3 and set(levels[1:]) == {1}


def test_engine_that_lacks_the_biases_is_found_out(base, make_trainer, tmp_path):
    plain = base("llama")
    ready = prepare_for_vllm(plain, tmp_path / "ready")
    # a server that was started on another checkpoint than the trainer's
    ready.config._name_or_path = str(tmp_path / "base")
    ready.name_or_path = str(tmp_path / "base")
    trainer = make_trainer(ready)
    sync_vectors_only(trainer)

    with pytest.raises(RuntimeError, match="does not sample from the steered policy"):
        check_vllm_sync(trainer)


def test_plain_base_is_refused_before_the_first_step(base, make_trainer, tmp_path):
    trainer = make_trainer(base("llama"))

    with pytest.raises(RuntimeError, match="no biases that could receive the steering vectors"):
        check_vllm_sync(trainer)
    set_steering_vectors(trainer.model, {0: torch.ones(64)})
    with pytest.raises(RuntimeError, match="no biases that could receive the steering vectors"):
        trainer.train()
    assert trainer.state.global_step == 0
