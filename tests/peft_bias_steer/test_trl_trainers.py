import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainerCallback,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from peft_bias_steer import BiasSteerConfig, BiasSteerFloat32Callback
from tests.peft_bias_steer.tiny_models import TWO_STEPS


def late_in_the_alphabet(completions, **kwargs):
    """A reward that differs between any two samples, so that every step moves the vectors."""
    return [sum(map(ord, text)) / 1000 for text in completions]


@pytest.fixture
def train(tiny_language_model, tmp_path):
    """Builds a GRPOTrainer over the tiny model; returns it untrained."""

    def build(model=None, peft_config=None, callbacks=(), **options):
        tokenizer = AutoTokenizer.from_pretrained(tiny_language_model, padding_side="left")
        defaults = {
            "output_dir": str(tmp_path),
            **TWO_STEPS,
            "per_device_train_batch_size": 4,
            "num_generations": 4,
            "max_completion_length": 4,
        }
        return GRPOTrainer(
            model=model if model is not None else AutoModelForCausalLM.from_pretrained(tiny_language_model),
            processing_class=tokenizer,
            peft_config=peft_config,
            reward_funcs=late_in_the_alphabet,
            train_dataset=Dataset.from_dict({"prompt": [f"{number} " for number in range(40)]}),
            callbacks=list(callbacks),
            args=GRPOConfig(**{**defaults, **options}),
        )

    return build


def vectors_of(model, adapter_name="default"):
    return [layer.vector(adapter_name) for layer in model.base_model.steering_layers.values()]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.1},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"bf16": True},
    ],
    ids=["plain", "beta", "checkpointing", "bf16"],
)
def test_grpo_trains_the_vectors_and_nothing_else(train, options):
    trainer = train(peft_config=BiasSteerConfig(), **options)
    model = trainer.model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()

    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if ".bias_steer_vector." in name}
    assert all(vector.dtype == torch.float32 for vector in vectors_of(model))


NUMBERS = [str(number) for number in range(8)]
PREFERENCES = {"prompt": NUMBERS, "chosen": [" 1"] * 8, "rejected": [" 2"] * 8}
SAMPLED = {"num_generations": 4, "max_completion_length": 4}


@pytest.mark.parametrize(
    ("trainer_class", "config_class", "columns", "options"),
    [
        (SFTTrainer, SFTConfig, {"text": NUMBERS}, {}),
        (SFTTrainer, SFTConfig, {"text": NUMBERS}, {"packing": True, "max_length": 8}),
        (DPOTrainer, DPOConfig, PREFERENCES, {}),
        (RewardTrainer, RewardConfig, PREFERENCES, {}),
        (RLOOTrainer, RLOOConfig, {"prompt": NUMBERS}, {**SAMPLED, "beta": 0.1}),
    ],
    ids=["sft", "packed", "dpo", "reward", "rloo"],
)
def test_other_trainers_of_trl_train_the_vectors_and_resume(
    tiny_language_model, tmp_path, trainer_class, config_class, columns, options
):
    rewards = trainer_class is RewardTrainer
    auto_class = AutoModelForSequenceClassification if rewards else AutoModelForCausalLM

    def build():
        torch.manual_seed(0)
        return trainer_class(
            model=auto_class.from_pretrained(tiny_language_model, **{"num_labels": 1} if rewards else {}),
            processing_class=AutoTokenizer.from_pretrained(tiny_language_model),
            peft_config=BiasSteerConfig(task_type="SEQ_CLS" if rewards else "CAUSAL_LM"),
            train_dataset=Dataset.from_dict(columns),
            args=config_class(str(tmp_path), **{**TWO_STEPS, "save_strategy": "steps", "save_steps": 1}, **options),
            **({"reward_funcs": late_in_the_alphabet} if trainer_class is RLOOTrainer else {}),
        )

    whole, resumed = build(), build()
    before = {name: parameter.detach().clone() for name, parameter in whole.model.named_parameters()}
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))

    after = dict(whole.model.named_parameters())
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    trained = {name for name in before if ".bias_steer_vector." in name or ".modules_to_save." in name}
    assert changed == trained and len(trained) == 2 + rewards
    assert all(torch.equal(after[name], other) for name, other in resumed.model.named_parameters())
    assert len(load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")) == len(trained)


def test_reference_adapter_is_a_copy_of_the_trained_one(train, tiny_language_model, set_vectors):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_language_model), BiasSteerConfig())
    start = set_vectors(model)
    trainer = train(model=model, beta=0.1)
    assert all(torch.equal(ref, s) for ref, s in zip(vectors_of(model, "ref"), start))
    trainer.train()

    assert all(torch.equal(ref, s) for ref, s in zip(vectors_of(model, "ref"), start))
    assert not any(torch.equal(vector, s) for vector, s in zip(vectors_of(model), start))


def test_vectors_on_a_bfloat16_base_stay_in_float32(train, tiny_language_model):
    base = AutoModelForCausalLM.from_pretrained(tiny_language_model, dtype=torch.bfloat16)
    trainer = train(model=base, peft_config=BiasSteerConfig(), bf16=True)
    trainer.train()

    assert all(vector.dtype == torch.float32 and vector.abs().max() > 0 for vector in vectors_of(trainer.model))


@pytest.mark.pinned
@pytest.mark.parametrize(("callbacks", "dtype"), [((), torch.bfloat16), ([BiasSteerFloat32Callback()], torch.float32)])
def test_callback_keeps_the_vectors_on_a_quantised_base_in_float32(train, tiny_language_model, callbacks, dtype):
    base = AutoModelForCausalLM.from_pretrained(
        tiny_language_model, quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.bfloat16
    )
    trainer = train(model=base, peft_config=BiasSteerConfig(), callbacks=callbacks, bf16=True)
    trainer.train()

    assert all(vector.dtype == dtype and vector.abs().max() > 0 for vector in vectors_of(trainer.model))


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def test_resumed_run_ends_with_the_vectors_of_an_uninterrupted_one(train, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    whole = train(peft_config=BiasSteerConfig(), output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    halves = str(tmp_path / "halves")
    train(peft_config=BiasSteerConfig(), output_dir=halves, callbacks=[StopAfter(2)], **options).train()
    resumed = train(peft_config=BiasSteerConfig(), output_dir=halves, **options)
    resumed.train(resume_from_checkpoint=True)

    for vector, expected in zip(vectors_of(resumed.model), vectors_of(whole.model)):
        assert expected.abs().max() > 0
        assert torch.equal(vector, expected)
    weights = load_file(tmp_path / "halves" / "checkpoint-4" / "adapter_model.safetensors")
    assert len(weights) == 2


def test_trained_adapter_is_saved_by_the_trainer_and_loaded(train, tiny_language_model, tmp_path):
    trainer = train(peft_config=BiasSteerConfig())
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_language_model), tmp_path / "saved")

    for vector, expected in zip(vectors_of(loaded), vectors_of(trainer.model)):
        assert torch.equal(vector, expected)
