"""
Exchange with other libraries at a chosen budget: the formats of SAELens, which SAEBench takes too, and sparsify; and
dictionaries of Gemma Scope.
"""

import json
import re
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import cached_file

from .configuration_hierarchical_sae import HierarchicalSaeConfig, integer, is_integer
from .modeling_hierarchical_sae import HierarchicalSaeModel
from .sites import BLOCKS, HOOK_POINTS
from .whole_files import whole_folder


CONFIG = "cfg.json"
SAELENS_WEIGHTS, SPARSIFY_WEIGHTS = "sae_weights.safetensors", "sae.safetensors"
# Version of the format that is written; SAELens reads one without a version, or below 6, by older rules.
SAELENS_VERSION = "6.54.0"
GEMMA_SCOPE_WEIGHTS = "params.npz"
# Where its dictionaries of each repository are from, as TransformerLens says it.
GEMMA_SCOPE_SITES = {
    "res": "blocks.{}.hook_resid_post",
    "mlp": "blocks.{}.hook_mlp_out",
    "att": "blocks.{}.attn.hook_z",
    # Before the norm's weights, which were folded into the MLP.
    "transcoders": "blocks.{}.ln2.hook_normalized",
}
# The architecture of SAELens that each selection is, and those of transcoders.
ARCHITECTURES = {"topk": "topk", "batch_topk": "jumprelu", "jumprelu": "jumprelu", "relu": "standard"}
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
# What reading one can raise, besides TypeError and ValueError.
DAMAGED_NPZ = (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, TokenError)
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")


def save_saelens(sae: HierarchicalSaeModel, folder: str | Path, k: int | None = None) -> None:
    """
    Write an autoencoder for SAELens 6 (`SAE.load_from_disk`) and what takes its objects, such as SAEBench, with one
    budget: as a TopK SAE, or as a JumpReLU SAE if it selects by a threshold (`selection="batch_topk"`), which is what
    SAELens does itself. A ReLU or JumpReLU SAE, which has no budget, is written as one. A transcoder is written as one,
    with its skip connection; SAELens has none that selects the k strongest latents.

    Args:
        sae ([`HierarchicalSaeModel`]): its decoder rows are normalised first, as by `save_pretrained`.
        folder (`str` or `Path`): gets `cfg.json` and `sae_weights.safetensors`; made if it is not there.
        k (`int`, *optional*): latents per input, at most `sae.config.k`, which is the default.

    Raises:
        `ValueError`: If `k` is out of range, or asked of an autoencoder that has no other budget than its own, or none,
            or for a transcoder with `selection="topk"`.
    """
    k, config = sae.config.check_k(k), sae.config
    architecture = _architecture(config)
    tensors = _tensors(sae)
    threshold = tensors.pop("threshold")
    tensors["W_enc"] = tensors.pop("encoder_weight").T.contiguous()
    metadata = {
        "sae_lens_version": SAELENS_VERSION,
        "sae_lens_training_version": None,
        "model_name": config.model_name,
        "hook_name": _hook_name(config.layer, config.hook_point),
        "dataset_path": config.dataset_name,
    }
    settings = {
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": str(tensors["W_dec"].dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": not config.is_transcoder,
        "normalize_activations": "none",
        "reshape_activations": _reshaping(architecture, metadata["hook_name"]),
        "metadata": metadata,
        "architecture": architecture,
    }
    if config.is_transcoder:
        settings["d_out"] = config.d_out
        metadata["hook_name_out"] = _hook_name(config.layer, config.target_hook_point)
    if architecture.startswith("jumprelu"):
        tensors["threshold"] = threshold.expand(config.d_sae).contiguous()
    if config.selection == "batch_topk":
        metadata |= {"training_architecture": "batchtopk", "training_architecture_details": {"k": k}}
    elif config.selection == "topk":
        settings |= {"k": k, "rescale_acts_by_decoder_norm": False}
    _write(folder, settings, SAELENS_WEIGHTS, tensors)


