"""Quality of a sparse autoencoder at every sparsity budget."""

from collections.abc import Iterable, Sequence

import torch

from .modeling_hierarchical_sae import HierarchicalSaeModel


@torch.no_grad()
def explained_variance(
    sae: HierarchicalSaeModel,
    activations: torch.Tensor | Iterable[torch.Tensor],
    budgets: Sequence[int] | None = None,
    batch_size: int = 4096,
) -> dict[int, float]:
    """
    Explained variance with the k strongest latents of each input, for each budget k:

        1 − Σ ‖x − x̂‖² / Σ ‖x − mean‖²

    with both sums, and the mean, over all tokens; an average of per-batch or per-token ratios is another number.

    Args:
        sae ([`HierarchicalSaeModel`]): left in evaluation mode or training mode as it came.
        activations (`torch.Tensor` or iterable of them): (tokens, d_in) each.
        budgets (`Sequence[int]`, *optional*): by default 1, 2, 4, … and the trained k.
        batch_size (`int`, defaults to 4096): tokens at a time.

    Returns:
        `dict[int, float]`: explained variance of each budget.
    """
    k = sae.config.k
    budgets = sorted({*(2**i for i in range(k.bit_length())), k} if budgets is None else set(budgets))
    if isinstance(activations, torch.Tensor):
        activations = [activations]
    was_training = sae.training
    sae.eval()
    device = sae.W_dec.device
    errors = torch.zeros(len(budgets), dtype=torch.float64, device=device)
    total = torch.zeros(sae.config.d_in, dtype=torch.float64, device=device)
    squares, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    for piece in activations:
        for x in piece.to(device).split(batch_size):
            x = x.float()
            # Sums are taken around b_dec: far from the origin, Σx² − n·mean² would lose its digits.
            centered = (x - sae.b_dec / sae.input_scale).double()
            total += centered.sum(dim=0)
            squares += centered.square().sum()
            tokens += len(x)
            top_indices, top_values = sae.encode(x)
            for place, budget in enumerate(budgets):
                reconstruction = sae.decode(top_indices[:, :budget], top_values[:, :budget])
                errors[place] += (x - reconstruction).double().square().sum()
    sae.train(was_training)
    if tokens < 2:
        raise ValueError(f"explained variance needs at least 2 tokens, got {tokens}")
    variance = squares - total.square().sum() / tokens
    return dict(zip(budgets, (1 - errors / variance).tolist()))
