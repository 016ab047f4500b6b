"""The language model that an autoencoder reads: its layers, hooks on its modules, and passes through the rest of it."""

import copy
import json
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .configuration_hierarchical_sae import integer, integers


logger = logging.get_logger(__name__)

# Which hooks the running thread or task has entered: those of others, on the same modules, do nothing here.
_ENTERED: ContextVar[frozenset] = ContextVar("entered", default=frozenset())
# Numbering a hook is not atomic in torch: of two threads at once, one would lose its hook.
_REGISTERING = threading.RLock()
# The hooks that are there, of whatever thread, and, while there are any, what keeps compiled code from running.
_HOOKS: set[object] = set()
_EAGER: list[Any] = []


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """
    The list of decoder layers of a transformers model, or of encoder layers if it has no decoder: in what `get_decoder`
    returns, or else in the whole model, the one of their number.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder = model.get_decoder()
    # The `decoder` of a masked language model can be its unembedding.
    for module in (*decoder.modules(), *model.modules()):
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(
        f"{type(model).__name__} has no list of decoder layers: expected its decoder {type(decoder).__name__} to hold "
        f"a ModuleList of {count} layers"
    )


def layer_indices(model: PreTrainedModel, layer: int | Sequence[int]) -> list[int]:
    """One decoder layer or several, counted from 0 or, if negative, from the end, as numbers counted from 0."""
    count = len(decoder_layers(model))
    layers = integers("layer", layer) if isinstance(layer, Iterable) else [integer("layer", layer)]
    if not layers or not all(-count <= index < count for index in layers):
        raise ValueError(f"layer must be in [0, {count - 1}], got {layer}")
    return [index % count for index in layers]


def hidden_size(model: PreTrainedModel) -> int:
    """Width of the residual stream."""
    return model.config.get_text_config(decoder=True).hidden_size


def check_length(model: PreTrainedModel, name: str, length: int) -> None:
    """Raise a `ValueError` if a context of `length` tokens, which the argument `name` allows, is longer than a model's."""
    config = model.config.get_text_config(decoder=True)
    most = getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", None)) or 0
    # XLNet says -1: no limit.
    if 0 < most < length:
        raise ValueError(
            f"the language model {model.config.name_or_path or type(model).__name__} has {most} positions: {name} must "
            f"be at most {most}, got {length}"
        )


def weights_of(model: PreTrainedModel) -> dict[str, Any]:
    """The type of a model's weights and how they are quantised, if they are: what changes its activations a little."""
    quantization = getattr(model.config, "quantization_config", None)
    given = (
        json.loads(quantization.to_json_string(use_diff=False))
        if isinstance(quantization, QuantizationConfigMixin)
        else quantization
    )
    return {"model_dtype": str(model.dtype).removeprefix("torch."), "quantization": given}


def vocabulary_size(model: PreTrainedModel) -> int:
    """Number of tokens that have an embedding; raises a `ValueError` for a model of something else than text."""
    try:
        embeddings: Any = model.get_input_embeddings()
        return embeddings.num_embeddings
    except (AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"expected a language model, which takes token ids, got a {type(model).__name__}, which takes "
            f"{model.main_input_name}: of a model of several towers, give one"
        ) from error


def check_vocabulary(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Raise a `ValueError` if one of the token ids is not in the model's vocabulary."""
    vocabulary = vocabulary_size(model)
    if ids.numel() and int(ids.max()) >= vocabulary:
        raise ValueError(
            f"the tokenizer gave the token {int(ids.max())}, the language model has a vocabulary of {vocabulary}: "
            "give the tokenizer that belongs to it, or ids that come from that"
        )


def check_predicts(model: PreTrainedModel) -> None:
    """Raise a `ValueError` if a model has no unembedding."""
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"expected a language model with an unembedding, got a {type(model).__name__}: load it with "
            "AutoModelForCausalLM"
        )


