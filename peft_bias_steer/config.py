import json
import operator
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, PeftType

from .guards import saved_shapes
from .model_card import complete_card
from .whole_files import whole_file


@dataclass
class BiasSteerConfig(PeftConfig):
    """
    Configuration of a [`BiasSteerModel`]: which modules get a trainable vector added to their output.

    Args:
        target_modules (`list[str]` or `str`, *optional*):
            Names (list) or a regular expression (string) of the modules to steer: decoder layers, or `nn.Linear` and
            `Conv1D` modules. If unset, every layer of the model's decoder (of its encoder, if it has no decoder).
        exclude_modules (`list[str]` or `str`, *optional*):
            Names or a regular expression of modules to leave alone although they are targeted.
        layers_to_transform (`int`, `range` or `list[int]`, *optional*):
            Indices of the layers to steer; negative ones count from the last layer. All layers if unset.
        layers_pattern (`list[str]` or `str`, *optional*):
            Name of the `nn.ModuleList` that holds the layers, if it is none of `layers`, `layer`, `h`, `block`,
            `blocks`.
        modules_to_save (`list[str]`, *optional*):
            Modules that are trained and saved whole, for example a classification head.
        init_weights (`bool`, defaults to `True`):
            Start from zero vectors, i.e. from the base model. `False` draws them from a standard normal distribution,
            which is of use in tests only.
        num_vectors (`int`, *optional*):
            Number of vectors in the adapter's file. Filled in when it is saved, so that none goes missing unnoticed.

    Raises:
        TypeError: If a value is of another type, a boolean or a fraction for the index of a layer, say.
        ValueError: If a regular expression is none.

    Example:

    ```python
    >>> from peft import get_peft_model
    >>> from peft_bias_steer import BiasSteerConfig

    >>> model = get_peft_model(model, BiasSteerConfig())
    ```
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    num_vectors: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.task_type, str | None):
            raise TypeError(f'task_type must be a name such as "CAUSAL_LM", got {self.task_type!r}')
        super().__post_init__()
        self.peft_type = PeftType("BIAS_STEER")
        # shapes of the tensors beside a config that was loaded: PEFT reads those only once the model is changed
        self.saved_shapes: dict[str, list[int]] | None = None
        # target_modules and layers_to_transform as they were given, and as they were filled in for a model
        self.filled_in: tuple[tuple, tuple] | None = None
        # tensors that PEFT has loaded into a model, part of which it is about to put on disk
        self.vectors_for_disk: dict[str, torch.Tensor] = {}
        self.check()

    def check(self) -> None:
        """
        Makes every value one that can be saved as JSON, numpy's integers among them, or refuses it.

        Raises:
            TypeError: If a value is of a type that cannot be meant.
            ValueError: If a regular expression is none.
        """
        for field in ("target_modules", "exclude_modules"):
            setattr(self, field, _names_or_pattern(field, getattr(self, field)))
        self.layers_to_transform = _indices(self.layers_to_transform)
        if self.layers_pattern is not None and not isinstance(self.layers_pattern, str):
            self.layers_pattern = _names("layers_pattern", self.layers_pattern)
        if self.modules_to_save is not None:
            self.modules_to_save = _names("modules_to_save", self.modules_to_save)
        for field in ("init_weights", "inference_mode"):
            setattr(self, field, _flag(field, getattr(self, field)))
        if isinstance(self.base_model_name_or_path, os.PathLike):
            self.base_model_name_or_path = os.fspath(self.base_model_name_or_path)
        if not isinstance(self.base_model_name_or_path, str | None):
            raise TypeError(
                f"base_model_name_or_path must be a folder or a Hub id, got {self.base_model_name_or_path!r}"
            )
        for field in fields(self):
            value = getattr(self, field.name)
            try:
                json.dumps(sorted(value) if isinstance(value, set) else value)
            except TypeError as error:
                raise TypeError(f"{field.name} must be a value that JSON can hold, got {value!r}: {error}") from error

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        hub_kwargs, _, _ = cls._split_kwargs(kwargs)
        config.saved_shapes = saved_shapes(str(pretrained_model_name_or_path), subfolder, hub_kwargs)
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        # PEFT opens the file before it knows that it can fill it
        with tempfile.TemporaryDirectory() as folder:
            super().save_pretrained(folder, **kwargs)
            text = Path(folder, CONFIG_NAME).read_text()
        os.makedirs(save_directory, exist_ok=True)
        with whole_file(os.path.join(save_directory, CONFIG_NAME)) as unfinished:
            unfinished.write_text(text)
        complete_card(save_directory, self.task_type, self.base_model_name_or_path)


def as_index(value: Any, name: str) -> int:
    """
    A whole number of any library as an `int`.

    Args:
        value: An integer of Python, numpy or torch.
        name (`str`): What to call it in the error.

    Raises:
        TypeError: If it is a boolean, a fraction or anything else.
    """
    # booleans of Python and torch, and those of older numpy, say that they are indices
    if not isinstance(value, bool) and str(getattr(value, "dtype", "")) not in ("bool", "torch.bool"):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} must be an integer, got {value!r}")


def _indices(value: Any) -> list[int] | int | None:
    if value is None:
        return None
    if isinstance(value, str | Mapping) or not _has_items(value):
        return as_index(value, "layers_to_transform, or each of its items,")
    return [as_index(item, "each item of layers_to_transform") for item in value]


def _has_items(value: Any) -> bool:
    # arrays and tensors without a dimension have the method, but no items
    return isinstance(value, Iterable) and getattr(value, "ndim", 1) > 0


def _names_or_pattern(field: str, value: Any) -> set[str] | str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        return set(_names(field, value))
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{field} must be a list of names or a regular expression, got {value!r}: {error}") from error
    return value


def _names(field: str, value: Any) -> list[str]:
    names = None if isinstance(value, str | Mapping) or not _has_items(value) else list(value)
    if names is None or not all(isinstance(name, str) for name in names):
        raise TypeError(f'{field} must be a list of names such as ["lm_head"], got {value!r}')
    return [str(name) for name in names]  # numpy's strings are a class of their own


def _flag(field: str, value: Any) -> bool:
    if str(getattr(value, "dtype", "")) == "bool":  # numpy's booleans
        value = bool(value)
    if not isinstance(value, bool):
        raise TypeError(f"{field} must be True or False, got {value!r}")
    return value


def layer_indices(indices: int | list[int], num_layers: int) -> list[int]:
    """
    The layers that `layers_to_transform` names, counted from the first one, in order.

    Raises:
        ValueError: If there is none, or one does not exist.
    """
    indices = [indices] if isinstance(indices, int) else list(indices)
    outside = [index for index in indices if not -num_layers <= index < num_layers]
    if outside or not indices:
        raise ValueError(
            f"layers_to_transform must hold indices in [{-num_layers}, {num_layers - 1}], got {outside or indices}"
        )
    return sorted({index % num_layers for index in indices})
