"""The residual stream of an architecture: its layers and its width."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .architectures import LAYER_LISTS, REFUSED_TYPES, SEQ_FIRST_TYPES, STREAM_COUNTS


# target_modules as they are filled in for a list of layers
LAYERS_PATTERN = re.compile(r"(?:\w+\\\.)*(?P<list>\w+)\\\.(?P<index>\\d\+|\([\d|]+\))")


def find_layers(model: PreTrainedModel, layers_pattern: list[str] | str | None = None) -> tuple[str, nn.ModuleList]:
    """
    Finds the decoder layers of a transformers model; of the encoder, if the model has no decoder.

    Args:
        model (`PreTrainedModel`): The base model.
        layers_pattern (`list[str]` or `str`, *optional*): Name of the `nn.ModuleList` that holds the layers.

    Returns:
        The name of the `nn.ModuleList` inside `model`, and the list.

    Raises:
        ValueError: If no such list is found, or if the architecture has more than one residual stream.
    """
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "expected a model that is not compiled, got the result of torch.compile: steer first, then compile"
        )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"cannot tell the layers of a {type(model).__name__}: name the modules in target_modules, nn.Linear or Conv1D"
        )
    residual_width(model)
    names = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern or LAYER_LISTS
    found = layer_lists(find_decoder(model), names) or layer_lists(model, names)
    if not found:
        raise ValueError(
            f"no nn.ModuleList named {' or '.join(names)} in {type(model).__name__}: name the list of layers in "
            "layers_pattern, or the modules to steer in target_modules"
        )
    # the outermost list: others belong to parts of a layer. Of several towers, that of the text; of several stacks that a
    # text goes through in turn, the largest
    text = [entry for entry in found if _model_type_at(model, entry[1]) == _text_config(model).model_type]
    layers = min(text or found, key=lambda entry: (entry[0], -len(entry[1])))[1]
    return next(name for name, module in model.named_modules() if module is layers), layers


def in_another_place(model: PreTrainedModel, target_modules: Any) -> str | None:
    """
    What a saved config calls the layers, for a model that has them in another place, as one with a head has the layers of
    one without; None if it names none.
    """
    found = LAYERS_PATTERN.fullmatch(target_modules) if isinstance(target_modules, str) else None
    try:
        path = find_layers(model, found["list"])[0] if found else None
    except ValueError:
        return None
    return found and f"{path}.".replace(".", r"\.") + found["index"]


def find_decoder(model: PreTrainedModel) -> nn.Module:
    """The decoder without a head; the encoder, if the model has no decoder."""
    decoder = model.get_decoder()
    # some return a model with a head, or one of an encoder and a decoder
    while isinstance(decoder, PreTrainedModel) and (inner := decoder.get_decoder()) is not decoder:
        decoder = inner
    return decoder


def text_pass(model: PreTrainedModel, input_ids: torch.Tensor) -> Callable[..., Any]:
    """
    A pass through the layers that are steered, of tokens, (1, tokens), alone: of the model, or of its decoder where the
    model asks for a sound or an image.
    """
    if model.main_input_name == "input_ids":
        inputs = {"decoder_input_ids": input_ids} if model.config.is_encoder_decoder else {}
        return partial(model, input_ids=input_ids, **inputs)
    # the decoder's own name for tokens is not always that
    run = partial(find_decoder(model), input_ids)
    if not model.config.is_encoder_decoder:
        return run
    # as if an encoder had read something: any numbers will do
    read = torch.linspace(-1, 1, 2 * residual_width(model), dtype=model.dtype, device=input_ids.device)
    return partial(run, encoder_hidden_states=read.view(1, 2, -1))


def _model_type_at(model: PreTrainedModel, layers: nn.ModuleList) -> str:
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    holders = [part for part in parts if any(module is layers for module in part.modules())]
    return holders[-1].config.model_type


def _text_config(model: PreTrainedModel) -> PreTrainedConfig:
    return model.config.get_text_config(decoder=True)


def layer_lists(module: nn.Module, names: Sequence[str]) -> list[tuple[int, nn.ModuleList]]:
    return [
        (name.count("."), child)
        for name, child in module.named_modules()
        # a stack of linear modules is no stack of layers
        if isinstance(child, nn.ModuleList)
        and name.rpartition(".")[2] in names
        and any(list(m.children()) for m in child)
    ]


def residual_width(model: PreTrainedModel) -> int:
    """
    Width of the residual stream, from the config: sharded weights do not show their shape.

    Raises:
        ValueError: If the architecture has no single residual stream to add a vector to.
    """
    config = _text_config(model)
    # the same name may stand for a whole model and for its text part
    own = {name.removesuffix("_text") for name in (model.config.model_type, config.model_type)}
    for reason, model_types in REFUSED_TYPES.items():
        if own & {name.removesuffix("_text") for name in model_types}:
            raise ValueError(f"{config.model_type} cannot be steered: it has {reason}")
    for name in STREAM_COUNTS:
        if getattr(config, name, 1) > 1:
            raise ValueError(
                f"{config.model_type} cannot be steered: its config counts {getattr(config, name)} residual streams "
                f"({name}), so there is no one vector to add"
            )
    if getattr(config, "hidden_size", None) is None:
        raise ValueError(f"{config.model_type} cannot be steered: its config names no hidden_size")
    return config.hidden_size


def width_at(model: PreTrainedModel, name: str) -> int:
    """
    Width of the stream at a layer of this name: that of the innermost model around it that has a config, a tower perhaps.

    Raises:
        ValueError: As in [`residual_width`].
    """
    residual_width(model)
    parts = name.split(".")
    around = (model.get_submodule(".".join(parts[:length])) for length in reversed(range(len(parts))))
    return residual_width(next(module for module in around if isinstance(module, PreTrainedModel)))


def seq_first_type(model: nn.Module) -> str | None:
    """The model type of the decoder's layers if these return (seq, batch, hidden_size)."""
    try:
        _, layers = find_layers(cast(PreTrainedModel, model))
    except ValueError:  # none that would be known to
        return None
    found = _model_type_at(cast(PreTrainedModel, model), layers)
    return found if found in SEQ_FIRST_TYPES else None


def refuse_seq_first(found: str | None, what: str, instead: str) -> None:
    """
    Refuses what has to tell rows from tokens in the output of a layer, in a model whose layers return them in turn.

    Args:
        found (`str`, *optional*): What [`seq_first_type`] says of the base model.
        what (`str`): What has to, for the error.
        instead (`str`): What to do instead, for the error.

    Raises:
        ValueError: If it is such a model.
    """
    if found:
        raise ValueError(
            f"expected a model whose layers return (batch, seq, hidden_size) for {what}, got {found}, whose layers "
            f"return (seq, batch, hidden_size): {instead}"
        )
