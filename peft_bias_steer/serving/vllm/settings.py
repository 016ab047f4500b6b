"""What an engine is started with, and what a request asks for."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ...config import as_index
from ...layer import as_factor
from ...tokens import TOKENS


# the field of the model's config, and what the keys of a request's extra arguments begin with
KEY = "bias_steer"
BASE = "__base__"
# the adapter whose vectors a trainer sends as weights
POLICY = "policy"
REQUEST_KEYS = (KEY, f"{KEY}_scale", f"{KEY}_tokens")


@dataclass(frozen=True)
class EngineSettings:
    """
    The value of `bias_steer` in `hf_overrides`, or in the config.json of a base model.

    Args:
        adapters (`dict[str, str]`, *optional*):
            Folder or Hub id of each adapter by its name. `None` instead of a folder stands for vectors of zeros, which
            a trainer fills.
        max_adapters (`int`, *optional*, defaults to 64):
            Adapters that can be loaded at once. Each takes layers x hidden_size x 4 bytes, from the start.
        default (`str`, *optional*): The adapter of requests that name none; the base model if unset.
        folder (`str`, *optional*):
            Adapters under it may be loaded over HTTP. If unset, none may.
    """

    adapters: Mapping[str, str | None] = field(default_factory=dict)
    max_adapters: int = 64
    default: str | None = None
    folder: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.adapters, Mapping):
            raise TypeError(f"expected adapters to be a dictionary of folders by name, got {self.adapters!r}")
        for name, path in [*self.adapters.items(), ("folder", self.folder)]:
            if not isinstance(path, str | os.PathLike | None):
                raise TypeError(f"expected a path or a Hub id for {name}, got {path!r}")
        if as_index(self.max_adapters, "max_adapters") < max(1, len(self.adapters)):
            raise ValueError(f"expected max_adapters of {max(1, len(self.adapters))} or more, got {self.max_adapters}")
        for name in self.adapters:
            check_name(name)
        if self.default is not None and self.default not in self.adapters:
            raise ValueError(f"expected the default to be one of {sorted(self.adapters)}, got {self.default!r}")

    @classmethod
    def of(cls, vllm_config: Any) -> "EngineSettings | None":
        """The settings of an engine; `None` if it was started without."""
        given = getattr(vllm_config.model_config.hf_config, KEY, None)
        if given is None:
            return None
        known = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping) or set(given) - set(known):
            raise ValueError(f"expected {KEY} to be a dictionary with some of {', '.join(known)}, got {given!r}")
        return cls(**given)


@dataclass(frozen=True)
class Choice:
    """What one request asks for."""

    adapter: str
    scale: float = 1.0
    tokens: str = "all"


def check_name(name: Any) -> None:
    if not isinstance(name, str) or not name or name == BASE:
        raise ValueError(f"expected the name of an adapter to be a string other than {BASE!r}, got {name!r}")


def asks_to_steer(key: str) -> bool:
    """Whether an argument of this name is meant for this package, be it misspelt: `bias-steer`, `BIAS_STEAR_scale`."""
    return re.sub("[^a-z]", "", key.lower()).startswith(("steer", "biasste"))


def read_choice(arguments: Mapping[str, Any] | None, default: str | None) -> Choice | None:
    """
    The adapter, scale and tokens of a request; `None` for the base model.

    Args:
        arguments (`dict`, *optional*): The extra arguments of the request.
        default (`str`, *optional*): The adapter if the request names none.

    Raises:
        TypeError: If the scale is no number.
        ValueError: If an argument is not known, or its value cannot be meant.
    """
    given = {key: value for key, value in (arguments or {}).items() if asks_to_steer(key)}
    if unknown := given.keys() - set(REQUEST_KEYS):
        raise ValueError(f"expected some of {', '.join(REQUEST_KEYS)}, got {', '.join(sorted(unknown))}")
    name = given.get(KEY, default)
    if KEY in given and not isinstance(name, str):
        raise TypeError(f"expected {KEY} to be the name of an adapter, got {name!r}")
    if name is None:
        if given:
            raise ValueError(f"{', '.join(sorted(given))} without {KEY}: name the adapter")
        return None
    scale = as_factor(given.get(f"{KEY}_scale", 1.0), f"{KEY}_scale")
    tokens = given.get(f"{KEY}_tokens", "all")
    if tokens not in TOKENS:
        raise ValueError(f"expected {KEY}_tokens to be one of {', '.join(TOKENS)}, got {tokens!r}")
    return None if name == BASE else Choice(name, scale, tokens)


def unknown_adapter(name: str, known: Any) -> str:
    names = ", ".join(sorted(known)) or "none"
    return f"no adapter named {name!r} is loaded: loaded are {names}"
