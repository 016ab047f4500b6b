"""Which stock class holds a merged model, and why there is none."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from peft_bias_steer import export_stock_checkpoint
from tests.peft_bias_steer.tiny_models import CLOSE, GPT2, SMALL, logits, make_base, steer


# model type, config, stock class that holds it
EXPORTED = [
    ("llama", SMALL, "LlamaForCausalLM"),
    ("llama", {**SMALL, "tie_word_embeddings": True, "attention_bias": True}, "LlamaForCausalLM"),
    ("mistral", {**SMALL, "sliding_window": None, "head_dim": 16}, "LlamaForCausalLM"),
    ("phi3", SMALL, "LlamaForCausalLM"),
    ("qwen2", {**SMALL, "tie_word_embeddings": True}, "LlamaForCausalLM"),
    ("granite", {**SMALL, "residual_multiplier": 0.25, "logits_scaling": 2.0}, "GraniteForCausalLM"),
    ("gpt2", GPT2, "GPT2LMHeadModel"),
    ("gpt_neox", SMALL, "GPTNeoXForCausalLM"),
    ("phi", SMALL, "PhiForCausalLM"),
    ("smollm3", SMALL, "SmolLM3ForCausalLM"),
    ("nemotron", SMALL, "NemotronForCausalLM"),
    ("arcee", SMALL, "ArceeForCausalLM"),
    ("helium", {**SMALL, "head_dim": 8}, "HeliumForCausalLM"),
    ("seed_oss", SMALL, "SeedOssForCausalLM"),
    ("ernie4_5", SMALL, "Ernie4_5ForCausalLM"),
    ("starcoder2", SMALL, "Starcoder2ForCausalLM"),
    ("opt", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}, "OPTForCausalLM"),
    ("falcon", {**SMALL, "bias": False}, "FalconForCausalLM"),
]


REFUSED = [
    ("qwen3", SMALL, "queries and keys"),
    ("gemma", SMALL, "embeddings and norms"),
    ("gemma2", SMALL, "a norm after the MLP"),
    ("olmo2", SMALL, "a norm after the MLP"),
    ("mixtral", {**SMALL, "num_local_experts": 4}, "a router weighs the outputs of its experts"),
    ("mistral", {**SMALL, "sliding_window": 16}, "sliding window of 16"),
    ("qwen2", {**SMALL, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding window of 8"),
    ("phi3", {**SMALL, "sliding_window": 16}, "sliding window of 16"),
    ("phi3", {**SMALL, "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
                                           "long_factor": [2.0] * 4}}, "longrope"),
    ("phi3", {**SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
     "rotates only a part"),
]  # fmt: skip


@pytest.mark.parametrize("model_type, config, stock_class", EXPORTED)
def test_stock_checkpoint_has_the_steered_logits(model_type, config, stock_class, tmp_path):
    base = make_base(model_type, **config)
    unsteered = logits(base)
    model = steer(base)
    expected = logits(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    export_stock_checkpoint(model, tmp_path / "out")

    reloaded, report = getattr(transformers, stock_class).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == stock_class
    torch.testing.assert_close(logits(reloaded), expected, **CLOSE)
    assert (expected - unsteered).abs().max() > 0.1
    assert model.state_dict().keys() == weights.keys(), "the model itself is left as it was"
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("model_type, config, reason", REFUSED)
def test_checkpoint_that_no_stock_class_can_hold_is_refused_with_the_reason(model_type, config, reason, tmp_path):
    model = steer(make_base(model_type, **config))
    expected = logits(model)

    with pytest.raises(ValueError, match=f"(?i){reason}"):
        export_stock_checkpoint(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert torch.equal(logits(model), expected)