@torch.no_grad()
def unembedding_weight(model: PreTrainedModel) -> torch.Tensor:
    """(vocabulary, hidden_size) float32 weight of a model's unembedding, wherever it is kept and in whatever form."""
    unembedding: Any = model.get_output_embeddings()
    weight = unembedding.weight
    # torchao's int8 weights call themselves floating-point, and torch's own are behind a method.
    if type(weight) in (torch.Tensor, nn.Parameter) and weight.device.type != "meta" and weight.is_floating_point():
        return weight.detach().float()
    # On disk, in main memory or quantised: what it makes of unit vectors.
    units = torch.eye(unembedding.in_features, dtype=model.dtype, device=input_device(model))
    return (unembedding(units) - unembedding(torch.zeros_like(units[:1]))).float().T


@contextmanager
def evaluation_mode(model: nn.Module) -> Generator[None, None, None]:
    """Dropout off inside; afterwards every part is back in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def forward_hook(module: nn.Module, hook: Callable[[nn.Module, Any, Any], Any]) -> Generator[None, None, None]:
    """Inside, a forward hook that sees the calls of this thread or task alone, whoever else runs the module."""

    def register(is_own: Callable[[], bool]) -> RemovableHandle:
        handle = module.register_forward_hook(lambda *given: hook(*given) if is_own() else None)
        # transformers' own hook for output_hidden_states, once installed, has to come after this one to see its result.
        hooks: Any = module._forward_hooks
        for key, other in list(hooks.items()):
            if getattr(other, "__module__", None) == "transformers.utils.output_capturing":
                hooks.move_to_end(key)
        return handle

    with _entered(register):
        yield


@contextmanager
def forward_pre_hook(module: nn.Module, hook: Callable[[nn.Module, Any, Any], Any]) -> Generator[None, None, None]:
    """[`forward_hook`] before the module runs: the hook takes its arguments, and those that are given by name."""

    def register(is_own: Callable[[], bool]) -> RemovableHandle:
        return module.register_forward_pre_hook(lambda *given: hook(*given) if is_own() else None, with_kwargs=True)

    with _entered(register):
        yield


@contextmanager
def no_hooks() -> Generator[None, None, None]:
    """Inside, this thread or task does not see the hooks that it has entered before."""
    entered = _ENTERED.set(frozenset())
    try:
        yield
    finally:
        _ENTERED.reset(entered)


@contextmanager
def _entered(register: Callable[[Callable[[], bool]], RemovableHandle]) -> Generator[None, None, None]:
    """Inside, the hook that `register` installs is there, and can tell whether a call is of this thread or task."""
    own = object()

    def is_own() -> bool:
        # A thread that Python did not start is autograd's: it repeats forward passes for gradient checkpointing.
        return own in _ENTERED.get() or threading.current_thread().name.startswith("Dummy-")

    with _REGISTERING:
        handle = register(is_own)
        _HOOKS.add(own)
        _run_eagerly()
    _ENTERED.set(_ENTERED.get() | {own})
    try:
        yield
    finally:
        _ENTERED.set(_ENTERED.get() - {own})
        with _REGISTERING:
            handle.remove()
            _HOOKS.remove(own)
            if _EAGER and not _HOOKS:
                _EAGER.pop().__exit__(None, None, None)


def _run_eagerly() -> None:
    """Code that was compiled before a hook was there would run on without it, since torch does not look for new ones."""
    if not _EAGER and "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
        # Refused inside a compiled function, which is traced with its hooks.
        with suppress(RuntimeError):
            _EAGER.append(torch.compiler.set_stance("force_eager"))


def input_device(model: PreTrainedModel) -> torch.device:
    """Where inputs are given to a model; one whose first weights are on disk moves them itself."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def inputs_of(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    """What a model takes of ids and mask, (contexts, positions), wherever they are: one with an encoder twice."""
    ids, mask = ids.to(input_device(model)), mask.to(input_device(model))
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if not model.config.is_encoder_decoder:
        return inputs
    return {**inputs, "decoder_input_ids": ids, "decoder_attention_mask": mask}


def next_token_logits(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits, (contexts, positions, vocabulary), of ids and mask, (contexts, positions), wherever they are."""
    with evaluation_mode(model):
        return model(**inputs_of(model, ids, mask)).logits


