import numbers
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import has_offloaded_params
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .config import BiasSteerConfig
from .merging import SHARES, MergeSite, merge_sites, refuse_offloaded
from .tokens import TokenChoice


@dataclass(frozen=True)
class Call:
    """
    What one caller asks of its own forward passes. Two threads that share a model must not get each other's.

    Args:
        disabled (`bool`, *optional*): Whether the layer leaves the output alone.
        adapter_names (`tuple[str, ...]`, *optional*): One adapter (or `"__base__"`) for each row of the batch.
        may_repeat (`bool`, *optional*): Whether every row may come several times in a row, as `generate` repeats them.
        choice (`TokenChoice`, *optional*): The tokens to act on; all of them if unset.
        chosen (`torch.Tensor`, *optional*): Those of the present pass, (batch, seq) of booleans.
    """

    disabled: bool = False
    adapter_names: tuple[str, ...] | None = None
    may_repeat: bool = False
    choice: TokenChoice | None = None
    chosen: torch.Tensor | None = field(default=None, compare=False)


NO_CALL = Call()
_CALLS: ContextVar[Mapping[nn.Module, Call]] = ContextVar("bias_steer_calls", default=MappingProxyType({}))
# by vector, so that a new adapter of an old name starts at 1
_SCALES: ContextVar[WeakKeyDictionary[nn.Module, float] | None] = ContextVar("bias_steer_scales", default=None)


@contextmanager
def calling(layers: Iterable["BiasSteerLayer"], **changes: Any) -> Generator[None]:
    """Changes the [`Call`] of these layers for the forward passes that this thread runs inside the block."""
    before = {layer: layer.call for layer in layers}
    token = _change(before, **changes)
    try:
        yield
    finally:
        _CALLS.reset(token)
        _show(before)


def choose_tokens(layers: Iterable["BiasSteerLayer"], chosen: torch.Tensor | None) -> None:
    """Tells these layers the tokens of this thread's present forward pass, (batch, seq), until [`calling`] ends."""
    _change({layer: layer.call for layer in layers}, chosen=chosen)


def _change(calls: dict["BiasSteerLayer", Call], **changes: Any) -> Token[Mapping[nn.Module, Call]]:
    during = {layer: replace(call, **changes) for layer, call in calls.items()}
    token = _CALLS.set({**_CALLS.get(), **during})
    _show(during)
    return token


def in_a_call() -> bool:
    """Whether this thread runs inside [`calling`], for whatever layers."""
    return not torch.compiler.is_compiling() and bool(_CALLS.get())


def _show(calls: dict["BiasSteerLayer", Call]) -> None:
    for layer, call in calls.items():
        layer.latest_call = call


def set_scale(layers: Sequence["BiasSteerLayer"], adapter: str, scale: float) -> None:
    """[`BiasSteerLayer.set_scale`] of several layers; those without the adapter are left alone."""
    scale = as_factor(scale, "scale")
    if any(adapter in layer.merged_adapters for layer in layers):
        raise ValueError(f"adapter {adapter!r} is merged: call unmerge_adapter() before set_scale()")
    # a copy: tasks that were started with a copy of this context keep theirs
    scales = WeakKeyDictionary(_SCALES.get())
    for layer in layers:
        if adapter in layer.scaling:
            layer.scaling[adapter] = scale
            scales[layer.bias_steer_vector[adapter]] = scale
    _SCALES.set(scales)


def as_factor(value: Any, name: str) -> float:
    """
    A number of any library as a `float` that float32, in which vectors are scaled, can hold.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is NaN, infinite, or beyond float32's largest number.
    """
    number = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    largest = torch.finfo(torch.float32).max
    if not -largest <= number <= largest:
        raise ValueError(f"{name} must be a finite number, got {value!r}: float32 ends at {largest:.5g}")
    return float(number)


MERGED = "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."


def wrong_length(adapter_names: Sequence[str], rows: int) -> str:
    return (
        "Length of `adapter_names` should be the same as the number of inputs, but got "
        f"{len(adapter_names)} and {rows} respectively: expected one adapter per row, got {len(adapter_names)} for {rows}"
    )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of which FSDP2 may have given each process a part; every process has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class SteeringVector(nn.Module):
    """One vector as the `weight` of a leaf module: TRL copies, and FSDP shards, modules rather than loose parameters."""

    def __init__(self, size: int, device: torch.device | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, device=device))

    def forward(self) -> torch.Tensor:
        # a call, not an attribute: accelerate and ZeRO-3 fetch a weight that is elsewhere when its module is called
        return self.weight

    @torch.no_grad()
    def write(self, values: torch.Tensor) -> None:
        """Overwrites the vector, (size,), also where accelerate keeps it outside the model, or FSDP2 shards it."""
        weight = self.weight
        if isinstance(weight, DTensor):  # each process has all values, and takes its part
            values = distribute_tensor(
                values.detach().to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None
            )
        if has_offloaded_params(self):
            cast(Any, self._hf_hook).weights_map = {"weight": values.detach().to("cpu", weight.dtype, copy=True)}
        else:
            weight.copy_(values)


