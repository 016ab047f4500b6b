"""Steering a model that runs in this process under llama-cpp-python, which has no interface of its own for it."""

import ctypes
from typing import TYPE_CHECKING

import torch

from ..layer import as_factor
from ..vectors import check_vectors


if TYPE_CHECKING:
    from llama_cpp import Llama


def set_steering_vectors(llama: "Llama", vectors: dict[int, torch.Tensor], scale: float = 1.0) -> None:
    """
    Steers a loaded llama.cpp model from now on, in place of any control vector before. What it has read so far is
    forgotten: it was computed under the old vectors.

    Args:
        llama (`llama_cpp.Llama`): The model.
        vectors (`dict[int, torch.Tensor]`):
            Vectors by index of their layer, each (hidden_size,), as `steering_vectors(model)` returns them. Layers that
            it does not name are not steered; an empty dictionary ends the steering.
        scale (`float`, *optional*, defaults to 1.0): What the vectors are multiplied by.

    Raises:
        TypeError: If the scale is no number.
        ValueError: If a vector does not fit the model, belongs to layer 0 or is not finite once it is scaled, or if the
            model keeps states in a cache of its own. The model is left as it was.
    """
    import llama_cpp

    scale = as_factor(scale, "scale")
    width, num_layers = llama.n_embd(), llama_cpp.llama_model_n_layer(llama.model)
    check_vectors(vectors, num_layers=num_layers, width=width)
    if 0 in vectors and vectors[0].any():
        raise ValueError(
            f"llama.cpp takes no vector for layer 0, but this one has norm {vectors[0].norm():.4g}: give it up with "
            "vectors.pop(0), or keep it with export_gguf()"
        )
    if llama.cache is not None:
        raise ValueError("the model's cache holds states that were computed under the old vectors: set_cache(None)")
    data = torch.zeros(num_layers - 1, width)
    for index, vector in vectors.items():
        if index:
            data[index - 1] = scale * vector.detach()
    if not data.isfinite().all():
        raise ValueError(
            f"expected vectors that are finite in float32 at scale {scale:.4g}, got larger ones: lower it"
        )
    pointer = ctypes.cast(data.data_ptr(), ctypes.POINTER(ctypes.c_float))
    # row r of the data steers layer r + 1
    if llama_cpp.llama_set_adapter_cvec(llama.ctx, pointer, data.numel(), width, 1, num_layers):
        raise RuntimeError("llama.cpp refused the control vector")
    llama.reset()
