import sys
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, cast

import torch
from accelerate.utils import has_offloaded_params
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .config import BiasSteerConfig, layer_indices
from .guards import keep_biases_on_save, refuse_lossy_rollout_sync, refuse_to_overwrite_base
from .layer import (
    MERGED,
    NO_CALL,
    BiasSteerLayer,
    SteeringVector,
    as_factor,
    calling,
    choose_tokens,
    in_a_call,
    set_scale,
    wrong_length,
)
from .merging import coarsest_rounding, in_evaluation_mode, merge_sites, vector_dtype
from .residual import find_layers, in_another_place, refuse_seq_first, seq_first_type, width_at
from .saved_keys import HINT, VECTOR, WRAPPED, check_adapter_name, check_saved_names, check_shape, host_name
from .tokens import Tokens, as_choice, recompute_in_context


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

    @cached_property
    def _seq_first_type(self) -> str | None:
        return seq_first_type(self.model)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> BiasSteerConfig:
        peft_config.check()  # a value may have been set since it was made
        refuse_to_overwrite_base(self.model)
        self._check_saved_shapes(peft_config.saved_shapes or {})
        # TRL passes the same object twice, and others may for a model with other layers
        given = _targets(peft_config)
        if peft_config.filled_in is not None and given == peft_config.filled_in[1]:
            given = peft_config.filled_in[0]
            peft_config.target_modules, peft_config.layers_to_transform = given
        if peft_config.target_modules is None or peft_config.layers_to_transform is not None:
            path, layers = find_layers(self.model, peft_config.layers_pattern)
            index = r"\d+"
            if peft_config.layers_to_transform is not None:
                peft_config.layers_to_transform = layer_indices(peft_config.layers_to_transform, len(layers))
                index = f"({'|'.join(map(str, peft_config.layers_to_transform))})"
            if peft_config.target_modules is None:
                peft_config.target_modules = f"{path}.{index}".replace(".", r"\.")
        if peft_config.num_vectors is not None and not self._targeted_names(peft_config):
            moved = in_another_place(cast(PreTrainedModel, self.model), peft_config.target_modules)
            peft_config.target_modules = moved or peft_config.target_modules
        peft_config.filled_in = given, _targets(peft_config)
        if peft_config.saved_shapes is not None:
            saved = [host_name(key) for key in peft_config.saved_shapes if VECTOR in key]
            # PEFT itself refuses a config without a target
            expected = self._targeted_names(peft_config) or saved
            check_saved_names(expected, saved, peft_config.num_vectors)
        return peft_config

    def _targeted_names(self, peft_config: BiasSteerConfig) -> list[str]:
        return [name for name, _ in self.model.named_modules() if self._is_target(peft_config, name)]

    def _is_target(self, peft_config: BiasSteerConfig, name: str) -> bool:
        return ".bias_steer" not in name and bool(self._check_target_module_exists(peft_config, name))

    def _check_saved_shapes(self, saved_shapes: dict[str, list[int]]) -> None:
        modules = dict(self.model.named_modules())
        shapes = {host_name(key): shape for key, shape in saved_shapes.items() if VECTOR in key}
        if modules.keys().isdisjoint(shapes):
            return  # PEFT may yet rename the keys
        for name, shape in shapes.items():
            if name not in modules:
                raise ValueError(f"the adapter holds a vector for {name}, but this model has no such module: {HINT}")
            check_shape(name, (self._output_width(name),), tuple(shape))

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, state_dict: dict | None = None, **kwargs: Any
    ) -> None:
        check_adapter_name(adapter_name)
        if state_dict is not None:
            # PEFT takes what stands before the prefix for the name of the target: the host, not our child of it
            state_dict = {key.replace(".bias_steer.bias_steer_", ".bias_steer_"): v for key, v in state_dict.items()}
        before = len(self.steering_layers)
        with self._undone_on_error(adapter_name):
            super().inject_adapter(model, adapter_name, *args, state_dict=state_dict, **kwargs)
        # torch does not look for hooks that came after it has compiled, and would run on without
        if len(self.steering_layers) > before and "torch._dynamo" in sys.modules:
            torch.compiler.reset()

    @contextmanager
    def _undone_on_error(self, adapter_name: str) -> Generator[None]:
        # PEFT has steered some modules, and frozen the rest, before it meets the one that it cannot
        before = set(self.model.modules())
        trained = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        targeted, config = list(self.targeted_module_names), self.peft_config[adapter_name]
        settings = dict(vars(config))
        try:
            yield
        except BaseException:
            for name, module in list(self.model.named_modules()):
                if isinstance(module, BiasSteerLayer) and module not in before:
                    module.detach_from_host()
                elif isinstance(module, BiasSteerLayer):
                    module.delete_adapter(adapter_name)
                elif isinstance(module, AuxiliaryTrainingWrapper) and module not in before:
                    parent, _, child = name.rpartition(".")
                    setattr(self.model.get_submodule(parent), child, module.original_module)
                elif isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._adapters:
                    module.delete_adapter(adapter_name, new_active_adapters=module.active_adapters)
            for parameter, requires_grad in trained:
                parameter.requires_grad = requires_grad
            self.targeted_module_names = targeted
            vars(config).update(settings)
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
            layer = BiasSteerLayer(host, self._output_width(current_key), self._execution_device())
            layer.set_adapter(self.active_adapters)
        layer.update_layer(adapter_name, peft_config)

    def _execution_device(self) -> torch.device | None:
        # PEFT takes accelerate's hooks off a model with layers on disk while it loads an adapter
        devices = list(getattr(self.model, "hf_device_map", {}).values())
        running = [device for device in devices if device not in ("cpu", "disk")]
        return torch.device((running or ["cpu"])[0]) if "disk" in devices else None

    def _output_width(self, name: str) -> int:
        module = self.model.get_submodule(name)
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        if isinstance(module, nn.Linear):
            return module.out_features
        if isinstance(module, Conv1D):
            return module.nf
        in_list = isinstance(self.model.get_submodule(name.rpartition(".")[0]), nn.ModuleList)
        if in_list and isinstance(self.model, PreTrainedModel):
            return width_at(self.model, name)
        raise TypeError(
            f"target module {name} is a {type(module).__name__}, expected a decoder layer, nn.Linear or Conv1D: "
            "leave target_modules unset to steer every decoder layer of a transformers model"
        )

    def _post_injection_hook(self, model: Any, config: Any, adapter_name: str) -> None:
        if hasattr(model, "add_model_tags"):
            model.add_model_tags(["bias-steer"])

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        self._put_back_vectors_of_disk(adapter_name)
        if autocast_adapter_dtype:
            return super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in self.steering_layers.values():
            if adapter_name in layer.bias_steer_vector:
                dtypes = (parameter.dtype for parameter in layer.get_base_layer().parameters())
                # the vector itself is the last of them
                layer.bias_steer_vector[adapter_name].to(next(one for one in dtypes if one == vector_dtype(one)))

    def _put_back_vectors_of_disk(self, adapter_name: str) -> None:
        # PEFT has just put layers on disk, and accelerate looks for their vectors in the files of the base model
        config = cast(BiasSteerConfig, self.peft_config[adapter_name])
        for key, vector in config.vectors_for_disk.items():
            module = cast(SteeringVector, self.get_submodule(key.removeprefix("base_model.").removesuffix(".weight")))
            module.write(vector)
        config.vectors_for_disk = {}

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        self._check_adapters_exist([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        active = self.active_adapters
        super().delete_adapter(adapter_name)
        # each layer has chosen another for a deleted active adapter by itself, among those that it has
        successors = [name for name in active if name != adapter_name] or list(self.peft_config)[:1]
        if adapter_name in active and successors:
            self.set_adapter(successors[0] if len(successors) == 1 else successors)

    def set_scale(self, adapter: str, scale: float) -> None:
        """
        Multiplies an adapter's vectors by a factor in every later forward pass: 0 is the base model, 1 the adapter.

        A thread that has set a scale keeps it; the others follow the last one that any thread has set.

        Args:
            adapter (`str`): Name of the adapter.
            scale (`float`): The factor. It is not saved with the adapter. A CUDA graph keeps the one it was recorded
                with, but follows a vector that is written to in place.

        Raises:
            TypeError: If the scale is no number.
            ValueError: If the scale is not finite, or the adapter does not exist or is merged.
        """
        self._check_adapters_exist([adapter])
        set_scale(list(self.steering_layers.values()), adapter, scale)

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """
        Adds an adapter whose vectors are the weighted sums of other adapters' vectors, at their present scale.

        Args:
            adapters (`list[str]`): Names of the adapters to sum. One that stands there twice counts twice.
            weights (`list[float]`): One factor for each of them.
            adapter_name (`str`): Name of the new adapter. Nothing happens if it exists already, as elsewhere in PEFT.

        Raises:
            TypeError: If a weight is no number.
            ValueError: If an adapter does not exist or has trained whole modules too, a weight is not finite, or there is
                not one weight for each.
        """
        if adapter_name in self.peft_config:
            return
        self._check_adapters_exist(adapters)
        if len(adapters) != len(weights) or not len(adapters):
            raise ValueError(
                f"expected one weight per adapter, got {len(weights)} weights for {len(adapters)} adapters"
            )
        factors = dict.fromkeys(adapters, 0.0)
        for adapter, weight in zip(adapters, weights):
            factors[adapter] += as_factor(weight, f"the weight of {adapter!r}")
        wrappers = [module for module in self.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        whole = [adapter for adapter in factors if any(adapter in wrapper._adapters for wrapper in wrappers)]
        if whole:
            raise ValueError(
                f"expected adapters of vectors alone, got {', '.join(whole)} with modules_to_save, of which there is no "
                "weighted sum: activate one of them with set_adapter()"
            )
        sums = {name: _weighted_sum(layer, factors) for name, layer in self.steering_layers.items()}
        sums = {name: total for name, total in sums.items() if total is not None}
        self.peft_config[adapter_name] = replace(
            self.peft_config[adapters[0]], target_modules=set(sums), exclude_modules=None, layers_to_transform=None
        )
        try:
            self.inject_adapter(self.model, adapter_name)
        except BaseException:
            del self.peft_config[adapter_name]
            raise
        for name, layer in self.steering_layers.items():
            if name in sums:
                layer.write(adapter_name, sums[name])
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
        rows = _batch_size(self.model, args, kwargs)
        self._check_adapter_names(adapter_names, rows)
        layers = list(self.steering_layers.values())
        # PEFT's own wrappers, of a head say, take the names as an argument
        handles = [
            module.register_forward_pre_hook(partial(_pass_adapter_names, layer=layers[0]), with_kwargs=True)
            for module in self.modules()
            if isinstance(module, AuxiliaryTrainingWrapper)
        ]
        try:
            # beam search and several samples repeat rows, and not in an encoder
            with calling(layers, adapter_names=tuple(adapter_names), may_repeat=rows is not None):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, adapter_names: Sequence[str], rows: int | None) -> None:
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names must be a list with one name for each row, got {adapter_names!r}")
        known = ["__base__", *self.peft_config]
        unknown = sorted({str(name) for name in adapter_names if name not in known})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        if any(layer.merged for layer in self.steering_layers.values()):
            raise ValueError(MERGED)
        refuse_seq_first(self._seq_first_type, "adapter_names", "give each adapter a batch of its own")
        if rows is not None and rows != len(adapter_names):
            raise ValueError(wrong_length(adapter_names, rows))

    def disables_per_call(self) -> bool:
        """
        Whether disabling needs no change: nothing is merged or disabled for good, no module is trained whole, and no other
        tuner is in the model.
        """
        wrappers = [
            module for module in self.modules() if isinstance(module, AuxiliaryTrainingWrapper | BaseTunerLayer)
        ]
        return not any(
            not isinstance(module, BiasSteerLayer) or module.merged or module.disabled_for_all for module in wrappers
        )

    def is_disabled(self) -> bool:
        """Whether this thread runs inside [`BiasSteerModel.disabled`]."""
        return in_a_call() and any(layer.call.disabled for layer in self.steering_layers.values())

    def disabled(self) -> AbstractContextManager[None]:
        """The base model, for the forward passes that this thread runs inside the block."""
        return calling(self.steering_layers.values(), disabled=True)

    @contextmanager
    def steer_tokens(
        self, tokens: Tokens | Sequence[Tokens], prompt_lengths: Sequence[int] | torch.Tensor | None = None
    ) -> Generator[None]:
        """
        Lets the vectors act on some tokens only, in the forward passes that this thread runs inside the block.

        The hidden states of the token at position p, counted without padding, move if p is in the chosen part. The
        prompt is what [`generate`] is given: with `"generated"`, the first new token is still the unsteered model's
        choice.

        Args:
            tokens (`str` or `list[str]`): `"all"`, `"prompt"` or `"generated"`, or one of these for each row.
            prompt_lengths (`list[int]`, *optional*):
                Number of tokens of each row's prompt, without padding, for forward passes over prompt and completion;
                of packed rows, of each document's, where the `position_ids` begin again. They need an `attention_mask`
                of shape (batch, seq) where there is padding. Not for `generate`.

        Raises:
            TypeError: If a length is no integer.
            ValueError: If it is none of these parts, or the model has an encoder beside its decoder, or layers that
                return (seq, batch, hidden_size). In a forward pass: if adapters are merged, or the lengths of its prompts
                are unknown.
        """
        choice = as_choice(tokens, prompt_lengths)
        if choice is not None and getattr(self.model.config, "is_encoder_decoder", False):
            raise ValueError(
                "expected a decoder alone, whose prompt and completion are one sequence, got a model with an encoder: "
                "steer_tokens has no meaning there"
            )
        if choice is not None:
            refuse_seq_first(self._seq_first_type, "steer_tokens", "steer all tokens")
        layers = list(self.steering_layers.values())
        hooks = [
            self.model.register_forward_pre_hook(partial(_before_pass, layers=layers), with_kwargs=True),
            self.model.register_forward_hook(partial(_after_pass, layers=layers), always_call=True),
        ]
        try:
            with calling(layers, choice=choice):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def in_generate(self, *args: Any, **kwargs: Any) -> Generator[None]:
        """Around a call of `generate` with these arguments, which tell the prompts from what is generated."""
        layers = list(self.steering_layers.values())
        choice = layers[0].call.choice if layers else None
        with nullcontext() if choice is None else calling(layers, choice=choice.in_generate(args, kwargs)):
            yield

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """
        transformers' continuous batching, of which PEFT knows nothing.

        Raises:
            ValueError: Inside [`steer_tokens`] or `disable_adapter`, which its own thread would not see.
        """
        if any(layer.call != NO_CALL for layer in self.steering_layers.values()):
            raise ValueError(
                "generate_batch runs in a thread of its own, which sees no steer_tokens and no disable_adapter: call "
                "generate instead"
            )
        return self.model.generate_batch(*args, **kwargs)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if self.is_disabled() or any(layer.disabled_for_all for layer in self.steering_layers.values()):
            raise ValueError(
                "expected to merge outside of disable_adapter(), which would not take out what is merged in it"
            )
        layers = self.steering_layers.values()
        refuse_lossy_rollout_sync([site for layer in layers for site in merge_sites(layer.get_base_layer())])

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_adapters_exist(adapter_names or [])
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
            if not layer.merges_finitely(adapter_names):
                raise ValueError(
                    f"NaNs or infinity detected in the merged weights: {name} has no room for the vectors in its dtype. Nothing "
                    "was merged: keep the adapter unmerged, or load the base in float32"
                )

    @torch.no_grad()
    def check_merge(self, *args: Any, tolerance: float | None = None, **kwargs: Any) -> float:
        """
        Merges on trial and compares the model's output before and after, in evaluation mode. The model is left unmerged.

        Args:
            args, kwargs: An input for the model, as for a forward pass.
            tolerance (`float`, *optional*):
                Largest difference to accept, relative to the largest number in the output. If unset, 0.001, or eight
                roundings where the model computes in less than float32: 0.0078 in float16, 0.0625 in bfloat16.

        Returns:
            The difference that was found.

        Raises:
            ValueError: If the merged model computes something else.
        """
        # dropout changes the output too
        with in_evaluation_mode(self.model):
            expected = self.model(*args, **kwargs)[0]
            if tolerance is None:
                tolerance = max(1e-3, 8 * coarsest_rounding(self.model, expected))
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
            self._check_adapters_exist(adapter_names or [])
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

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's moves a weight along, which what modules_to_save wraps need not have: an MLP, say
        setattr(parent, child_name, new_module)

    @classmethod
    def _get_adapter_state_dict(  # PEFT passes these by position
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict, unwanted_adapter_names: list[str]
    ) -> dict[str, torch.Tensor]:
        # PEFT's own selection would take the weights of any other tuner that lives in the same model
        vectors = {key: value for key, value in state_dict.items() if VECTOR in key}
        config.num_vectors = len(vectors)
        # accelerate may keep them outside the model
        away = {
            key for key, value in vectors.items() if value.is_meta and has_offloaded_params(_vector_at(model, key))
        }
        return {key: _vector_at(model, key)().detach() if key in away else value for key, value in vectors.items()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # nor does a file say that another tuner wraps the module
        return super()._remove_adapter_name_from_key(key, adapter_name).replace(WRAPPED, VECTOR)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict
    ) -> dict[str, torch.Tensor]:
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = model.state_dict()
        loaded = {key: value for key, value in state_dict.items() if VECTOR in key}
        for key, value in loaded.items():
            if key not in own:
                raise ValueError(f"the state dict holds {key}, but no such module is steered in this model: {HINT}")
            check_shape(host_name(key), tuple(own[key].shape), tuple(value.shape))
        steered = [key for key in own if key.endswith(f"{VECTOR}{adapter_name}.weight")]
        check_saved_names([host_name(key) for key in steered], [host_name(key) for key in loaded])
        # a weight that is elsewhere cannot be loaded in place
        for key in loaded:
            if has_offloaded_params(_vector_at(model, key)):
                _vector_at(model, key).write(loaded[key])
        if "disk" in getattr(model, "hf_device_map", {}).values():
            config.vectors_for_disk = loaded
        return state_dict


def _weighted_sum(layer: BiasSteerLayer, factors: dict[str, float]) -> torch.Tensor | None:
    vectors = {adapter: layer.sum_vectors([adapter]) for adapter in factors}
    terms = [factors[adapter] * vector.detach() for adapter, vector in vectors.items() if vector is not None]
    return torch.stack(terms).sum(0) if terms else None


def _batch_size(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> int | None:
    names = ("input_ids", "inputs", "inputs_embeds", getattr(model, "main_input_name", "input_ids"))
    inputs = [*args[:1], *(kwargs.get(name) for name in names)]
    return next((len(value) for value in inputs if isinstance(value, torch.Tensor)), None)


def _pass_adapter_names(
    module: nn.Module, args: tuple, kwargs: dict[str, Any], layer: BiasSteerLayer
) -> tuple[tuple, dict[str, Any]]:
    names = layer.call.adapter_names
    if names is None:  # another thread's pass
        return args, kwargs
    repeats = len(args[0]) // len(names) if layer.call.may_repeat else 1
    return args, {**kwargs, "adapter_names": [name for name in names for _ in range(repeats)]}


def _before_pass(module: nn.Module, args: tuple, kwargs: dict[str, Any], layers: list[BiasSteerLayer]) -> None:
    choice = layers[0].call.choice
    if choice is None or layers[0].disable_adapters:  # it may be another thread's pass
        return
    if any(layer.merged for layer in layers):
        raise ValueError(MERGED.replace("adapter_names", "steer_tokens"))
    choose_tokens(layers, choice.chosen(module, args, kwargs))
    if torch.is_grad_enabled():
        recompute_in_context(module)


def _after_pass(module: nn.Module, args: tuple, output: Any, layers: list[BiasSteerLayer]) -> None:
    if layers[0].call.choice is not None:
        choose_tokens(layers, None)


def _vector_at(model: nn.Module, key: str) -> SteeringVector:
    return cast(SteeringVector, model.get_submodule(key.removesuffix(".weight")))


def _targets(config: BiasSteerConfig) -> tuple:
    return config.target_modules, config.layers_to_transform
