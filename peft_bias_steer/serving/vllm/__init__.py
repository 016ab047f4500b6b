"""
vLLM plugin: a base checkpoint served with many adapters, one for each request, loaded and removed while it runs.

vLLM finds [`register`] as an entry point. Stock checkpoints (`export_stock_checkpoint`) need none of this.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ...vectors import check_vectors
from .adapters import load_fitting
from .plugin import known_names, pack, register, unpack
from .settings import KEY, EngineSettings


if TYPE_CHECKING:
    from vllm import LLM

__all__ = ["adapter_vectors", "list_adapters", "load_adapter", "register", "remove_adapter", "vllm_overrides"]


def vllm_overrides(
    adapters: Mapping[str, str] | None = None,
    *,
    max_adapters: int = 64,
    default: str | None = None,
    folder: str | None = None,
) -> dict[str, Any]:
    """
    The `hf_overrides` with which vLLM serves a base checkpoint with adapters.

    A request names one: `SamplingParams(extra_args={"bias_steer": "math"})`, or `"vllm_xargs": {"bias_steer": "math"}`
    in the body of an HTTP request. `bias_steer_scale` multiplies its vectors, and `bias_steer_tokens` is `"all"`,
    `"prompt"` or `"generated"`.

    Args:
        adapters (`dict[str, str]`, *optional*): Folder or Hub id of each adapter by the name that requests use.
        max_adapters (`int`, *optional*, defaults to 64):
            Adapters that can be loaded at once. Each takes layers x hidden_size x 4 bytes, from the start.
        default (`str`, *optional*): The adapter of requests that name none; the base model if unset.
        folder (`str`, *optional*): Adapters under it may be loaded over HTTP. If unset, none may.

    Raises:
        TypeError: If `max_adapters` is no integer, `adapters` no dictionary, or a folder no path.
        ValueError: If there are more adapters than places, or the default is none of them.
    """
    adapters = {} if adapters is None else adapters
    given: dict[str, Any] = {"adapters": adapters, "max_adapters": max_adapters, "default": default, "folder": folder}
    EngineSettings(**given)
    return {KEY: {**given, "adapters": dict(adapters)}}


def load_adapter(llm: "LLM", name: str, adapter: str | Mapping[int, torch.Tensor], *, replace: bool = False) -> None:
    """
    Loads an adapter into a running engine; what is running goes on. Requests that use an adapter which is replaced end
    with the vectors that they began with, and nothing in the prefix cache is used for the new ones.

    Args:
        llm (`vllm.LLM`): Engine that was started with [`vllm_overrides`].
        name (`str`): What requests call it.
        adapter (`str` or `dict[int, torch.Tensor]`):
            Folder or Hub id, or vectors by index of their layer, (hidden_size,) each, as `steering_vectors(model)`
            returns them. Layers that it does not name are not steered.
        replace (`bool`, *optional*, defaults to `False`): Whether an adapter of this name may be there already.

    Raises:
        ValueError: If the name is taken, all places are, or the vectors do not fit the model.
    """
    config, processor = llm.llm_engine.vllm_config.model_config, llm.llm_engine.input_processor
    num_layers = config.get_total_num_hidden_layers()
    vectors = load_fitting(adapter, num_layers) if isinstance(adapter, str) else dict(adapter)
    check_vectors(vectors, num_layers=num_layers, width=config.get_hidden_size())
    _call(llm, "load", name, pack(vectors), replace)
    known_names(processor).add(name)


def remove_adapter(llm: "LLM", name: str) -> None:
    """
    Removes an adapter from a running engine. Requests that use it end with it.

    Args:
        llm (`vllm.LLM`): As in [`load_adapter`].
        name (`str`): Its name.

    Raises:
        ValueError: If there is no such adapter, or it is the default one.
    """
    _call(llm, "remove", name)
    known_names(llm.llm_engine.input_processor).discard(name)


def list_adapters(llm: "LLM") -> dict[str, str]:
    """
    A digest of the vectors of each adapter in a running engine, by its name.

    Args:
        llm (`vllm.LLM`): As in [`load_adapter`].
    """
    return _call(llm, "loaded")


def adapter_vectors(llm: "LLM", name: str) -> dict[int, torch.Tensor]:
    """
    The vectors of an adapter as a running engine holds them, (hidden_size,) each, by index of their layer.

    Args:
        llm (`vllm.LLM`): As in [`load_adapter`].
        name (`str`): The adapter's name.

    Raises:
        ValueError: If there is no such adapter.
    """
    return unpack(_call(llm, "vectors", name))


def _call(llm: "LLM", method: str, *args: Any) -> Any:
    core: Any = llm.llm_engine.engine_core
    try:
        if hasattr(core, "call_utility"):
            return core.call_utility(f"{KEY}_{method}", *args)
        return getattr(core.engine_core, f"{KEY}_{method}")(*args)
    except Exception as error:  # the engine's process hands on the words of an error, and not its kind
        raise ValueError(str(error)) from error
