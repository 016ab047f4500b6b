"""What would go wrong without a word in PEFT, TRL or transformers is done right, or refused."""

import copy
import pickle
import types

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from peft_bias_steer import BiasSteerConfig, bias_ready_checkpoint, steering_vectors
from tests.peft_bias_steer.tiny_models import CLOSE, GPT2, SMALL, logits, make_base, steer


def call_as_trl(function):
    """Calls `function` from a module of TRL's name, as TRL's weight sync does."""
    trl = types.ModuleType("trl.generation.vllm_generation")
    exec("def sync(function):\n    return function()", vars(trl))
    return trl.sync(function)


def test_merge_inside_a_vllm_sync_raises_on_a_base_that_cannot_receive_the_vectors():
    model = steer(make_base())
    expected = logits(model)

    with pytest.raises(RuntimeError, match="prepare_for_vllm"):
        call_as_trl(model.merge_adapter)
    assert not model.base_model.model.model.layers[0].bias_steer.merged
    assert torch.equal(logits(model), expected)
    model.merge_adapter()


def test_trl_itself_meets_the_refusal_when_it_collects_the_weights_for_vllm(tmp_path):
    from contextlib import nullcontext

    from trl.generation.vllm_generation import VLLMGeneration

    bias_ready_checkpoint(make_base(), tmp_path)
    ready, base = steer(AutoModelForCausalLM.from_pretrained(tmp_path)), steer(make_base())
    generation = VLLMGeneration.__new__(VLLMGeneration)
    generation._dist = types.SimpleNamespace(is_fsdp=False, gather_params=lambda parameters: nullcontext())

    generation.model = ready
    sent = {name: tensor.clone() for name, tensor in generation._iter_named_params()}
    assert torch.equal(sent["model.layers.1.mlp.down_proj.bias"], steering_vectors(ready)[1])
    assert set(sent) == {name for name, _ in AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters()}
    generation.model = base
    with pytest.raises(RuntimeError, match="would silently sample from the base model"):
        list(generation._iter_named_params())


@pytest.mark.parametrize("model_type, config", [("llama", SMALL), ("granite", SMALL), ("gpt2", GPT2)])
def test_unloaded_model_saves_what_stock_from_pretrained_reads_back(model_type, config, tmp_path):
    model = steer(make_base(model_type, **config))
    expected = logits(model)

    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)

    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, **CLOSE)
    torch.testing.assert_close(logits(merged), expected, **CLOSE)


@pytest.mark.parametrize("model_type, hint", [("mistral", "export_stock_checkpoint"), ("qwen3", "queries and keys")])
def test_unloaded_model_that_cannot_be_saved_completely_refuses_at_save_time(model_type, hint, tmp_path):
    model = steer(make_base(model_type, **SMALL, sliding_window=None))
    merged = model.merge_and_unload()

    for clone in (merged, copy.deepcopy(merged), pickle.loads(pickle.dumps(merged))):
        with pytest.raises(ValueError, match=f"would lose the merged steering vectors.*{hint}"):
            clone.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_merged_vectors_on_plain_linear_modules_are_saved_or_refused(tmp_path):
    model = steer(make_base(), target_modules=["q_proj", "o_proj"])
    expected = logits(model)
    model.merge_and_unload().save_pretrained(tmp_path / "attention")

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "attention")
    torch.testing.assert_close(logits(reloaded), expected, **CLOSE)
    head = steer(make_base(), target_modules=["lm_head"]).merge_and_unload()
    with pytest.raises(ValueError, match="would lose"):
        head.save_pretrained(tmp_path / "head")


def test_steered_classifier_saves_what_it_computes(tmp_path):
    config = AutoConfig.for_model("llama", **SMALL, num_labels=3)
    model = get_peft_model(
        AutoModelForSequenceClassification.from_config(config),
        BiasSteerConfig(init_weights=False, task_type="SEQ_CLS"),
    ).eval()
    expected = logits(model)

    model.merge_and_unload().save_pretrained(tmp_path)

    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(reloaded), expected, **CLOSE)
