"""
What of vLLM is changed: three methods, and what breaks without each. Engines that were started without `bias_steer` in
their model's config behave as before, but for requests that ask for an adapter: these are refused.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from .adapters import SALT, EngineAdapters
from .layers import extra_arguments
from .settings import KEY, EngineSettings, asks_to_steer, read_choice, unknown_adapter


def register() -> None:
    """Makes vLLM's engines serve adapters. vLLM calls it in each of its processes."""
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor

    # the model exists there, and has not been compiled: without it no layer is steered
    _wrap(EngineCore, "_initialize_kv_caches", _install_adapters)
    # without it a request has no row, and reads keys and values of other adapters from the prefix cache
    _wrap(EngineCore, "preprocess_add_request", _admit)
    # without it an unknown adapter is an error of the server (500) instead of the request (400)
    _wrap(InputProcessor, "process_inputs", _check_request)
    _refuse_beam_search()
    for method in (load, remove, loaded, vectors):
        setattr(EngineCore, f"{KEY}_{method.__name__}", method)


def _wrap(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(owner, name, None)
    if original is None:
        raise RuntimeError(
            f"this vLLM has no {owner.__name__}.{name}, without which requests would get the base model: install the "
            "version that peft_bias_steer names, or set VLLM_PLUGINS='' to run without it"
        )
    if getattr(original, KEY, False):
        return

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(functools.partial(original, self), self, *args, **kwargs)

    setattr(wrapped, KEY, True)
    setattr(owner, name, wrapped)


def _install_adapters(original: Callable[..., Any], core: Any, vllm_config: Any) -> Any:
    settings = EngineSettings.of(vllm_config)
    core.bias_steer = None if settings is None else EngineAdapters(core.model_executor, vllm_config, settings)
    return original(vllm_config)


def _admit(original: Callable[..., Any], core: Any, request: Any) -> Any:
    if core.bias_steer is None:
        return original(request)
    with core.bias_steer.admit(request) as version:
        admitted = original(request)
        if version is not None:
            version.requests.add(admitted[0])
        return admitted


def _check_request(original: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any) -> Any:
    from vllm.exceptions import VLLMValidationError

    request = original(*args, **kwargs)
    settings, names = EngineSettings.of(processor.vllm_config), known_names(processor)
    arguments = extra_arguments(request) or {}
    try:
        # in an engine without adapters, arguments with other names are other programs' own
        own = arguments if settings else {key: arguments[key] for key in arguments if key.startswith(KEY)}
        choice = read_choice(own, None if settings is None else settings.default)
        if choice is not None and settings is None:
            raise ValueError(f"{KEY}: this engine was started without adapters: give it hf_overrides={{'{KEY}': ...}}")
        if choice is not None and choice.adapter not in names:
            raise ValueError(unknown_adapter(choice.adapter, names))
        if (request.cache_salt or "").startswith(SALT):
            raise ValueError(f"expected a cache_salt that does not begin with {SALT!r}")
    except (TypeError, ValueError) as error:
        raise VLLMValidationError(str(error), parameter=KEY) from error
    return request


def known_names(processor: Any) -> set[str]:
    """Names that requests of this process may use; [`load`] and [`remove`] of the engine are announced here."""
    names = vars(processor).get(f"{KEY}_names")
    if names is None:
        settings = EngineSettings.of(processor.vllm_config)
        names = processor.bias_steer_names = set(settings.adapters if settings else ())
    return names


def _refuse_beam_search() -> None:
    """vLLM makes the requests of a beam search itself, without the extra arguments."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("vllm.entrypoints."):
            for owner in vars(module).values():
                if isinstance(owner, type) and "to_beam_search_params" in vars(owner):
                    _wrap(owner, "to_beam_search_params", _without_adapter)


def _without_adapter(original: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
    from vllm.exceptions import VLLMValidationError

    # `__base__` and a scale of 0 too: what is dropped would leave the beams to the engine's default
    if asked := sorted(filter(asks_to_steer, request.vllm_xargs or {})):
        raise VLLMValidationError(
            f"beam search takes no adapter, got {', '.join(asked)}: leave that out, or set use_beam_search to false",
            parameter=KEY,
        )
    return original(*args, **kwargs)


# methods of the engine, which its clients call by name; arguments and results are what msgpack holds


def load(core: Any, name: str, vectors: dict[int, bytes], replace: bool) -> None:
    _adapters(core).load(name, unpack(vectors), replace=replace)


def remove(core: Any, name: str) -> None:
    _adapters(core).remove(name)


def loaded(core: Any) -> dict[str, str]:
    return _adapters(core).list()


def vectors(core: Any, name: str) -> dict[int, bytes]:
    return pack(_adapters(core).vectors(name))


def _adapters(core: Any) -> EngineAdapters:
    if core.bias_steer is None:
        raise ValueError(f"this engine was started without adapters: give it hf_overrides={{'{KEY}': ...}}")
    return core.bias_steer


def pack(vectors: dict[int, torch.Tensor]) -> dict[int, bytes]:
    """Vectors as bytes of float32."""
    return {int(index): vector.detach().float().cpu().numpy().tobytes() for index, vector in vectors.items()}


def unpack(vectors: dict[int, bytes]) -> dict[int, torch.Tensor]:
    """The inverse of [`pack`]."""
    return {int(index): torch.frombuffer(bytearray(data), dtype=torch.float32) for index, data in vectors.items()}