def resumed(
    model: PreTrainedModel, layer: int, output: Any, edit: Callable[[torch.Tensor], torch.Tensor]
) -> PreTrainedModel:
    """
    A model of the same weights in which the decoder layers up to one compute nothing: they return what that one
    returned before, so that a pass costs what comes after it. The model itself is not touched.

    Args:
        model (`PreTrainedModel`): any transformers model for which [`resumes`] is true.
        layer (`int`): decoder layer, counted from 0.
        output (`Any`): what it returned, with what hooks of others did to it, for the inputs that are to come.
        edit (`Callable`): called with its hidden states, (batch, positions, hidden_size), gives what stands in their
            place.
    """
    layers = decoder_layers(model)
    given = [lambda: output] * layer + [partial(edited, output, edit)]
    parts = {str(index): _giving(layers[index], give) for index, give in enumerate(given)}
    path = next(name for name, module in model.named_modules() if module is layers)
    return _with_parts(model, path.split("."), parts)


@torch.no_grad()
def resumes(model: PreTrainedModel, layer: int, ids: torch.Tensor, mask: torch.Tensor) -> bool:
    """
    Whether [`resumed`] gives, to the bit, the logits of a whole pass: it does not where the rest of a model uses more
    of its first layers than what they return, such as their keys and values, or runs them again.

    Args:
        model (`PreTrainedModel`): any transformers model with a list of decoder layers and an unembedding.
        layer (`int`): decoder layer, counted from 0.
        ids (`torch.Tensor`): (contexts, positions), token ids to try it with.
        mask (`torch.Tensor`): (contexts, positions), zero where a position is padding.
    """
    outputs, calls = [], []
    with forward_hook(decoder_layers(model)[layer], lambda module, args, output: outputs.append(output)):
        expected = next_token_logits(model, ids, mask)

    def unchanged(states: torch.Tensor) -> torch.Tensor:
        calls.append(states)
        return states.clone()

    try:
        # Another pass before the one that is compared: nothing of it may be left behind.
        next_token_logits(resumed(model, layer, outputs[0], torch.zeros_like), ids, mask)
        found = next_token_logits(resumed(model, layer, outputs[0], unchanged), ids, mask)
    except Exception as error:
        # Any type, from the model's own code; what is wrong with the model itself stops whole passes as well.
        logger.info(f"the language model takes whole passes: from layer {layer} on it raises {error!r}")
        return False
    # Unless its layers were reached exactly once: a model that others have patched may run as a whole.
    return len(calls) == 1 and torch.equal(found, expected)


def edited(output: Any, edit: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
    """What a module returns, with its hidden states edited, which are alone or first in a tuple or list; or None."""
    is_tensor = isinstance(output, torch.Tensor)
    states = edit(output if is_tensor else output[0])
    if is_tensor or states is None:
        return states
    return type(output)((states, *output[1:]))


def _giving(layer: nn.Module, give: Callable[[], Any]) -> nn.Module:
    """A layer with all that a model asks of it, but for its computation; its hooks are in what it gives already."""
    part: Any = copy.copy(layer)
    part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
    part.forward = lambda *args, **kwargs: give()
    return part


def _with_parts(module: nn.Module, path: Sequence[str], parts: dict[str, nn.Module]) -> Any:
    """A copy of a module with other parts in the one at `path`; all others are shared."""
    if path:
        parts = {path[0]: _with_parts(getattr(module, path[0]), path[1:], parts)}
    other: Any = copy.copy(module)
    other._modules = {**module._modules, **parts}
    return other
