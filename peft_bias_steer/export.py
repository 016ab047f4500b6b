"""Steered models as files that other software loads: stock checkpoints with biases, and GGUF files for llama.cpp."""

import copy
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel, PeftType, get_peft_model
from torch import nn
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from .config import BiasSteerConfig
from .layer import BiasSteerLayer
from .residual import MergeSite, find_layers, merge_sites, residual_width


if TYPE_CHECKING:
    from .model import BiasSteerModel


logger = logging.get_logger(__name__)

# config fields that give linear modules a bias and do nothing else
BIAS_SWITCHES = ("mlp_bias", "attention_bias", "use_bias", "bias", "qkv_bias")
# classes that compute what Llama computes, and the switches under which Llama has their biases
LLAMA_COUSINS = {
    "MistralForCausalLM": ("mlp_bias",),
    "Phi3ForCausalLM": ("mlp_bias",),
    "Qwen2ForCausalLM": ("mlp_bias", "attention_bias"),
}
WHY_NO_STOCK_FORM = {
    "Qwen3ForCausalLM": "it normalises queries and keys, which no class with MLP biases does",
    "GemmaForCausalLM": "it scales embeddings and norms as no class with MLP biases does",
}


def steering_vectors(model: PeftModel, adapter_name: str = "default") -> dict[int, torch.Tensor]:
    """
    The vectors of one adapter by the index of their layer.

    Args:
        model (`PeftModel`): A model with a BiasSteer adapter.
        adapter_name (`str`, *optional*, defaults to `"default"`): Name of the adapter.

    Returns:
        `dict[int, torch.Tensor]`: Copies of the vectors, unscaled, each (hidden_size,).

    Raises:
        ValueError: If there is no such adapter, or if it steers modules other than layers.
    """
    layers = _layers_by_index(model, [adapter_name])
    return {index: layer.vector(adapter_name).detach().clone() for index, layer in layers.items()}


def set_steering_vectors(model: PeftModel, vectors: dict[int, torch.Tensor], adapter_name: str = "default") -> None:
    """
    Overwrites the vectors of one adapter. Layers that `vectors` does not name keep theirs.

    Args:
        model (`PeftModel`): A model with a BiasSteer adapter.
        vectors (`dict[int, torch.Tensor]`): New vectors by index of their layer, each (hidden_size,).
        adapter_name (`str`, *optional*, defaults to `"default"`): Name of the adapter.

    Raises:
        ValueError: If a layer is not steered, a size is wrong or the adapter is merged. Nothing is changed then.
    """
    layers = _layers_by_index(model, [adapter_name])
    unknown = sorted(set(vectors) - set(layers))
    if unknown:
        raise ValueError(f"expected vectors for layers among {sorted(layers)}, got some for {unknown}")
    for index, vector in vectors.items():
        if vector.shape != (layers[index].size,):
            raise ValueError(
                f"expected a vector of shape ({layers[index].size},) for layer {index}, got {tuple(vector.shape)}"
            )
        if adapter_name in layers[index].merged_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged: call unmerge_adapter() before changing its vectors")
    for index, vector in vectors.items():
        layers[index].vector(adapter_name).data.copy_(vector)


