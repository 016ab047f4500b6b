"""Replace, steer and ablate what a sparse autoencoder reads, inside a running language model."""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .activation_shards import ActivationShards, pieces_of
from .configuration_hierarchical_sae import integer, positive_number
from .language_model import evaluation_mode
from .modeling_hierarchical_sae import HierarchicalSaeModel, check_finite
from .sites import Site, check_fits, site_hook, target_site


logger = logging.get_logger(__name__)

Edit = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@contextmanager
def splice(
    model: PreTrainedModel,
    sae: HierarchicalSaeModel,
    layer: int | None = None,
    *,
    hook_point: str | None = None,
    k: int | None = None,
    keep_error: bool = False,
    edit: Edit | None = None,
    max_norm: float | None = None,
    max_norm_ratio: float | None = 5.0,
) -> Generator[None, None, None]:
    """
    Inside, reconstructions stand in place of the hidden states at a site of a decoder layer: x̂ for x, or x̂ + (x − x̂₀)
    with the error kept, where x̂₀ is the reconstruction before `edit`. Without an edit, keeping the error changes nothing at all. The
    error is a constant, so that all gradients pass through the latents (arXiv 2403.19647). What a transcoder computes
    stands at its target's site, in place of the model's own values there.

    Contexts can be nested, over several sites, layers and autoencoders; on one site they act in the order in which they
    were entered. They hold in `generate` as well, for prompt and new tokens, and in the thread or task that entered
    them, not in others that use the same model: `generate_batch` starts one and does not see them. With gradient
    checkpointing the backward pass belongs inside too, since it runs the layers again. Each position is treated by
    itself, so what stands at padded positions does not matter to the others.

    Args:
        model (`PreTrainedModel`): any transformers model with a list of decoder layers, a PEFT model too. Left as it
            was, also by an exception.
        sae ([`HierarchicalSaeModel`]): in evaluation mode inside.
        layer (`int`, *optional*): decoder layer, counted from 0; negative counts from the end. By default the one in the
            autoencoder's config.
        hook_point (`str`, *optional*): where in the layer, as in [`iterate_activations`]; by default the one in the
            autoencoder's config, or else its output.
        k (`int`, *optional*): latents per position, at most `sae.config.k`, which is the default.
        keep_error (`bool`, defaults to `False`): add what the reconstruction lacks.
        edit (`Callable`, *optional*): called with top_indices and top_values, (batch, positions, k) each, returns the
            values to reconstruct from.
        max_norm (`float`, *optional*): positions of a larger norm keep the model's own values, such as attention
            sinks, which an autoencoder is not trained on. By default `max_norm_ratio` times the median on record (see
            [`record_statistics`]), or no limit if there is none; for a transcoder that of its targets as well.
        max_norm_ratio (`float`, *optional*, defaults to 5.0): the one that it was trained with, see [`ActivationSettings`];
            None for no limit.

    Raises:
        `ValueError`: If there is no such layer or site, another hidden size than `sae.config.d_in`, an autoencoder of another
            site, `k` out of range, or no positive norm; in the forward pass, if `edit` returns
            something else than values, or a transcoder's target comes before what it reads.
    """
    k, limits = sae.config.check_k(k), _norm_limits(sae, max_norm, max_norm_ratio)
    if not isinstance(keep_error, bool):
        raise ValueError(f"keep_error must be True or False, got {keep_error!r}")

    site = _site(model, sae, layer, hook_point)
    target, read = target_site(sae, model, site), []

    def replace(hidden_states: torch.Tensor) -> torch.Tensor:
        clean = x = hidden_states.to(sae.W_dec.device, torch.promote_types(hidden_states.dtype, torch.float32))
        if sae.config.is_transcoder:
            if not read:
                raise ValueError(f"{target} comes before {site} in the language model: it cannot be computed from it")
            x = read.pop().to(clean).reshape(*clean.shape[:-1], sae.config.d_in)
        top_indices, top_values = sae.encode(x, k)
        # Before the edit, which may change the values in place.
        unedited = sae.decode(top_indices, top_values, x).detach() if keep_error else clean
        edited = top_values if edit is None else edit(top_indices, top_values)
        if not isinstance(edited, torch.Tensor):
            raise ValueError(f"edit must return the values to reconstruct from, a tensor, got {edited!r}")
        replacement = sae.decode(top_indices, edited, x)
        if keep_error:
            replacement = clean.detach() + (replacement - unedited)
        norms = (torch.linalg.vector_norm(states, dim=-1, keepdim=True) for states in (x, clean))
        is_usual = torch.stack([norm <= limit for norm, limit in zip(norms, limits)]).all(dim=0)
        return torch.where(is_usual, replacement.to(clean.dtype), clean).to(hidden_states)

    def keep(hidden_states: torch.Tensor) -> None:
        # Until the target is reached, which a pass that ends before it never does.
        read[:] = [hidden_states]

    reading = site_hook(site, keep) if sae.config.is_transcoder else nullcontext()
    with evaluation_mode(sae), reading, site_hook(target, replace):
        yield


