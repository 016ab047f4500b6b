"""Quality of a sparse autoencoder at every sparsity budget, alone and inside its language model."""

import math
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import EvalResult

from .activation_shards import ActivationShards, pieces_of
from .activations import ActivationStream, Pass
from .configuration_hierarchical_sae import integer
from .language_model import (
    check_predicts,
    decoder_layers,
    evaluation_mode,
    forward_hook,
    next_token_logits,
    resumed,
    resumes,
)
from .modeling_hierarchical_sae import HierarchicalSaeModel, check_finite
from .sites import read_sites, site_hook
from .sparse_latents import weighted_rows
from .whole_files import check_writable, whole_file


Edit = Callable[[torch.Tensor], torch.Tensor]
# A latent that fires on more than this share of all tokens counts as dense.
DENSE = 0.1
TABLE = {
    "explained_variance": "expl. var.",
    "fvu": "FVU",
    "l2_ratio": "L2 ratio",
    "cosine": "cosine",
    "latents_per_token": "latents",
    "dead_fraction": "dead",
    "dense_fraction": "dense",
    "cross_entropy": "CE",
    "loss_recovered": "recovered",
    "kl_divergence": "KL",
}

METRICS = {
    "explained_variance": "explained variance",
    "latents_per_token": "latents per token",
    "loss_recovered": "loss recovered",
    "kl_divergence": "KL divergence, nats",
}


