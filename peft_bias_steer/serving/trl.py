"""TRL with vLLM: a base that can receive steering vectors, and proof that the engine samples from the steered policy."""

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..merging import merge_sites
from ..vectors import active_vectors, set_steering_vectors, steering_layers, steering_vectors
from ..whole_files import whole_folder
from .routes import VLLM_PLUGIN, VLLM_STOCK, serving_routes
from .stock_checkpoint import bias_ready_checkpoint, find_tokenizer
from .vllm.layers import VECTOR
from .vllm.settings import KEY, POLICY


if TYPE_CHECKING:
    from trl import GRPOTrainer

__all__ = ["check_vllm_sync", "prepare_for_vllm", "sync_vectors_only"]


def prepare_for_vllm(
    base: PreTrainedModel, output_dir: str | os.PathLike, *, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedModel:
    """
    Writes a base checkpoint whose copy in vLLM can receive steering vectors, and loads it for training.

    Where a stock class has the biases it is a [`bias_ready_checkpoint`]. Otherwise the checkpoint's config asks this
    package's vLLM plugin for an adapter named `policy`, which every request gets; call [`sync_vectors_only`] on the
    trainer then.

    Args:
        base (`PreTrainedModel`): A model without adapters.
        output_dir (`str` or `os.PathLike`): Folder to write. It must be empty or not exist.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): As in [`export_stock_checkpoint`].

    Returns:
        `PreTrainedModel`: The model to train, as `GRPOTrainer(model=...)`; TRL starts vLLM from its folder.

    Raises:
        ValueError: If neither a stock class nor the plugin can hold the vectors. Nothing is written then.
    """
    routes = {route.name: route for route in serving_routes(base)}
    if routes[VLLM_STOCK].exact:
        bias_ready_checkpoint(base, output_dir, tokenizer=tokenizer)
    elif routes[VLLM_PLUGIN].exact:
        with whole_folder(output_dir) as folder:
            base.save_pretrained(folder)
            if tokenizer := tokenizer or find_tokenizer(base):
                tokenizer.save_pretrained(folder)
            config = AutoConfig.from_pretrained(folder)
            setattr(config, KEY, {"adapters": {POLICY: None}, "max_adapters": 1, "default": POLICY})
            config.save_pretrained(folder)
    else:
        raise ValueError(
            f"vLLM cannot hold steering vectors of {type(base).__name__}: {routes[VLLM_STOCK].reason}; "
            f"{routes[VLLM_PLUGIN].reason}. Set use_vllm=False"
        )
    return AutoModelForCausalLM.from_pretrained(output_dir, dtype=base.dtype)


def sync_vectors_only(trainer: "GRPOTrainer") -> None:
    """
    Makes a trainer send vLLM the vectors alone, layers x hidden_size numbers, instead of the whole model.

    The base weights never change, and vLLM has read them from the same checkpoint.

    Args:
        trainer (`GRPOTrainer`): A trainer with `use_vllm=True`, on a base that [`prepare_for_vllm`] wrote.

    Raises:
        ValueError: If vLLM's sleep mode discards the weights, or if the vectors are sharded.
    """
    generation = trainer.vllm_generation
    if generation.enable_sleep_mode:
        raise ValueError("vLLM's sleep mode discards the base weights: set vllm_enable_sleep_mode=False")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError("the vectors may be sharded under FSDP and DeepSpeed: keep TRL's own sync there")
    model = cast(PeftModel, generation.model)
    weights = _vector_weights if _is_for_plugin(model) else _bias_weights
    # without it TRL sends every weight of the model, and none under the name that the plugin's classes take
    generation._iter_named_params = partial(weights, model)


@torch.no_grad()
def check_vllm_sync(trainer: "GRPOTrainer") -> float:
    """
    Checks that what TRL sends reaches vLLM: syncs random vectors, lets vLLM sample a few tokens, and compares their
    log-probabilities with the model's own. The trained vectors are put back and synced again.

    Call it before `trainer.train()`.

    Args:
        trainer (`GRPOTrainer`): A trainer with `use_vllm=True`.

    Returns:
        `float`: Mean difference of the log-probabilities, in nats.

    Raises:
        RuntimeError: If vLLM samples from another policy than the steered one.
    """
    model, generation = cast(PeftModel, trainer.accelerator.unwrap_model(trainer.model)), trainer.vllm_generation
    trained, training = steering_vectors(model), model.training
    model.eval()
    prompt = torch.arange(3, 19) * 7919 % model.config.get_text_config(decoder=True).vocab_size
    try:
        _set_probe(model, prompt)
        generation.sync_weights()
        with _plain_sampling(generation):
            _, completions, sampled, _ = generation.generate([prompt.tolist()], None, num_generations=1)
        logprobs = torch.tensor([step[0] for step in sampled[0]])
        steered = (_logprobs(model, prompt, completions[0]) - logprobs).abs().mean().item()
        with model.disable_adapter():
            unsteered = (_logprobs(model, prompt, completions[0]) - logprobs).abs().mean().item()
    finally:
        if any(layer.merged for layer in steering_layers(model).values()):  # TRL leaves it so when vLLM raises
            model.unmerge_adapter()
        set_steering_vectors(model, trained)
        model.train(training)
    generation.sync_weights()
    # half precision rounds differently in the two programs; a policy that lacks the vectors is far off
    if not steered < 0.25 * unsteered:
        raise RuntimeError(
            f"vLLM does not sample from the steered policy: its log-probabilities differ by {steered:.3f} from the "
            f"steered model's, and by {unsteered:.3f} from the base model's. Train on a base that prepare_for_vllm() "
            "wrote, with this package installed where vLLM runs"
        )
    return steered


def _is_for_plugin(model: PeftModel) -> bool:
    return getattr(model.config, KEY, None) is not None


def _vector_weights(model: PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    for index, vector in active_vectors(model).items():
        yield f"model.layers.{index}.{VECTOR}", vector


def _bias_weights(model: PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    names = {id(module): name for name, module in model.get_base_model().named_modules()}
    model.merge_adapter()
    try:
        for layer in steering_layers(model).values():
            for site in merge_sites(layer.get_base_layer()):
                yield f"{names[id(site.module)]}.{site.attribute}", cast(torch.Tensor, site.bias).data
    finally:
        model.unmerge_adapter()


def _set_probe(model: PeftModel, prompt: torch.Tensor) -> None:
    """Random vectors that are large enough to move the log-probabilities by more than rounding does."""
    generator = torch.Generator().manual_seed(0)
    probe = {i: torch.randn(v.shape, generator=generator) for i, v in steering_vectors(model).items()}
    with model.disable_adapter():
        base = _logprobs(model, prompt[:1], prompt[1:].tolist())
    for exponent in range(-10, 5):
        set_steering_vectors(model, {index: 2.0**exponent * vector for index, vector in probe.items()})
        if (_logprobs(model, prompt[:1], prompt[1:].tolist()) - base).abs().mean() > 0.5:
            break


def _logprobs(model: PeftModel, prompt: torch.Tensor, completion: list[int]) -> torch.Tensor:
    """Log-probability of each token of the completion: (len(completion),)."""
    ids = torch.cat([prompt, torch.tensor(completion)])[None].to(model.device)
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()


@contextmanager
def _plain_sampling(generation: Any) -> Generator[None]:
    plain = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": None,
        "repetition_penalty": 1.0,
        "max_completion_length": 8,
        "generation_kwargs": {"ignore_eos": True},
    }
    own = {name: getattr(generation, name) for name in plain}
    vars(generation).update(plain)
    try:
        yield
    finally:
        vars(generation).update(own)
