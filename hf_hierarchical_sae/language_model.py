"""The language model that an autoencoder reads: its decoder layers, their outputs, and what stands in place of them."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .modeling_hierarchical_sae import HierarchicalSaeModel


logger = logging.get_logger(__name__)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers of a transformers model: in what `get_decoder` returns, the one of their number."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder = model.get_decoder()
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(
        f"{type(model).__name__} has no list of decoder layers: expected its decoder {type(decoder).__name__} to hold "
        f"a ModuleList of {count} layers"
    )


def layer_indices(model: PreTrainedModel, layer: int | Sequence[int]) -> list[int]:
    """One decoder layer or several, counted from 0 or, if negative, from the end, as numbers counted from 0."""
    count = len(decoder_layers(model))
    layers = [layer] if isinstance(layer, int) else list(layer)
    if not layers or not all(-count <= index < count for index in layers):
        raise ValueError(f"layer must be in [0, {count - 1}], got {layer}")
    return [index % count for index in layers]


def hidden_size(model: PreTrainedModel) -> int:
    """Width of the residual stream."""
    return model.config.get_text_config(decoder=True).hidden_size


def check_fits(sae: HierarchicalSaeModel, model: PreTrainedModel, layer: int) -> int:
    """
    Whether an autoencoder can read the output of a decoder layer. A language model of another name is logged.

    Args:
        sae ([`HierarchicalSaeModel`]): the autoencoder.
        model (`PreTrainedModel`): any transformers model with a list of decoder layers.
        layer (`int`): decoder layer, counted from 0; negative counts from the end.

    Returns:
        `int`: the layer, counted from 0.

    Raises:
        `ValueError`: If there is no such layer, the sizes differ, or it was trained on something else than outputs of
            layers.
    """
    config, (index,) = sae.config, layer_indices(model, layer)
    name, size = model.config.name_or_path, hidden_size(model)
    if size != config.d_in:
        raise ValueError(
            f"the autoencoder takes activations of size {config.d_in} (it was trained on "
            f"{config.model_name or 'an unnamed model'}), the language model {name} has hidden_size {size}: give the "
            "model that it was trained on"
        )
    if config.hook_point not in (None, "output"):
        raise ValueError(
            f"the language model is read and changed at layer outputs, the autoencoder was trained on "
            f"{config.hook_point!r}"
        )
    if config.model_name not in (None, name):
        logger.warning(f"the autoencoder was trained on {config.model_name}, the language model is {name}")
    return index


@contextmanager
def evaluation_mode(model: nn.Module) -> Generator[None, None, None]:
    """Dropout off inside, and back on afterwards if it was on."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


class _LayerReached(Exception):
    """Ends a forward pass at the last layer that is wanted."""


@torch.no_grad()
def layer_outputs(
    model: PreTrainedModel, layers: Sequence[int], ids: torch.Tensor, mask: torch.Tensor
) -> list[torch.Tensor]:
    """
    What decoder layers return, from a forward pass that stops at the last of them.

    Args:
        model (`PreTrainedModel`): any transformers model with a list of decoder layers; its dropout is off.
        layers (`Sequence[int]`): decoder layers, counted from 0.
        ids (`torch.Tensor`): (contexts, positions), token ids.
        mask (`torch.Tensor`): (contexts, positions), zero where a position is padding.

    Returns:
        `list[torch.Tensor]`: (contexts, positions, hidden_size) for each of `layers`.
    """
    captured = {}

    def capture(module: nn.Module, args: Any, output: Any) -> None:
        captured[module] = output if isinstance(output, torch.Tensor) else output[0]
        if len(captured) == len(set(layers)):
            raise _LayerReached

    modules = decoder_layers(model)
    handles = [modules[index].register_forward_hook(capture) for index in set(layers)]
    try:
        with evaluation_mode(model):
            model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
    except _LayerReached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [captured[modules[index]] for index in layers]


@contextmanager
def edited_output(
    model: PreTrainedModel, layer: int, edit: Callable[[torch.Tensor], torch.Tensor | None]
) -> Generator[None, None, None]:
    """
    Inside, `edit(hidden_states)` stands in place of the hidden states that a decoder layer returns, unless it is None.

    Args:
        model (`PreTrainedModel`): any transformers model with a list of decoder layers.
        layer (`int`): decoder layer, counted from 0, that returns its hidden states, (batch, positions, hidden_size),
            alone or first in a tuple or list.
        edit (`Callable`): called with the hidden states in each forward pass.
    """

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        is_tensor = isinstance(output, torch.Tensor)
        edited = edit(output if is_tensor else output[0])
        if is_tensor or edited is None:
            return edited
        return type(output)((edited, *output[1:]))

    module = decoder_layers(model)[layer]
    handle = module.register_forward_hook(hook)
    # transformers' own hook for output_hidden_states, once installed, has to come after this one to see its result.
    hooks: Any = module._forward_hooks
    for key, other in list(hooks.items()):
        if getattr(other, "__module__", None) == "transformers.utils.output_capturing":
            hooks.move_to_end(key)
    try:
        yield
    finally:
        handle.remove()