@contextmanager
def ablate(
    model: PreTrainedModel,
    sae: HierarchicalSaeModel,
    layer: int | None,
    latents: int | Sequence[int],
    *,
    hook_point: str | None = None,
    k: int | None = None,
    max_norm: float | None = None,
    max_norm_ratio: float | None = 5.0,
) -> Generator[None, None, None]:
    """
    Inside, the hidden states at a site of a decoder layer lack what some latents contribute:
    x − Σ_{i ∈ latents} v_i W_dec[i], with v_i the activation of latent i if it is among the k strongest, else 0. A form of [`splice`], which says more.

    Args:
        model (`PreTrainedModel`): any transformers model with a list of decoder layers.
        sae ([`HierarchicalSaeModel`]): in evaluation mode inside.
        layer (`int`, *optional*): decoder layer, counted from 0; negative counts from the end. `None` for the one in the
            autoencoder's config.
        latents (`int` or `Sequence[int]`): which to leave out.
        hook_point (`str`, *optional*): as in [`splice`].
        k (`int`, *optional*): latents per position, at most `sae.config.k`, which is the default.
        max_norm (`float`, *optional*): as in [`splice`].
        max_norm_ratio (`float`, *optional*, defaults to 5.0): as in [`splice`].

    Raises:
        `ValueError`: If [`splice`] raises it, or a latent is out of range.
    """
    is_ablated = torch.zeros(sae.config.d_sae, dtype=torch.bool, device=sae.W_dec.device)
    is_ablated[_indices(sae, latents)] = True

    def drop(top_indices: torch.Tensor, top_values: torch.Tensor) -> torch.Tensor:
        return top_values.masked_fill(is_ablated[top_indices], 0.0)

    limits: dict[str, Any] = {"max_norm": max_norm, "max_norm_ratio": max_norm_ratio}
    with splice(model, sae, layer, hook_point=hook_point, k=k, keep_error=True, edit=drop, **limits):
        yield


@contextmanager
def steer(
    model: PreTrainedModel,
    sae: HierarchicalSaeModel,
    layer: int | None,
    latent: int | Sequence[int],
    *,
    hook_point: str | None = None,
    strength: float | Sequence[float],
    typical_activation: float | Sequence[float] | None = None,
) -> Generator[None, None, None]:
    """
    Inside, decoder directions are added to the hidden states at a site of a decoder layer, a transcoder's at its target's
    site, at every position:
    x + Σ_i strength_i · typical_i · W_dec[i], with typical_i the mean activation of latent i where it fires.

    Args:
        model (`PreTrainedModel`): any transformers model with a list of decoder layers. Left as it was, also by an
            exception.
        sae ([`HierarchicalSaeModel`]): whose decoder to take.
        layer (`int`, *optional*): decoder layer, counted from 0; negative counts from the end. `None` for the one in the
            autoencoder's config.
        latent (`int` or `Sequence[int]`): one latent or several.
        hook_point (`str`, *optional*): as in [`splice`].
        strength (`float` or `Sequence[float]`): in units of the typical activation, one for all latents or one for
            each; negative steers away.
        typical_activation (`float` or `Sequence[float]`, *optional*): in units of x. By default the one on record
            (see [`record_statistics`]); 1.0 makes `strength` a coefficient.

    Raises:
        `ValueError`: If there is no such layer, site or latent, another hidden size than `sae.config.d_in`, or a typical
            activation that is neither given nor on record.
    """
    indices = _indices(sae, latent)
    if typical_activation is None:
        typical = sae.mean_activation[indices].float()
        unknown = indices[typical == 0].tolist()
        if unknown:
            raise ValueError(
                f"the typical activation of latents {unknown} is not on record: call record_statistics with "
                "activations that they fire on, or give typical_activation"
            )
    else:
        typical = _numbers("typical_activation", typical_activation, indices)
    coefficients = typical * _numbers("strength", strength, indices)
    if coefficients.ndim > 1 or coefficients.numel() not in (1, len(indices)):
        raise ValueError(
            f"strength and typical_activation must be one number or one for each of the {len(indices)} latents, "
            f"got shape {tuple(coefficients.shape)}"
        )

    def add(hidden_states: torch.Tensor) -> torch.Tensor:
        # Of each pass, so that each can have a backward pass of its own.
        vector = coefficients.expand(len(indices)) @ sae.W_dec[indices].float()
        x = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        return (x + vector.to(x)).to(hidden_states.dtype)

    site = _site(model, sae, layer, hook_point)
    with site_hook(target_site(sae, model, site), add):
        yield


