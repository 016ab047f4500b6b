"""Sites of a language model: where hidden states are read and others put in their place."""

import re
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .configuration_hierarchical_sae import place_name
from .language_model import (
    decoder_layers,
    edited,
    evaluation_mode,
    forward_hook,
    forward_pre_hook,
    hidden_size,
    input_device,
    inputs_of,
    layer_indices,
    no_hooks,
    vocabulary_size,
)
from .modeling_hierarchical_sae import HierarchicalSaeModel


logger = logging.get_logger(__name__)


# Sites that have names of their own, and the names of the same in TransformerLens; every other is a module, by its path.
HOOK_POINTS = {
    "input": "hook_resid_pre",
    "middle": "hook_resid_mid",
    "output": "hook_resid_post",
    "attention.input": "attn.hook_in",
    "attention.heads": "attn.hook_z",
    "attention.output": "hook_attn_out",
    "mlp.input": "mlp.hook_in",
    "mlp.output": "hook_mlp_out",
}
# Those whose vectors are of the residual stream, or are added to it.
STREAM = ("input", "middle", "output", "attention.output", "mlp.output")
# What a layer calls its attention and its MLP, as the first module and the last, from the outermost inwards.
ATTENTION = r"(self_|linear_|multi_head_)?(attn|attention)|SelfAttention"
MLP = r"mlp|mlp_block|shared_mlp|feed_forward|ffn|ff|DenseReluDense|block_sparse_moe|moe"
BLOCKS = {
    "attention": [(ATTENTION, ATTENTION)],
    "mlp": [(MLP, MLP), ("intermediate", "output"), ("fc1", "fc2")],
}
# What some layers multiply by what attention and MLP give.
FACTORS = ("residual_multiplier", "residual_scale")
# Shapes of what models take that do not take token ids: one image, a tenth of a second of sound, a spectrogram.
NOISE: dict[str, Callable[[Any], tuple]] = {
    "pixel_values": lambda config: (config.num_channels, *_pair(config.image_size)),
    "input_values": lambda config: (1600,),
    "input_features": lambda config: (config.num_mel_bins, 2 * config.max_source_positions),
}
Use = Callable[[torch.Tensor], torch.Tensor | None]


@dataclass(frozen=True)
class Site:
    """
    Where hidden states are read and written. Two are equal if they are the same place, whatever it is called.

    Args:
        module (`nn.Module`): whose hidden states they are.
        is_input (`bool`): those that it takes, rather than those that it returns.
        width (`int`): their last dimension.
        layer (`int`, *optional*): decoder layer, counted from 0; `None` for a module by its path within the model.
        hook_point (`str`): one of [`HOOK_POINTS`], or a module's path.
        in_place (`bool`, defaults to `False`): others than the module take the same tensor.
        factor (`float`, defaults to 1.0): what the layer multiplies by them.
    """

    module: nn.Module
    is_input: bool
    width: int = field(compare=False)
    layer: int | None = field(compare=False)
    hook_point: str = field(compare=False)
    in_place: bool = False
    factor: float = 1.0

    def __str__(self) -> str:
        return place_name(self.layer, self.hook_point)


def find_site(model: PreTrainedModel, layer: int | None, hook_point: str = "output") -> Site:
    """
    A place in a language model. What its architecture does not say, passes over a few tokens try out.

    Args:
        model (`PreTrainedModel`): any transformers model with a list of decoder layers, or of encoder layers.
        layer (`int`, *optional*): decoder layer, counted from 0; negative counts from the end. `None` for a module by its
            path within the model.
        hook_point (`str`, defaults to `"output"`): the residual stream before the layer (`"input"`), between attention and
            MLP (`"middle"`) or after the layer (`"output"`); what attention or MLP take (`"attention.input"`,
            `"mlp.input"`), or what they add to the residual stream (`"attention.output"`, `"mlp.output"`), after the norm
            that follows them in some models; what the heads of attention give, side by side, before they are mixed
            (`"attention.heads"`); or the output of a module, by its path within the layer (`"mlp.down_proj"`).

    Returns:
        [`Site`]

    Raises:
        `ValueError`: If there is no such layer, or the layer has no such site.
    """
    if not isinstance(hook_point, str):
        raise ValueError(f"hook_point must be one of {', '.join(HOOK_POINTS)} or a module's path, got {hook_point!r}")
    if layer is None and hook_point in HOOK_POINTS:
        raise ValueError(f"hook_point={hook_point!r} is a site of a layer: say which layer")
    if layer is None:
        return _module_site(model, model, None, hook_point)
    index = layer_indices(model, layer)[0]
    module = decoder_layers(model)[index]
    if hook_point in ("input", "output"):
        return Site(module, hook_point == "input", hidden_size(model), index, hook_point)
    if hook_point not in HOOK_POINTS:
        return _module_site(model, module, index, hook_point)
    found = _Layer(model, index).site(hook_point)
    if found is None:
        raise ValueError(
            f"{place_name(index, hook_point)} is not to be had in {type(module).__name__}, which has "
            f"{', '.join(_sites_of(model, index))}: give one of these, or a module by its path within the layer"
        )
    return found