def _base(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def _steering_layers(model: PeftModel) -> dict[str, BiasSteerLayer]:
    return cast("BiasSteerModel", model.base_model).steering_layers


def _check_adapters(model: PeftModel, adapter_names: list[str]) -> None:
    if not isinstance(model, PeftModel):
        raise ValueError(f"expected a PeftModel with a BiasSteer adapter, got a {type(model).__name__}")
    kinds = {name: PeftType(config.peft_type).value for name, config in model.peft_config.items()}
    if not adapter_names or any(kinds.get(name) != "BIAS_STEER" for name in adapter_names):
        raise ValueError(f"expected the name of a BiasSteer adapter, got {adapter_names}; the model has {kinds}")


def _layers_by_index(model: PeftModel, adapter_names: list[str]) -> dict[int, BiasSteerLayer]:
    _check_adapters(model, adapter_names)
    pattern = cast(BiasSteerConfig, model.peft_config[adapter_names[0]]).layers_pattern
    index_of = {host: index for index, host in enumerate(find_layers(_base(model), pattern)[1])}
    layers = {}
    for name, layer in _steering_layers(model).items():
        if any(adapter in layer.bias_steer_vector for adapter in adapter_names):
            if layer.get_base_layer() not in index_of:
                raise ValueError(
                    f"expected vectors on decoder layers, but {name} is steered, which has no layer index: save the "
                    "adapter with save_pretrained() instead"
                )
            layers[index_of[layer.get_base_layer()]] = layer
    return layers


def _active_vectors(model: PeftModel) -> dict[int, torch.Tensor]:
    layers = _layers_by_index(model, model.active_adapters)
    sums = {index: layer.sum_vectors(model.active_adapters) for index, layer in layers.items()}
    vectors = {index: total.detach().float().cpu() for index, total in sums.items() if total is not None}
    broken = [index for index, vector in vectors.items() if not vector.isfinite().all()]
    if broken:
        raise ValueError(
            f"expected finite vectors, got NaN or infinity in those of layers {broken}: nothing to export"
        )
    return vectors


def export_stock_checkpoint(
    model: PeftModel | PreTrainedModel,
    output_dir: str | os.PathLike,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """
    Writes a checkpoint of stock transformers classes that computes what the steered model computes.

    The vectors become biases. Where the model's own class has no room for them, another stock class is used: Llama,
    SmolLM3, Granite and others with `mlp_bias=True`; Mistral, Phi3 and Qwen2 as `LlamaForCausalLM`. The checkpoint is
    loaded again and its logits are compared before it appears under `output_dir`.

    Args:
        model (`PeftModel` or `PreTrainedModel`):
            The steered model, with its active adapters at their present scale, or what `merge_and_unload` returned.
        output_dir (`str` or `os.PathLike`): Folder to write. It must be empty or not exist.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer to save along. By default the one of the checkpoint that the base model was loaded from.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): Size above which the weights are split.

    Raises:
        ValueError: If no stock class computes the same, with the reason. Nothing is written then.
    """
    weights = _merged_weights(model) if isinstance(model, PeftModel) else model.state_dict()
    _write_checkpoint(model, weights, output_dir, tokenizer=tokenizer, max_shard_size=max_shard_size)


def bias_ready_checkpoint(
    base: PreTrainedModel,
    output_dir: str | os.PathLike,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """
    Writes the same model with zero biases where steering vectors merge.

    vLLM ignores a bias that its checkpoint did not have. Training on this checkpoint instead of `base` lets TRL's
    vLLM sync deliver the vectors.

    Args:
        base (`PreTrainedModel`): A model without adapters.
        output_dir (`str` or `os.PathLike`): Folder to write. It must be empty or not exist.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): As in [`export_stock_checkpoint`].
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): Size above which the weights are split.

    Raises:
        ValueError: If no stock class has such biases, with the reason. Nothing is written then.
    """
    _, layers = find_layers(base)
    zero = torch.zeros(residual_width(base), device=base.device)
    sites = _sites(layers)
    originals = [site.bias for site in sites]
    try:
        for site, original in zip(sites, originals):
            site.write(original, zero)
        weights = base.state_dict()
    finally:
        for site, original in zip(sites, originals):
            site.restore(original)
    _write_checkpoint(base, weights, output_dir, tokenizer=tokenizer, max_shard_size=max_shard_size)


def _sites(hosts: Iterable[nn.Module]) -> list[MergeSite]:
    sites = []
    for host in hosts:
        try:
            sites += merge_sites(host)
        except ValueError as error:
            parts = {name.rpartition(".")[2] for name, _ in host.named_modules()}
            reason = "no bias in it reaches its output unchanged"
            if parts & {"experts", "router"}:
                reason = "a router weighs the outputs of its experts, and any bias in them"
            elif any(name.startswith(("post_feedforward", "post_mlp")) for name in parts):
                reason = "a norm after the MLP rescales any bias in it"
            raise ValueError(f"no checkpoint can hold vectors on {type(host).__name__}: {reason} ({error})") from error
    return sites


def _merged_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    _check_adapters(model, model.active_adapters)
    _sites(layer.get_base_layer() for layer in _steering_layers(model).values())
    was_merged = any(layer.merged for layer in _steering_layers(model).values())
    try:
        if not was_merged:
            model.merge_adapter(safe_merge=True)
        weights = _base(model).state_dict()
    finally:
        if not was_merged:
            model.unmerge_adapter()
    return {key: weight for key, weight in weights.items() if ".bias_steer." not in key}


@dataclass
class StockForm:
    """
    A stock class that can hold a model's weights and biases.

    Args:
        model_class (`type[PreTrainedModel]`): The class.
        config (`PreTrainedConfig`): Its config.
        weights (`dict[str, torch.Tensor]`): All its weights; biases that only the class demands are zero.
        switches (`tuple[str, ...]`): Config fields that are on here and off in the model's own config.
    """

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    weights: dict[str, torch.Tensor]
    switches: tuple[str, ...] = ()

    def skeleton(self) -> PreTrainedModel:
        with torch.device("meta"):
            return self.model_class(copy.deepcopy(self.config))


def _find_stock_form(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> StockForm:
    for form in _candidate_forms(model, weights):
        expected = form.skeleton().state_dict()
        biases = {key for key in form.weights if key.endswith("bias")}
        added = expected.keys() - form.weights.keys()
        if biases <= expected.keys() and all(key.endswith(".bias") for key in added):
            for key in added:
                weight = form.weights[key.removesuffix("bias") + "weight"]
                dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
                form.weights[key] = torch.zeros(expected[key].shape, dtype=dtype, device=weight.device)
            return form
    name = type(model).__name__
    raise ValueError(
        f"no stock class computes what {name} with these biases computes: "
        f"{WHY_NO_STOCK_FORM.get(name, 'its config has no switch for them')}. Keep the adapter and load it with "
        "PeftModel.from_pretrained(), or use export_control_vector() for llama.cpp"
    )


def _candidate_forms(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> Iterator[StockForm]:
    from huggingface_hub.errors import StrictDataclassError

    yield StockForm(type(model), model.config, dict(weights))
    text_config = model.config.get_text_config(decoder=True)
    switches = [name for name in BIAS_SWITCHES if getattr(text_config, name, None) is False]
    for names in [*([name] for name in switches), switches]:
        config = copy.deepcopy(model.config)
        for name in names:
            setattr(config.get_text_config(decoder=True), name, True)
        try:
            config.validate()
        except StrictDataclassError:  # some switches have to be turned together
            continue
        yield StockForm(type(model), config, dict(weights), tuple(names))
    if type(model).__name__ in LLAMA_COUSINS:
        _refuse_what_llama_lacks(model)
        shared = LlamaConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
        fields = {name: value for name, value in model.config.to_dict().items() if name in shared}
        fields.update(dict.fromkeys(LLAMA_COUSINS[type(model).__name__], True))
        yield StockForm(LlamaForCausalLM, LlamaConfig(**fields), dict(_split_fused(weights, model.config)))


def _refuse_what_llama_lacks(model: PreTrainedModel) -> None:
    config, rope = model.config, model.config.rope_parameters
    reason = None
    if config.sliding_window is not None and config.sliding_window < config.max_position_embeddings:
        reason = f"its attention has a sliding window of {config.sliding_window} tokens"
    elif rope["rope_type"] == "longrope":
        reason = "its rotary embedding is of type longrope"
    elif rope.get("partial_rotary_factor", 1.0) != 1.0:
        reason = f"it rotates only a part ({rope['partial_rotary_factor']}) of each head"
    if reason is not None:
        raise ValueError(
            f"{type(model).__name__} cannot be written as LlamaForCausalLM: {reason}. Keep the adapter and load it "
            "with PeftModel.from_pretrained(), or use export_control_vector() for llama.cpp"
        )


def _split_fused(weights: dict[str, torch.Tensor], config: PreTrainedConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Phi3's `qkv_proj` and `gate_up_proj` as the modules that Llama has; copies, since files hold no views."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key_rows = config.num_key_value_heads * head_dim
    for key, weight in weights.items():
        if "qkv_proj" in key:
            rows = [config.num_attention_heads * head_dim, key_rows, key_rows]
            for name, part in zip(("q_proj", "k_proj", "v_proj"), weight.split(rows)):
                yield key.replace("qkv_proj", name), part.clone()
        elif "gate_up_proj" in key:
            for name, part in zip(("gate_proj", "up_proj"), weight.chunk(2)):
                yield key.replace("gate_up_proj", name), part.clone()
        else:
            yield key, weight


def _write_checkpoint(
    model: PeftModel | PreTrainedModel,
    weights: dict[str, torch.Tensor],
    output_dir: str | os.PathLike,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    max_shard_size: int | str,
) -> None:
    base = _base(model)
    output = Path(output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output_dir must be empty or not exist, but {output} holds something: choose another")
    if getattr(base.config, "quantization_config", None) is not None:
        raise ValueError(
            f"expected a base model that is not quantised, got {base.config.quantization_config}: load the base in "
            "full precision, attach the adapter to that, and export it"
        )
    own = next(_candidate_forms(base, weights)).skeleton().state_dict()
    foreign = [key for key in weights if key not in own and not key.endswith(".bias")]
    if foreign:
        raise ValueError(f"no stock class has the weights {foreign[:4]}…: unload what else was added to the model")
    form = _find_stock_form(base, weights)
    stock = form.skeleton()
    stock.load_state_dict(form.weights, assign=True)
    if base.can_generate():
        stock.generation_config = copy.deepcopy(base.generation_config)
    tokenizer = tokenizer or _find_tokenizer(base)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        folder = Path(scratch, "checkpoint")
        stock.save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        _verify_checkpoint(model, form.model_class, folder)
        os.replace(folder, output)


def _find_tokenizer(base: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    if not base.name_or_path:
        return None
    try:
        return AutoTokenizer.from_pretrained(base.name_or_path)
    except (OSError, ValueError):
        logger.warning(f"No tokenizer found in {base.name_or_path}: pass one as `tokenizer` to have it saved along.")
        return None


@torch.no_grad()
def _verify_checkpoint(model: PeftModel | PreTrainedModel, model_class: type[PreTrainedModel], folder: Path) -> None:
    base = _base(model)
    reloaded, report = cast(Any, model_class).from_pretrained(
        folder, dtype=base.dtype, attn_implementation=base.config._attn_implementation, output_loading_info=True
    )
    lost = {*report["missing_keys"], *report["unexpected_keys"]}
    config = base.config.get_text_config(decoder=True)
    # a multiplicative walk through the vocabulary: distinct tokens without touching the random state
    input_ids = (torch.arange(1, 17, device=base.device) * 7919 % config.vocab_size)[None]
    inputs = {"input_ids": input_ids, **({"decoder_input_ids": input_ids} if config.is_encoder_decoder else {})}
    # module by module: a PeftModel may be in training mode around a base that is not
    modes = [(module, module.training) for module in model.modules()]
    expected = model.eval()(**inputs).logits.float()
    for module, mode in modes:
        module.training = mode
    got = reloaded.to(base.device).eval()(**inputs).logits.float()
    # float16 and bfloat16 round the bias itself, and once more at every layer
    tolerance = (1e-4 if base.dtype in (torch.float32, torch.float64) else 5e-2) * expected.abs().max()
    error = (got - expected).abs().max()
    if lost or not error <= tolerance:
        raise RuntimeError(
            f"the reloaded {model_class.__name__} should give the model's logits within {tolerance:.1e}, got "
            f"{error:.1e} and the lost or missing weights {sorted(lost)}: nothing was written; please report this"
        )


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
    weights = model.state_dict()
    try:
        form = _find_stock_form(model, weights)
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


def _refuse_to_save(*args, reason: str, **kwargs) -> None:
    raise ValueError(f"save_pretrained() would lose the merged steering vectors when the model is loaded: {reason}")


def refuse_lossy_rollout_sync(sites: Iterable[MergeSite]) -> None:
    """
    Raises if TRL is about to merge for vLLM, and vLLM's copy of the model has no biases to receive.

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
            "would silently sample from the base model. Write a base with zero biases once, with "
            "peft_bias_steer.bias_ready_checkpoint(base, output_dir), and train on that, or set use_vllm=False"
        )


def _package(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]


def export_control_vector(model: PeftModel, path: str | os.PathLike, *, drop_first_layer: bool = False) -> float:
    """
    Writes the active vectors, summed at their present scale, as a control vector for llama.cpp
    (`llama-cli --control-vector FILE`): a GGUF file with one tensor `direction.N` for the output of each layer N.

    llama.cpp refuses a file with a vector for layer 0.

    Args:
        model (`PeftModel`): A model with a BiasSteer adapter.
        path (`str` or `os.PathLike`): File to write.
        drop_first_layer (`bool`, *optional*, defaults to `False`): Leave out the vector of layer 0 if it is not zero.

    Returns:
        `float`: Norm of the vector of layer 0, which the file does not hold.

    Raises:
        ValueError: If layer 0 has a vector that `drop_first_layer` does not give up, or no other layer has any.
    """
    vectors = _active_vectors(model)
    dropped = vectors.pop(0, torch.zeros(1)).norm().item()
    others = sum(vector.norm().item() ** 2 for vector in vectors.values()) ** 0.5
    if dropped and not drop_first_layer:
        raise ValueError(
            f"llama.cpp takes no vector for layer 0, but this one has norm {dropped:.4g} (the others together "
            f"{others:.4g}): give it up with drop_first_layer=True, or keep it with inject_bias_gguf() or "
            "export_stock_checkpoint()"
        )
    if not vectors:
        raise ValueError("expected vectors for layers above 0, got none: llama.cpp takes no file without any")
    gguf = _import_gguf()
    config = _base(model).config.get_text_config(decoder=True)
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", config.model_type)
    writer.add_uint32("controlvector.layer_count", config.num_hidden_layers)
    for index, vector in sorted(vectors.items()):
        writer.add_tensor(f"direction.{index}", vector.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dropped


def from_control_vector(
    path: str | os.PathLike, model: PeftModel | PreTrainedModel, adapter_name: str = "default"
) -> PeftModel:
    """
    Reads a llama.cpp control vector as a BiasSteer adapter. The layers that the file does not name are not steered.

    Args:
        path (`str` or `os.PathLike`): GGUF file with tensors `direction.N`.
        model (`PeftModel` or `PreTrainedModel`): Model to steer; a `PeftModel` gets one more adapter.
        adapter_name (`str`, *optional*, defaults to `"default"`): Name of the new adapter.

    Returns:
        `PeftModel`: The steered model.

    Raises:
        ValueError: If the file is damaged, holds no control vector, or one of another size. `model` is unchanged then.
    """
    base = _base(model)
    _, layers = find_layers(base)
    width = residual_width(base)
    vectors = {}
    for tensor in _read_gguf(path).tensors:
        prefix, _, index = tensor.name.partition(".")
        if prefix != "direction" or not index.isdecimal() or int(index) >= len(layers):
            raise ValueError(f"expected tensors direction.0 to direction.{len(layers) - 1}, got {tensor.name}")
        if tensor.tensor_type.name != "F32" or tensor.data.shape != (width,):
            raise ValueError(
                f"expected {tensor.name} as F32 of shape ({width},), got {tensor.tensor_type.name} of shape "
                f"{tensor.data.shape}: a control vector fits only the model that it was made for"
            )
        vectors[int(index)] = torch.from_numpy(tensor.data.copy())
    if not vectors:
        raise ValueError(f"expected a control vector with tensors direction.N, got none in {path}")
    config = BiasSteerConfig(layers_to_transform=sorted(vectors))
    if isinstance(model, PeftModel):
        if adapter_name in model.peft_config:
            raise ValueError(f"expected a new adapter name, got {adapter_name!r}, which the model has already")
        model.add_adapter(adapter_name, config)
    else:
        model = get_peft_model(model, config, adapter_name=adapter_name)
    set_steering_vectors(model, vectors, adapter_name)
    return model


def inject_bias_gguf(model: PeftModel, gguf_in: str | os.PathLike, gguf_out: str | os.PathLike) -> None:
    """
    Copies a llama.cpp model and adds the active vectors to it as biases `blk.N.ffn_down.bias`, layer 0 included.

    Metadata and all other tensors stay as they are, byte for byte, whatever their quantisation.

    Args:
        model (`PeftModel`): A model with a BiasSteer adapter; its active vectors are summed at their present scale.
        gguf_in (`str` or `os.PathLike`): GGUF file of the base model, of architecture `llama`.
        gguf_out (`str` or `os.PathLike`): GGUF file to write.

    Raises:
        ValueError: If the file is damaged, of another architecture or size, or has such biases already.
    """
    vectors = {f"blk.{index}.ffn_down.bias": vector for index, vector in sorted(_active_vectors(model).items())}
    reader = _read_gguf(gguf_in)
    _check_gguf_fits(reader, model, vectors)
    swapped = ">" if sys.byteorder == "little" else "<"
    order = swapped if reader.byte_order == "S" else "="
    field = reader.tensors[-1].field
    infos_end = field.offset + sum(part.nbytes for part in field.parts)
    magic_and_version, tensors_and_rest = reader.data[:8].tobytes(), reader.data[16:infos_end].tobytes()
    old_size = len(reader.data) - reader.data_offset
    offset = _padded(old_size, reader.alignment)
    infos, data = b"", b"\0" * (offset - old_size)
    for name, vector in vectors.items():
        values = vector.numpy().astype(f"{order}f4").tobytes()
        infos += struct.pack(f"{order}Q{len(name)}sIQIQ", len(name), name.encode(), 1, len(vector), 0, offset)
        data += values.ljust(_padded(len(values), reader.alignment), b"\0")
        offset += _padded(len(values), reader.alignment)
    count = struct.pack(f"{order}Q", len(reader.tensors) + len(vectors))
    head = magic_and_version + count + tensors_and_rest + infos
    unfinished = Path(f"{gguf_out}.unfinished")
    with open(gguf_in, "rb") as source, unfinished.open("wb") as file:
        file.write(head.ljust(_padded(len(head), reader.alignment), b"\0"))
        source.seek(reader.data_offset)
        shutil.copyfileobj(source, file)
        file.write(data)
    os.replace(unfinished, gguf_out)


def _check_gguf_fits(reader: Any, model: PeftModel, vectors: dict[str, torch.Tensor]) -> None:
    architecture = _gguf_value(reader, "general.architecture")
    if architecture != "llama" or _gguf_value(reader, "llama.expert_count"):
        raise ValueError(
            f"expected a dense GGUF model of architecture llama, got {architecture} with "
            f"{_gguf_value(reader, 'llama.expert_count') or 0} experts, for which llama.cpp knows no such bias: use "
            "export_control_vector()"
        )
    base = _base(model)
    expected = (len(find_layers(base)[1]), residual_width(base))
    got = tuple(_gguf_value(reader, f"llama.{name}") for name in ("block_count", "embedding_length"))
    if got != expected:
        raise ValueError(f"expected a GGUF model of (layers, width) = {expected}, got {got}: take that of this base")
    present = sorted(vectors.keys() & {tensor.name for tensor in reader.tensors})
    if present:
        raise ValueError(f"expected a GGUF model without biases, got one with {present[0]}: take the unsteered one")


def _gguf_value(reader: Any, name: str) -> object:
    value = reader.get_field(name)
    return None if value is None else value.contents()


def _read_gguf(path: str | os.PathLike) -> Any:
    gguf = _import_gguf()
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(
            f"expected a complete GGUF file, got {os.path.getsize(path)} bytes in {path} that do not parse ({error})"
        ) from error


def _import_gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need one more package: pip install 'peft_bias_steer[gguf]'") from error
    return gguf


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
