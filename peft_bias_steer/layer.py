from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from .config import BiasSteerConfig
from .merging import MergeSite, merge_sites


class SteeringVector(nn.Module):
    """One vector as the `weight` of a leaf module: TRL copies, and FSDP shards, modules rather than loose parameters."""

    def __init__(self, size: int, device: torch.device | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, device=device))


class BiasSteerLayer(nn.Module, BaseTunerLayer):
    """
    Adds the active vectors to the output of the module it hangs on: `h'_l = h_l + sum_a scale_a * s_{a,l}`, for every
    token alike (https://huggingface.co/papers/2505.18706).

    It is a child, named `bias_steer`, of the steered module and acts through a forward hook, so that no parameter of
    the base model changes its name. The sum is taken in float32 and cast back to the dtype of `h_l`.

    Args:
        host (`nn.Module`): The module whose output is steered.
        size (`int`): Width of that output.
    """

    adapter_layer_names = ("bias_steer_vector",)
    other_param_names = ("scaling",)

    def __init__(self, host: nn.Module, size: int) -> None:
        super().__init__()
        # in a tuple, because as an attribute it would be registered as a child: a cycle in the module tree
        self._host = (host,)
        self.size = size
        # other code of PEFT asks every tuner layer for these two
        self.in_features = getattr(host, "in_features", getattr(host, "nx", size))
        self.out_features = size
        self.bias_steer_vector = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._merged_sites: list[tuple[MergeSite, nn.Parameter | None]] = []
        host.bias_steer = self
        # prepended: transformers' hooks that record hidden states have to see the steered ones
        self._hook = host.register_forward_hook(_steer_output, prepend=True)

    def get_base_layer(self) -> nn.Module:
        return self._host[0]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, None]:
        # no dtype: the vectors stay in float32 whatever the base model's dtype is
        parameter = next(base_layer.parameters(), None)
        return (None if parameter is None else parameter.device), None

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

        Raises:
            ValueError: If the adapter is merged.
        """
        if adapter in self.merged_adapters:
            raise ValueError(f"adapter {adapter!r} is merged: call unmerge_adapter() before set_scale()")
        if adapter in self.scaling:
            self.scaling[adapter] = scale

    def forward(self, output: Any, adapter_names: list[str] | None = None) -> Any:
        """
        Args:
            output: What the steered module returned: a tensor, or a tuple or list that starts with one.
                hidden states: (batch, ..., size)
            adapter_names (`list[str]`, *optional*): One adapter (or `"__base__"`) for each row of the batch.
        """
        if self.disable_adapters or (self.merged and adapter_names is None):
            return output
        if not isinstance(output, torch.Tensor):
            return type(output)((self(output[0], adapter_names=adapter_names), *output[1:]))
        if adapter_names is None:
            steering = self.sum_vectors(self.active_adapters)
        else:
            steering = self._per_row_vectors(output, adapter_names)
        return output if steering is None else (output + steering).to(output.dtype)

    def vector(self, adapter_name: str) -> nn.Parameter:
        """The trainable vector of one adapter, unscaled: (size,)."""
        return cast(SteeringVector, self.bias_steer_vector[adapter_name]).weight

    def sum_vectors(self, adapter_names: list[str]) -> torch.Tensor | None:
        """Sum of the scaled vectors, (size,), or None if this layer has none of the adapters. Not to be written to."""
        total = None
        for name in adapter_names:
            if name in self.scaling:
                scale, vector = self.scaling[name], self.vector(name)
                vector = vector if scale == 1 else vector * scale
                total = vector if total is None else total + vector
        return total

    def _per_row_vectors(self, hidden: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        if self.merged:
            raise ValueError("adapter_names cannot be combined with merged adapters: call unmerge_adapter() first")
        if len(hidden) != len(adapter_names):
            raise ValueError(
                f"adapter_names must name one adapter per row, got {len(adapter_names)} for {len(hidden)}"
            )
        none = torch.zeros(self.size, device=hidden.device)
        rows = [none if (v := self.sum_vectors([name])) is None else v for name in adapter_names]
        return torch.stack(rows).view(len(rows), *[1] * (hidden.dim() - 2), self.size)

    def enable_adapters(self, enabled: bool) -> None:
        # the bias of a merged adapter acts inside the host, out of this layer's reach: take it out right away
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Writes the vectors into biases inside the host.

        Args:
            safe_merge (`bool`, *optional*, defaults to `False`): Refuse vectors that are not finite.
            adapter_names (`list[str]`, *optional*): The adapters to merge; the active ones if unset.

        Raises:
            ValueError: If the host has no place for a bias, or `safe_merge` meets NaN or infinity.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.bias_steer_vector]
        if not names:
            return
        total = self.sum_vectors(self.merged_adapters + names).detach()
        if safe_merge and not torch.isfinite(total).all():
            raise ValueError(f"NaNs detected in the vectors of {names}: nothing was merged into this layer")
        if not self.merged:
            self._merged_sites = [(site, site.bias) for site in merge_sites(self.get_base_layer())]
        for site, original in self._merged_sites:
            site.write(original, total)
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Puts back the very biases that were there before the first `merge`: nothing is subtracted, nothing drifts."""
        for site, original in self._merged_sites:
            site.restore(original)
        self._merged_sites = []
        self.merged_adapters = []

    def detach_from_host(self) -> None:
        self._hook.remove()
        del self.get_base_layer().bias_steer

    def extra_repr(self) -> str:
        return f"size={self.size}"


def _steer_output(module: Any, args: tuple, output: Any) -> Any:
    return module.bias_steer(output)
