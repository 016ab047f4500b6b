"""Llama, Mistral, Qwen2 and Qwen3 as ReBased models: the configuration and the weights."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from .configuration_rebased import RebasedConfig


LLAMAS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
# What both configurations call the same.
SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "initializer_range",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
# A replaced layer has its own in the place of these.
REPLACED = ("q_proj", "k_proj", "q_norm", "k_norm")


def read_llama(model: PreTrainedModel, layers: Iterable[int]) -> tuple[RebasedConfig, dict[str, torch.Tensor]]:
    """
    The configuration of a Llama whose `layers` are linear attention, and a copy of the weights that stay.

    Raises:
        ValueError: If the model is of another class or holds what a ReBased model cannot, or for an index out of range.
    """
    if type(model).__name__ not in LLAMAS:
        raise ValueError(f"model must be a {', '.join(LLAMAS[:-1])} or {LLAMAS[-1]}, got {type(model).__name__}")
    old = model.config
    wanted = list(layers) if isinstance(layers, Iterable) else [None]
    if any(type(i) is not int or not 0 <= i < old.num_hidden_layers for i in wanted):
        raise ValueError(f"layers must be a list of indices from 0 to {old.num_hidden_layers - 1}, got {layers!r}")
    if old.hidden_act != "silu":
        raise ValueError(f"hidden_act of the model must be silu, got {old.hidden_act!r}; a ReBased model has no other")
    if any(x.is_meta or not x.is_floating_point() for x in model.parameters()):
        raise ValueError(
            "the weights of model must be in memory and not quantised; load it with dtype= and no device_map"
        )
    with torch.device("meta"):
        expected = type(model)(copy.deepcopy(old)).state_dict()
    if strange := sorted(expected.keys() ^ model.state_dict().keys()):
        raise ValueError(
            f"model must have the tensors of its configuration, got {len(strange)} others or missing: {', '.join(strange[:3])}; "
            "merge or remove its adapters"
        )
    config = RebasedConfig(**{name: getattr(old, name) for name in SAME}, **_other_names(model, wanted))
    new = tuple(f"model.layers.{i}.self_attn.{name}." for i in wanted for name in REPLACED)
    state_dict = {
        name: x.detach().clone()
        for name, x in model.state_dict().items()
        if not name.startswith(new) and not (config.tie_word_embeddings and name == "lm_head.weight")
    }
    return config, state_dict


def _other_names(model: PreTrainedModel, layers: list[int]) -> dict[str, Any]:
    """Entries of the configuration that a Llama writes otherwise, or in its code."""
    old, window, first = model.config, getattr(model.config, "sliding_window", None), model.get_decoder().layers[0]
    if type(model).__name__.startswith("Qwen"):
        layer_types = list(old.layer_types)
    elif type(model).__name__.startswith("Mistral") and window is not None:
        layer_types = ["sliding_attention"] * old.num_hidden_layers
    else:
        layer_types = ["full_attention"] * old.num_hidden_layers
    return {
        "head_dim": first.self_attn.head_dim,
        "layer_types": ["linear_attention" if i in layers else kind for i, kind in enumerate(layer_types)],
        **({"sliding_window": window} if "sliding_attention" in layer_types else {}),
        "rope_parameters": {name: copy.copy(x) for name, x in old.rope_parameters.items() if x is not None},
        "attention_bias": first.self_attn.q_proj.bias is not None,
        "attention_out_bias": first.self_attn.o_proj.bias is not None,
        "use_softmax_qk_norm": hasattr(first.self_attn, "q_norm"),
        "mlp_bias": first.mlp.up_proj.bias is not None,
        "norm_eps": old.rms_norm_eps,
        "attention_dropout": old.attention_dropout or 0.0,
        "tie_word_embeddings": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
    }
