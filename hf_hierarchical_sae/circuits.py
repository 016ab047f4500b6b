"""Transcoder sets for circuit-tracer, which draws how latents of all layers lead to a prediction."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .configuration_hierarchical_sae import HierarchicalSaeConfig, place_name
from .modeling_hierarchical_sae import HierarchicalSaeModel
from .sites import HOOK_POINTS
from .whole_files import whole_folder


# What a graph can read latents from; what they give has to stand in the MLP's place, whose own gradient is cut.
INPUTS, OUTPUT = ("mlp.input", "middle"), "mlp.output"
# What the transcoders of a set have in common.
SHARED = ("model_name", "hook_point", "d_in", "d_sae", "selection", "skip_connection")


def export_circuit_tracer(folders: Iterable[str | Path], output: str | Path, k: int | None = None) -> None:
    """
    Write transcoders of all layers as one transcoder set of circuit-tracer, with one budget. Its TopK keeps negative
    values where fewer than k latents are active: k latents that are always 0 stand behind the others and take their place.

    Args:
        folders (`Iterable[str | Path]`): where the transcoders are saved, in any order; ids on the Hub too. One of each
            layer of the language model, from its `"mlp.input"`, or the residual stream before that (`"middle"`), to its
            `"mlp.output"`.
        output (`str` or `Path`): gets `config.yaml` and a file for each layer; made if it is not there.
        k (`int`, *optional*): latents per input, at most the `config.k` of each, which is the default. Transcoders that
            select by a threshold, or keep every active latent, have no budget.

    Raises:
        `ValueError`: If one is not there, is no transcoder or is of other sites, a layer is missing or there twice, two
            differ in model, site or size, none says of which model they are, or `k` is out of range.
    """
    folders = list(folders)
    configs = [_config(folder) for folder in folders]
    for folder, config in zip(folders, configs):
        _check_sites(folder, config)
    _check_set(configs)
    settings = _settings(configs, k)
    with whole_folder(output) as unfinished:
        for folder, config in zip(folders, configs):
            save_file(_tensors(folder, settings), unfinished / f"layer_{config.layer}.safetensors")
        lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in settings.items()]
        (unfinished / "config.yaml").write_text("".join(lines), encoding="utf-8")
    # Those of an older and deeper set would be taken for layers of this one.
    for path in Path(output).glob("layer_*.safetensors"):
        if path.stem not in {f"layer_{config.layer}" for config in configs}:
            path.unlink()


def _config(folder: str | Path) -> Any:
    """Of an autoencoder; a folder without a config, or with another model's, would read as the default one."""
    try:
        found, _ = HierarchicalSaeConfig.get_config_dict(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"expected the folder of a transcoder or its id on the Hub, got {folder}: {error}") from error
    if found.get("model_type") != HierarchicalSaeConfig.model_type:
        raise ValueError(f"circuit-tracer takes transcoders, {folder} holds none: give the folders that train wrote")
    return HierarchicalSaeConfig.from_dict(found)


def _check_sites(folder: str | Path, config: Any) -> None:
    if not config.is_transcoder:
        raise ValueError(
            f"circuit-tracer takes transcoders, {folder} holds an autoencoder: train with target_hook_point"
        )
    if config.hook_point not in INPUTS or config.target_hook_point != OUTPUT or config.d_out != config.d_in:
        raise ValueError(
            f"circuit-tracer takes transcoders from {' or '.join(INPUTS)} to {OUTPUT} of one size, {folder} goes from "
            f"{config.hook_point} ({config.d_in}) to {config.target_hook_point} ({config.d_out})"
        )


def _check_set(configs: list[Any]) -> None:
    layers = [config.layer for config in configs]
    if not layers or Counter(layers) != Counter(range(len(layers))):
        raise ValueError(
            f"circuit-tracer needs one transcoder of every layer from 0 on, got {len(layers)}, of layers "
            f"{', '.join(map(str, layers)) or 'none'}"
        )
    if configs[0].model_name is None:
        raise ValueError(
            "circuit-tracer loads the language model by its name, which the transcoders do not say: set model_name in the "
            "config of each"
        )
    for config in configs:
        for name in SHARED:
            own, first = getattr(config, name), getattr(configs[0], name)
            if own != first:
                raise ValueError(
                    f"the transcoders of a set have one {name}, got {first!r} for {place_name(layers[0], 'output')} and "
                    f"{own!r} for {place_name(config.layer, 'output')}"
                )


def _settings(configs: list[Any], k: int | None) -> dict[str, Any]:
    """What `config.yaml` says."""
    config, budgets = configs[0], {config.check_k(k) for config in configs}
    activation = {"topk": "topk", "relu": "relu"}.get(config.selection, "jumprelu")
    if activation == "topk" and len(budgets) > 1:
        raise ValueError(f"the transcoders were trained for the budgets {sorted(budgets)}: say with k which to write")
    return {
        "model_name": config.model_name,
        "model_kind": "transcoder_set",
        "feature_input_hook": HOOK_POINTS[config.hook_point],
        "feature_output_hook": HOOK_POINTS[OUTPUT],
        "activation": activation,
        **({"k": budgets.pop()} if activation == "topk" else {}),
    }


def _tensors(folder: str | Path, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of a layer, in units of x and y."""
    sae = HierarchicalSaeModel.from_pretrained(folder, dtype=torch.float32).eval()
    sae.fold_input_scale()
    tensors = {name: parameter.detach() for name, parameter in sae.named_parameters()}
    tensors["W_enc"] = tensors.pop("encoder_weight")
    if settings["activation"] == "topk":
        for name in ("W_enc", "b_enc", "W_dec"):
            tensors[name] = torch.cat(
                [tensors[name], tensors[name].new_zeros(settings["k"], *tensors[name].shape[1:])]
            )
    elif settings["activation"] == "jumprelu":
        # Below 0 no latent is active here.
        tensors["activation_function.threshold"] = sae.threshold.clamp(min=0).expand(sae.config.d_sae).contiguous()
    return tensors


__all__ = ["export_circuit_tracer"]
