"""The vectors of a steered model as plain tensors by the index of their layer."""

from itertools import islice
from typing import cast

import torch
from peft import PeftModel, PeftType, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import load_peft_weights
from torch import nn
from transformers import PreTrainedModel

from .config import BiasSteerConfig, as_index
from .layer import BiasSteerLayer, whole
from .model import BiasSteerModel
from .residual import find_layers, residual_width
from .saved_keys import VECTOR, check_saved_names, host_name


__all__ = ["check_vectors", "from_vectors", "load_vectors", "set_steering_vectors", "steering_vectors"]


def check_vectors(vectors: dict[int, torch.Tensor], *, num_layers: int, width: int) -> None:
    """
    Refuses vectors that a model cannot take.

    Args:
        vectors (`dict[int, torch.Tensor]`): Vectors by index of their layer, each (width,).
        num_layers (`int`): Number of the model's layers.
        width (`int`): Width of its residual stream.

    Raises:
        TypeError: If the index of a layer is no integer, or a vector no tensor of real numbers.
        ValueError: If a layer does not exist, or a vector has another shape or is not finite.
    """
    for index, vector in vectors.items():
        as_index(index, "the index of a layer")
        if not isinstance(vector, torch.Tensor) or vector.is_complex() or vector.dtype == torch.bool:
            got = vector.dtype if isinstance(vector, torch.Tensor) else type(vector).__name__
            raise TypeError(f"expected a tensor of real numbers for layer {index}, got {got}")
        if not 0 <= index < num_layers:
            raise ValueError(
                f"expected vectors for layers 0 to {num_layers - 1}, got one for layer {index}: take those of this base "
                "model"
            )
        if tuple(vector.shape) != (width,):
            raise ValueError(
                f"expected a vector of shape ({width},) for layer {index}, got {tuple(vector.shape)}: take those of this "
                "base model"
            )
        if not vector.isfinite().all():
            raise ValueError(f"expected finite vectors, got NaN or infinity in that of layer {index}")


def load_vectors(adapter: str, skip_modules: bool = False) -> dict[int, torch.Tensor]:
    """
    The vectors of a saved adapter by the index of their layer, without its base model.

    Args:
        adapter (`str`): Folder or Hub id of the adapter.
        skip_modules (`bool`, *optional*, defaults to `False`):
            Leave out modules that were trained whole (`modules_to_save`) instead of refusing the adapter.

    Raises:
        ValueError: If it is an adapter of another kind, steers modules other than layers, has trained modules beside
            the vectors, or if one of its vectors is missing or not finite.
    """
    return vectors_by_path(adapter, skip_modules)[1]


def vectors_by_path(
    adapter: str, skip_modules: bool = False, num_layers: int | None = None
) -> tuple[str, dict[int, torch.Tensor]]:
    """
    [`load_vectors`], and the name of the list of layers that they are for; for a base model of so many layers, if they
    are given, of which one that the adapter should steer and has no vector for is refused.
    """
    config = BiasSteerConfig.from_pretrained(adapter)
    if not isinstance(config, BiasSteerConfig):
        raise ValueError(f"expected a BiasSteer adapter, got one of type {config.peft_type} in {adapter}")
    weights = load_peft_weights(adapter, device="cpu")
    vectors = {host_name(key): weight for key, weight in weights.items() if VECTOR in key}
    others = sorted(key for key in weights if VECTOR not in key)
    others += [name for name in vectors if not name.rpartition(".")[2].isdecimal()]
    if others and not (skip_modules and all(key in weights for key in others)):
        raise ValueError(f"expected vectors on layers only, got {others[0]} in {adapter}")
    path, steered = _steered_layers(config, list(vectors), num_layers)
    check_saved_names(steered, list(vectors), config.num_vectors if num_layers else None)
    by_index = {int(name.rpartition(".")[2]): vector for name, vector in vectors.items()}
    width = len(next(iter(by_index.values())))
    check_vectors(by_index, num_layers=max(by_index) + 1, width=width)
    return path, dict(sorted(by_index.items()))


def _steered_layers(config: BiasSteerConfig, saved: list[str], num_layers: int | None) -> tuple[str, list[str]]:
    if not saved:
        raise ValueError("the adapter's file holds no vector: copy or save it again")
    path, last = saved[0].rpartition(".")[0], max(int(name.rpartition(".")[2]) for name in saved)
    # no model has as many layers; the number of vectors says which are the steered ones
    unknown = last + 1 if config.num_vectors is None else 10_000
    layers = (f"{path}.{index}" for index in range(max(num_layers, last + 1) if num_layers else unknown))
    steered = (name for name in layers if config.target_modules is None or check_target_module_exists(config, name))
    return path, list(steered if num_layers else islice(steered, config.num_vectors))


