"""How far single latents go with labels of the text, at each budget and beside permuted labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.utils import logging

from .configuration_hierarchical_sae import integer
from .latent_activations import LatentActivations


MEASURES = ("purity", "information", "auroc")
# Contexts of about one length that exchange the labels of their tokens.
NEIGHBOURS = 10


@dataclass(kw_only=True)
class LabelScores:
    """
    What [`score_labels`] found. Tensors of latents hold NaN where a latent fires on fewer than `min_fires` labelled
    tokens at that budget. Printing it gives a table of means over the other latents.

    Args:
        budgets (`list[int]`): numbers of latents per token.
        label_names (`list[str]`): the labels.
        tokens (`int`): labelled tokens.
        best_label (`torch.Tensor`): (budgets, d_sae), the label of most of the tokens that a latent fires on.
        purity (`torch.Tensor`): (budgets, d_sae), the share of these tokens that carry it.
        information (`torch.Tensor`): (budgets, d_sae), I(fires; label) / H(fires), the share of the entropy of firing
            that the label explains.
        auroc (`torch.Tensor`): (budgets, d_sae), largest area under the ROC curve of the activation, 0 where it does
            not fire, for any label against all others.
        purity_by_chance, information_by_chance, auroc_by_chance (`torch.Tensor`): (budgets, d_sae), means of the same
            over permuted labels. All three numbers are above their ideal of chance for latents that fire rarely.
        above_chance (`torch.Tensor`): (budgets, d_sae), whether information is above that of every permutation, which
            happens by chance once in `permutations + 1` times.
        probe_auroc (`torch.Tensor`): (budgets, labels), of the single latent that tells a label best from the others:
            chosen on the contexts of even number, measured on the others (sparse probing, arXiv 2305.01610, with k = 1).
            NaN for a label that either half lacks, or has on all of its tokens.
        permutations (`int`): how many.
    """

    budgets: list[int]
    label_names: list[str]
    tokens: int
    best_label: torch.Tensor
    purity: torch.Tensor
    information: torch.Tensor
    auroc: torch.Tensor
    purity_by_chance: torch.Tensor
    information_by_chance: torch.Tensor
    auroc_by_chance: torch.Tensor
    above_chance: torch.Tensor
    probe_auroc: torch.Tensor
    permutations: int

    def to_dict(self) -> dict:
        """Means over the latents that were scored, one number per budget, ready for JSON."""
        scored = ~self.purity.isnan()
        means = {
            name: getattr(self, name).nanmean(dim=1).tolist()
            for measure in MEASURES
            for name in (measure, f"{measure}_by_chance")
        }
        return {
            "budgets": self.budgets,
            "labels": len(self.label_names),
            "tokens": self.tokens,
            "scored_latents": scored.sum(dim=1).tolist(),
            **means,
            "above_chance": [float(row[keep].float().mean()) for row, keep in zip(self.above_chance, scored)],
            "probe_auroc": self.probe_auroc.nanmean(dim=1).tolist(),
        }

    def __str__(self) -> str:
        found = self.to_dict()
        titles = {
            "scored_latents": "latents",
            "purity": "purity",
            "purity_by_chance": "(chance)",
            "information": "inform.",
            "information_by_chance": "(chance)",
            "auroc": "AUROC",
            "auroc_by_chance": "(chance)",
            "above_chance": "above",
            "probe_auroc": "probe",
        }
        lines = [f"{'budget':>6}" + "".join(f" {title:>9}" for title in titles.values())]
        for place, budget in enumerate(self.budgets):
            lines.append(f"{budget:>6}" + "".join(f" {found[name][place]:>9.4g}" for name in titles))
        return "\n".join([*lines, f"{self.tokens} tokens, {len(self.label_names)} labels"])


def score_labels(
    activations: LatentActivations,
    labels: torch.Tensor | None = None,
    label_names: Sequence[str] | None = None,
    budgets: Sequence[int] | None = None,
    *,
    min_fires: int = 20,
    permutations: int = 20,
    seed: int = 0,
    show_progress: bool = True,
) -> LabelScores:
    """
    How far each latent goes with one label of the text, at each budget, with the same for permuted labels.

    Labels of contexts are permuted among contexts: in a random order of these, each label gets as many tokens as it
    had, so that only contexts where one label ends and the next begins are divided. Labels of tokens are exchanged among
    contexts of about one length, which keeps the runs that they come in, and that a context is full of some of them; in a
    single context they are shifted along it by a random distance.

    Args:
        activations ([`LatentActivations`]): from [`read_latents`].
        labels (`torch.Tensor`, *optional*): (positions,) or (contexts,), places in `label_names`, -1 where there is
            none; by default those of the mapping that the texts came in.
        label_names (`Sequence[str]`, *optional*): needed if `labels` is given.
        budgets (`Sequence[int]`, *optional*): by default 1, 2, 4, … and the largest.
        min_fires (`int`, defaults to 20): leave out latents that fire on fewer labelled tokens.
        permutations (`int`, defaults to 20): number of permutations, at least 1.
        seed (`int`, defaults to 0): of the permutations.
        show_progress (`bool`, defaults to `True`): progress bar.

    Returns:
        [`LabelScores`]

    Raises:
        `ValueError`: If there are no labels or fewer than two in use, they have another length, or budgets are out of
            range.
    """
    names, labels = _check_labels(activations, labels, label_names)
    budgets = activations.check_budgets(budgets)
    permutations, min_fires = integer("permutations", permutations, 1), integer("min_fires", min_fires)
    is_by_context = len(labels) == len(activations.context_starts) - 1
    contexts = activations.position_contexts
    per_token = labels[contexts] if is_by_context else labels
    used = (activations.is_read & (per_token >= 0)).nonzero().flatten()
    per_token, contexts = per_token[used], contexts[used]
    if len(per_token.unique()) < 2:
        raise ValueError(f"expected tokens of at least 2 labels, got {len(per_token.unique())} on {len(used)} tokens")
    generator = torch.Generator().manual_seed(integer("seed", seed))
    permute = _permuted if is_by_context else _dealt_by_context
    shuffled = [permute(per_token, contexts, generator) for _ in range(permutations)]

    found = []
    total = len(budgets) * (1 + permutations)
    with logging.tqdm(total=total, desc="score", unit="labelling", disable=not show_progress) as progress:
        for budget in budgets:
            firing = _Firing(activations, budget, used)
            too_few = firing.fires < min_fires
            counts = []
            for labelling in (per_token, *shuffled):
                counts.append(firing.scores(labelling, len(names)))
                progress.update()
            own, *others = counts
            by_chance = {name: torch.stack([other[name] for other in others]) for name in MEASURES}
            at_budget = {
                **own,
                **{f"{name}_by_chance": values.mean(dim=0) for name, values in by_chance.items()},
            }
            at_budget = {name: values.masked_fill(too_few, torch.nan) for name, values in at_budget.items()}
            at_budget["best_label"] = firing.best_label(per_token, len(names))
            at_budget["above_chance"] = (own["information"] > by_chance["information"].amax(dim=0)) & ~too_few
            halves = [contexts % 2 == half for half in (0, 1)]
            choosing, measuring = (
                _Firing(activations, budget, used[half]).auroc(per_token[half], len(names)) for half in halves
            )
            chosen = choosing.nan_to_num(-1).argmax(dim=0)
            # Nothing is chosen for a label that half of the contexts lack, or have alone.
            was_chosen = ~choosing.isnan().all(dim=0)
            at_budget["probe_auroc"] = measuring.gather(0, chosen.unsqueeze(0))[0].where(was_chosen, torch.nan)
            found.append(at_budget)
    return LabelScores(
        budgets=budgets,
        label_names=names,
        tokens=len(used),
        permutations=permutations,
        **{name: torch.stack([at_budget[name] for at_budget in found]) for name in found[0]},
    )


class _Firing:
    """Where latents fire at a budget on the tokens `used`, (n,) positions, sorted by latent and activation."""

    def __init__(self, activations: LatentActivations, budget: int, used: torch.Tensor):
        self.tokens, self.d_sae = len(used), len(activations.latent_starts) - 1
        place = torch.full((len(activations.token_ids),), -1)
        place[used] = torch.arange(len(used))
        places = place[activations.positions.long()]
        kept = (activations.ranks <= budget) & (places >= 0)
        values, latents, places = activations.values[kept], activations.entry_latents[kept], places[kept]
        order = values.argsort(stable=True)
        order = order[latents[order].argsort(stable=True)]
        values, self.latents, self.places = values[order], latents[order], places[order]
        self.fires = torch.bincount(latents, minlength=self.d_sae)
        # Equal activations share the mean of their ranks; tokens without one come before all of them.
        is_new = torch.ones(len(values), dtype=torch.bool)
        is_new[1:] = (values[1:] != values[:-1]) | (self.latents[1:] != self.latents[:-1])
        group = is_new.cumsum(0) - 1
        firsts, sizes = is_new.nonzero().flatten(), torch.bincount(group)
        start = (self.fires.cumsum(0) - self.fires)[self.latents]
        self.silent = (self.tokens - self.fires).double()
        self.ranks = self.silent[self.latents] + (firsts + (sizes - 1) / 2)[group].double() - start + 1

    def counts(self, labels: torch.Tensor, number: int, weights: torch.Tensor | None = None) -> torch.Tensor:
        """(d_sae, labels): tokens of each label that a latent fires on, or the sums of their weights."""
        cells = self.latents * number + labels[self.places]
        return torch.bincount(cells, weights, minlength=self.d_sae * number).view(-1, number).double()

    def best_label(self, labels: torch.Tensor, number: int) -> torch.Tensor:
        return self.counts(labels, number).argmax(dim=1)

    def auroc(self, labels: torch.Tensor, number: int) -> torch.Tensor:
        """(d_sae, labels): of the activation, for a label against all others; NaN for a label without tokens."""
        counts, of_label = self.counts(labels, number), torch.bincount(labels, minlength=number).double()
        ranks = self.counts(labels, number, self.ranks) + (of_label - counts) * (self.silent.unsqueeze(1) + 1) / 2
        return (ranks - of_label * (of_label + 1) / 2) / (of_label * (self.tokens - of_label))

    def scores(self, labels: torch.Tensor, number: int) -> dict[str, torch.Tensor]:
        counts, of_label = self.counts(labels, number), torch.bincount(labels, minlength=number).double()
        fires = self.fires.double()
        cells = torch.stack([counts, of_label - counts]) / self.tokens
        expected = torch.stack([fires, self.silent]).unsqueeze(2) * of_label / self.tokens**2
        information = torch.where(cells > 0, cells * (cells / expected).log(), 0).sum(dim=(0, 2))
        shares = torch.stack([fires, self.silent]) / self.tokens
        return {
            "purity": counts.amax(dim=1) / fires,
            "information": information / torch.special.entr(shares).sum(dim=0),
            "auroc": self.auroc(labels, number).nan_to_num(0).amax(dim=1),
        }


def _permuted(per_token: torch.Tensor, contexts: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Labels of tokens in `contexts`, (n,) each, dealt anew in a random order of the contexts: as often as before."""
    present, inverse = contexts.unique(return_inverse=True)
    places = torch.randperm(len(present), generator=generator)[inverse]
    dealt = torch.empty_like(per_token)
    dealt[places.argsort(stable=True)] = per_token.sort().values
    return dealt


