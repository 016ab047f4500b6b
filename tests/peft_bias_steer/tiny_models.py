"""Steered models of random weights, small enough to compare every logit."""

from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from peft_bias_steer import BiasSteerConfig


SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
INPUT_IDS = torch.arange(1, 41).view(2, 20) % 97
# float32 after three layers of width 32: the sums are only ordered differently
CLOSE = {"atol": 2e-6, "rtol": 1e-5}

# arguments of any of TRL's trainers: two steps on a CPU that leave nothing behind
TWO_STEPS: dict[str, Any] = {
    "max_steps": 2,
    "learning_rate": 0.05,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}


def make_base(model_type="llama", **config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(config or SMALL))).eval()


def steer(base, **config):
    """A steered model whose vectors are far from zero."""
    return get_peft_model(base, BiasSteerConfig(init_weights=False, **config)).eval()


def logits(model, input_ids=None):
    with torch.no_grad():
        return model(input_ids=INPUT_IDS if input_ids is None else input_ids).logits