def load_saelens(source: str | Path, subfolder: str = "") -> HierarchicalSaeModel:
    """
    Read a ReLU (standard), TopK or JumpReLU SAE of SAELens 6, or a BatchTopK SAE, which SAELens saves as a JumpReLU
    SAE with one threshold; or a transcoder, of ReLU or JumpReLU, with a skip connection or without.

    Args:
        source (`str` or `Path`): folder, or id on the Hub, with `cfg.json` and `sae_weights.safetensors`.
        subfolder (`str`, *optional*): where they are in it.

    Returns:
        [`HierarchicalSaeModel`]: in evaluation mode and float32, with the same reconstructions; of a TopK SAE, at the
            budget of the file and at smaller ones.

    Raises:
        `ValueError`: If it is of another architecture, has missing or unknown keys, transposed or torn weights, a
            setting that cannot be represented, a pickle, which is never loaded, or a transcoder that does not say its
            places.
    """
    settings, tensors = _read(source, subfolder, SAELENS_WEIGHTS)
    settings = _saelens_settings(settings)
    architecture = settings["architecture"]
    d_in, d_sae, d_out = (integer(f"{name} in {CONFIG}", settings[name], 1) for name in ("d_in", "d_sae", "d_out"))
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_enc": (d_sae,), "b_dec": (d_out,)}
    if architecture.startswith("jumprelu"):
        shapes["threshold"] = (d_sae,)
    if "skip" in architecture:
        shapes["W_skip"] = (d_out, d_in)
    tensors = _checked(tensors, shapes)
    if architecture not in TRANSCODERS and not settings["apply_b_dec_to_input"]:
        tensors["b_enc"] = _centred(tensors)
    if settings.get("rescale_acts_by_decoder_norm"):
        norms = torch.linalg.vector_norm(tensors["W_dec"], dim=1)
        tensors["W_enc"], tensors["b_enc"] = tensors["W_enc"] * norms, tensors["b_enc"] * norms
        # A row of zeros adds nothing, whatever it is divided by.
        tensors["W_dec"] = tensors["W_dec"] / norms.masked_fill(norms == 0, 1).unsqueeze(1)
    metadata = settings["metadata"]
    origin = {
        **_places(metadata.get("hook_name"), metadata.get("hook_name_out") if architecture in TRANSCODERS else None),
        "model_name": metadata.get("model_name"),
        "dataset_name": metadata.get("dataset_path"),
    }
    if architecture == "topk":
        return _build(integer(f"k in {CONFIG}", settings["k"], 1), tensors, **origin)
    threshold = tensors.get("threshold")
    if threshold is None:
        return _build(d_sae, tensors, selection="relu", **origin)
    k: Any = _section(metadata, "training_architecture_details").get("k")
    # SAELens takes a fraction for the mean number of latents.
    k = int(k) if isinstance(k, float) and k.is_integer() else k
    if not is_integer(k) or not 1 <= k <= d_sae or not bool((threshold == threshold[0]).all()):
        return _build(d_sae, tensors, selection="jumprelu", **origin)
    tensors["threshold"] = threshold[0]
    return _build(int(k), tensors, selection="batch_topk", **origin)


