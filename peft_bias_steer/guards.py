"""
What works around PEFT, TRL and transformers, apart from registration and the model card. Without

- `saved_shapes`: PEFT meets a vector that does not fit, or a damaged file, when the model is changed already;
- `refuse_to_overwrite_base`: PEFT writes over the files of a base model that was left on disk;
- `refuse_lossy_rollout_sync`: TRL's vLLM samples from the base model, without a word;
- `keep_biases_on_save`: `from_pretrained` drops the merged vectors, without a word.
"""

import os
import sys
from collections.abc import Iterable
from functools import partial
from types import FrameType
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from .merging import MergeSite
from .stock_forms import find_stock_form


def saved_shapes(folder: str, subfolder: str | None, hub_kwargs: dict[str, Any]) -> dict[str, list[int]] | None:
    """
    Shapes of the tensors in an adapter's file by their key; None if there is no such file.

    Raises:
        ValueError: If the file is damaged.
    """
    missing_is_fine = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    path = cached_file(folder, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder or "", **missing_is_fine, **hub_kwargs)
    if path is None:
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118, a file is no dict
    except SafetensorError as error:
        raise ValueError(
            f"{path} should be a complete safetensors file, got {os.path.getsize(path)} bytes that do not parse "
            f"({error}): copy or download it again"
        ) from error


def refuse_to_overwrite_base(model: nn.Module) -> None:
    """
    Refuses to load an adapter where PEFT would overwrite the checkpoint of the base model under names of its own.

    PEFT writes the files of layers that were left on disk anew (`PeftModel._update_offload`), somewhere else only if their
    path is absolute, or a part of it holds `--`, as in the Hub's cache.

    Args:
        model (`nn.Module`): The base model, off which PEFT has taken accelerate's hooks if it is about to do so.

    Raises:
        ValueError: If the files would be overwritten.
    """
    if "disk" not in getattr(model, "hf_device_map", {}).values():
        return
    bare = (module for module in model.modules() if not hasattr(module, "_hf_hook"))
    if not any(parameter.is_meta for module in bare for parameter in module.parameters(recurse=False)):
        return
    path = str(getattr(model, "name_or_path", ""))
    written = path.lstrip(os.sep)
    if "--" not in path and os.path.isdir(written) and os.path.samefile(path, written):
        raise ValueError(
            f"PEFT would overwrite the files in {path}, of which layers were left on disk: load the base model again, "
            "attach the adapter with get_peft_model(base, BiasSteerConfig.from_pretrained(adapter)), and then "
            "set_steering_vectors(model, load_vectors(adapter))"
        )


def refuse_lossy_rollout_sync(sites: Iterable[MergeSite]) -> None:
    """
    Refuses a merge by which TRL would send vLLM biases that its copy of the model has no room for.

    vLLM ignores an unexpected bias without a word, so it would go on sampling from the base model.

    Args:
        sites (`Iterable[MergeSite]`): The places that the merge would write to.

    Raises:
        RuntimeError: If the caller is TRL and one of the sites has no bias in the base model.
    """
    frame = sys._getframe(1)
    # TRL leaves no other sign: who calls PEFT decides. PEFT's own frames, and torch's decorators, come in between
    while frame is not None and _package(frame) in ("peft_bias_steer", "peft", "torch"):
        frame = frame.f_back
    if frame is not None and _package(frame) == "trl" and any(site.bias is None for site in sites):
        raise RuntimeError(
            "vLLM runs a copy of the base checkpoint, which has no biases that could receive the steering vectors: it "
            "would silently sample from the base model. Train on what prepare_for_vllm(base, output_dir) of "
            "peft_bias_steer.serving.trl returns, and call sync_vectors_only(trainer) before, or set use_vllm=False"
        )


def _package(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]


def keep_biases_on_save(model: nn.Module) -> None:
    """
    Makes `save_pretrained` of a model with merged vectors complete, or makes it refuse.

    `from_pretrained` drops biases that the config does not announce. If a switch in the config announces them, it is
    turned on here, and the other biases that it implies are added as zeros. Otherwise `save_pretrained` raises.

    Args:
        model (`nn.Module`): What `merge_and_unload` is about to return. Nothing happens to one outside transformers.
    """
    if not isinstance(model, PreTrainedModel):
        return
    weights = _saved_tensors(model)
    try:
        form = find_stock_form(model, weights)
    except ValueError as error:
        model.save_pretrained = partial(_refuse_to_save, reason=str(error))
        return
    if form.model_class is not type(model):
        reason = f"it has to be saved as {form.model_class.__name__}: use export_stock_checkpoint(model, output_dir)"
        model.save_pretrained = partial(_refuse_to_save, reason=reason)
        return
    for switch in form.switches:
        setattr(model.config.get_text_config(decoder=True), switch, True)
    for key in form.weights.keys() - weights.keys():
        module = model.get_submodule(key.removesuffix(".bias"))
        module.bias = nn.Parameter(form.weights[key], requires_grad=False)


def _saved_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What `state_dict` holds of parameters and buffers; its call damages what bitsandbytes has packed for a CPU."""
    return {
        f"{prefix}.{name}" if prefix else name: tensor
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, tensor in {**module._parameters, **module._buffers}.items()
        if tensor is not None and name not in module._non_persistent_buffers_set
    }


def _refuse_to_save(*args: Any, reason: str, **kwargs: Any) -> None:
    raise ValueError(f"save_pretrained() would lose the merged steering vectors when the model is loaded: {reason}")
