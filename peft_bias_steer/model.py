from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from .guards import keep_biases_on_save, refuse_lossy_rollout_sync
from .layer import BiasSteerLayer
from .merging import merge_sites
from .residual import find_layers, residual_width


class BiasSteerModel(BaseTuner):
    """
    Adds one trainable vector to the output of every decoder layer and freezes the rest: `h'_l = h_l + s_l`.

    On Llama-3.1-8B these are 131,072 parameters (0.0016 %). The method is described in
    https://huggingface.co/papers/2505.18706. Users meet this class as `base_model` of the [`~peft.PeftModel`] that
    `get_peft_model(model, BiasSteerConfig())` returns.
    """

    prefix = "bias_steer_"
    tuner_layer_cls = BiasSteerLayer
    target_module_mapping = {}

    @property
    def steering_layers(self) -> dict[str, BiasSteerLayer]:
        """Name of each steered module, and its [`BiasSteerLayer`], in the order of the model."""
        modules = self.model.named_modules()
        return {name.removesuffix(".bias_steer"): m for name, m in modules if isinstance(m, BiasSteerLayer)}

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        self._check_saved_vectors(peft_config.saved_shapes)
        # has to leave a config alone that went through here before: TRL passes the same object twice
        if peft_config.target_modules is not None and peft_config.layers_to_transform is None:
            return peft_config
        path, layers = find_layers(self.model, peft_config.layers_pattern)
        index = r"\d+"
        if peft_config.layers_to_transform is not None:
            peft_config.layers_to_transform = _layer_indices(peft_config.layers_to_transform, len(layers))
            index = f"({'|'.join(map(str, peft_config.layers_to_transform))})"
        if peft_config.target_modules is None:
            peft_config.target_modules = f"{path}.{index}".replace(".", r"\.")
        return peft_config

    def _check_saved_vectors(self, saved_shapes: dict[str, list[int]]) -> None:
        modules = dict(self.model.named_modules())
        shapes = {_host_name(key): shape for key, shape in saved_shapes.items() if VECTOR in key}
        if modules.keys().isdisjoint(shapes):
            return  # PEFT may yet rename the keys
        for name, shape in shapes.items():
            if name not in modules:
                raise ValueError(f"the adapter holds a vector for {name}, but this model has no such module: {HINT}")
            _check_shape(name, (self._output_width(name),), tuple(shape))

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, state_dict: dict | None = None, **kwargs: Any
    ) -> None:
        if state_dict is not None:
            # PEFT takes what stands before the prefix for the name of the target: the host, not our child of it
            state_dict = {key.replace(".bias_steer.bias_steer_", ".bias_steer_"): v for key, v in state_dict.items()}
        before = set(self.steering_layers.values())
        try:
            super().inject_adapter(model, adapter_name, *args, state_dict=state_dict, **kwargs)
        except (TypeError, ValueError):
            # some modules may have been steered before the bad one was met
            for layer in self.steering_layers.values():
                if layer in before:
                    layer.delete_adapter(adapter_name)
                else:
                    layer.detach_from_host()
            raise

    def _create_and_replace(  # PEFT passes some of these by position
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        host = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        layer = getattr(host, "bias_steer", None)
        if layer is None:
            layer = BiasSteerLayer(host, self._output_width(current_key))
            layer.set_adapter(self.active_adapters)
        layer.update_layer(adapter_name, peft_config)

    def _output_width(self, name: str) -> int:
        module = self.model.get_submodule(name)
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        if isinstance(module, nn.Linear):
            return module.out_features
        if isinstance(module, Conv1D):
            return module.nf
        if isinstance(self.model.get_submodule(name.rpartition(".")[0]), nn.ModuleList):
            return residual_width(self.model)
        raise TypeError(
            f"target module {name} is a {type(module).__name__}, expected a decoder layer, nn.Linear or Conv1D: "
            "leave target_modules unset to steer every decoder layer"
        )

    def _post_injection_hook(self, model: Any, config: Any, adapter_name: str) -> None:
        if hasattr(model, "add_model_tags"):
            model.add_model_tags(["bias-steer"])

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        if autocast_adapter_dtype:
            return super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in self.steering_layers.values():
            if adapter_name in layer.bias_steer_vector:
                dtype = next(p.dtype for p in layer.get_base_layer().parameters() if p.is_floating_point())
                layer.bias_steer_vector[adapter_name].to(dtype)

    def set_scale(self, adapter: str, scale: float) -> None:
        """
        Multiplies an adapter's vectors by a factor in every later forward pass: 0 is the base model, 1 the adapter.

        Args:
            adapter (`str`): Name of the adapter.
            scale (`float`): The factor. It is not saved with the adapter. A CUDA graph keeps the one it was recorded
                with, but follows a vector that is written to in place.
        """
        self._check_adapters_exist([adapter])
        for layer in self.steering_layers.values():
            layer.set_scale(adapter, scale)

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """
        Adds an adapter whose vectors are the weighted sums of other adapters' vectors, at their present scale.

        Args:
            adapters (`list[str]`): Names of the adapters to sum.
            weights (`list[float]`): One factor for each of them.
            adapter_name (`str`): Name of the new adapter. Nothing happens if it exists already, as elsewhere in PEFT.

        Raises:
            ValueError: If an adapter does not exist, or there is not one weight for each.
        """
        if adapter_name in self.peft_config:
            return
        self._check_adapters_exist(adapters)
        if len(adapters) != len(weights):
            raise ValueError(
                f"expected one weight per adapter, got {len(weights)} weights for {len(adapters)} adapters"
            )
        layers = self.steering_layers
        targets = {n for n, layer in layers.items() if any(a in layer.bias_steer_vector for a in adapters)}
        self.peft_config[adapter_name] = replace(
            self.peft_config[adapters[0]], target_modules=targets, exclude_modules=None, layers_to_transform=None
        )
        self.inject_adapter(self.model, adapter_name)
        for layer in layers.values():
            if adapter_name in layer.bias_steer_vector:
                total = torch.zeros(layer.size, device=layer.vector(adapter_name).device)
                for adapter, weight in zip(adapters, weights):
                    if adapter in layer.bias_steer_vector:
                        total += weight * layer.sum_vectors([adapter]).detach()
                layer.vector(adapter_name).data.copy_(total)
        self.set_requires_grad(adapter_name, False)

    def _check_adapters_exist(self, adapters: list[str]) -> None:
        unknown = [adapter for adapter in adapters if adapter not in self.peft_config]
        if unknown:
            raise ValueError(f"Adapter(s) {unknown} do not exist, expected some of {list(self.peft_config)}")

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Generator[None]:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = sorted({*adapter_names} - {"__base__", *self.peft_config})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        # beam search repeats every row in the decoder, but not in an encoder
        repeated = [name for name in adapter_names for _ in range(kwargs.get("num_beams") or 1)]
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        encoder_modules = set() if encoder in (None, self.model) else set(encoder.modules())
        handles = [
            module.register_forward_pre_hook(
                partial(_add_adapter_names, adapter_names=adapter_names if module in encoder_modules else repeated),
                with_kwargs=True,
            )
            for module in self.modules()
            if isinstance(module, BiasSteerLayer | AuxiliaryTrainingWrapper)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        layers = self.steering_layers.values()
        refuse_lossy_rollout_sync([site for layer in layers for site in merge_sites(layer.get_base_layer())])

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        if safe_merge:
            self._check_finite(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _check_finite(self, adapter_names: list[str] | None) -> None:
        # before any layer is merged: a refused merge must not leave half of the layers merged
        for name, layer in self.steering_layers.items():
            for adapter in adapter_names or layer.active_adapters:
                vector = layer.sum_vectors([adapter])
                if vector is not None and not torch.isfinite(vector).all():
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken: its vector at "
                        f"{name} is not finite. Nothing was merged"
                    )

    @torch.no_grad()
    def check_merge(self, *args: Any, tolerance: float = 1e-3, **kwargs: Any) -> float:
        """
        Merges on trial and compares the model's output before and after. The model is left unmerged.

        Args:
            args, kwargs: An input for the model, as for a forward pass.
            tolerance (`float`, *optional*, defaults to 0.001):
                Largest difference to accept, relative to the largest number in the output. bfloat16 needs about 0.05.

        Returns:
            The difference that was found.

        Raises:
            ValueError: If the merged model computes something else.
        """
        expected = self.model(*args, **kwargs)[0]
        self.merge_adapter(safe_merge=True)
        try:
            difference = ((self.model(*args, **kwargs)[0] - expected).abs().max() / expected.abs().max()).item()
        finally:
            self.unmerge_adapter()
        if not difference <= tolerance:
            raise ValueError(f"merging changes the output by {difference:.1e}, expected at most {tolerance:.1e}")
        return difference

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        layers = self.steering_layers.values()
        if merge:
            self._check_merge_allowed()
            if safe_merge:
                self._check_finite(adapter_names)
            for layer in layers:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        merged = any(layer.merged for layer in layers)
        for layer in layers:
            layer.detach_from_host()
        super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        if merged:
            keep_biases_on_save(self.model)
        return self.model

    @classmethod
    def _get_adapter_state_dict(  # PEFT passes these by position
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict, unwanted_adapter_names: list[str]
    ) -> dict[str, torch.Tensor]:
        # PEFT's own selection would take the weights of any other tuner that lives in the same model
        return {key: value for key, value in state_dict.items() if VECTOR in key}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict
    ) -> dict[str, torch.Tensor]:
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = model.state_dict()
        for key, value in state_dict.items():
            if VECTOR in key:
                if key not in own:
                    raise ValueError(
                        f"the state dict holds {key}, but no such module is steered in this model: {HINT}"
                    )
                _check_shape(_host_name(key), tuple(own[key].shape), tuple(value.shape))
        return state_dict


VECTOR = ".bias_steer.bias_steer_vector."
HINT = "load it into the base model that it was trained on (base_model_name_or_path in adapter_config.json)"


def _host_name(key: str) -> str:
    return key.removeprefix("base_model.model.").partition(VECTOR)[0]


def _check_shape(name: str, expected: tuple[int, ...], got: tuple[int, ...]) -> None:
    if got != expected:
        raise ValueError(f"expected a vector of shape {expected} for {name}, got {got}: {HINT}")


def _add_adapter_names(
    module: nn.Module, args: tuple, kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[tuple, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}


def _layer_indices(indices: int | list[int], num_layers: int) -> list[int]:
    indices = [indices] if isinstance(indices, int) else list(indices)
    outside = [index for index in indices if not -num_layers <= index < num_layers]
    if outside or not indices:
        raise ValueError(
            f"layers_to_transform must hold indices in [{-num_layers}, {num_layers - 1}], got {outside or indices}"
        )
    return sorted({index % num_layers for index in indices})