class BiasSteerLayer(nn.Module, BaseTunerLayer):
    """
    Adds the active vectors to the output of the module it hangs on: `h'_l = h_l + sum_a scale_a * s_{a,l}`, for every
    token alike (https://huggingface.co/papers/2505.18706).

    It is a child, named `bias_steer`, of the steered module and acts through a forward hook, so that no parameter of
    the base model changes its name. The sum is taken in float32 and cast back to the dtype of `h_l`.

    Args:
        host (`nn.Module`): The module whose output is steered.
        size (`int`): Width of that output.
        execution_device (`torch.device`, *optional*):
            Where the module runs, if its weights are elsewhere and accelerate's hooks do not tell.
    """

    adapter_layer_names = ("bias_steer_vector",)
    other_param_names = ("scaling",)

    def __init__(self, host: nn.Module, size: int, execution_device: torch.device | None = None) -> None:
        super().__init__()
        # in a tuple, because as an attribute it would be registered as a child: a cycle in the module tree
        self._host = (host,)
        self.size = size
        self._execution_device = execution_device
        # other code of PEFT asks every tuner layer for these two
        self.in_features = getattr(host, "in_features", getattr(host, "nx", size))
        self.out_features = size
        self.bias_steer_vector = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._merged_sites: list[MergeSite] = []
        # what the last caller of any thread asked for
        self.latest_call = NO_CALL
        host.bias_steer = self
        # prepended: transformers' hooks that record hidden states have to see the steered ones
        self._hook = host.register_forward_hook(_steer_output, prepend=True)

    def get_base_layer(self) -> nn.Module:
        return self._host[0]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, None]:
        # no dtype: the vectors stay in float32 whatever the base model's dtype is
        parameter = next(base_layer.parameters(), None)
        if parameter is None:
            return None, None
        if not parameter.is_meta:
            return parameter.device, None
        # accelerate fetches the weights for each pass: what is added to the output has to be where that runs
        hooks = (getattr(module, "_hf_hook", None) for module in base_layer.modules())
        devices = [hook.execution_device for hook in hooks if isinstance(hook, AlignDevicesHook)]
        known = [torch.device(device) for device in [*devices, self._execution_device] if device is not None]
        return (known or [parameter.device])[0], None

    @property
    def call(self) -> Call:
        """What the caller of the present forward pass asked for."""
        # compiled code and the replicas of DataParallel, in threads of their own, see no context
        if torch.compiler.is_compiling() or "_is_replica" in self.__dict__:
            return self.latest_call
        return _CALLS.get().get(self, NO_CALL)

    @property
    def disabled_for_all(self) -> bool:
        """Whether every thread gets the base model."""
        return self._disable_adapters

    @property
    def disable_adapters(self) -> bool:
        return self.disabled_for_all or self.call.disabled

    def update_layer(self, adapter_name: str, config: BiasSteerConfig) -> None:
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        vector = SteeringVector(self.size, device)
        if not config.init_weights:
            nn.init.normal_(vector.weight)
        self.bias_steer_vector[adapter_name] = vector
        self.scaling[adapter_name] = 1.0
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_scale(self, adapter: str, scale: float) -> None:
        """
        Multiplies the vector of `adapter` by `scale` in every later forward pass. Not saved with the adapter.

        A thread that has set a scale keeps it; the others follow the last one that any thread has set.

        Raises:
            TypeError: If the scale is no number.
            ValueError: If the scale is not finite, or the adapter is merged.
        """
        set_scale([self], adapter, scale)

    def scale(self, adapter: str) -> float:
        """The factor of an adapter's vector in the forward passes of this thread."""
        latest = self.scaling[adapter]
        own = None if torch.compiler.is_compiling() else _SCALES.get()
        return latest if own is None else own.get(self.bias_steer_vector[adapter], latest)

    def forward(self, output: Any, adapter_names: Sequence[str] | None = None) -> Any:
        """
        Args:
            output: What the steered module returned: a tensor, or a tuple or list that starts with one.
                hidden states: (batch, ..., size)
            adapter_names (`list[str]`, *optional*): One adapter (or `"__base__"`) for each row of the batch.
        """
        call = self.call
        names = call.adapter_names if adapter_names is None else adapter_names
        if self.disabled_for_all or call.disabled or (self.merged and names is None):
            return output
        if not isinstance(output, torch.Tensor):
            return type(output)((self(output[0], adapter_names=adapter_names), *output[1:]))
        if names is None:
            steering = self.sum_vectors(self.active_adapters)
        else:
            steering = self._per_row_vectors(output, names, may_repeat=call.may_repeat)
        if steering is None:
            return output
        steered = (output + steering).to(output.dtype)
        return steered if call.choice is None else torch.where(_chosen_rows(call, output), steered, output)

    def vector(self, adapter_name: str) -> nn.Parameter:
        """The trainable vector of one adapter, unscaled: (size,). On the meta device where accelerate offloads it."""
        return cast(SteeringVector, self.bias_steer_vector[adapter_name]).weight

    def write(self, adapter_name: str, values: torch.Tensor) -> None:
        """Overwrites the vector of one adapter, (size,), in place."""
        cast(SteeringVector, self.bias_steer_vector[adapter_name]).write(values)

    def sum_vectors(self, adapter_names: list[str]) -> torch.Tensor | None:
        """Sum of the scaled vectors, (size,), or None if this layer has none of the adapters. Not to be written to."""
        total = None
        for name in adapter_names:
            if name in self.scaling:
                scale, vector = self.scale(name), self.bias_steer_vector[name]()
                vector = vector if scale == 1 else vector * scale
                total = vector if total is None else total + vector
        return total

    def _per_row_vectors(
        self, hidden: torch.Tensor, adapter_names: Sequence[str], *, may_repeat: bool = False
    ) -> torch.Tensor:
        if self.merged:
            raise ValueError(MERGED)
        repeats = len(hidden) // len(adapter_names) if may_repeat else 1
        if len(hidden) != repeats * len(adapter_names):
            raise ValueError(wrong_length(adapter_names, len(hidden)))
        none = torch.zeros(self.size, device=hidden.device)
        rows = [none if (v := self.sum_vectors([name])) is None else v for name in adapter_names]
        vectors = torch.stack(rows).repeat_interleave(repeats, dim=0)
        return vectors.view(len(hidden), *[1] * (hidden.dim() - 2), self.size)

    def enable_adapters(self, enabled: bool) -> None:
        # the bias of a merged adapter acts inside the host, out of this layer's reach: take it out right away
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Writes the vectors into biases inside the host.

        Args:
            safe_merge (`bool`, *optional*, defaults to `False`): Refuse biases that would not be finite.
            adapter_names (`list[str]`, *optional*): The adapters to merge; the active ones if unset.

        Raises:
            ValueError: If the host has no place for a bias, or `safe_merge` meets NaN or infinity.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.bias_steer_vector]
        if not names:
            return
        if safe_merge and not self.merges_finitely(names):
            raise ValueError(
                f"NaNs or infinity in biases with the vectors of {names}: nothing was merged into this layer"
            )
        total = self.sum_vectors(self.merged_adapters + names).detach()
        self._merged_sites = self._sites()
        for site in self._merged_sites:
            site.share(self, total)
        self.merged_adapters += names

    def merges_finitely(self, adapter_names: list[str] | None = None) -> bool:
        """Whether the biases that [`merge`] would write are finite in their own dtype."""
        total = self.sum_vectors([*dict.fromkeys([*self.merged_adapters, *(adapter_names or self.active_adapters)])])
        if total is None:
            return True
        return all(bool(site.shared(self, total.detach()).isfinite().all()) for site in self._sites())

    def _sites(self) -> list[MergeSite]:
        """Where the vectors go, and where they are while they are merged."""
        return self._merged_sites or merge_sites(self.get_base_layer())

    def unmerge(self) -> None:
        """Puts back the very biases that were there before the first `merge`: nothing is subtracted, nothing drifts."""
        for site in self._merged_sites:
            refuse_offloaded(site.module)
        for site in self._merged_sites:
            site.share(self, None)
        self._merged_sites = []
        self.merged_adapters = []

    def detach_from_host(self) -> None:
        for site in self._merged_sites:  # for good: the biases are the model's own from now on
            vars(site.module).pop(SHARES, None)
        self._hook.remove()
        del self.get_base_layer().bias_steer

    def extra_repr(self) -> str:
        return f"size={self.size}"


def _chosen_rows(call: Call, hidden: torch.Tensor) -> torch.Tensor:
    if call.chosen is None or call.chosen.shape != hidden.shape[:2]:
        got = None if call.chosen is None else tuple(call.chosen.shape)
        raise ValueError(
            f"steer_tokens knows of (rows, tokens) = {got} in this forward pass, but a steered module returns "
            f"{tuple(hidden.shape)}: call the whole model, no part or replica of it, and steer decoder layers"
        )
    return call.chosen.to(hidden.device).view(*call.chosen.shape, *[1] * (hidden.dim() - 2))


def _steer_output(module: Any, args: tuple, output: Any) -> Any:
    return module.bias_steer(output)