def load_gemma_scope(source: str | Path, subfolder: str = "") -> HierarchicalSaeModel:
    """
    Read a JumpReLU SAE or transcoder of Gemma Scope (arXiv 2408.05147) in its own format. What its transcoders read is
    `ln2.hook_normalized` of TransformerLens, the MLP's input before the weights w of the norm. Divided by them, 1 + w in
    transformers' Gemma 2, the columns of `encoder_weight` read `"mlp.input"`.

    Args:
        source (`str` or `Path`): folder, or id on the Hub, with `params.npz`, such as `google/gemma-scope-2b-pt-res`.
        subfolder (`str`, *optional*): where it is in it, such as `layer_20/width_16k/average_l0_71`.

    Returns:
        [`HierarchicalSaeModel`]: in evaluation mode and float32, with `selection="jumprelu"`. The names of repository
            and folders say the language model, layer and site, and whether it is a transcoder; what they do not say
            stays open.

    Raises:
        `ValueError`: If it is a dictionary of embeddings, or a transcoder without its layer in the path, has missing or
            unknown arrays, transposed or torn ones, or pickled objects, which are never loaded.
    """
    path = Path(source, subfolder).as_posix()
    if re.search(r"\bembedding/width_", path):
        raise ValueError(
            f"expected a dictionary of residual stream, MLP or attention outputs, or a transcoder, got embeddings: {path}"
        )
    origin = _gemma_scope_origin(path)
    (weights_path,) = _find(source, subfolder, GEMMA_SCOPE_WEIGHTS)
    arrays = _arrays(weights_path, Path(source, subfolder))
    # Some files spell matrices in lower case, and some hold a factor of 1: SAELens reads them too.
    for name in {"W_enc", "W_dec"} - arrays.keys():
        if name.lower() in arrays:
            arrays[name] = arrays.pop(name.lower())
    if "scaling_factor" in arrays and bool((arrays["scaling_factor"] == 1).all()):
        del arrays["scaling_factor"]
    _check_keys("the weights", arrays, {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"})
    d_in, d_sae = arrays["b_dec"].numel(), arrays["b_enc"].numel()
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
    tensors = _checked(arrays, {**shapes, "threshold": (d_sae,)})
    if "target_hook_point" not in origin:
        tensors["b_enc"] = _centred(tensors)
    return _build(d_sae, tensors, selection="jumprelu", **origin)


def save_sparsify(sae: HierarchicalSaeModel, folder: str | Path, k: int | None = None) -> None:
    """
    Write an autoencoder or transcoder for EleutherAI's sparsify (`SparseCoder.load_from_disk`), with one budget.

    Args:
        sae ([`HierarchicalSaeModel`]): its decoder rows are normalised first, as by `save_pretrained`.
        folder (`str` or `Path`): gets `cfg.json` and `sae.safetensors`; made if it is not there. sparsify calls it
            after the module whose output is computed, such as `layers.9` or, by a transcoder, `layers.9.mlp`: nothing
            else in it says so.
        k (`int`, *optional*): latents per input, at most `sae.config.k`, which is the default.

    Raises:
        `ValueError`: If `k` is out of range, the folder is called after another module than the autoencoder's, or for
            one that keeps no fixed number of latents or a transcoder that does not go from what a module takes to what
            it gives, in one size, which the format cannot hold.
    """
    k, config = sae.config.check_k(k), sae.config
    if not config.has_budgets:
        raise ValueError(
            f"sparsify holds a fixed number of latents per input, this {config.kind} selects by a threshold"
        )
    if config.is_transcoder:
        _check_module(config)
    _check_name(folder, config)
    tensors = _tensors(sae)
    del tensors["threshold"]
    tensors["encoder.weight"], tensors["encoder.bias"] = tensors.pop("encoder_weight"), tensors.pop("b_enc")
    settings = {
        "activation": "topk",
        "expansion_factor": max(1, config.d_sae // config.d_in),
        "normalize_decoder": config.normalize_decoder,
        "num_latents": config.d_sae,
        "k": k,
        "multi_topk": False,
        "skip_connection": config.skip_connection,
        "transcode": config.is_transcoder,
        "d_in": config.d_in,
    }
    _write(folder, settings, SPARSIFY_WEIGHTS, tensors)


def load_sparsify(source: str | Path, subfolder: str = "") -> HierarchicalSaeModel:
    """
    Read an autoencoder or transcoder of EleutherAI's sparsify.

    Args:
        source (`str` or `Path`): folder, or id on the Hub, with `cfg.json` and `sae.safetensors`.
        subfolder (`str`, *optional*): where they are in it. The last folder's name says which module it is, as in
            `layers.9`, or `layers.9.mlp`, whose output a transcoder computes from its input.

    Returns:
        [`HierarchicalSaeModel`]: in evaluation mode and float32, with the same reconstructions, at the budget of the
            file and at smaller ones.

    Raises:
        `ValueError`: If it has another activation function, missing or unknown keys, transposed or torn weights, or a
            pickle, which is never loaded, or is a transcoder of a folder whose name is no layer, attention or MLP.
    """
    settings, tensors = _read(source, subfolder, SPARSIFY_WEIGHTS)
    defaults: dict[str, Any] = {
        "activation": "topk",
        "skip_connection": False,
        "transcode": False,
        "signed": False,
        "expansion_factor": 32,
        "num_latents": 0,
        "multi_topk": False,
        "normalize_decoder": True,
    }
    _check_keys(CONFIG, settings, {"d_in", "k"}, defaults)
    settings = {**defaults, **settings}
    # A linear map of an autoencoder's input to itself leaves nothing for the latents to do.
    fixed = ["activation", "signed", *(["skip_connection"] if settings["transcode"] is not True else [])]
    for name in fixed:
        if settings[name] != defaults[name]:
            raise ValueError(
                f"expected a TopK autoencoder with {name}={defaults[name]!r}, got {name}={settings[name]!r}"
            )
    for name in ("transcode", "skip_connection"):
        if not isinstance(settings[name], bool):
            raise ValueError(f"{name} in {CONFIG} must be true or false, got {settings[name]!r}")
    d_in = integer(f"d_in in {CONFIG}", settings["d_in"], 1)
    d_sae = integer(f"num_latents in {CONFIG}", settings["num_latents"], 0)
    d_sae = d_sae or d_in * integer(f"expansion_factor in {CONFIG}", settings["expansion_factor"], 1)
    shapes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    tensors = _checked(tensors, {**shapes, **({"W_skip": (d_in, d_in)} if settings["skip_connection"] else {})})
    tensors["W_enc"], tensors["b_enc"] = tensors.pop("encoder.weight").T, tensors.pop("encoder.bias")
    name = Path(subfolder or source).name
    layer, module = _place(name)
    origin = {"layer": layer, "hook_point": module}
    if settings["transcode"]:
        origin = {"layer": layer, "hook_point": _input_of(module), "target_hook_point": module}
        if None in origin.values():
            raise ValueError(
                "expected a transcoder in a folder called after the layer, attention or MLP that it stands for, such as "
                f"layers.9.mlp, got {name}: call it so"
            )
    return _build(integer(f"k in {CONFIG}", settings["k"], 1), tensors, **origin)


def _architecture(config: Any) -> str:
    """What SAELens calls it."""
    own = ARCHITECTURES[config.selection]
    if not config.is_transcoder:
        return own
    if own == "topk":
        raise ValueError(
            "SAELens has no transcoder that selects the k strongest latents: use save_sparsify, or train with "
            "selection='batch_topk'"
        )
    return TRANSCODERS[2 * (own == "jumprelu") + config.skip_connection]


def _saelens_settings(settings: dict) -> dict:
    """What a `cfg.json` says, with defaults for what it leaves out; refuses what cannot be represented."""
    metadata = _section(settings, "metadata")
    architecture = settings.get("architecture")
    is_transcoder = architecture in TRANSCODERS
    for name in ("hook_name", "hook_name_out"):
        place = metadata.get(name)
        if not isinstance(place, str) and (is_transcoder or place is not None):
            raise ValueError(f"metadata.{name} in {CONFIG} must be the name of a place, got {place!r}")
    version = str(metadata.get("sae_lens_version") or settings.get("sae_lens_version"))
    if not re.match(r"[6-9]\.|\d\d+\.", version):
        raise ValueError(
            f"expected the format of SAELens 6 or later, got version {version}: load it with SAELens and save it again"
        )
    if architecture not in ("standard", "topk", "jumprelu", *TRANSCODERS):
        raise ValueError(
            f"expected a standard (ReLU), TopK or JumpReLU SAE or a transcoder, got architecture {architecture!r}, which "
            "cannot be represented"
        )
    own = ["k"] if architecture == "topk" else ["d_out"] if is_transcoder else []
    needed = {"d_in", "d_sae", "metadata", "architecture", *own}
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not is_transcoder,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **({"rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}),
    }
    _check_keys(CONFIG, settings, needed, defaults)
    for name, value in settings.items():
        if isinstance(defaults.get(name), bool) and not isinstance(value, bool):
            raise ValueError(f"{name} in {CONFIG} must be true or false, got {value!r}")
    settings = {"d_out": settings["d_in"], **defaults, **settings, "metadata": metadata}
    if is_transcoder and settings["apply_b_dec_to_input"] is not False:
        raise ValueError(
            f"expected a transcoder with apply_b_dec_to_input=False, got {settings['apply_b_dec_to_input']!r}: its b_dec "
            "is of another site than its input"
        )
    reshaping = _reshaping(architecture, metadata.get("hook_name"))
    allowed = {"normalize_activations": "none", "reshape_activations": reshaping}
    for name, value in allowed.items():
        if settings[name] not in ("none", value):
            raise ValueError(
                f"expected {name}='none', got {settings[name]!r}: fold it into the weights with SAELens first"
            )
    return settings


def _tensors(sae: HierarchicalSaeModel) -> dict[str, torch.Tensor]:
    """Copies of the weights and the threshold on the CPU, in units of x and, of a transcoder, y."""
    sae.normalize_decoder()
    config: Any = sae.config
    with torch.device("meta"):
        folded = HierarchicalSaeModel(config)
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in sae.state_dict().items()}
    folded.load_state_dict(copies, assign=True)
    folded.fold_input_scale()
    return {
        **{name: parameter.detach() for name, parameter in folded.named_parameters()},
        "threshold": folded.threshold,
    }


def _build(k: int, tensors: dict[str, torch.Tensor], **settings: Any) -> HierarchicalSaeModel:
    """A model of weights that go by SAELens' names, in units of x, which are left as they are."""
    (d_in, d_sae), d_out = tensors["W_enc"].shape, tensors["W_dec"].shape[1]
    is_unit = bool(((torch.linalg.vector_norm(tensors["W_dec"], dim=1) - 1).abs() <= 1e-6).all())
    settings |= {"d_in": d_in, "d_out": d_out, "d_sae": d_sae, "k": k, "budgets": [k]}
    settings |= {"normalize_decoder": is_unit, "skip_connection": "W_skip" in tensors}
    try:
        config = HierarchicalSaeConfig(**settings)
    except StrictDataclassError as error:
        raise ValueError(f"the file does not describe an autoencoder: {error.__cause__}") from error
    sae = HierarchicalSaeModel(config).eval()
    with torch.no_grad():
        sae.encoder_weight.copy_(tensors["W_enc"].T)
        for name in tensors.keys() - {"W_enc"}:
            getattr(sae, name).copy_(tensors[name])
    return sae


def _centred(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The encoder's bias, (d_sae,), with which it takes x − b_dec for x; float64 where it sums, some latents at a time."""
    shift = [tensors["b_dec"].double() @ columns.double() for columns in tensors["W_enc"].split(4096, dim=1)]
    return (tensors["b_enc"].double() + torch.cat(shift)).float()


def _gemma_scope_origin(path: str) -> dict[str, Any]:
    """What the names of repository and folders say of a dictionary of Gemma Scope, as config has it."""
    # Innermost first: a folder of the user's own may be called layer_12_study.
    layers = re.findall(r"(?:^|/)layer_(\d+)(?=/|$)", path)
    layer = layers[-1] if layers else None
    repository = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)", path)
    if repository is None:
        return {"layer": None if layer is None else int(layer)}
    is_transcoder = repository[3] == "transcoders"
    if is_transcoder and layer is None:
        raise ValueError(f"expected the layer of a transcoder in the path, such as layer_5, got {path}")
    origin = {"model_name": f"google/gemma-2-{repository[1]}{'-it' if repository[2] == 'it' else ''}"}
    if layer is None:
        return origin
    names = [GEMMA_SCOPE_SITES[site].format(layer) for site in (repository[3], "mlp")]
    return {**origin, **_places(names[0], names[1] if is_transcoder else None)}


def _reshaping(architecture: str, hook_name: str | None) -> str:
    """What SAELens does to activations at this place, which come flat here: its SAEs flatten the heads' outputs."""
    return "hook_z" if architecture not in TRANSCODERS and (hook_name or "").endswith("hook_z") else "none"


def _places(name: str | None, target: str | None = None) -> dict[str, Any]:
    """What config says of a place, and of the target of a transcoder. Names that are not of one layer stay as they are."""
    layer, hook_point = _place(name)
    if target is None:
        return {"layer": layer, "hook_point": hook_point}
    target_layer, target_hook_point = _place(target)
    numbers = [re.search(r"\b(?:blocks|layers|h)\.(\d+)\b", one or "") for one in (name, target)]
    if len({number and number[1] for number in numbers}) > 1:
        return {"layer": None, "hook_point": name, "target_hook_point": target}
    layer = target_layer if layer is None else layer
    return {"layer": layer, "hook_point": hook_point, "target_hook_point": target_hook_point}


def _place(name: str | None) -> tuple[int | None, str | None]:
    """
    Layer and hook point of a name of TransformerLens or of a module, as config has them. What is in another tower than
    the decoder, or cannot be translated, keeps its name.
    """
    lens = re.fullmatch(r"blocks\.(\d+)\.(.+)", name or "")
    for hook_point, hook in HOOK_POINTS.items():
        if lens and lens[2] == hook:
            return int(lens[1]), hook_point
    path = re.fullmatch(r"(.*\.)?(?:layers|h)\.(\d+)(?:\.(.+))?", name or "")
    if path is None or path[3] in HOOK_POINTS or re.search("encoder|vision|visual|audio", path[1] or ""):
        return None, name
    return int(path[2]), path[3] or "output"


def _hook_name(layer: int | None, hook_point: str | None) -> str | None:
    """The other way round."""
    own = hook_point or "output"
    if layer is None or re.search(rf"(blocks|layers|h)\.{layer}\b", own):
        return hook_point
    return f"blocks.{layer}.{HOOK_POINTS[own]}" if own in HOOK_POINTS else f"layers.{layer}.{own}"


def _input_of(module: str | None) -> str | None:
    """The hook point of what a module takes, which is called by the hook point of what it gives."""
    for block, names in BLOCKS.items():
        if module == f"{block}.output" or re.fullmatch(names[0][1], module or ""):
            return f"{block}.input"
    return "input" if module == "output" else None


def _check_module(config: Any) -> None:
    """Raise a `ValueError` if sparsify, whose transcoders stand for a module, has none that is like this one."""
    (_, taken), (_, given) = (
        _place(_hook_name(config.layer, hook_point)) for hook_point in (config.hook_point, config.target_hook_point)
    )
    if taken is None or taken != _input_of(given) or config.d_out != config.d_in:
        raise ValueError(
            "sparsify's transcoders go from what a layer, its attention or its MLP takes to what it gives, of one size, "
            f"got one from {taken} ({config.d_in}) to {given} ({config.d_out})"
        )


def _check_name(folder: str | Path, config: Any) -> None:
    """Raise a `ValueError` if a folder's name says that the autoencoder is of another place than the config does."""
    hook_name = _hook_name(config.layer, config.target_hook_point or config.hook_point)
    name, (layer, own) = Path(folder).name, _place(hook_name)
    named = _place(name)[1] if re.match(r"(?:.*\.)?(?:layers|h)\.\d+", name) else own
    # What a block adds is, but for a norm behind it, what its module returns.
    added = {f"{block}.output": names[0][1] for block, names in BLOCKS.items()}.get(own or "")
    is_foreign = layer is None and named != "output"
    if own in (None, named) or is_foreign or (added and re.fullmatch(added, named or "")):
        return
    place = f"layers.{layer}" if own == "output" else hook_name
    raise ValueError(
        f"sparsify takes the folder's name for the place of the autoencoder, which is {place}, got {name}: give "
        "the folder that name"
    )


def _write(folder: str | Path, settings: dict, weights_name: str, tensors: dict[str, torch.Tensor]) -> None:
    with whole_folder(folder) as unfinished:
        save_file(tensors, unfinished / weights_name)
        (unfinished / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def _find(source: str | Path, subfolder: str, weights_name: str, *others: str) -> list[str]:
    """Where the weights and other files are, from the Hub if `source` is no folder."""
    path, folder = Path(source), Path(source, subfolder)
    if path.is_file():
        raise ValueError(f"expected the folder that holds {weights_name}, got the file {path}")
    if not path.exists() and (path.is_absolute() or len(path.parts) > 2):
        raise ValueError(
            f"expected a folder with {weights_name}, or an id on the Hub, got {path}, which does not exist"
        )
    if folder.is_dir() and not (folder / weights_name).exists():
        pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLES]
        if pickles:
            raise ValueError(
                f"expected {weights_name} in {folder}, got the pickle {pickles[0]}: loading one can run any code, so "
                "it is never done; have it saved as safetensors"
            )
        raise ValueError(f"expected {weights_name} in {folder}, got {sorted(path.name for path in folder.iterdir())}")
    return [str(cached_file(str(source), name, subfolder=subfolder)) for name in (weights_name, *others)]


def _read(source: str | Path, subfolder: str, weights_name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    folder = Path(source, subfolder)
    weights_path, config_path = _find(source, subfolder, weights_name, CONFIG)
    try:
        settings, tensors = json.loads(Path(config_path).read_text()), load_file(weights_path)
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"expected JSON in {CONFIG} and safetensors in {weights_name} of {folder}, got {error}"
        ) from error
    if not isinstance(settings, dict):
        raise ValueError(f"{CONFIG} in {folder} must hold settings by name, got {settings!r}")
    return settings, tensors


def _arrays(path: str, folder: Path) -> dict[str, torch.Tensor]:
    """What an `.npz` holds. Objects in it are pickles, which numpy leaves alone."""
    expected = f"expected arrays in {GEMMA_SCOPE_WEIGHTS} in {folder}"
    try:
        return {name: torch.from_numpy(array) for name, array in dict(numpy.load(path, allow_pickle=False)).items()}
    except (*DAMAGED_NPZ, TypeError, ValueError) as error:
        if "allow_pickle" in str(error):
            raise ValueError(
                f"{expected}, got pickled objects: loading them can run any code, so it is never done"
            ) from error
        raise ValueError(f"{expected}, got {error}") from error


def _section(settings: dict, name: str) -> dict:
    """Settings within settings, which may be missing."""
    found = settings.get(name) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{name} in {CONFIG} must hold settings by name, got {found!r}")
    return found


def _check_keys(where: str, found: dict, needed: set[str], optional: Iterable[str] = ()) -> None:
    missing, unknown = sorted(needed - found.keys()), sorted(found.keys() - needed - {*optional})
    if missing or unknown:
        raise ValueError(
            f"{where} must have the keys {sorted(needed)}, got {f'none for {missing}' if missing else ''}"
            f"{' and ' if missing and unknown else ''}{f'the unknown {unknown}' if unknown else ''}"
        )


def _checked(tensors: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The tensors in float32, if they are those of `shapes`."""
    _check_keys("the weights", tensors, set(shapes))
    checked = {}
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape)
        if found != shape:
            hint = ", which is transposed" if found == shape[::-1] else ""
            raise ValueError(f"{name} must have shape {shape}, got {found}{hint}")
        if not tensors[name].is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensors[name].dtype}")
        checked[name] = tensors[name].float()
        if not bool(checked[name].isfinite().all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    return checked


__all__ = ["load_gemma_scope", "load_saelens", "load_sparsify", "save_saelens", "save_sparsify"]
