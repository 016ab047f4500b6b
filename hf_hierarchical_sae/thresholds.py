"""Selection by a threshold for a dictionary that was trained to give each input its k strongest latents."""

import copy
from collections.abc import Iterable
from typing import Any

import torch

from .activation_shards import ActivationShards, pieces_of
from .configuration_hierarchical_sae import integer
from .language_model import evaluation_mode
from .modeling_hierarchical_sae import HierarchicalSaeModel, check_finite


# Activations are counted by their sign, exponent and first 15 bits: to 1 part in 32,768.
DROPPED_BITS = 8


@torch.no_grad()
def select_by_threshold(
    sae: HierarchicalSaeModel, activations: torch.Tensor | Iterable[torch.Tensor] | ActivationShards, k: int
) -> HierarchicalSaeModel:
    """
    The same dictionary with a threshold: an input has as many latents as are above it, k on average. Inputs that need more
    latents get them, so that less of what they hold is lost than with the k strongest of each.

    Args:
        sae ([`HierarchicalSaeModel`]): trained for several budgets or for one; left as it is.
        activations (`torch.Tensor` or iterable of them): (..., d_in) each, such as an [`ActivationStream`]; or
            [`ActivationShards`]; pairs for a transcoder. What the mean is over, best ten thousand tokens or more.
        k (`int`): mean number of latents per input, at most `sae.config.k`.

    Returns:
        [`HierarchicalSaeModel`]: with `selection="batch_topk"`, in evaluation mode.

    Raises:
        `ValueError`: If `k` is out of range or more than are active, there are no activations, they are NaN or infinite, or
            they do not belong to the autoencoder.
    """
    k = integer("k", k)
    if not 1 <= k <= sae.config.k:
        raise ValueError(f"k must be in [1, {sae.config.k}], the trained budget, got {k}")
    config: Any = copy.deepcopy(sae.config)
    config.selection, config.k, config.budgets, config.budget_weights = "batch_topk", k, [k], None
    config.validate_architecture()
    selecting = HierarchicalSaeModel(config).to(sae.device, sae.dtype)
    tensors = {name: tensor for name, tensor in sae.state_dict().items() if name != "threshold"}
    selecting.load_state_dict(tensors, strict=False)
    with evaluation_mode(sae):
        selecting.threshold.fill_(_threshold(sae, activations, k))
    return selecting.eval()


def _threshold(sae: HierarchicalSaeModel, activations: Any, k: int) -> torch.Tensor:
    """The largest that leaves k latents per input on average, in the units of training."""
    tokens, counts = 0, torch.zeros(2 ** (31 - DROPPED_BITS), dtype=torch.int64, device=sae.device)
    for x, _ in pieces_of(activations, sae):
        check_finite(x)
        for part in x.split(sae._tokens_at_a_time(x)):
            tokens += len(part)
            for _, latents in sae._chunks(sae._scaled(part.to(sae.device))):
                active = latents.float()[latents > 0]
                # Positive floats are ordered as their bits are.
                counts += torch.bincount(active.view(torch.int32) >> DROPPED_BITS, minlength=len(counts))
    above = counts.flip(0).cumsum(0)
    if tokens == 0 or above[-1] < k * tokens:
        raise ValueError(
            f"k must be at most the number of latents that are active, {int(above[-1]) / max(1, tokens):.1f} per input on "
            f"average over {tokens}, got {k}"
        )
    place = len(counts) - 1 - int(torch.searchsorted(above, k * tokens))
    return torch.tensor(place << DROPPED_BITS, dtype=torch.int32).view(torch.float32)


__all__ = ["select_by_threshold"]