@dataclass(kw_only=True)
class HierarchicalSaeEvaluation:
    """
    What [`evaluate_budgets`] or [`evaluate_in_model`] found. Lists hold one number per budget; printing it gives a
    table.

    Args:
        budgets (`list[int]`): numbers of latents per token.
        tokens (`int`): tokens evaluated.
        explained_variance (`list[float]`): 1 − Σ‖x − x̂‖² / Σ‖x − mean‖², both sums and the mean over all tokens.
        fvu (`list[float]`): fraction of variance unexplained, 1 − explained variance.
        l2_ratio (`list[float]`): mean of ‖x̂‖ / ‖x‖.
        cosine (`list[float]`): mean cosine of x and x̂.
        latents_per_token (`list[float]`): mean number of latents that fire; below the budget where fewer are positive.
        dead_fraction (`list[float]`): share of latents that fire on none of the tokens.
        dense_fraction (`list[float]`): share of latents that fire on more than a tenth of the tokens.
        density (`torch.Tensor`): (budgets, d_sae), share of tokens that each latent fires on.
        cross_entropy (`list[float]`, *optional*): of the language model on the next token, in nats, with the
            reconstruction in place of the hidden states, over the positions that are replaced.
        loss_recovered (`list[float]`, *optional*): (zeros − spliced) / (zeros − clean), the share of the
            cross-entropy between zeros in place of the hidden states and themselves that the reconstruction keeps.
        kl_divergence (`list[float]`, *optional*): KL(clean ‖ spliced) of the next token, in nats.
        clean_cross_entropy (`float`, *optional*): with nothing replaced.
        zeros_cross_entropy (`float`, *optional*): with zeros in place of the hidden states.
    """

    budgets: list[int]
    tokens: int
    explained_variance: list[float]
    fvu: list[float]
    l2_ratio: list[float]
    cosine: list[float]
    latents_per_token: list[float]
    dead_fraction: list[float]
    dense_fraction: list[float]
    density: torch.Tensor
    cross_entropy: list[float] | None = None
    loss_recovered: list[float] | None = None
    kl_divergence: list[float] | None = None
    clean_cross_entropy: float | None = None
    zeros_cross_entropy: float | None = None

    def to_dict(self) -> dict:
        """Everything but the density of each latent, ready for JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "density"}

    def metrics(self, dataset_name: str, split: str | None = None) -> list[EvalResult]:
        """
        The numbers of each budget as a model card's metadata has them: explained variance, latents per token and, if it
        was measured, what the language model keeps. Those that are no number are left out.

        Args:
            dataset_name (`str`): of the text; the id of a dataset on the Hub, if it is one.
            split (`str`, *optional*): of the dataset.
        """
        return [
            EvalResult(
                task_type="feature-extraction",
                dataset_type=re.sub(r"[^\w./-]+", "-", dataset_name),
                dataset_name=dataset_name,
                dataset_split=split,
                metric_type=name,
                metric_name=f"{title}, k = {budget}",
                metric_value=float(f"{value:.4g}"),
            )
            for name, title in METRICS.items()
            for budget, value in zip(self.budgets, getattr(self, name) or [])
            if math.isfinite(value)
        ]

    def __str__(self) -> str:
        columns = {name: title for name, title in TABLE.items() if getattr(self, name) is not None}
        lines = [f"{'budget':>6}" + "".join(f" {title:>10}" for title in columns.values())]
        for place, budget in enumerate(self.budgets):
            lines.append(f"{budget:>6}" + "".join(f" {getattr(self, name)[place]:>10.4g}" for name in columns))
        summary = f"{self.tokens} tokens, {self.density.shape[1]} latents"
        if self.clean_cross_entropy is not None:
            summary += f"; CE {self.clean_cross_entropy:.4g} clean, {self.zeros_cross_entropy:.4g} with zeros"
        return "\n".join([*lines, summary])


@torch.no_grad()
def evaluate_budgets(
    sae: HierarchicalSaeModel,
    activations: torch.Tensor | Iterable[torch.Tensor] | ActivationShards,
    budgets: Sequence[int] | None = None,
    batch_size: int = 4096,
) -> HierarchicalSaeEvaluation:
    """
    Quality with the k strongest latents of each input, for each budget k, from one encoding.

    Args:
        sae ([`HierarchicalSaeModel`]): left in evaluation mode or training mode as it came.
        activations (`torch.Tensor` or iterable of them): (..., d_in) each, finite, such as an [`ActivationStream`]; or
            [`ActivationShards`].
        budgets (`Sequence[int]`, *optional*): by default 1, 2, 4, … and the trained k; for an SAE that has no other, such
            as a batch_topk SAE, `sae.config.k`.
        batch_size (`int`, defaults to 4096): tokens at a time.

    Returns:
        [`HierarchicalSaeEvaluation`]

    Raises:
        `ValueError`: If budgets are out of range, there are fewer than 2 tokens, activations are integers, NaN or
            infinite, or a stream or harvest is of a language model, layer or site that the autoencoder was not trained on.
    """
    batch_size = integer("batch_size", batch_size, 1)
    pieces, sums = pieces_of(activations, sae), _BudgetSums(sae, sae.config.check_budgets(budgets))
    with evaluation_mode(sae):
        sae.normalize_decoder()
        for piece in pieces:
            for x, targets in zip(*(part.split(batch_size) for part in piece)):
                for _ in sums.reconstructions(x.to(sae.W_dec.device), targets.to(sae.W_dec.device)):
                    pass
    return sums.result()


@torch.no_grad()
def evaluate_in_model(
    sae: HierarchicalSaeModel, stream: ActivationStream, budgets: Sequence[int] | None = None
) -> HierarchicalSaeEvaluation:
    """
    [`evaluate_budgets`], and the cross-entropy and KL divergence of the language model with the reconstruction in place
    of the hidden states at its site. Positions that the stream leaves out keep the model's own values there. A pass per
    budget and two more run: after a layer's output from there on, at other sites, and in models whose later layers use
    more than that output, as a whole.

    Args:
        sae ([`HierarchicalSaeModel`]): left in evaluation mode or training mode as it came.
        stream ([`ActivationStream`]): from [`iterate_activations`]; read from the start of its text.
        budgets (`Sequence[int]`, *optional*): as in [`evaluate_budgets`].

    Returns:
        [`HierarchicalSaeEvaluation`]

    Raises:
        `ValueError`: If budgets are out of range, no text has 3 tokens, activations are NaN or infinite, the language model
            has no unembedding, or the autoencoder was not trained on this language model, layer or site.
    """
    if not isinstance(stream, ActivationStream):
        raise ValueError(
            f"expected a stream from iterate_activations, got a {type(stream).__name__}: evaluate_budgets takes activations"
        )
    stream.check_reads(sae, with_targets=True)
    check_predicts(stream.model)
    sums = _BudgetSums(sae, sae.config.check_budgets(budgets))
    with evaluation_mode(sae):
        sae.normalize_decoder()
        in_model = _language_model_sums(sae, stream, sums)
    return sums.result(in_model)


def explained_variance(
    sae: HierarchicalSaeModel,
    activations: torch.Tensor | Iterable[torch.Tensor] | ActivationShards,
    budgets: Sequence[int] | None = None,
    batch_size: int = 4096,
) -> dict[int, float]:
    """Explained variance of each budget, the first column of [`evaluate_budgets`], which takes the same arguments."""
    evaluation = evaluate_budgets(sae, activations, budgets, batch_size)
    return dict(zip(evaluation.budgets, evaluation.explained_variance))


def plot_evaluations(evaluations: Mapping[str, HierarchicalSaeEvaluation], path: str | Path) -> None:
    """
    Draw explained variance against budget, or against the mean number of latents where there is none, and the histogram
    of latent densities at the largest budget, and save it.

    Args:
        evaluations (`Mapping[str, HierarchicalSaeEvaluation]`): one per autoencoder, by name.
        path (`str` or `Path`): picture to write, of any format that matplotlib (the extra `plot`) knows.

    Raises:
        `ImportError`: If matplotlib is not installed.
        `ValueError`: If matplotlib does not know the format.
        `OSError`: If the folder cannot be written to.
    """
    path = check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    quality, density = figure.subplots(1, 2)
    ticks = sorted({latents for evaluation in evaluations.values() for latents in _latents(evaluation)})
    for name, evaluation in evaluations.items():
        quality.plot(_latents(evaluation), evaluation.explained_variance, "o-", label=name, markersize=4)
        fired = evaluation.density[-1][evaluation.density[-1] > 0].log10().cpu()
        if len(fired):
            density.hist(fired.numpy(), bins=40, histtype="step", label=name)
    quality.set(xlabel="latents per token", ylabel="explained variance")
    quality.set_xscale("log", base=2)
    quality.set_xticks(ticks, [str(tick) for tick in ticks])
    density.set(xlabel="log10 of the share of tokens that a latent fires on", ylabel="latents")
    for axes in (quality, density):
        axes.grid(alpha=0.3)
    quality.legend(fontsize="small")
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=150)


def check_plot(path: str | Path) -> Path:
    """The picture that [`plot_evaluations`] writes for this path; what that would raise is raised here."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need one more package: pip install 'hf_hierarchical_sae[plot]'") from error
    path = Path(path)
    # The suffix is what says the format.
    path = path if path.suffix else path.with_suffix(".png")
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ValueError(f"expected a picture of type {', '.join(sorted(known))}, got {path}")
    check_writable(path)
    return path


