"""
vLLM plugin: a base checkpoint served with the vectors of an adapter, which can be changed while the engine runs.

vLLM finds `register` as an entry point. Stock checkpoints (`export_stock_checkpoint`) need none of this.
"""

import functools
import math
import re
from collections.abc import Iterable, Iterator
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch

from ..architectures import LAYER_LISTS, VLLM_PLUGIN_CLASSES
from ..residual import layer_lists
from ..vectors import check_vectors, load_vectors


if TYPE_CHECKING:
    from vllm import LLM

__all__ = [
    "SteeringWorker",
    "register",
    "set_steering_scale",
    "set_steering_vectors",
    "steering_vectors",
    "vllm_overrides",
]
PREFIX = "BiasSteer"
VECTOR = "steering_vector"


def register() -> None:
    """Registers `BiasSteer<architecture>` with vLLM for every supported architecture; vLLM calls it in each process."""
    from vllm import ModelRegistry

    for architecture in VLLM_PLUGIN_CLASSES:
        # by name: importing the classes here would start CUDA in processes that fork later
        ModelRegistry.register_model(PREFIX + architecture, f"{__name__}:{PREFIX}{architecture}")


def __getattr__(name: str) -> type:
    architecture = name.removeprefix(PREFIX)
    if name == architecture or architecture not in VLLM_PLUGIN_CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _steered_model_class(architecture)


@functools.cache
def _steered_model_class(architecture: str) -> type:
    from vllm import ModelRegistry

    base = ModelRegistry.models[architecture].load_model_cls()
    return type(PREFIX + architecture, (SteeredModel, base), {"__module__": __name__})


@functools.cache
def _steered_layer_class(layer_class: type) -> type:
    return type(f"Steered{layer_class.__name__}", (_SteeredLayer, layer_class), {})


class _SteeredLayer:
    """
    A decoder layer whose output moves by a vector: `h' = h + scale * s`. Under tensor parallelism every rank holds the
    whole vector, as it holds the whole residual stream.
    """

    steering_vector: torch.Tensor  # (hidden_size,), float32
    steering_scale: torch.Tensor  # ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)  # ty: ignore[missing-attribute]
        hidden, *residual = output if isinstance(output, tuple) else (output,)
        # vLLM's layers hand on the MLP's output and the residual separately: their sum is what the next one sees
        hidden = (hidden + self.steering_scale * self.steering_vector).to(hidden.dtype)
        return (hidden, *residual) if residual else hidden