def _dealt_by_context(per_token: torch.Tensor, contexts: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """
    Labels of tokens in `contexts`, (n,) each, where each context has those of another of about its length: they lie end to
    end, in groups of neighbours in length, so that where lengths differ a few go over a context's border.
    """
    present, inverse, lengths = contexts.unique(return_inverse=True, return_counts=True)
    if len(present) == 1:
        return per_token.roll(int(torch.randint(1, len(per_token), (), generator=generator)))
    by_length, source = lengths.argsort(stable=True), torch.empty_like(present)
    for group in by_length.tensor_split(max(1, len(present) // NEIGHBOURS)):
        circle = group[torch.randperm(len(group), generator=generator)]
        source[circle] = circle.roll(1)
    place, dealt = torch.arange(len(present)), torch.empty_like(per_token)
    taken, given = torch.empty_like(present), torch.empty_like(present)
    taken[by_length], given[source[by_length]] = place, place
    dealt[taken[inverse].argsort(stable=True)] = per_token[given[inverse].argsort(stable=True)]
    return dealt


def _check_labels(
    activations: LatentActivations, labels: torch.Tensor | None, label_names: Sequence[str] | None
) -> tuple[list[str], torch.Tensor]:
    if labels is None:
        labels, label_names = activations.context_labels, activations.label_names
    if labels is None or label_names is None:
        raise ValueError(
            "no labels: give `labels` and `label_names`, or texts as a mapping from label to texts to read_latents"
        )
    labels = torch.as_tensor(labels)
    contexts, positions = len(activations.context_starts) - 1, len(activations.token_ids)
    if labels.shape not in ((contexts,), (positions,)):
        raise ValueError(
            f"labels must have one entry per token ({positions}) or per context ({contexts}), got {tuple(labels.shape)}"
        )
    if not torch.equal(labels, labels.long().to(labels.dtype)):
        raise ValueError(f"labels must be whole numbers, places in label_names, got {labels.dtype} with others")
    if len(labels) and not -1 <= int(labels.min()) <= int(labels.max()) < len(label_names):
        raise ValueError(
            f"labels must be in [-1, {len(label_names)}), places in label_names, "
            f"got {int(labels.min())}…{int(labels.max())}"
        )
    return list(label_names), labels.long().cpu()