def from_vectors(
    vectors: dict[int, torch.Tensor],
    model: PeftModel | PreTrainedModel,
    adapter_name: str = "default",
    *,
    layers_pattern: str | None = None,
) -> PeftModel:
    """
    Makes an adapter of given vectors. Layers that `vectors` does not name are not steered.

    Args:
        vectors (`dict[int, torch.Tensor]`): Vectors by index of their layer, each (hidden_size,).
        model (`PeftModel` or `PreTrainedModel`): Model to steer; a `PeftModel` gets one more adapter.
        adapter_name (`str`, *optional*, defaults to `"default"`): Name of the new adapter.
        layers_pattern (`str`, *optional*): As in [`BiasSteerConfig`].

    Returns:
        `PeftModel`: The steered model.

    Raises:
        TypeError: If the index of a layer is no integer, or a vector no tensor of real numbers.
        ValueError: If there is no vector, one does not fit, or the model has an adapter of this name. `model` is
            unchanged then.
    """
    base = unwrap(model)
    if not vectors:
        raise ValueError("expected at least one vector, got none")
    check_vectors(vectors, num_layers=len(find_layers(base, layers_pattern)[1]), width=residual_width(base))
    config = BiasSteerConfig(layers_to_transform=sorted(vectors), layers_pattern=layers_pattern)
    if isinstance(model, PeftModel):
        if adapter_name in model.peft_config:
            raise ValueError(f"expected a new adapter name, got {adapter_name!r}, which the model has already")
        model.add_adapter(adapter_name, config)
    else:
        model = get_peft_model(model, config, adapter_name=adapter_name)
    set_steering_vectors(model, vectors, adapter_name)
    return model


def steering_vectors(model: PeftModel, adapter_name: str = "default") -> dict[int, torch.Tensor]:
    """
    The vectors of one adapter by the index of their layer. Under FSDP2 every process has to call it.

    Args:
        model (`PeftModel`): A model with a BiasSteer adapter.
        adapter_name (`str`, *optional*, defaults to `"default"`): Name of the adapter.

    Returns:
        `dict[int, torch.Tensor]`: Copies of the vectors, unscaled, each (hidden_size,).

    Raises:
        ValueError: If there is no such adapter, or if it steers modules other than layers.
    """
    layers = layers_by_index(model, [adapter_name])
    return {index: whole(layer.bias_steer_vector[adapter_name]().detach()).clone() for index, layer in layers.items()}


def set_steering_vectors(model: PeftModel, vectors: dict[int, torch.Tensor], adapter_name: str = "default") -> None:
    """
    Overwrites the vectors of one adapter. Layers that `vectors` does not name keep theirs.

    Args:
        model (`PeftModel`): A model with a BiasSteer adapter.
        vectors (`dict[int, torch.Tensor]`): New vectors by index of their layer, each (hidden_size,).
        adapter_name (`str`, *optional*, defaults to `"default"`): Name of the adapter.

    Raises:
        ValueError: If a layer is not steered, a vector does not fit or the adapter is merged. Nothing is changed then.
    """
    layers = layers_by_index(model, [adapter_name])
    check_vectors(vectors, num_layers=max(layers) + 1, width=next(iter(layers.values())).size)
    unknown = sorted(set(vectors) - set(layers))
    if unknown:
        raise ValueError(f"expected vectors for layers among {sorted(layers)}, got some for {unknown}")
    if any(adapter_name in layers[index].merged_adapters for index in vectors):
        raise ValueError(f"adapter {adapter_name!r} is merged: call unmerge_adapter() before changing its vectors")
    for index, vector in vectors.items():
        layers[index].write(adapter_name, vector)


def active_vectors(model: PeftModel) -> dict[int, torch.Tensor]:
    """The active vectors, summed at their present scale, by the index of their layer; refuses what is not finite."""
    layers = layers_by_index(model, model.active_adapters)
    sums = {index: layer.sum_vectors(model.active_adapters) for index, layer in layers.items()}
    vectors = {index: whole(total.detach()).float().cpu() for index, total in sums.items() if total is not None}
    if vectors:
        check_vectors(vectors, num_layers=max(layers) + 1, width=next(iter(layers.values())).size)
    return vectors


def layers_by_index(model: PeftModel, adapter_names: list[str]) -> dict[int, BiasSteerLayer]:
    check_adapters(model, adapter_names)
    index_of = {host: index for index, host in enumerate(layers_of(model, adapter_names[0]))}
    layers = {}
    for name, layer in steering_layers(model).items():
        if any(adapter in layer.bias_steer_vector for adapter in adapter_names):
            if layer.get_base_layer() not in index_of:
                raise ValueError(
                    f"expected vectors on decoder layers, but {name} is steered, which has no layer index: save the "
                    "adapter with save_pretrained() instead"
                )
            layers[index_of[layer.get_base_layer()]] = layer
    return layers


def layers_of(model: PeftModel, adapter_name: str) -> nn.ModuleList:
    """The layers of the base, steered or not, by the name that the adapter's config has for their list."""
    return find_layers(unwrap(model), cast(BiasSteerConfig, model.peft_config[adapter_name]).layers_pattern)[1]


def check_adapters(model: PeftModel, adapter_names: list[str]) -> None:
    """
    Refuses names that are no BiasSteer adapters of `model`.

    Raises:
        ValueError: If there is one, or no name at all.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(f"expected a PeftModel with a BiasSteer adapter, got a {type(model).__name__}")
    kinds = {name: PeftType(config.peft_type).value for name, config in model.peft_config.items()}
    if not adapter_names or any(kinds.get(name) != "BIAS_STEER" for name in adapter_names):
        raise ValueError(f"expected the name of a BiasSteer adapter, got {adapter_names}; the model has {kinds}")


def steering_layers(model: PeftModel) -> dict[str, BiasSteerLayer]:
    return cast(BiasSteerModel, model.base_model).steering_layers


def unwrap(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """The transformers model inside."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model