class SteeredModel:
    """
    Mixed in before a causal language model of vLLM: steers its decoder layers with an adapter that `hf_overrides` name.

    - `bias_steer_adapter`: folder or Hub id of the adapter. Without one the vectors start at zero.
    - `bias_steer_scale`: what the vectors are multiplied by, 1 by default.

    Weights named `layers.N.steering_vector`, which a trainer may send, become the vectors.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # ty: ignore[unknown-argument]
        config = vllm_config.model_config.hf_config
        adapter = getattr(config, "bias_steer_adapter", None)
        width = vllm_config.model_config.get_hidden_size()
        # buffers: unlike parameters they survive the engine's sleep, and no checkpoint has to hold them
        self.steered_layers = dict(_add_vectors(self, width, float(getattr(config, "bias_steer_scale", 1.0))))
        self.num_steerable_layers = vllm_config.model_config.get_total_num_hidden_layers()
        if adapter is not None:
            self.set_steering_vectors(load_vectors(adapter))

    def set_steering_vectors(self, vectors: dict[int, torch.Tensor]) -> None:
        width = len(next(iter(self.steered_layers.values())).steering_vector)
        check_vectors(vectors, num_layers=self.num_steerable_layers, width=width)
        for index, layer in self.steered_layers.items():  # those of this pipeline stage
            if index in vectors:
                layer.steering_vector.copy_(vectors[index])

    def set_steering_scale(self, scale: float) -> None:
        if not math.isfinite(scale):
            raise ValueError(f"expected a finite scale, got {scale}")
        for layer in self.steered_layers.values():
            layer.steering_scale.fill_(scale)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str] | None:
        return super().load_weights(self._take_vectors(weights))  # ty: ignore[missing-attribute]

    def _take_vectors(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in weights:
            match = re.search(rf"\.(\d+)\.{VECTOR}$", name)
            if match is None:
                yield name, weight
            else:
                self.set_steering_vectors({int(match[1]): weight})


def vllm_overrides(adapter: str, architecture: str, *, scale: float = 1.0) -> dict[str, Any]:
    """
    The `hf_overrides` with which vLLM serves a base checkpoint steered by an adapter.

    Args:
        adapter (`str`): Folder or Hub id of the adapter.
        architecture (`str`): Class of the base model, as its config.json names it.
        scale (`float`, *optional*, defaults to 1.0): What the vectors are multiplied by.

    Raises:
        ValueError: If the plugin has no class for the architecture.
    """
    if architecture not in VLLM_PLUGIN_CLASSES:
        raise ValueError(
            f"the vLLM plugin steers {', '.join(VLLM_PLUGIN_CLASSES)}, got {architecture}: vLLM would drop the "
            "vectors. Serve it with transformers, or see which routes there are with `bias-steer routes`"
        )
    return {"architectures": [PREFIX + architecture], "bias_steer_adapter": adapter, "bias_steer_scale": scale}


def _add_vectors(model: Any, width: int, scale: float) -> Iterator[tuple[int, Any]]:
    from vllm.model_executor.models.utils import PPMissingLayer

    _, layers = min(layer_lists(model, LAYER_LISTS), key=lambda entry: entry[0])
    for index, layer in enumerate(layers):
        if not isinstance(layer, PPMissingLayer):
            layer.register_buffer(VECTOR, torch.zeros(width, dtype=torch.float32), persistent=False)
            layer.register_buffer("steering_scale", torch.tensor(scale, dtype=torch.float32), persistent=False)
            # the layers exist by now, made by vLLM's own model class, which knows no other
            layer.__class__ = _steered_layer_class(type(layer))
            yield index, layer


class SteeringWorker:
    """
    Methods that vLLM's workers gain under `worker_extension_cls="peft_bias_steer.serving.vllm.SteeringWorker"`, for
    `LLM.collective_rpc` and the server's `/collective_rpc`. Arguments and results are plain data, as JSON holds it.

    After a change reset the prefix cache: it holds keys and values that were computed under the old vectors.
    [`set_steering_vectors`] and [`set_steering_scale`] do.
    """

    def set_steering_vectors(self, vectors: dict[int, list[float]]) -> None:
        """Overwrites the vectors, each (hidden_size,), of the layers that are named; the others keep theirs."""
        model = _steered_model(self)
        model.set_steering_vectors({int(index): torch.tensor(vector) for index, vector in vectors.items()})

    def set_steering_scale(self, scale: float) -> None:
        """Multiplies the vectors by `scale` from now on."""
        _steered_model(self).set_steering_scale(float(scale))

    def get_steering_vectors(self) -> dict[int, list[float]]:
        """The unscaled vectors of the layers that this worker holds."""
        return {index: layer.steering_vector.tolist() for index, layer in _steered_model(self).steered_layers.items()}


def _steered_model(worker: Any) -> Any:
    model = worker.get_model()
    if not isinstance(model, SteeredModel):
        raise ValueError(
            f"expected an engine that runs a steered model, got {type(model).__name__}, which has no place for the "
            f"vectors: start it with hf_overrides={{'architectures': ['{PREFIX}{type(model).__name__}']}}"
        )
    return model


def set_steering_vectors(llm: "LLM", vectors: dict[int, torch.Tensor]) -> None:
    """
    Replaces steering vectors in a running engine; nothing else travels. Its prefix cache is emptied.

    Args:
        llm (`vllm.LLM`):
            Engine that runs a `BiasSteer…` architecture. If it has processes of its own, start it with
            `worker_extension_cls="peft_bias_steer.serving.vllm.SteeringWorker"`.
        vectors (`dict[int, torch.Tensor]`):
            Vectors by index of their layer, each (hidden_size,), as `steering_vectors(model)` returns them.

    Raises:
        ValueError: If the engine's model has no place for vectors, or a vector does not fit it.
        RuntimeError: If requests are running, which hold keys and values that were computed under the old vectors.
    """
    _call_workers(llm, SteeringWorker.set_steering_vectors, {i: vector.tolist() for i, vector in vectors.items()})
    _reset_prefix_cache(llm)


def set_steering_scale(llm: "LLM", scale: float) -> None:
    """
    Multiplies the vectors of a running engine by a factor: 0 is the base model, 1 the adapter. Its prefix cache is
    emptied.

    Args:
        llm (`vllm.LLM`): As in [`set_steering_vectors`].
        scale (`float`): The factor.

    Raises:
        ValueError: If the engine's model has no place for vectors, or the factor is not finite.
        RuntimeError: If requests are running, as in [`set_steering_vectors`].
    """
    _call_workers(llm, SteeringWorker.set_steering_scale, scale)
    _reset_prefix_cache(llm)


def steering_vectors(llm: "LLM") -> dict[int, torch.Tensor]:
    """
    The unscaled vectors that a running engine holds, by index of their layer, each (hidden_size,).

    Args:
        llm (`vllm.LLM`): As in [`set_steering_vectors`].
    """
    parts = _call_workers(llm, SteeringWorker.get_steering_vectors)
    return {int(index): torch.tensor(vector) for part in parts for index, vector in part.items()}


def _call_workers(llm: "LLM", method: FunctionType, *args: Any) -> list[Any]:
    # a function reaches only workers in this process, a name only workers with the extension
    extended = llm.llm_engine.vllm_config.parallel_config.worker_extension_cls
    return llm.collective_rpc(method.__name__ if extended else method, args=args)


def _reset_prefix_cache(llm: "LLM") -> None:
    if not llm.reset_prefix_cache():
        raise RuntimeError(
            "the prefix cache could not be emptied, because requests are running: they go on with keys and values of "
            "the old vectors. Wait for them, and update again"
        )