@contextmanager
def site_hook(site: Site, use: Use) -> Generator[None, None, None]:
    """
    Inside, `use(hidden_states)` is called in each forward pass of this thread or task, and what it returns stands in the
    place of the hidden states, unless it is None.

    Args:
        site ([`Site`]): from [`find_site`].
        use (`Callable`): takes and gives hidden states, (batch, positions, width) in most models.
    """

    def edit_input(module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        key = _input_key(module, args, kwargs)
        states = args[0] if key is None else kwargs[key]
        # A copy is what others may keep, for their backward pass too.
        found = use(states.clone() if site.in_place else states)
        if found is not None and site.in_place:
            states.copy_(found)
        if found is None or site.in_place:
            return None
        return ((found, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: found})

    def edit_output(states: torch.Tensor) -> torch.Tensor | None:
        if site.factor == 1.0:
            return use(states)
        found = use(states * site.factor)
        # Nothing is rounded where nothing was changed.
        return None if found is None else states + (found - states * site.factor) / site.factor

    if site.is_input:
        hook = forward_pre_hook(site.module, edit_input)
    else:
        hook = forward_hook(site.module, lambda module, args, output: edited(output, edit_output))
    with hook:
        yield


class _Reached(Exception):
    """Ends a forward pass at the last site that is wanted."""


@torch.no_grad()
def read_sites(
    model: PreTrainedModel, sites: Sequence[Site], ids: torch.Tensor, mask: torch.Tensor
) -> list[torch.Tensor]:
    """
    Hidden states at some sites, from a forward pass that stops at the last of them.

    Args:
        model (`PreTrainedModel`): any transformers model; its dropout is off.
        sites (`Sequence[Site]`): from [`find_site`].
        ids (`torch.Tensor`): (contexts, positions), token ids.
        mask (`torch.Tensor`): (contexts, positions), zero where a position is padding.

    Returns:
        `list[torch.Tensor]`: (contexts, positions, width) for each of `sites`.

    Raises:
        `ValueError`: If a site is not reached, or does not have hidden states of each position.
    """
    captured, wanted = {}, list(dict.fromkeys(sites))

    def capture(site: Site, states: torch.Tensor) -> None:
        captured[site] = states
        if len(captured) == len(wanted):
            raise _Reached
        # What comes next may change it in place.
        captured[site] = states.clone()

    _run(model, inputs_of(model, ids, mask), [site_hook(site, partial(capture, site)) for site in wanted])
    for site in wanted:
        shape = tuple(captured[site].shape) if site in captured else None
        if shape not in ((*ids.shape, site.width), (ids.numel(), site.width)):
            raise ValueError(
                f"expected hidden states of shape {(*ids.shape, site.width)} at {site}, got {shape}: give another hook_point"
            )
    return [captured[site].view(*ids.shape, -1) for site in sites]


def check_fits(
    sae: HierarchicalSaeModel, model: PreTrainedModel, layer: int | None, hook_point: str | None = None
) -> Site:
    """
    Where an autoencoder reads a language model. A language model of another name is logged.

    Args:
        sae ([`HierarchicalSaeModel`]): the autoencoder.
        model (`PreTrainedModel`): any transformers model with a list of decoder layers.
        layer (`int`, *optional*): decoder layer, counted from 0; negative counts from the end. `None` for a module by its
            path within the model.
        hook_point (`str`, *optional*): as in [`find_site`]; by default the one in the autoencoder's config, or else
            `"output"`.

    Returns:
        [`Site`]

    Raises:
        `ValueError`: If there is no such site, the sizes differ, it was trained on another site, or it is offloaded.
    """
    sae.check_loaded()
    config, name = sae.config, model.config.name_or_path
    trained = hook_point if config.hook_point is None else config.hook_point
    site = find_site(model, layer, trained or "output")
    if hook_point is not None and (given := find_site(model, layer, hook_point)) != site:
        raise ValueError(f"the {config.kind} was trained on {site}, got {given}: give it hook_point={trained!r}")
    if site.width != config.d_in:
        is_stream = site.hook_point in ("input", "output")
        raise ValueError(
            f"the {config.kind} takes activations of size {config.d_in} (it was trained on "
            f"{config.model_name or 'an unnamed model'}), the language model {name} has "
            f"{'hidden_size' if is_stream else f'at {site} the size'} {site.width}: give the model that it was trained on"
        )
    if config.model_name not in (None, name):
        logger.warning(f"the {config.kind} was trained on {config.model_name}, the language model is {name}")
    return site


def target_site(sae: HierarchicalSaeModel, model: PreTrainedModel, site: Site) -> Site:
    """
    The site whose activations a transcoder computes from those at another, or that one itself for an autoencoder.

    Args:
        sae ([`HierarchicalSaeModel`]): the transcoder or autoencoder.
        model (`PreTrainedModel`): the language model.
        site ([`Site`]): where it reads, from [`check_fits`].

    Raises:
        `ValueError`: If the language model has no such site, it is the one that is read, or the sizes differ.
    """
    if not sae.config.is_transcoder:
        return site
    target = find_site(model, site.layer, sae.config.target_hook_point)
    if target == site or target.width != sae.config.d_out:
        raise ValueError(
            f"the transcoder computes activations of size {sae.config.d_out} from those at {site}, the language model "
            f"{model.config.name_or_path} has at {target} {'the same' if target == site else f'the size {target.width}'}: "
            "give the model that it was trained on"
        )
    return target


def writes_to_stream(model: PreTrainedModel, site: Site) -> bool:
    """Whether hidden states at a site of a layer, whatever it is called, are of the residual stream or are added to it."""
    if site.layer is None:
        return False
    layer, names = _Layer(model, site.layer), _sites_of(model, site.layer)
    stream = [find_site(model, site.layer, name) for name in names if name in STREAM]
    return layer.memory(site) in map(layer.memory, stream)


def final_norm(model: PreTrainedModel) -> nn.Module | None:
    """The norm between the last decoder layer and the unembedding, as a pass over a few tokens runs it; None without one."""
    layers, unembedding, found = set(decoder_layers(model).modules()), model.get_output_embeddings(), None
    for call in _calls(model, model):
        if call.module is unembedding:
            break
        if call.module in layers:
            found = None
        elif call.taken and call.given and not _is_linear(call.module) and not list(call.module.children()):
            # Dropout, which is off, gives what it takes.
            is_norm = call.given.width == call.taken.width and call.given.memory != call.taken.memory
            found = call.module if is_norm else found
    return found


def _input_key(module: nn.Module, args: tuple, kwargs: dict) -> str | None:
    """The name under which a module was given its hidden states, None if they are its first argument."""
    if args:
        return None
    first = next(iter(signature(module.forward).parameters))
    return first if first in kwargs else next(name for name, value in kwargs.items() if torch.is_tensor(value))


class _Seen:
    """Hidden states in a pass. Kept, so that no others can lie in the same memory."""

    def __init__(self, states: torch.Tensor):
        self.states, self.width = states, states.shape[-1]
        self.memory, self.key = states.data_ptr(), (states.data_ptr(), states._version)


@dataclass
class _Call:
    """One call of a module in a pass: the hidden states that it takes and those that it returns."""

    module: nn.Module
    taken: _Seen | None = None
    given: _Seen | None = None


class _Layer:
    """What a decoder layer does in passes over a few tokens."""

    def __init__(self, model: PreTrainedModel, index: int):
        self.model, self.index, self.layer = model, index, decoder_layers(model)[index]
        self.calls = _calls(model, self.layer)

    def site(self, hook_point: str) -> Site | None:
        """The site of a name, None if the layer has none."""
        if hook_point == "middle":
            return self._middle()
        name, _, side = hook_point.partition(".")
        first, last = self._block(BLOCKS[name])
        if side == "output":
            return self._added(last, hook_point)
        if side == "heads":
            first = next(iter(self._last_matrix(last.module)), None) if last else None
        return self._site(first, hook_point, is_input=True) if first and first.taken else None

    def memory(self, site: Site) -> int | None:
        """Where the hidden states of a site lie in these passes."""
        call = self._call(site.module)
        seen = call and (call.taken if site.is_input else call.given)
        return seen.memory if seen else None

    def _block(self, names: Sequence[tuple[str, str]]) -> tuple[_Call | None, _Call | None]:
        """The first and the last module of attention or MLP: the outermost that is called so, and runs; alone there."""
        for first, last in names:
            found = self._outermost(first), self._outermost(last)
            if all(len(calls) == 1 for calls in found):
                return found[0][0], found[1][0]
        return None, None

    def _outermost(self, name: str) -> list[_Call]:
        """Calls of the modules of a name that have the shortest paths."""
        paths = {path: call for path, part in self.layer.named_modules() if (call := self._call(part))}
        depths = {path: path.count(".") for path in paths if re.fullmatch(name, path.rpartition(".")[2])}
        return [paths[path] for path, depth in depths.items() if depth == min(depths.values())]

    def _call(self, module: nn.Module) -> _Call | None:
        return next((call for call in self.calls if call.module is module), None)

    def _site(self, call: _Call, hook_point: str, *, is_input: bool, in_place: bool = False) -> Site:
        seen: Any = call.taken if is_input else call.given
        return Site(call.module, is_input, seen.width, self.index, hook_point, in_place)

    def _middle(self) -> Site | None:
        """The last input of a module, up to the MLP, from which on the layer uses nothing else."""
        first = self._block(BLOCKS["mlp"])[0]
        start: Any = self.calls[0].taken
        for call in reversed(self.calls[: self.calls.index(first) + 1] if first else []):
            if call.taken and call.taken.memory != start.memory:
                site = self._site(call, "middle", is_input=True, in_place=True)
                if self._is_cut_at(site):
                    return site
        return None

    def _added(self, last: _Call | None, hook_point: str) -> Site | None:
        """What a module adds to the residual stream; of one that adds the stream itself, what its last matrix gives."""
        for call in [last, *self._last_matrix(last.module)] if last else []:
            if call.given and not self._is_cut_at(self._site(call, hook_point, is_input=False)):
                factor = next((value for name in FACTORS if (value := getattr(self.layer, name, None))), 1.0)
                return replace(self._site(self._normed(call), hook_point, is_input=False), factor=factor)
        return None

    def _last_matrix(self, module: nn.Module) -> list[_Call]:
        """The linear layer within a module that runs last, with what adapters add to it."""
        parts = set(module.modules())
        linear = [call for call in self.calls if call.module in parts and _is_linear(call.module)]
        return [call for call in linear if linear[-1].module in set(call.module.modules())][:1]

    def _normed(self, call: _Call) -> _Call:
        """The norm or the scale of what a module returns, in layers that have one, or else the module."""
        for later in self.calls[self.calls.index(call) + 1 :]:
            is_norm = re.search("norm|scale", type(later.module).__name__.lower())
            if is_norm and later.taken and call.given and later.taken.key == call.given.key:
                return later
        return call

    def _is_cut_at(self, site: Site) -> bool:
        """Whether with zeros at a site nothing of what the layer takes reaches what it returns."""
        outputs: list[torch.Tensor] = []
        for shift in (0, 1):
            kept = forward_hook(self.layer, lambda module, args, output: edited(output, outputs.append))
            _try(self.model, self.layer, [site_hook(site, torch.zeros_like), kept], shift)
        return torch.equal(*outputs)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _is_linear(module: nn.Module) -> bool:
    return getattr(getattr(module, "weight", None), "ndim", 0) == 2


def _calls(model: PreTrainedModel, module: nn.Module) -> list[_Call]:
    """Calls of a module and its parts in a pass over a few tokens, in the order in which they start."""
    calls, running = [], []

    def start(part: nn.Module, args: tuple, kwargs: dict) -> None:
        key = _input_key(part, args, kwargs) if args or kwargs else ""
        call = _Call(part, _seen(args[0] if key is None else kwargs.get(key)))
        calls.append(call)
        running.append(call)

    def end(part: nn.Module, args: tuple, output: Any) -> None:
        while (call := running.pop()).module is not part:
            pass
        call.given = _seen(output[0] if isinstance(output, tuple | list) and output else output)

    parts = list(module.modules())
    _try(model, module, [hook for part in parts for hook in (forward_pre_hook(part, start), forward_hook(part, end))])
    return calls


def _seen(states: Any) -> _Seen | None:
    is_states = isinstance(states, torch.Tensor) and states.is_floating_point() and states.ndim > 1
    return _Seen(states) if is_states else None


@torch.no_grad()
def _try(model: PreTrainedModel, last: nn.Module, hooks: Iterable[AbstractContextManager], shift: int = 0) -> None:
    """A pass over a few tokens with these hooks and no others of this module, until the last module has returned."""
    inputs = _tried_inputs(model, shift)

    def stop(module: nn.Module, args: tuple, output: Any) -> None:
        raise _Reached

    with no_hooks():
        _run(model, inputs, [*hooks, forward_hook(last, stop)])


def _tried_inputs(model: PreTrainedModel, shift: int) -> dict[str, Any]:
    """A few tokens, or noise where a model takes images or sound; others for each shift, for the decoder if it has one."""
    ids, name = torch.arange(10).view(2, 5), model.main_input_name
    inputs = inputs_of(model, ids, torch.ones_like(ids))
    own = "decoder_input_ids" if "decoder_input_ids" in inputs else name if name in NOISE else "input_ids"
    if name in NOISE:
        del inputs["input_ids"], inputs["attention_mask"]
        seed = torch.Generator().manual_seed(shift if own == name else 0)
        inputs[name] = torch.randn(2, *NOISE[name](model.config), generator=seed).to(input_device(model), model.dtype)
    if own not in NOISE:
        inputs[own] = (inputs[own] + shift) % vocabulary_size(model)
    return inputs


def _run(model: PreTrainedModel, inputs: dict[str, Any], hooks: Iterable[AbstractContextManager]) -> None:
    """A forward pass with these hooks, which may end it."""
    with ExitStack() as inside:
        for hook in (evaluation_mode(model), suppress(_Reached), *hooks):
            inside.enter_context(hook)
        model(**inputs)


def _module_site(model: PreTrainedModel, root: nn.Module, layer: int | None, path: str) -> Site:
    """The output of a module by its path within another, or by the end of it that no other has."""
    parts = {name: part for name, part in root.named_modules() if name}
    ends = [name for name in parts if name == path or (layer is None and name.endswith(f".{path}"))]
    name = path if path in parts else ends[0] if len(ends) == 1 else None
    where = type(root).__name__ if layer is None else f"layer {layer}"
    if name is None:
        raise ValueError(
            f"hook_point must be one of {', '.join(HOOK_POINTS)} of a layer, or the path of one of the modules of "
            f"{where}, such as {', '.join(list(parts)[:6])}, got {path!r}"
        )
    calls = _calls(model, parts[name])
    if not calls or not (given := calls[0].given):
        raise ValueError(f"{path} of {where} returns no hidden states in a pass over text: give another module")
    return Site(parts[name], False, given.width, layer, path)


def _sites_of(model: PreTrainedModel, index: int) -> list[str]:
    """The names of [`HOOK_POINTS`] that a layer has."""
    layer = _Layer(model, index)
    return [name for name in HOOK_POINTS if name in ("input", "output") or layer.site(name)]