def _latents(evaluation: HierarchicalSaeEvaluation) -> list[int] | list[float]:
    """The budgets, or the mean number of latents of a dictionary that keeps any number of them."""
    if evaluation.budgets == [evaluation.density.shape[1]]:
        return [round(latents, 1) for latents in evaluation.latents_per_token]
    return evaluation.budgets


class _BudgetSums:
    """Running sums over tokens, on the autoencoder's device, that every number of the evaluation comes from."""

    def __init__(self, sae: HierarchicalSaeModel, budgets: list[int]):
        self.sae, self.budgets = sae, budgets
        zeros = partial(torch.zeros, dtype=torch.float64, device=sae.W_dec.device)
        self.errors, self.ratios, self.cosines = (zeros(len(budgets)) for _ in range(3))
        self.total, self.squares = zeros(len(sae.b_dec)), zeros(())
        self.fired = zeros(len(budgets), sae.config.d_sae)
        self.tokens = 0

    def reconstructions(self, x: torch.Tensor, targets: torch.Tensor) -> Iterator[torch.Tensor]:
        """
        Yield what is computed from x, (tokens, d_in), at each budget, each from the one before, and add up how it differs
        from `targets`, (tokens, d_out), which are x itself for an autoencoder.
        """
        for given in (x,) if targets is x else (x, targets):
            check_finite(given)
        x, targets = x.float(), targets.float()
        top_indices, top_values = self.sae.encode(x, self.budgets[-1])
        # In float32, Σx² − n·mean² would lose its digits far from the origin.
        precise = targets.double()
        self.total += precise.sum(dim=0)
        self.squares += precise.square().sum()
        self.tokens += len(x)
        norms = torch.linalg.vector_norm(targets, dim=1).clamp(min=1e-12)
        # The unused places of a batch_topk SAE hold zeros, so its one budget takes all places.
        ends = self.budgets if self.sae.config.has_budgets else [top_indices.shape[1]]
        start = 0
        # With no latent yet: the bias, and what a skip connection gives.
        reconstruction = self.sae.decode(top_indices[:, :1], torch.zeros_like(top_values[:, :1]), x)
        counts = torch.zeros_like(self.fired[0])
        for place, end in enumerate(ends):
            indices, values = top_indices[:, start:end], top_values[:, start:end]
            counts.index_add_(0, indices.flatten(), (values > 0).flatten().double())
            reconstruction = reconstruction + weighted_rows(indices, values, self.sae.W_dec)
            lengths = torch.linalg.vector_norm(reconstruction, dim=1)
            self.errors[place] += torch.linalg.vector_norm(targets - reconstruction, dim=1).double().square().sum()
            self.ratios[place] += (lengths / norms).double().sum()
            products = torch.linalg.vecdot(targets, reconstruction) / norms / lengths.clamp(min=1e-12)
            self.cosines[place] += products.double().sum()
            self.fired[place] += counts
            yield reconstruction
            start = end

    def result(self, language_model: dict | None = None) -> HierarchicalSaeEvaluation:
        tokens = self.tokens
        if tokens < 2:
            raise ValueError(f"the evaluation needs at least 2 tokens, got {tokens}")
        variance = self.squares - self.total.square().sum() / tokens
        if variance <= 0:
            raise ValueError(f"the evaluation needs activations that vary, got {tokens} equal ones")
        fvu = self.errors / variance
        density = self.fired / tokens
        return HierarchicalSaeEvaluation(
            budgets=self.budgets,
            tokens=tokens,
            explained_variance=(1 - fvu).tolist(),
            fvu=fvu.tolist(),
            l2_ratio=(self.ratios / tokens).tolist(),
            cosine=(self.cosines / tokens).tolist(),
            latents_per_token=density.sum(dim=1).tolist(),
            dead_fraction=(density == 0).double().mean(dim=1).tolist(),
            dense_fraction=(density > DENSE).double().mean(dim=1).tolist(),
            density=density.float().cpu(),
            **(language_model or {}),
        )