@torch.no_grad()
def record_statistics(
    sae: HierarchicalSaeModel,
    activations: torch.Tensor | Iterable[torch.Tensor] | ActivationShards,
    batch_size: int = 4096,
) -> None:
    """
    Measure what interventions need to know, and keep it in the autoencoder, which saves it with its weights: the mean
    activation of each latent over the inputs that it fires on (`mean_activation`, 0 if on none), and the median norm
    of the inputs (`median_norm`), of a transcoder's targets too (`median_target_norm`).

    Args:
        sae ([`HierarchicalSaeModel`]): left in evaluation mode or training mode as it came.
        activations (`torch.Tensor` or iterable of them): (..., d_in) each, finite, such as an
            [`ActivationStream`]; or [`ActivationShards`]. For a transcoder, pairs of these and targets, (..., d_out).
        batch_size (`int`, defaults to 4096): tokens at a time.

    Raises:
        `ValueError`: If there are no tokens, activations of another size, or NaN or infinite ones, or a stream or harvest is
            of a language model, layer or site that the autoencoder was not trained on.
    """
    total = torch.zeros(sae.config.d_sae, dtype=torch.float64, device=sae.W_dec.device)
    fired, norms, target_norms = torch.zeros_like(total), [], []
    batch_size = integer("batch_size", batch_size, 1)
    with evaluation_mode(sae):
        for x, targets in pieces_of(activations, sae):
            check_finite(x)
            check_finite(targets)
            for part in x.split(batch_size):
                part = part.to(sae.W_dec.device).float()
                top_indices, top_values = sae.encode(part)
                total.index_add_(0, top_indices.flatten(), top_values.flatten().double())
                fired.index_add_(0, top_indices.flatten(), (top_values > 0).flatten().double())
                norms.append(torch.linalg.vector_norm(part, dim=1))
            if sae.config.is_transcoder:
                target_norms.append(torch.linalg.vector_norm(targets.float(), dim=1))
    if not sum(map(len, norms)):
        raise ValueError("expected a sample of activations to measure, got no tokens")
    sae.mean_activation.copy_(total / fired.clamp(min=1))
    sae.median_norm.copy_(torch.cat(norms).median())
    if sae.config.is_transcoder:
        sae.median_target_norm.copy_(torch.cat(target_norms).median())


def _norm_limits(sae: HierarchicalSaeModel, max_norm: float | None, max_norm_ratio: float | None) -> list[float]:
    """Largest norms of what is read and, of a transcoder, of its targets; one that is given is of what is read alone."""
    medians = [sae.median_norm, *([sae.median_target_norm] if sae.config.is_transcoder else [])]
    if max_norm is not None:
        return [positive_number("max_norm", max_norm), torch.inf][: len(medians)]
    ratio = torch.inf if max_norm_ratio is None else positive_number("max_norm_ratio", max_norm_ratio)
    if max_norm_ratio is not None and not all(median.isfinite() for median in medians):
        raise ValueError(
            f"the recorded median norm has no room in {sae.median_norm.dtype}, and so tells no limit: load the autoencoder in "
            "float32 or bfloat16, or give max_norm"
        )
    return [ratio * (median.item() or torch.inf) for median in medians]


def _site(model: PreTrainedModel, sae: HierarchicalSaeModel, layer: int | None, hook_point: str | None) -> Site:
    """Where to change hidden states; a layer that the autoencoder was not trained on is logged."""
    trained = sae.config.layer
    site = check_fits(sae, model, trained if layer is None else layer, hook_point)
    if trained not in (None, site.layer):
        logger.warning(f"the autoencoder was trained on layer {trained}, it is used on {site.layer}")
    return site


def _numbers(name: str, numbers: Any, like: torch.Tensor) -> torch.Tensor:
    """In float32, where `like` is."""
    try:
        found = torch.as_tensor(numbers, device=like.device)
    except (TypeError, ValueError, RuntimeError):
        found = torch.tensor(False)
    if found.dtype == torch.bool or not found.isfinite().all():
        raise ValueError(f"{name} must be finite numbers, got {numbers!r}")
    return found.float()


def _indices(sae: HierarchicalSaeModel, latents: int | Sequence[int]) -> torch.Tensor:
    return torch.tensor(sae.config.check_latents(latents), device=sae.W_dec.device)


__all__ = ["ablate", "record_statistics", "splice", "steer"]
