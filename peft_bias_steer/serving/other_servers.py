"""Files for other projects that add vectors inside vLLM: EasySteer, a fork of it, and hotwire, a plugin."""

import json
import os
from pathlib import Path

import torch
from peft import PeftModel

from ..residual import find_layers, residual_width
from ..vectors import active_vectors, unwrap
from ..whole_files import whole_file
from .gguf import write_control_vector
from .stock_checkpoint import refuse_trained_modules


__all__ = ["export_easysteer", "export_hotwire"]

# easysteer/extraction/result.py writes it and reads it back, to know which algorithm a vector is for
EASYSTEER = {"version": 1, "component": "hidden_states", "metadata": None}


def export_easysteer(model: PeftModel, path: str | os.PathLike) -> dict[str, object]:
    """
    Writes the active vectors, summed at their present scale, for EasySteer (https://github.com/ZJU-REAL/EasySteer): a
    control vector of llama.cpp's form that may hold layer 0.

    EasySteer rounds the vectors to the dtype of the model. The form of the file was read in its fork of vLLM at 4ca76fd,
    `vllm/model_hooks/steering/loading.py`.

    Args:
        model (`PeftModel`): A model with a BiasSteer adapter.
        path (`str` or `os.PathLike`): File to write, `*.gguf`.

    Returns:
        `dict[str, object]`: What a request passes as `steering`, to a server that finds the file under this path.

    Raises:
        ValueError: If the file is not named `*.gguf`, or the adapter steers no layer or trained other modules too.
    """
    vectors = _vectors(model, path, ".gguf")
    write_control_vector(model, vectors, path, {"method": "bias_steer", "easysteer": json.dumps(EASYSTEER)})
    everywhere = {"prompt": "all", "generation": "all"}
    return {"vectors": [{"source": os.fspath(path), "algorithm": "direct", "scale": 1.0, "apply": everywhere}]}


def export_hotwire(model: PeftModel, path: str | os.PathLike) -> list[dict[str, object]]:
    """
    Writes the active vectors, summed at their present scale, for hotwire-vllm 0.1.2
    (https://github.com/moudrkat/hotwire-vllm): one float32 tensor (num_layers, hidden_size), with zeros for layers
    without a vector. The name of the file is the id in requests.

    hotwire rounds the vectors to the dtype of the model. It needs one of its `HOTWIRE_SLOTS` (16, if unset) for each
    layer of each scale, and serves requests beyond that, or with an unknown id, without the vector and without an error.

    Args:
        model (`PeftModel`): A model with a BiasSteer adapter.
        path (`str` or `os.PathLike`): File to write, `*.pt`.

    Returns:
        `list[dict[str, object]]`: What a request passes, as JSON, as `vllm_xargs["hotwire"]`.

    Raises:
        ValueError: If the file is not named `*.pt`, or the adapter steers no layer or trained other modules too.
    """
    vectors = _vectors(model, path, ".pt")
    base = unwrap(model)
    rows = torch.zeros(len(find_layers(base)[1]), residual_width(base))
    for index, vector in vectors.items():
        rows[index] = vector
    with whole_file(path) as unfinished:
        torch.save(rows, unfinished)
    return [{"id": Path(path).stem, "layer": index, "scale": 1.0} for index in sorted(vectors)]


def _vectors(model: PeftModel, path: str | os.PathLike, suffix: str) -> dict[int, torch.Tensor]:
    refuse_trained_modules(model, "such a file")
    vectors = active_vectors(model)
    if Path(path).suffix != suffix:
        raise ValueError(f"expected a file named *{suffix}, the only one that is loaded, got {path}")
    if not vectors:
        raise ValueError("expected vectors, got none: activate an adapter that steers a layer")
    return vectors