def _language_model_sums(sae: HierarchicalSaeModel, stream: ActivationStream, sums: _BudgetSums) -> dict:
    """Cross-entropy and KL at each budget, over the positions that are replaced and have a next token."""
    clean, zeros, predicted = 0.0, 0.0, 0
    spliced, divergence = (torch.zeros(len(sums.budgets), dtype=torch.float64) for _ in range(2))
    with closing(_passes_with_logits(stream)) as passes:
        for read, logits in passes:
            kept, expected = [states[read.kept] for states in read.states], logits(torch.clone)
            scored = read.kept.cpu() & F.pad(read.mask[:, 1:], (0, 1)).bool()
            rows, targets = scored.flatten().nonzero().squeeze(1), read.ids.roll(-1, dims=1)[scored]
            losses = partial(_cross_entropy_and_divergence, expected=expected, rows=rows, targets=targets)
            replaced = partial(_replaced, read.kept)
            clean += losses(expected)[0]
            zeros += losses(logits(partial(replaced, torch.zeros_like(kept[-1]))))[0]
            pair = [states.to(sae.W_dec.device) for states in (kept[0], kept[-1])]
            for place, reconstruction in enumerate(sums.reconstructions(*pair)):
                loss, kl = losses(logits(partial(replaced, reconstruction)))
                spliced[place] += loss
                divergence[place] += kl
            predicted += len(targets)
    if predicted == 0:
        raise ValueError("the language model's loss needs texts of at least 3 tokens, got none")
    if not math.isfinite(clean):
        raise ValueError(
            f"expected a language model of finite loss, got {clean}: its activations are NaN or infinite in some contexts"
        )
    return {
        "cross_entropy": (spliced / predicted).tolist(),
        "loss_recovered": ((zeros - spliced) / (zeros - clean)).tolist(),
        "kl_divergence": (divergence / predicted).tolist(),
        "clean_cross_entropy": clean / predicted,
        "zeros_cross_entropy": zeros / predicted,
    }


