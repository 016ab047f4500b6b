"""Llama, Mistral, Qwen2 and Qwen3 as ReBased models: the configuration, the weights, and where feature maps start."""

import copy
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from .configuration_rebased import RebasedConfig
from .linear_attention_rebased import RebasedMappedAttention


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
# What the linear attention of replaced layers may be, which no Llama says.
OF_REPLACED_LAYERS = (
    "feature_dim",
    "kernel",
    "use_qk_norm",
    "use_gamma",
    "use_beta",
    "qk_norm_per_head",
    "attention_eps",
    "linear_attention_window",
)


def read_llama(
    model: PreTrainedModel, layers: Iterable[int], options: dict[str, Any], input_ids: torch.Tensor | None = None
) -> tuple[RebasedConfig, dict[str, torch.Tensor]]:
    """
    The configuration of a Llama whose `layers` are linear attention, and a copy of its weights.

    Raises:
        ValueError: If the model is of another class or holds what a ReBased model cannot, for an index out of range, for an
            option that is not one of `OF_REPLACED_LAYERS`, and for text that is not (rows, seq) of its tokens.
    """
    if type(model).__name__ not in LLAMAS:
        raise ValueError(f"model must be a {', '.join(LLAMAS[:-1])} or {LLAMAS[-1]}, got {type(model).__name__}")
    old = model.config
    wanted = list(layers) if isinstance(layers, Iterable) else [None]
    if any(type(i) is not int or not 0 <= i < old.num_hidden_layers for i in wanted):
        raise ValueError(f"layers must be a list of indices from 0 to {old.num_hidden_layers - 1}, got {layers!r}")
    if unknown := sorted(set(options) - set(OF_REPLACED_LAYERS)):
        raise ValueError(f"options may be {', '.join(OF_REPLACED_LAYERS)}, got {', '.join(unknown)}")
    given = [*options, *(["input_ids"] if input_ids is not None else [])]
    if given and not wanted:
        raise ValueError(f"{', '.join(given)} are options of replaced layers, of which there are none; give layers")
    if input_ids is not None:
        _check_text(input_ids, old.vocab_size)
    if old.hidden_act != "silu":
        raise ValueError(f"hidden_act of the model must be silu, got {old.hidden_act!r}; a ReBased model has no other")
    # A quantised weight of torchao says that it is floating, but is no plain tensor.
    if any(x.is_meta or not x.is_floating_point() or type(x.data) is not torch.Tensor for x in model.parameters()):
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
    config = RebasedConfig(
        **{name: getattr(old, name) for name in SAME},
        **_other_names(model, wanted),
        use_feature_map=bool(wanted),
        **options,
    )
    state_dict = {
        name: x.detach().clone()
        for name, x in model.state_dict().items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }
    return config, state_dict


def _check_text(input_ids: Any, vocab_size: int) -> None:
    if not isinstance(input_ids, torch.Tensor):
        got: Any = type(input_ids).__name__
    elif input_ids.dim() != 2 or input_ids.numel() == 0:
        got = tuple(input_ids.shape)
    elif input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        got = input_ids.dtype
    elif not 0 <= int(input_ids.min()) <= int(input_ids.max()) < vocab_size:
        got = f"some from {int(input_ids.min())} to {int(input_ids.max())}"
    else:
        return
    raise ValueError(
        f"input_ids must be a tensor (rows, seq) of at least one row and token, integers from 0 to {vocab_size - 1}, got {got}"
    )


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


class AttentionCall(NamedTuple):
    """What an attention layer was called with, and what it gave."""

    hidden_states: torch.Tensor  # (batch, seq, hidden_size)
    position_embeddings: tuple[torch.Tensor, torch.Tensor]  # (batch or 1, seq, head_dim) each
    output: torch.Tensor  # (batch, seq, hidden_size)


@contextmanager
def recorded_attention(model: PreTrainedModel, layers: Iterable[int]) -> Generator[dict[int, AttentionCall]]:
    """The last call of the attention of each of a Llama's `layers`, while the context is open."""
    calls: dict[int, AttentionCall] = {}

    def record(layer_idx: int, call: dict[str, Any], output: Any) -> None:
        calls[layer_idx] = AttentionCall(call["hidden_states"], call["position_embeddings"], output[0])

    handles = [
        model.get_decoder()
        .layers[i]
        .self_attn.register_forward_hook(
            lambda module, args, kwargs, output, i=i: record(i, kwargs, output), with_kwargs=True
        )
        for i in layers
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def start_feature_maps(
    mixers: dict[int, RebasedMappedAttention], model: PreTrainedModel, input_ids: torch.Tensor
) -> None:
    """
    Let the map of each head of keys, and of the queries that share it, keep their principal directions over a text.

    mixers: the replaced layers by their index in the Llama
    input_ids: (rows, seq)
    """
    moments = {}
    with recorded_attention(model, mixers) as calls:
        for row in input_ids.split(1):
            model.get_decoder()(row.to(model.device), use_cache=False)
            for i, call in calls.items():
                query, key, _ = mixers[i].project(call.hidden_states, call.position_embeddings)
                moments[i] = moments.get(i, 0) + _second_moments(query, key)
    for i, mixer in mixers.items():
        # Ascending; a map to more numbers than a head has keeps random ones for the rest.
        directions = torch.linalg.eigh(moments[i]).eigenvectors.flip(-1)[..., : mixer.config.feature_dim]
        for each in (mixer.q_map, mixer.k_map):
            starts = directions.repeat_interleave(each.weight.shape[0] // directions.shape[0], dim=0)
            each.weight[..., : directions.shape[-1]] = starts.to(each.weight.dtype)


def _second_moments(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """(1, heads, seq, head_dim) each -> (num_key_value_heads, head_dim, head_dim), float64: keys and the mean of their queries."""
    group = query.shape[1] // key.shape[1]
    x = torch.cat([query[0].unflatten(0, (-1, group)).flatten(1, 2) / group**0.5, key[0]], dim=1).double()
    return x.mT @ x
