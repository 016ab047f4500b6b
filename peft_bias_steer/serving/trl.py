"""TRL with vLLM: a base that can receive steering vectors, and proof that the engine samples from the steered policy."""

import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ..layer import BiasSteerLayer, whole
from ..merging import MergeSite, merge_sites
from ..vectors import layers_by_index, steering_layers, unwrap
from ..whole_files import whole_folder
from .base_model import load_base_model
from .routes import VLLM_PLUGIN, VLLM_STOCK, serving_routes
from .stock_checkpoint import bias_ready_checkpoint, find_tokenizer, wrapped_modules
from .vllm.layers import VECTOR
from .vllm.settings import KEY, POLICY


if TYPE_CHECKING:
    from trl import GRPOTrainer
    from trl.experimental.async_grpo import AsyncGRPOTrainer

# name of a weight in vLLM, the layer whose vectors are in it, and its bias, if they are added to one
Place = tuple[str, BiasSteerLayer, MergeSite | None]

__all__ = ["check_vllm_sync", "prepare_for_vllm", "sync_vectors_only"]


def prepare_for_vllm(
    base: PreTrainedModel,
    output_dir: str | os.PathLike,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    plugin: bool = False,
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
        plugin (`bool`, *optional*, defaults to `False`):
            Ask for the plugin also where a stock class has the biases. vLLM's server (`vllm_mode="server"`, AsyncGRPO)
            takes the vectors alone only so.

    Returns:
        `PreTrainedModel`: The model to train, as `GRPOTrainer(model=...)`; TRL starts vLLM from its folder.

    Raises:
        ValueError: If neither a stock class nor the plugin can hold the vectors. Nothing is written then.
    """
    routes = {route.name: route for route in serving_routes(base)}
    if routes[VLLM_STOCK].exact and not plugin:
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
    return load_base_model(os.fspath(output_dir))


def sync_vectors_only(trainer: "GRPOTrainer | AsyncGRPOTrainer") -> None:
    """
    Makes a trainer send vLLM the vectors alone, layers x hidden_size numbers, instead of the whole model.

    The base weights never change, and vLLM has read them from the same checkpoint. Under FSDP2 and DeepSpeed ZeRO-3 the
    vectors are gathered, and no weight of the base. With `vllm_enable_sleep_mode` vLLM reads the base once more, which
    TRL has let it drop, and keeps it in the host's memory from then on (sleep level 1).

    Args:
        trainer (`GRPOTrainer` or `AsyncGRPOTrainer`): A trainer with vLLM, on a base that [`prepare_for_vllm`] wrote.

    Raises:
        ValueError: If the adapter trains more than vectors (`modules_to_save`), if the base has no place for the vectors, if
            vLLM's server would damage its weights (it takes a bias only together with the weight beside it), or under FSDP1.
    """
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1:
        raise ValueError("FSDP1 mixes the vectors with the base's weights: set fsdp_version: 2 in accelerate's config")
    if names := list(wrapped_modules(_model(trainer))):
        raise ValueError(
            f"vectors alone travel, and {', '.join(names)} is trained too, which vLLM would never get: leave modules_to_save "
            "out, or write the base with prepare_for_vllm(base, output_dir) and keep TRL's own sync, which sends the whole model"
        )
    places = _places(_model(trainer))
    is_server = _is_async(trainer) or trainer.vllm_generation.mode == "server"
    if is_server and any(site is not None for _, _, site in places):
        raise ValueError(
            "vLLM's server takes biases only together with the weights beside them: write the base with "
            "prepare_for_vllm(base, output_dir, plugin=True), or keep TRL's own sync, which sends the whole model"
        )
    if any(site is not None and site.bias is None for _, _, site in places):
        raise ValueError(
            "the base has no biases that could receive the vectors: train on what prepare_for_vllm(base, output_dir) "
            "returns"
        )
    weights = partial(_iter_weights, trainer, places)
    if _is_async(trainer):
        _stream(trainer, weights)
        return
    generation: Any = trainer.vllm_generation
    # without it TRL sends every weight of the model, and none under the name that the plugin's classes take
    generation._iter_named_params = weights
    if not is_server and generation.enable_sleep_mode:
        _keep_weights_asleep(generation.llm)


def check_vllm_sync(trainer: "GRPOTrainer | AsyncGRPOTrainer") -> float | None:
    """
    Checks that what TRL sends reaches vLLM: syncs random vectors, lets vLLM sample a few tokens, and compares their
    log-probabilities with the model's own. The trained vectors are put back and synced again.

    Call it before `trainer.train()`, in every process. With FSDP, DeepSpeed ZeRO-3 and AsyncGRPO, which put model or
    connection together in `train()`, the check waits for that, and comes before the first rollout.

    Args:
        trainer (`GRPOTrainer` or `AsyncGRPOTrainer`): A trainer with vLLM.

    Returns:
        `float`: Mean difference of the log-probabilities, in nats; `None` if the check waits for `train()`.

    Raises:
        RuntimeError: If vLLM samples from another policy than the steered one.
    """
    layers = layers_by_index(_model(trainer), ["default"])
    if _is_async(trainer):
        sync = cast(Any, trainer)._sync_weight_merged
        vars(trainer).update(_sync_weight_merged=partial(_check_and_sync, trainer, sync, layers))
        return None
    generation: Any = trainer.vllm_generation
    check = partial(_check, trainer, layers, generation.sync_weights, partial(_sample, generation))
    if trainer.is_fsdp_enabled or _is_zero3(trainer):
        trainer.add_callback(_AtTrainBegin(check))
        return None
    return check()


class _AtTrainBegin(TrainerCallback):
    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.call()


def _is_async(trainer: Any) -> bool:
    return "weight_transfer" in vars(trainer)


def _model(trainer: Any) -> PeftModel:
    return cast(PeftModel, trainer.accelerator.unwrap_model(trainer.model))


def _is_zero3(trainer: Any) -> bool:
    plugin = trainer.accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


@contextmanager
def _gathered(trainer: Any, parameters: Iterable[torch.Tensor | None], *, to_write: bool = False) -> Generator[None]:
    """What ZeRO-3 has shared out, whole inside the block; every process has to enter it."""
    if not _is_zero3(trainer):
        yield
        return
    import deepspeed  # ty: ignore[import-not-found]

    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if to_write else None):
        yield


def _places(model: PeftModel) -> list[Place]:
    if getattr(model.config, KEY, None) is not None:
        layers = layers_by_index(model, list(model.peft_config))
        return [(f"model.layers.{index}.{VECTOR}", layer, None) for index, layer in layers.items()]
    names = {id(module): name for name, module in model.get_base_model().named_modules()}
    return [
        (f"{names[id(site.module)]}.{site.attribute}", layer, site)
        for layer in steering_layers(model).values()
        for site in merge_sites(layer.get_base_layer())
    ]


@torch.no_grad()
def _iter_weights(trainer: Any, places: list[Place]) -> Iterator[tuple[str, torch.Tensor]]:
    """The active vectors at their scales, or biases with them; every process has to iterate, to gather what is sharded."""
    device, names = trainer.accelerator.device, _model(trainer).active_adapters
    vectors = [[layer.vector(name) for name in names if name in layer.scaling] for _, layer, _ in places]
    biases = [site.bias for _, _, site in places if site is not None]
    weights = {}
    with _gathered(trainer, [*chain(*vectors), *biases]):
        for name, layer, site in places:
            weight = torch.zeros(layer.size, device=device)
            for adapter in names:
                if adapter in layer.scaling:
                    weight += layer.scale(adapter) * whole(layer.vector(adapter).to(device))
            if not weight.isfinite().all():
                raise ValueError(f"expected finite vectors, got NaN or infinity in what becomes {name} in vLLM")
            if site is not None:
                # from the very bias of the base: a merge would have to be undone, and of a shard would be another shard;
                # a layer and a module in it may write to one
                bias = weights[name] if name in weights else whole(cast(Any, site.bias).to(device))
                weight = site.merged(bias, weight)
            weights[name] = weight
    yield from weights.items()


def _stream(trainer: Any, weights: Callable[[], Iterator[tuple[str, torch.Tensor]]]) -> None:
    """Makes an AsyncGRPOTrainer announce and send these."""
    from trl.experimental.async_grpo.weight_transfer import WeightTransferClient

    trainer._streaming_iter = weights
    trainer._sync_weight_merged = partial(_sync_without_merging, trainer, trainer._sync_weight_merged)
    # in the main process; another transfer announces what it likes
    if isinstance(trainer.weight_transfer, WeightTransferClient):
        sent = list(weights())
        trainer.weight_transfer._weight_update_info.update(
            names=[name for name, _ in sent],
            dtype_names=[str(weight.dtype).removeprefix("torch.") for _, weight in sent],
            shapes=[list(weight.shape) for _, weight in sent],
        )


def _sync_without_merging(trainer: Any, sync: Callable[[float], Any], start: float) -> Any:
    """AsyncGRPO merges before it sends; the vectors go as they are, and not every base could take them."""
    model = _model(trainer)
    vars(model).update(merge_adapter=lambda: None, unmerge_adapter=lambda: None)
    try:
        return sync(start)
    finally:
        del model.merge_adapter, model.unmerge_adapter


def _keep_weights_asleep(llm: Any) -> None:
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights")
    sleep = llm.sleep
    llm.sleep = lambda level: sleep(level=1)


def _check_and_sync(
    trainer: Any, sync: Callable[[float], Any], layers: dict[int, BiasSteerLayer], start: float
) -> Any:
    """AsyncGRPO's first sync, between the connection to the server and the first rollout."""
    trainer._sync_weight_merged = sync
    base = unwrap(_model(trainer))
    packed = base.config._attn_implementation
    # that of the trainer takes packed trees alone
    base.set_attn_implementation("eager")
    try:
        _check(trainer, layers, partial(sync, start), partial(_sample_over_http, trainer))
    finally:
        base.set_attn_implementation(packed)
    return sync(start)


@torch.no_grad()
def _check(
    trainer: Any,
    layers: dict[int, BiasSteerLayer],
    sync: Callable[[], Any],
    sample: Callable[[list[int]], tuple[list[int], list[float]]],
) -> float:
    model = _model(trainer)
    training, trained = model.training, _read(trainer, layers)
    model.eval()
    prompt = torch.arange(3, 19) * 7919 % model.config.get_text_config(decoder=True).vocab_size
    try:
        _set_probe(trainer, layers, prompt)
        sync()
        completion, sampled = sample(prompt.tolist())
        logprobs = torch.tensor(sampled)
        steered = (_logprobs(model, prompt, completion) - logprobs).abs().mean().item()
        with model.disable_adapter():
            unsteered = (_logprobs(model, prompt, completion) - logprobs).abs().mean().item()
    finally:
        if any(layer.merged for layer in layers.values()):  # TRL leaves it so when vLLM raises
            model.unmerge_adapter()
        _write(trainer, layers, trained)
        model.train(training)
    sync()
    # half precision rounds differently in the two programs; a policy that lacks the vectors is far off
    for near, far in gather_object([(steered, unsteered)]):
        if not near < 0.25 * far:
            raise RuntimeError(
                f"vLLM does not sample from the steered policy: its log-probabilities differ by {near:.3f} from the "
                f"steered model's, and by {far:.3f} from the base model's. Train on a base that "
                "prepare_for_vllm() wrote, and start vLLM from the same folder, with this package installed where it runs"
            )
    return steered


def _read(trainer: Any, layers: dict[int, BiasSteerLayer]) -> dict[int, torch.Tensor]:
    with _gathered(trainer, [layer.vector("default") for layer in layers.values()]):
        return {index: whole(layer.vector("default")).detach().clone() for index, layer in layers.items()}


def _write(trainer: Any, layers: dict[int, BiasSteerLayer], vectors: dict[int, torch.Tensor]) -> None:
    for module in _model(trainer).modules():
        if isinstance(module, FSDPModule):  # what is written into gathered parameters would be lost with them
            module.reshard()
    with _gathered(trainer, [layer.vector("default") for layer in layers.values()], to_write=True):
        for index, layer in layers.items():
            layer.write("default", vectors[index])


def _sample(generation: Any, prompt: list[int]) -> tuple[list[int], list[float]]:
    """A few tokens after the prompt, as TRL lets vLLM sample them, and their log-probabilities."""
    with _plain_sampling(generation):
        _, completions, sampled, _ = generation.generate([prompt], None, num_generations=1)
    return completions[0], [step[0] for step in sampled[0]]


def _sample_over_http(trainer: Any, prompt: list[int]) -> tuple[list[int], list[float]]:
    """The same from AsyncGRPO's server, which the main process asks for all."""
    choice = None
    if trainer.accelerator.is_main_process:
        import requests

        url = trainer.vllm_client.server_url
        plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        body = {
            "prompt": prompt,
            "max_tokens": 8,
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
            **plain,
        }
        model = requests.get(f"{url}/v1/models").json()["data"][0]["id"]
        answer = requests.post(f"{url}/v1/completions", json={"model": model, **body})
        answer.raise_for_status()
        choice = answer.json()["choices"][0]
    [choice] = broadcast_object_list([choice], from_process=0)
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def _set_probe(trainer: Any, layers: dict[int, BiasSteerLayer], prompt: torch.Tensor) -> None:
    """Random vectors that are large enough to move the log-probabilities by more than rounding does."""
    model, generator = _model(trainer), torch.Generator().manual_seed(0)
    probe = {index: torch.randn(layer.size, generator=generator) for index, layer in layers.items()}
    with model.disable_adapter():
        base = _logprobs(model, prompt[:1], prompt[1:].tolist())
    for exponent in range(-10, 5):
        _write(trainer, layers, {index: 2.0**exponent * vector for index, vector in probe.items()})
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