def _passes_with_logits(
    stream: ActivationStream,
) -> Generator[tuple[Pass, Callable[[Edit], torch.Tensor]], None, None]:
    """Each pass, and what gives its logits, (contexts, positions, vocabulary), with the hidden states edited."""
    model, site, outputs = stream.model, stream.sites[-1], {}
    # The last layer that is done before the site.
    done = -1 if site.layer is None else site.layer - (site.hook_point != "output")
    layer = decoder_layers(model)[done] if done >= 0 else None
    is_resumed = None if layer is not None else False
    with forward_hook(layer, lambda module, args, output: outputs.update(last=output)) if layer else nullcontext():
        for read in stream.passes():
            used = read.kept.any(dim=1)
            if not used.any():
                continue
            if not used.all():
                # Contexts beyond `max_tokens` would go through all passes of the others.
                read = _contexts_of(read, used)
                read_sites(model, stream.sites, read.ids, read.mask)
            output = outputs.get("last")
            if is_resumed is None:
                is_resumed = resumes(model, done, read.ids[:1], read.mask[:1])
            yield read, partial(_logits, stream, read, (done, output) if is_resumed else None)


def _contexts_of(read: Pass, used: torch.Tensor) -> Pass:
    """Some of the contexts of a pass, (contexts,)."""
    ids, mask, kept, *states = (part[used.to(part.device)] for part in (read.ids, read.mask, read.kept, *read.states))
    return Pass(ids, mask, states, kept)


def _logits(stream: ActivationStream, read: Pass, resume: tuple[int, Any] | None, edit: Edit) -> torch.Tensor:
    """Logits with `edit(hidden states)` at the last site; from a layer on, if what it returned is given with its number."""
    model, site = stream.model, stream.sites[-1]
    if resume is None:
        with site_hook(site, edit):
            return next_token_logits(model, read.ids, read.mask)
    done, output = resume
    if done == site.layer:
        return next_token_logits(resumed(model, done, output, edit), read.ids, read.mask)
    with site_hook(site, edit):
        return next_token_logits(resumed(model, done, output, torch.clone), read.ids, read.mask)


def _replaced(keep: torch.Tensor, replacement: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The output with `replacement`, (tokens, hidden_size), at the positions to keep."""
    output = output.clone()
    # Some models take the MLP's hidden states without a dimension of contexts.
    output[keep if output.ndim > keep.ndim else keep.flatten()] = replacement.to(output)
    return output


def _cross_entropy_and_divergence(
    logits: torch.Tensor, *, expected: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor
) -> tuple[float, float]:
    """Sums over rows of (…, vocabulary) logits, few at a time: a float32 copy of all would double the memory."""
    loss = divergence = 0.0
    # On a CPU as many as its caches hold.
    size = 16 if logits.device.type == "cpu" else 256
    logits, expected = logits.flatten(0, -2), expected.flatten(0, -2)
    for part, ids in zip(rows.to(logits.device).split(size), targets.to(logits.device).split(size)):
        log_probabilities, clean = (each[part].float().log_softmax(dim=1) for each in (logits, expected))
        loss += F.nll_loss(log_probabilities, ids, reduction="sum").item()
        divergence += F.kl_div(log_probabilities, clean, reduction="sum", log_target=True).item()
    return loss, divergence
