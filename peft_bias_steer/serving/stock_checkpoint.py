"""Steered models as checkpoints of stock transformers classes, for vLLM and whatever else reads their biases."""

import copy
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import AutoProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..merging import MergeSite, in_evaluation_mode, merge_sites, why_no_merge_site
from ..residual import find_layers, residual_width, text_pass
from ..stock_forms import StockForm, find_stock_form
from ..vectors import check_adapters, steering_layers, unwrap
from ..whole_files import check_empty_folder, whole_folder


__all__ = ["bias_ready_checkpoint", "export_stock_checkpoint"]
logger = logging.get_logger(__name__)


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
    loaded again and its output is compared before it appears under `output_dir`.

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
    weights = zero_biased_weights(base)
    _write_checkpoint(base, weights, output_dir, tokenizer=tokenizer, max_shard_size=max_shard_size)


def zero_biased_weights(base: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of a model with zero biases where steering vectors merge; the model itself is left as it was."""
    _, layers = find_layers(base)
    zero = torch.zeros(residual_width(base), device=base.device)
    sites = _sites(layers)
    originals = [site.bias for site in sites]
    try:
        for site, original in zip(sites, originals):
            site.write(original, zero)
        return base.state_dict()
    finally:
        for site, original in zip(sites, originals):
            site.restore(original)


def _sites(hosts: Iterable[nn.Module]) -> list[MergeSite]:
    sites = []
    for host in hosts:
        try:
            sites += merge_sites(host)
        except ValueError as error:
            raise ValueError(
                f"no checkpoint can hold vectors on {type(host).__name__}: {why_no_merge_site(host)} ({error})"
            ) from error
    return sites


def _merged_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    check_adapters(model, model.active_adapters)
    _sites(layer.get_base_layer() for layer in steering_layers(model).values())
    was_merged = any(layer.merged for layer in steering_layers(model).values())
    try:
        if not was_merged:
            model.merge_adapter(safe_merge=True)
        weights = unwrap(model).state_dict()
    finally:
        if not was_merged:
            model.unmerge_adapter()
    weights = {key: weight for key, weight in weights.items() if ".bias_steer." not in key}
    for name, wrapper in wrapped_modules(model).items():
        if unwrap(model).config.get_text_config(decoder=True).tie_word_embeddings and _holds_words(model, wrapper):
            raise ValueError(
                f"the adapter trained {name}, which this base model ties to its other embedding: no checkpoint can "
                "hold one of them trained. Load the base with tie_word_embeddings=False first"
            )
        weights = {key: weight for key, weight in weights.items() if not key.startswith(f"{name}.")}
        trained = wrapper.modules_to_save[wrapper.active_adapters[0]].state_dict()
        weights |= {f"{name}.{key}": weight for key, weight in trained.items()}
    return weights


def wrapped_modules(model: PeftModel) -> dict[str, ModulesToSaveWrapper]:
    """Modules that the active adapters trained whole, such as a head, by their name in the base model."""
    modules = unwrap(model).named_modules()
    wrappers = {name: module for name, module in modules if isinstance(module, ModulesToSaveWrapper)}
    return {name: wrapper for name, wrapper in wrappers.items() if wrapper.active_adapters}


def refuse_trained_modules(model: PeftModel, what: str) -> None:
    """
    Refuses to write a file of vectors alone where the adapter trained more than these.

    Raises:
        ValueError: If it did.
    """
    if names := list(wrapped_modules(model)):
        raise ValueError(
            f"{what} holds vectors alone, and this adapter trained {', '.join(names)} too, which would be left out: use "
            "export_stock_checkpoint()"
        )


def _holds_words(model: PeftModel, wrapper: ModulesToSaveWrapper) -> bool:
    base = unwrap(model)
    return any(part is wrapper for part in (base.get_input_embeddings(), base.get_output_embeddings()))


def _write_checkpoint(
    model: PeftModel | PreTrainedModel,
    weights: dict[str, torch.Tensor],
    output_dir: str | os.PathLike,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    max_shard_size: int | str,
) -> None:
    base = unwrap(model)
    check_empty_folder(output_dir)
    if getattr(base.config, "quantization_config", None) is not None:
        raise ValueError(
            f"expected a base model that is not quantised, got {base.config.quantization_config}: load the base in "
            "full precision, attach the adapter to that, and export it"
        )
    own = StockForm(type(base), base.config, weights).skeleton().state_dict()
    foreign = [key for key in weights if key not in own and not key.endswith(".bias")]
    if foreign:
        raise ValueError(f"no stock class has the weights {foreign[:4]}…: unload what else was added to the model")
    form = find_stock_form(base, weights)
    stock = form.skeleton()
    stock.load_state_dict(form.weights, assign=True)
    if base.can_generate():
        stock.generation_config = copy.deepcopy(base.generation_config)
    tokenizer = tokenizer or find_tokenizer(base)
    with whole_folder(output_dir) as folder:
        stock.save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        _verify_checkpoint(base, form.model_class, folder)


def find_tokenizer(base: PreTrainedModel) -> Any:
    """What the checkpoint of a model has to prepare its inputs: a processor where it reads more than text, if it has one."""
    if not base.name_or_path:
        return None
    reads_more = base.config.get_text_config(decoder=True) is not base.config or base.main_input_name != "input_ids"
    for auto_class in [AutoProcessor, AutoTokenizer] if reads_more else [AutoTokenizer]:
        try:
            return auto_class.from_pretrained(base.name_or_path)
        except Exception as error:  # tokenizers raises this very class
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    logger.warning(
        f"No tokenizer found in {base.name_or_path} ({reason}): pass one as `tokenizer` to have it saved along."
    )
    return None


@torch.no_grad()
def _verify_checkpoint(base: PreTrainedModel, model_class: type[PreTrainedModel], folder: Path) -> None:
    reloaded, report = cast(Any, model_class).from_pretrained(
        folder, dtype=base.dtype, attn_implementation=base.config._attn_implementation, output_loading_info=True
    )
    lost = {*report["missing_keys"], *report["unexpected_keys"]}
    config = base.config.get_text_config(decoder=True)
    # a multiplicative walk through the vocabulary: distinct tokens without touching the random state
    input_ids = (torch.arange(1, 17, device=base.device) * 7919 % config.vocab_size)[None]
    ends = getattr(config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    if (end := next((end for end in ends if end in range(config.vocab_size)), None)) is not None:
        input_ids[0, -1] = end  # BART classifies what stands there
    with in_evaluation_mode(base):
        expected = _outputs(base, input_ids)
    got = _outputs(reloaded.to(base.device).eval(), input_ids)
    # float16 and bfloat16 round the bias itself, and once more at every layer
    tolerance = 1e-4 if base.dtype in (torch.float32, torch.float64) else 5e-2
    pairs = zip(got, expected, strict=True)
    errors = [(ours - theirs).abs().max() / (theirs.abs().max() or 1.0) for ours, theirs in pairs]
    error = torch.stack(errors).max()
    if lost or not error <= tolerance:
        raise RuntimeError(
            f"the reloaded {model_class.__name__} should give the model's output within {tolerance:.1e} of its largest "
            f"number, got {error:.1e} and the lost or missing weights {sorted(lost)}: nothing was written; please report "
            "this"
        )


def _outputs(model: PreTrainedModel, input_ids: torch.Tensor) -> list[torch.Tensor]:
    """What a model returns, its cache apart: logits, those of starts and ends, or hidden states."""
    returned = text_pass(model, input_ids)().values()
    return [value.float() for value in returned if isinstance(value, torch.Tensor) and value.is_floating_point()]
