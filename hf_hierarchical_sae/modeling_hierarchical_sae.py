"""A sparse autoencoder, or transcoder, that is trained for every sparsity budget at once."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from huggingface_hub import CommitInfo, EvalResult, ModelCard
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_hierarchical_sae import HierarchicalSaeConfig
from .hierarchical_topk import as_indices, choose_form, normalized_weights
from .large_pages import keep_pages_for
from .model_card_hierarchical_sae import WEIGHT_FILES, push_with_card, sae_card
from .sparse_latents import (
    SparseEncoder,
    TangentGradient,
    distinct_latents,
    latents_above,
    pre_activations,
    strongest_latents,
    weighted_rows,
)
from .whole_files import whole_folder


# Of the mean variance of inputs, in the linear map that a transcoder starts from.
RIDGE = 0.01
# How many are held at a time outside training: in float32 64 MiB, less than a training batch of a large dictionary needs.
PRE_ACTIVATIONS = 2**24
# In training on CPU: fewer at a time would make the encoder's product slower, all of a large batch would take memory.
TRAINING_TOKENS = 1024


@dataclass
class HierarchicalSaeOutput(ModelOutput):
    """
    What a [`HierarchicalSaeModel`] returns. Positions that `attention_mask` leaves out hold zeros.

    Args:
        loss (`torch.Tensor`): scalar, mean squared error over budgets, in units of the scaled input, or targets.
        reconstruction (`torch.Tensor`): (..., d_out), from all k latents.
        top_indices (`torch.Tensor`): (..., k), the selected latents, strongest first.
        top_values (`torch.Tensor`): (..., k), their activations.
        budget_errors (`torch.Tensor`): (budgets,), mean squared error at each budget; for a Matryoshka SAE, (prefixes,), at
            each prefix of the dictionary, or (prefixes, budgets).
    """

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    top_indices: torch.Tensor | None = None
    top_values: torch.Tensor | None = None
    budget_errors: torch.Tensor | None = None


class HierarchicalSaeModel(PreTrainedModel):
    r"""
    Sparse autoencoder for the activations of a language model:

        v, i = TopK(ReLU((x − b_dec) W_enc + b_enc)),    x̂ = Σ_j v_j W_dec[i_j] + b_dec

    trained with the mean error over sparsity budgets ([`hierarchical_topk_loss`], arXiv 2505.24473), so that any
    k up to the trained one can be used at inference. The encoder is stored by latent, as `encoder_weight`
    (d_sae, d_in): gradients reach only selected latents, and a latent is then one row. `W_enc` is its transpose.

    Dictionaries trained elsewhere with another activation function, ReLU or JumpReLU, are the same model for use, with
    `selection="relu"` or `"jumprelu"`: every input has as many latents as are active (see [`load_saelens`]).

    A transcoder, with `config.target_hook_point`, computes the activations y of another site instead:

        v, i = TopK(ReLU(x W_enc + b_enc)),    ŷ = Σ_j v_j W_dec[i_j] + b_dec  (+ W_skip x with a skip connection)

    While training, parameters live in units of the scaled input `input_scale · x`; what goes in and comes out of
    every method is in units of x. A transcoder's are of `input_scale · (x − input_center)` and of `target_scale · y`.
    [`~HierarchicalSaeModel.fold_input_scale`] moves all that into the weights.
    """

    config_class = HierarchicalSaeConfig
    base_model_prefix = "sae"
    main_input_name = "hidden_states"
    input_scale: torch.Tensor
    input_center: torch.Tensor
    target_scale: torch.Tensor
    threshold: torch.Tensor
    tokens_since_fired: torch.Tensor
    mean_activation: torch.Tensor
    median_norm: torch.Tensor
    median_target_norm: torch.Tensor

    def __init__(self, config: HierarchicalSaeConfig):
        super().__init__(config)
        # `from_pretrained` sets what it is given in a config that was checked before.
        config.validate_architecture()
        d_out: Any = config.d_out
        self.encoder_weight = nn.Parameter(torch.empty(config.d_sae, config.d_in))
        self.b_enc = nn.Parameter(torch.empty(config.d_sae))
        self.W_dec = nn.Parameter(torch.empty(config.d_sae, d_out))
        self.b_dec = nn.Parameter(torch.empty(d_out))
        if config.skip_connection:
            self.W_skip = nn.Parameter(torch.empty(d_out, config.d_in))
        self.register_buffer("input_scale", torch.ones(()))
        # (d_sae,) with `selection="jumprelu"`.
        self.register_buffer("threshold", torch.zeros(config.d_sae if config.selection == "jumprelu" else ()))
        self.register_buffer("tokens_since_fired", torch.zeros(config.d_sae, dtype=torch.int64))
        # In units of x; 0 until `record_statistics` has measured them.
        self.register_buffer("mean_activation", torch.zeros(config.d_sae))
        self.register_buffer("median_norm", torch.zeros(()))
        if config.is_transcoder:
            self.register_buffer("input_center", torch.zeros(config.d_in))
            self.register_buffer("target_scale", torch.ones(()))
            self.register_buffer("median_target_norm", torch.zeros(()))
        self._training_sums: torch.Tensor | None = None
        keep_pages_for(self)
        self.add_model_tags(["sparse-autoencoder", "hf_hierarchical_sae"])
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        own = [module.encoder_weight] if module.config.is_transcoder else []
        for weight in (module.W_dec, *own):
            init.normal_(weight)
            init.copy_(weight, F.normalize(weight.detach(), dim=1))
        if not own:
            init.copy_(module.encoder_weight, module.W_dec.detach())
        skip = [module.W_skip] if module.config.skip_connection else []
        for tensor in (module.b_enc, module.b_dec, *skip, *module.buffers()):
            init.zeros_(tensor)
        for scale in module._scales():
            init.ones_(scale)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """[`~PreTrainedModel.from_pretrained`] that raises a `ValueError` if a tensor is missing, of another shape or unknown."""
        kwargs["ignore_mismatched_sizes"] = True
        try:
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(f"the weights in {pretrained_model_name_or_path} are torn: {error}") from error
        model, info = loaded
        found = {
            "no": sorted(info["missing_keys"]),
            "another shape of": [f"{name} {tuple(shape)}" for name, shape, _ in sorted(info["mismatched_keys"])],
            "the unknown": sorted(info["unexpected_keys"]),
        }
        if any(found.values()):
            raise ValueError(
                f"expected the weights of an autoencoder of {model.config.d_sae} latents for activations of size "
                f"{model.config.d_in} in {pretrained_model_name_or_path}, got "
                + "; ".join(f"{how} {', '.join(names)}" for how, names in found.items() if names)
            )
        return loaded if output_loading_info else model

    @property
    def W_enc(self) -> torch.Tensor:
        """(d_in, d_sae): the encoder."""
        return self.encoder_weight.T

    @property
    def dead_fraction(self) -> float:
        """Share of latents that have not fired for `config.dead_after_tokens` training tokens."""
        return self._dead_latents().float().mean().item()

    def __call__(self, *args: Any, **kwargs: Any) -> HierarchicalSaeOutput:
        # Before FSDP's own hooks, so that the rows it shards and the optimizer holds are the ones normalised.
        if self.training:
            self.normalize_decoder()
        return super().__call__(*args, **kwargs)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        k: int | None = None,
        return_loss: bool = True,
        *,
        targets: torch.Tensor | None = None,
    ) -> HierarchicalSaeOutput:
        """
        Args:
            hidden_states (`torch.Tensor`): (..., d_in), floating point, finite.
            attention_mask (`torch.Tensor`, *optional*): (...), zero where a position is padding.
            k (`int`, *optional*): latents per input, at most `config.k`, which is the default. The loss then averages
                over the trained budgets that do not exceed it.
            return_loss (`bool`, defaults to `True`): whether to compute the loss; a transcoder without `targets` has
                none.
            targets (`torch.Tensor`, *optional*): (..., d_out), what a transcoder is to compute; an autoencoder computes
                `hidden_states`.

        Returns:
            [`HierarchicalSaeOutput`]

        Raises:
            `ValueError`: If shape or dtype are wrong, `k` is out of range, an autoencoder is given `targets` or, in training
                mode, a transcoder is given none, activations are NaN or infinite, weights are in half precision, the
                gradient of the loss raises it as well then, or `config.selection` is for use only.
        """
        self._check_input(hidden_states, attention_mask)
        self._check_targets(hidden_states, targets)
        if self.training:
            self._check_trainable()
            self._check_float32()
        keep = None if attention_mask is None else attention_mask.reshape(-1).bool()
        flat = _rows_kept(hidden_states, keep)
        goals = flat if targets is None else _rows_kept(targets, keep)
        read = [flat] if targets is None else [flat, goals]
        checks = [_begin_finite_check(part) for part in read] if self.training else []
        scaled = self._scaled(flat)
        goals = scaled if targets is None else _at_least_float32(goals) * self._target_scale
        top_indices, top_values = self._encode_scaled(scaled, k)
        for finish in checks:
            finish()
        if self.training:
            self._count_firing(top_indices, top_values)

        loss = errors = None
        if return_loss and (targets is not None or not self.config.is_transcoder):
            loss, errors, reconstruction = self._loss(scaled, goals, top_indices, top_values)
            if loss.requires_grad and self.W_dec.dtype.itemsize < 4:
                loss.register_hook(self._check_float32)
            if self.training and errors is not None and k is None:
                self._add_training_sums(goals, errors)
        else:
            reconstruction = weighted_rows(top_indices, top_values, self.W_dec) + self.b_dec
            if self.config.skip_connection:
                reconstruction = reconstruction + self._skip(scaled)
        reconstruction = (reconstruction / self._target_scale).to(hidden_states.dtype)
        shape = hidden_states.shape[:-1]
        return HierarchicalSaeOutput(
            loss=loss,
            reconstruction=_restore(reconstruction, keep, shape),
            top_indices=_restore(top_indices, keep, shape),
            top_values=_restore(top_values / self._target_scale, keep, shape),
            budget_errors=errors,
        )

    def encode(self, x: torch.Tensor, k: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            x (`torch.Tensor`): (..., d_in), floating point.
            k (`int`, *optional*): latents per input, at most `config.k`, which is the default.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: top_indices and top_values, (..., k) each, strongest first. With a
            `selection` other than `"topk"` the last size is the largest number of latents that any input uses, and
            other places hold the value 0 and a latent that the input does not use.
        """
        self._check_input(x, None)
        top_indices, top_values = self._encode_scaled(self._scaled(x.reshape(-1, self.config.d_in)), k)
        shape = x.shape[:-1]
        return _restore(top_indices, None, shape), _restore(top_values / self._target_scale, None, shape)

    def decode(
        self, top_indices: torch.Tensor, top_values: torch.Tensor, hidden_states: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            top_indices (`torch.Tensor`): (..., k).
            top_values (`torch.Tensor`): (..., k).
            hidden_states (`torch.Tensor`, *optional*): (..., d_in), what was encoded; a skip connection needs it.

        Returns:
            `torch.Tensor`: (..., d_out), Σ_j top_values_j W_dec[top_indices_j] + b_dec, and W_skip x with a skip connection.
        """
        if not all(isinstance(part, torch.Tensor) and part.ndim for part in (top_indices, top_values)):
            raise ValueError(f"top_indices and top_values must be tensors (..., k), got {top_indices!r:.40}")
        if top_indices.is_floating_point() or top_indices.dtype == torch.bool or not top_values.is_floating_point():
            raise ValueError(
                "top_indices must be integers and top_values floating point, "
                f"got {top_indices.dtype} and {top_values.dtype}"
            )
        if top_indices.shape != top_values.shape:
            raise ValueError(
                "top_indices and top_values must have one shape, "
                f"got {tuple(top_indices.shape)} and {tuple(top_values.shape)}"
            )
        k, shape = top_indices.shape[-1], top_indices.shape[:-1]
        rows = weighted_rows(as_indices(top_indices).reshape(-1, k), top_values.reshape(-1, k), self.W_dec)
        rows = rows + self.b_dec / self._target_scale
        if self.config.skip_connection:
            x = self._check_skipped(hidden_states, shape)
            scaled = self._scaled(x.reshape(-1, self.config.d_in))
            rows = rows + self._skip(scaled) / self._target_scale
        return _restore(rows, None, shape)

    @torch.no_grad()
    def initialize_from_activations(
        self, activations: torch.Tensor, targets: torch.Tensor | None = None, keep_weights: bool = False
    ) -> None:
        """
        Set `input_scale` so that centred activations have about unit mean square, and `b_dec` to their geometric
        median. The scale is a power of two: folding it into the weights later rounds nothing. A transcoder's inputs and
        targets are each scaled and centred so.

        Args:
            activations (`torch.Tensor`): (tokens, d_in), a sample of the training data; a few thousand are enough.
            targets (`torch.Tensor`, *optional*): (tokens, d_out), those of a transcoder.
            keep_weights (`bool`, defaults to `False`): go on with a trained dictionary: the scale is set, and the
                weights are changed with it so that outputs stay as they are.
        """
        self._check_trainable()
        self._check_input(activations, None)
        self._check_targets(activations, targets)
        if self.config.is_transcoder and targets is None:
            raise ValueError("a transcoder needs a sample of its targets as well: give targets, (tokens, d_out)")
        input_center, input_scale = _center_and_scale(activations)
        center, scale = (input_center, input_scale) if targets is None else _center_and_scale(targets)
        if keep_weights:
            self._change_scales(input_scale, scale, input_center)
            return
        self.input_scale.copy_(input_scale)
        self.b_dec.copy_(center * scale)
        if targets is not None:
            self.input_center.copy_(input_center)
            self.target_scale.copy_(scale)
            self._start_from_linear_map(activations, targets)

    @torch.no_grad()
    def fold_input_scale(self) -> None:
        """
        Move `input_scale` into the biases and the threshold, in place; outputs stay equal to the last bit. A transcoder's
        go into all its weights, and outputs stay equal but for rounding.
        """
        one = torch.ones_like(self.input_scale)
        self._change_scales(one, one, torch.zeros(self.config.d_in))

    def _change_scales(
        self, input_scale: torch.Tensor, target_scale: torch.Tensor, input_center: torch.Tensor
    ) -> None:
        """Other units of training, and weights of the same outputs in them; an autoencoder has only the first."""
        old, new = self._target_scale, input_scale
        if self.config.is_transcoder:
            new = target_scale.to(old)
            shift = (input_center.to(self.input_center) - self.input_center).double() * self.input_scale
            skip = [(self.W_skip, self.b_dec)] if self.config.skip_connection else []
            for weight, bias in [(self.encoder_weight, self.b_enc), *skip]:
                bias.add_(torch.cat([rows.double() @ shift for rows in weight.split(4096)]).to(bias))
                weight.mul_(self.input_scale / input_scale.to(old) * (new / old))
            self.input_center.copy_(input_center)
        for tensor in (self.b_enc, self.b_dec, self.threshold):
            tensor.mul_(new.to(old) / old)
        for scale, value in zip(self._scales(), (input_scale, target_scale)):
            scale.copy_(value)

    def _start_from_linear_map(self, activations: torch.Tensor, targets: torch.Tensor) -> None:
        """
        The best linear map A of inputs to targets is where a skip connection starts, which leaves the latents the rest.
        Without one, encoder rows start along what A makes their decoder rows of, W_dec Aᵀ: in an autoencoder, where A is
        the identity, the transpose.
        """
        x, y = self._scaled(_rows_kept(activations, None)), _at_least_float32(_rows_kept(targets, None))
        x, y = x.double(), (y * self._target_scale - self.b_dec).to(x).double()
        gram = x.T @ x
        # As many samples as dimensions, or fewer, would be fitted by noise.
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        linear = torch.linalg.solve(gram + ridge, x.T @ y)
        if self.config.skip_connection:
            self.W_skip.copy_(linear.T)
        else:
            self.encoder_weight.copy_(F.normalize(self.W_dec.to(linear) @ linear.T, dim=1))

    def _scales(self) -> list[torch.Tensor]:
        return [self.input_scale, *([self.target_scale] if self.config.is_transcoder else [])]

    @property
    def _target_scale(self) -> torch.Tensor:
        """Of what is computed, which is an autoencoder's input."""
        return self._scales()[-1]

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale the rows of `W_dec` to unit norm, in place; does nothing if `config.normalize_decoder` is off."""
        if not self.config.normalize_decoder:
            return
        if self.W_dec.dim() != 2:
            raise ValueError(
                "the rows of W_dec cannot be normalised where DeepSpeed's ZeRO-3 has shared them out: use stage 2, or FSDP2, "
                "as examples/hf_hierarchical_sae/train_sharded.py does"
            )
        norms = torch.linalg.vector_norm(_at_least_float32(self.W_dec), dim=1, keepdim=True)
        # Rows that are at unit norm up to rounding stay as they are: normalising twice changes nothing.
        is_off = ((norms - 1).abs() > max(1e-6, torch.finfo(self.W_dec.dtype).eps)) & (norms > 0)
        self.W_dec.div_(norms.masked_fill(~is_off, 1.0))
        # DeepSpeed's ZeRO-1 and 2 step copies of their own, which they then write over the weights; to one that is more exact
        # than the weights these would do harm.
        set_copy: Any = getattr(self.W_dec, "set_full_hp_param", None)
        if set_copy is not None and self.W_dec.dtype == torch.float32:
            set_copy(self.W_dec)

    def pop_training_metrics(self) -> dict[str, float]:
        """
        Explained variance of the training batches since the last call, at powers of two among the trained budgets and
        at the last one (of a Matryoshka SAE of one budget, of each prefix), and the fraction of dead latents. Every process has to call it: they add up their batches.

        Returns:
            `dict[str, float]`: `explained_variance_<budget>` or `explained_variance_<prefix>`, and `dead_fraction`; empty if there was no training batch.
        """
        names = list(self.config.trained_budgets)
        if len(names) == 1:
            names = list(self.config.matryoshka_prefixes or names)
        sums = self._training_sums
        if sums is None:
            sums = torch.zeros(len(names) + len(self.b_dec) + 2, dtype=torch.float64, device=self.b_dec.device)
        self._training_sums = None
        _sum_over_processes(sums)
        errors, total, squares, tokens = sums.split([len(names), len(self.b_dec), 1, 1])
        if tokens < 2:
            return {}
        values = 1 - errors / (squares - total.square().sum() / tokens)
        shown = {name for name in names if name.bit_count() == 1} | {names[-1]}
        metrics = {f"explained_variance_{name}": value for name, value in zip(names, values.tolist()) if name in shown}
        return {**metrics, "dead_fraction": self.dead_fraction}

    def train(self, mode: bool = True) -> "HierarchicalSaeModel":
        if not mode and self.W_dec.device.type != "meta":
            self.normalize_decoder()
        return super().train(mode)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """[`~PreTrainedModel.save_pretrained`] that leaves an older model whole until the new one is on disk."""
        self.normalize_decoder()
        kwargs.setdefault("repo_id", Path(save_directory).name)
        with whole_folder(save_directory) as unfinished:
            super().save_pretrained(unfinished, *args, **kwargs)
            written = {path.name for path in unfinished.iterdir()}
        # An older model in another number of pieces would be loaded instead.
        if written.intersection(WEIGHT_FILES):
            for path in (path for name in WEIGHT_FILES for path in Path(save_directory).glob(name)):
                if path.name not in written:
                    path.unlink()

    def push_to_hub(self, repo_id: str, *, metrics: Sequence[EvalResult] = (), **kwargs: Any) -> CommitInfo:
        """
        [`~PreTrainedModel.push_to_hub`], in one commit with a model card that shows how to use the model if there is none yet.

        Args:
            repo_id (`str`): where to.
            metrics (`Sequence[EvalResult]`): what [`HierarchicalSaeEvaluation.metrics`] gives, for the card's metadata.
            kwargs (*optional*): those of transformers.
        """
        return push_with_card(self, repo_id, metrics, **kwargs)

    def model_card(self, repo_id: str, picture: str | None = None, metrics: Sequence[EvalResult] = ()) -> ModelCard:
        """
        Args:
            repo_id (`str`): where the model will be found, used in the snippet.
            picture (`str`, *optional*): file name, in the repository, of a plot of quality against budget.
            metrics (`Sequence[EvalResult]`): what was measured, for the card's metadata.

        Returns:
            `ModelCard`: the facts of the config, which budgets it was trained for among them, and a usage snippet
                that runs as it stands.
        """
        return sae_card(self.config, repo_id, tags=list(self.model_tags or []), picture=picture, metrics=metrics)

    def _check_trainable(self) -> None:
        if not self.config.is_trainable:
            raise ValueError(
                f"a {self.config.selection} SAE is for use: it is not trained here, got training mode or activations "
                "to start from; call eval(), or train one with selection='topk' or 'batch_topk'"
            )
        if getattr(self, "_is_replica", False):
            raise ValueError(
                "torch.nn.DataParallel, which Trainer takes where one process sees several GPUs, trains copies whose counts "
                "and threshold are lost: start a process for each GPU, with accelerate launch or torchrun, or show one, "
                "with CUDA_VISIBLE_DEVICES=0"
            )

    def _check_float32(self, grad_loss: torch.Tensor | None = None) -> None:
        """Half precision is for inference; a hook of the loss as well."""
        if self.W_dec.dtype.itemsize < 4:
            raise ValueError(
                f"training needs float32 weights, got {self.W_dec.dtype}: load the autoencoder with "
                "dtype=torch.float32, and use bf16=True in TrainingArguments for autocast"
            )

    def check_loaded(self) -> None:
        """Raise a `ValueError` if accelerate keeps the weights on disk or in main memory: it fetches them for `forward` alone."""
        if self.W_dec.is_meta and getattr(self, "_hf_hook", None) is not None:
            raise ValueError(
                "the weights of this autoencoder are offloaded, and are fetched for a forward pass alone: load it whole for "
                "anything else, without device_map or with device_map={'': device}"
            )

    def _check_input(self, x: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"activations must be a tensor, got a {type(x).__name__}")
        self.check_loaded()
        if not x.is_floating_point():
            raise ValueError(f"activations must be floating point, got {x.dtype}")
        if x.ndim < 1 or x.shape[-1] != self.config.d_in:
            raise ValueError(f"activations must have shape (..., d_in={self.config.d_in}), got {tuple(x.shape)}")
        if attention_mask is not None and attention_mask.shape != x.shape[:-1]:
            raise ValueError(
                f"attention_mask must have shape {tuple(x.shape[:-1])}, got {tuple(attention_mask.shape)}"
            )

    def _check_targets(self, x: torch.Tensor, targets: torch.Tensor | None) -> None:
        if targets is None:
            if self.config.is_transcoder and self.training:
                raise ValueError(
                    f"a transcoder is trained to compute {self.config.target_hook_point}: give targets, (..., d_out), or "
                    "call eval() before using it"
                )
            return
        if not self.config.is_transcoder:
            raise ValueError(
                "an autoencoder computes its own input, got targets: leave them out, or say with target_hook_point in the "
                "config that it is a transcoder"
            )
        if not isinstance(targets, torch.Tensor) or not targets.is_floating_point():
            raise ValueError(f"targets must be a floating point tensor, got {targets!r:.40}")
        if targets.shape != (*x.shape[:-1], self.config.d_out):
            raise ValueError(
                f"targets must have shape {(*x.shape[:-1], self.config.d_out)}, got {tuple(targets.shape)}"
            )

    def _check_skipped(self, hidden_states: Any, shape: tuple[int, ...]) -> torch.Tensor:
        expected = (*shape, self.config.d_in)
        if not isinstance(hidden_states, torch.Tensor) or hidden_states.shape != expected:
            raise ValueError(
                f"a skip connection needs hidden_states of shape {expected}, those that were encoded, got "
                f"{getattr(hidden_states, 'shape', hidden_states)}"
            )
        return hidden_states

    def _scaled(self, flat: torch.Tensor) -> torch.Tensor:
        """(tokens, d_in) activations as the encoder takes them."""
        flat = _at_least_float32(flat)
        return ((flat - self.input_center) if self.config.is_transcoder else flat) * self.input_scale

    def _encoder_bias(self, scaled: torch.Tensor) -> torch.Tensor:
        """(d_in,) what the encoder subtracts from its input: of an autoencoder, its decoder's bias."""
        return scaled.new_zeros(self.config.d_in) if self.config.is_transcoder else self.b_dec

    def _skip(self, scaled: torch.Tensor) -> torch.Tensor:
        """(tokens, d_out) what the skip connection gives, in units of the scaled targets."""
        return F.linear(scaled, self.W_skip.to(scaled.dtype))

    def _encode_scaled(self, scaled: torch.Tensor, k: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """top_indices and top_values, (tokens, k), in units of the scaled input, with gradients."""
        values, indices = self._select(scaled, self.config.check_k(k))
        values = values.to(scaled.dtype)
        center = self._encoder_bias(scaled)
        return indices, SparseEncoder.apply(scaled, self.encoder_weight, self.b_enc, center, values, indices)

    @torch.no_grad()
    def _select(self, scaled: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pre-activations and indices of the latents to keep, of some inputs at a time."""
        parts = [self._select_part(part, k) for part in scaled.split(max(1, self._tokens_at_a_time(scaled)))]
        width = max(values.shape[1] for values, _ in parts)
        values, indices = (torch.cat([F.pad(p, (0, width - p.shape[1])) for p in part]) for part in zip(*parts))
        if not self.config.has_budgets and not self.training:
            indices = distinct_latents(indices, values)
        return values, indices

    def _tokens_at_a_time(self, scaled: torch.Tensor) -> int:
        tokens = PRE_ACTIVATIONS // (self.config.encoder_chunk_size or self.config.d_sae)
        if not self.training:
            return tokens
        # A batch_topk SAE selects among the whole batch.
        is_whole = self.config.selection == "batch_topk" or scaled.device.type != "cpu"
        return len(scaled) if is_whole else max(TRAINING_TOKENS, tokens)

    def _select_part(self, scaled: torch.Tensor, k: int) -> Sequence[torch.Tensor]:
        if self.config.selection == "topk":
            return strongest_latents(self._chunks(scaled), k)
        if self.config.selection == "batch_topk":
            return self._batch_topk(scaled, k)
        return latents_above(self._chunks(scaled), self.threshold)

    def _chunks(self, scaled: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        chunk_size = self.config.encoder_chunk_size or self.config.d_sae
        return pre_activations(scaled - self._encoder_bias(scaled), self.encoder_weight, self.b_enc, chunk_size)

    def _batch_topk(self, scaled: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Training: the tokens × k strongest of the batch. Inference: those above the learned threshold."""
        whole = None if self.config.encoder_chunk_size else list(self._chunks(scaled))
        width = min(2 * k, self.config.d_sae)
        values, indices = strongest_latents(whole or self._chunks(scaled), width)
        threshold = self._selection_threshold(values, k)
        # Only an input whose last candidate is above the threshold may have more latents that are.
        more = (values[:, -1] > threshold).nonzero().squeeze(1)
        if len(more):
            chunks = whole or self._chunks(scaled)
            width = int(sum((latents[more] <= threshold).logical_not_().sum(dim=1) for _, latents in chunks).max())
            values = F.pad(values, (0, width - values.shape[1]), value=-torch.inf)
            indices = F.pad(indices, (0, width - indices.shape[1]))
            values[more], indices[more] = strongest_latents(whole or self._chunks(scaled), width, more)
            threshold = self._selection_threshold(values, k)
        # Written so that NaN is kept and seen in what comes out.
        values = torch.where((values < threshold) | (values <= 0), 0.0, values)
        used = int((values != 0).sum(dim=1).max()) if len(values) else 0
        return values[:, : max(1, used)], indices[:, : max(1, used)]

    def _selection_threshold(self, values: torch.Tensor, k: int) -> torch.Tensor:
        if self.training and len(values):
            return values.flatten().topk(len(values) * k).values[-1].clamp(min=0)
        return self.threshold

    def _loss(
        self, scaled: torch.Tensor, goals: torch.Tensor, top_indices: torch.Tensor, top_values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Loss, the error at each budget, and the reconstruction, all in units of the scaled goals, (tokens, d_out)."""
        if len(scaled) == 0:
            # A batch of padding only: a zero that keeps every parameter in the graph, as DDP needs.
            nothing: Any = sum(parameter.sum() for parameter in self.parameters()) * 0.0
            return nothing, None, goals + nothing
        W_dec, b_dec = (_at_least_float32(parameter) for parameter in (self.W_dec, self.b_dec))
        W_dec = TangentGradient.apply(W_dec) if self.config.normalize_decoder else W_dec
        # What a skip connection gives is not left to the latents.
        skipped = self._skip(scaled) if self.config.skip_connection else None
        wanted = goals if skipped is None else goals - skipped
        budgets, budget_weights = self._budgets_up_to(top_indices.shape[1])
        budget_errors = choose_form("auto", top_values, W_dec, b_dec, wanted)
        prefixes = self.config.matryoshka_prefixes
        # Of the whole dictionary last.
        nested = [top_values * (top_indices < end) for end in prefixes[:-1]] if prefixes else []
        parts = [budget_errors(top_indices, each, W_dec, b_dec, wanted, budgets) for each in (*nested, top_values)]
        errors, reconstruction = torch.stack([part for part, _ in parts]), parts[-1][1]
        loss = (errors.mean(dim=0) * normalized_weights(budget_weights, budgets, like=errors)).sum()
        errors = errors.squeeze(0) if len(parts) == 1 else errors.squeeze(1)
        if self.config.aux_loss_coefficient > 0 and self.training:
            residual = (wanted - reconstruction).detach()
            loss = loss + self.config.aux_loss_coefficient * self._auxiliary_loss(scaled, residual, W_dec)
        return loss, errors, reconstruction if skipped is None else reconstruction + skipped

    def _budgets_up_to(self, width: int) -> tuple[tuple[int, ...], Sequence[float] | None]:
        """The trained budgets that `width` latents allow, or `width` itself, and their weights (`None`: equal)."""
        budgets = tuple(budget for budget in self.config.trained_budgets if budget <= width)
        if not self.config.has_budgets or not budgets:
            return (width,), None
        weights = (self.config.budget_weights or [])[: len(budgets)]
        return budgets, weights if any(weights) else None

    def _auxiliary_loss(self, scaled: torch.Tensor, residual: torch.Tensor, W_dec: torch.Tensor) -> torch.Tensor:
        """Error of the dead latents' reconstruction of the residual, arXiv 2406.04093, section 2.4."""
        dead = self._dead_latents().nonzero().squeeze(1)
        if len(dead) == 0:
            return residual.new_zeros(())
        centered = scaled.detach() - self._encoder_bias(scaled)
        latents = F.linear(centered, self.encoder_weight[dead], self.b_enc[dead])
        aux_k = min(self.config.aux_k or max(1, self.config.d_in // 2), len(dead))
        values, places = latents.topk(aux_k, dim=1)
        reconstruction = weighted_rows(dead[places], values.relu().to(residual.dtype), W_dec)
        return (reconstruction - residual).square().mean()

    @torch.no_grad()
    def _add_training_sums(self, goals: torch.Tensor, errors: torch.Tensor) -> None:
        # float64: far from the origin, Σx² − n·mean² loses its digits.
        x = goals.double()
        tokens = x.new_full((1,), len(x))
        errors = errors[-1] if errors.ndim == 2 else errors
        sums = torch.cat([errors.double() * x.numel(), x.sum(dim=0), x.square().sum().reshape(1), tokens])
        # A model that has moved since goes on with the sums that it had.
        self._training_sums = sums if self._training_sums is None else self._training_sums.to(sums.device) + sums

    def _dead_latents(self) -> torch.Tensor:
        return self.tokens_since_fired >= self.config.dead_after_tokens

    @torch.no_grad()
    def _count_firing(self, top_indices: torch.Tensor, top_values: torch.Tensor) -> None:
        """Every process counts the latents that fired in any of them, and learns one threshold."""
        fired = top_values > 0
        smallest = self.threshold
        if top_values.numel():
            smallest = torch.where(fired.any(), top_values.masked_fill(~fired, torch.inf).amin(), smallest)
        counts = torch.zeros(self.config.d_sae + 3, dtype=torch.float32, device=top_values.device)
        counts.index_add_(0, top_indices.flatten(), fired.flatten().float())
        counts[-3:] = torch.stack([counts.new_full((), len(top_values)), smallest.float(), counts.new_ones(())])
        _sum_over_processes(counts)
        tokens, threshold, processes = counts[-3:]
        self.tokens_since_fired.add_(tokens.long()).masked_fill_(counts[:-3] > 0, 0)
        if not self.config.has_budgets:
            is_first = self.threshold == 0
            # A mean over the last ten batches or so: over a hundred, it lags behind the weights of a short run.
            new, share = threshold / processes, torch.where(is_first, 1.0, 0.1)
            self.threshold.lerp_(new.to(self.threshold.dtype), share.to(self.threshold.dtype))


def _sum_over_processes(tensor: torch.Tensor) -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)


@torch.no_grad()
def geometric_median(points: torch.Tensor, iterations: int = 50) -> torch.Tensor:
    """
    Point with the smallest sum of distances to `points`, by Weiszfeld's algorithm.

    Args:
        points (`torch.Tensor`): (n, d_in).
        iterations (`int`, defaults to 50): upper bound; it stops early once the point has settled.

    Returns:
        `torch.Tensor`: (d_in,).
    """
    center = points.mean(dim=0)
    for _ in range(iterations):
        weights = 1 / torch.linalg.vector_norm(points - center, dim=1).clamp(min=1e-8)
        moved = weights @ points / weights.sum()
        settled = torch.linalg.vector_norm(moved - center) <= 1e-5 * torch.linalg.vector_norm(moved)
        center = moved
        if settled:
            break
    return center


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rows_kept(x: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """(..., n) to (kept, n)."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if keep is None else flat[keep]


def _center_and_scale(activations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Geometric median, and the power of two that makes the mean square of what is around it about 1."""
    activations = activations.reshape(-1, activations.shape[-1])
    check_finite(activations)
    activations = activations.float()
    center = geometric_median(activations)
    mean_square = (activations - center).square().mean()
    if mean_square == 0:
        raise ValueError(f"the {len(activations)} activations are all equal: expected a sample that varies")
    return center, torch.exp2(-0.5 * mean_square.log2()).log2().round().exp2()


def _restore(flat: torch.Tensor, keep: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
    """(kept, n) back to (*shape, n), with zeros where `keep` is False."""
    if keep is not None:
        full = flat.new_zeros(len(keep), flat.shape[1])
        full[keep] = flat
        flat = full
    return flat.reshape(*shape, flat.shape[1])


def check_finite(x: torch.Tensor) -> None:
    """Raise a `ValueError` that counts NaN and infinite entries of (tokens, d_in) activations, if there are any."""
    # One pass and no copy in the usual case: a sum is finite unless an entry is not, or it overflows.
    if torch.isfinite(x.sum(dtype=torch.float64)):
        return
    nan, infinite = int(x.isnan().sum()), int(x.isinf().sum())
    if nan or infinite:
        raise ValueError(
            f"expected finite activations, got {nan} NaN and {infinite} infinite of {x.numel()} entries in "
            f"{int((~x.isfinite()).any(dim=-1).sum())} tokens: drop these tokens or harvest in float32"
        )


def _begin_finite_check(x: torch.Tensor) -> Callable[[], None]:
    """`check_finite` in two parts: on a GPU, what is called in between is queued while the host waits for its result."""
    if not x.is_cuda or torch.compiler.is_compiling():
        check_finite(x)
        return lambda: None
    is_finite = torch.isfinite(x.sum(dtype=torch.float64)).to("cpu", non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(x.device))

    def finish() -> None:
        arrived.synchronize()
        if not is_finite:
            check_finite(x)

    return finish


__all__ = ["HierarchicalSaeModel", "HierarchicalSaeOutput"]
