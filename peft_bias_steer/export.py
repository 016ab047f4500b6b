"""Steered models as files that other software loads: stock checkpoints with biases, and GGUF files for llama.cpp."""

import copy
import os
import struct
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .config import BiasSteerConfig
from .layer import BiasSteerLayer
from .residual import MergeSite, find_layers, merge_sites, residual_width


logger = logging.get_logger(__name__)

# config fields that give linear modules a bias and do nothing else
BIAS_SWITCHES = ("mlp_bias", "attention_bias", "use_bias", "bias")
# classes that compute what Llama computes, and the switches under which Llama has their biases
LLAMA_COUSINS = {
    "MistralForCausalLM": ("mlp_bias",),
    "Phi3ForCausalLM": ("mlp_bias",),
    "Qwen2ForCausalLM": ("mlp_bias", "attention_bias"),
}
WHY_NO_STOCK_FORM = {
    "Qwen3ForCausalLM": "it normalises queries and keys, which no class with MLP biases does",
    "GemmaForCausalLM": "it scales embeddings and norms as no class with MLP biases does",
}


def steering_vectors(model: PeftModel, adapter_name: str = "default") -> dict[int, torch.Tensor]:
    """
    The vectors of one adapter by the index of their layer.

    Args:
        model (`PeftModel`): A model with a BiasSteer adapter.
        adapter_name (`str`, *optional*, defaults to `"default"`): Name of the adapter.

    Returns:
        `dict[int, torch.Tensor]`: Copies of the vectors, unscaled, each (hidden_size,).

    Raises:
        ValueError: If there is no such adapter, or if it steers modules other than layers.
    """
    layers = _layers_by_index(model, [adapter_name])
    return {index: layer.vector(adapter_name).detach().clone() for index, layer in layers.items()}


def set_steering_vectors(
    model: PeftModel, vectors: dict[int, torch.Tensor], adapter_name: str = "default"
) -> None:
    """
    Overwrites the vectors of one adapter. Layers that `vectors` does not name keep theirs.

    Args:
        model (`PeftModel`): A model with a BiasSteer adapter.
        vectors (`dict[int, torch.Tensor]`): New vectors by index of their layer, each (hidden_size,).
        adapter_name (`str`, *optional*, defaults to `"default"`): Name of the adapter.

    Raises:
        ValueError: If a layer is not steered, a size is wrong or the adapter is merged. Nothing is changed then.
    """
    layers = _layers_by_index(model, [adapter_name])
    unknown = sorted(set(vectors) - set(layers))
    if unknown:
        raise ValueError(f"expected vectors for layers among {sorted(layers)}, got some for {unknown}")
    for index, vector in vectors.items():
        if vector.shape != (layers[index].size,):
            raise ValueError(
                f"expected a vector of shape ({layers[index].size},) for layer {index}, got {tuple(vector.shape)}"
            )
        if adapter_name in layers[index].merged_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged: call unmerge_adapter() before changing its vectors")
    for index, vector in vectors.items():
        layers[index].vector(adapter_name).data.copy_(vector)


def _layers_by_index(model: PeftModel, adapter_names: list[str]) -> dict[int, BiasSteerLayer]:
    base = model.get_base_model()
    unknown = [name for name in adapter_names if name not in model.peft_config]
    foreign = [name for name, config in model.peft_config.items() if not isinstance(config, BiasSteerConfig)]
    if unknown or foreign:
        raise ValueError(f"expected BiasSteer adapters, got {adapter_names}; the model has {model.peft_config}")
    _, hosts = find_layers(base, model.peft_config[adapter_names[0]].layers_pattern)
    index_of = {host: index for index, host in enumerate(hosts)}
    layers = {}
    for name, layer in model.base_model.steering_layers.items():
        if any(adapter in layer.bias_steer_vector for adapter in adapter_names):
            if layer.get_base_layer() not in index_of:
                raise ValueError(
                    f"expected vectors on decoder layers, but {name} is steered, which has no layer index: save the "
                    "adapter with save_pretrained() instead"
                )
            layers[index_of[layer.get_base_layer()]] = layer
    return layers


def _active_vectors(model: PeftModel) -> dict[int, torch.Tensor]:
    names = model.active_adapters
    layers = _layers_by_index(model, names)
    return {index: layer.sum_vectors(names).detach().float().cpu() for index, layer in layers.items()}


def export_stock_checkpoint(
    model: PeftModel | PreTrainedModel,
    output_dir: str | os.PathLike,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """
    Writes a checkpoint of stock transformers classes that computes what the steered model computes.

    The vectors become biases. Where the model's own class has no room for them, another stock class is used: Llama,
    SmolLM3, Granite and others with `mlp_bias=True`; Mistral, Phi3 and Qwen2 as `LlamaForCausalLM`. The checkpoint is
    loaded again and its logits are compared before it appears under `output_dir`.

    Args:
        model (`PeftModel` or `PreTrainedModel`):
            The steered model, with its active adapters at their present scale, or what `merge_and_unload` returned.
        output_dir (`str` or `os.PathLike`): Folder to write. It must be empty or not exist.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer to save along. By default the one of the checkpoint that the base model was loaded from.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): Size above which the weights are split.

    Raises:
        ValueError: If no stock class computes the same, with the reason. Nothing is written then.
    """
    if isinstance(model, PeftModel):
        base, weights = model.get_base_model(), _merged_weights(model)
    else:
        base, weights = model, model.state_dict()
    _write_checkpoint(model, base, weights, output_dir, tokenizer=tokenizer, max_shard_size=max_shard_size)


def bias_ready_checkpoint(
    base: PreTrainedModel,
    output_dir: str | os.PathLike,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """
    Writes the same model with zero biases where steering vectors merge.

    vLLM ignores a bias that its checkpoint did not have. Training on this checkpoint instead of `base` lets TRL's
    vLLM sync deliver the vectors.

    Args:
        base (`PreTrainedModel`): A model without adapters.
        output_dir (`str` or `os.PathLike`): Folder to write. It must be empty or not exist.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): As in [`export_stock_checkpoint`].
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): Size above which the weights are split.

    Raises:
        ValueError: If no stock class has such biases, with the reason. Nothing is written then.
    """
    _, layers = find_layers(base)
    zero = torch.zeros(residual_width(base), device=base.device)
    sites = [site for layer in layers for site in merge_sites(layer)]
    originals = [site.bias for site in sites]
    try:
        for site, original in zip(sites, originals):
            site.write(original, zero)
        weights = base.state_dict()
    finally:
        for site, original in zip(sites, originals):
            site.restore(original)
    _write_checkpoint(base, base, weights, output_dir, tokenizer=tokenizer, max_shard_size=max_shard_size)


def _merged_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    _layers_by_index(model, model.active_adapters)
    was_merged = any(layer.merged for layer in model.base_model.steering_layers.values())
    if not was_merged:
        model.merge_adapter()
    try:
        weights = model.get_base_model().state_dict()
    finally:
        if not was_merged:
            model.unmerge_adapter()
    return {key: weight for key, weight in weights.items() if ".bias_steer." not in key}


@dataclass
class StockForm:
    """A stock class and config, and the weights it needs; `added` names the biases that are to be zero."""

    model_class: type[PreTrainedModel]
    config: object
    weights: dict[str, torch.Tensor]
    switches: tuple[str, ...] = ()
    added: list[str] = None

    def skeleton(self) -> PreTrainedModel:
        with torch.device("meta"):
            return self.model_class(copy.deepcopy(self.config))
