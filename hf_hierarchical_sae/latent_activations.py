"""What each latent of a sparse autoencoder does over a text: where it fires, how strongly, and at which budgets."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .activations import ActivationSettings, ActivationStream
from .configuration_hierarchical_sae import integer, integers, powers_of_two_and
from .language_model import evaluation_mode
from .modeling_hierarchical_sae import HierarchicalSaeModel
from .sites import HOOK_POINTS


@dataclass(kw_only=True)
class LatentActivations:
    """
    Every activation over a text, sorted by latent, on the CPU. Made by [`read_latents`].

    A latent counts at budget k where its rank is at most k, so one encoding serves every budget. Latent i owns the
    entries `latent_starts[i]` up to `latent_starts[i + 1]`, in the order of the text.

    Args:
        k (`int`): largest rank.
        token_ids (`torch.Tensor`): (positions,), every token of the text, one context after the other.
        context_starts (`torch.Tensor`): (contexts + 1,), where each context starts, and the end of the last.
        is_read (`torch.Tensor`): (positions,), false where a token was left out: first positions, attention sinks.
        latent_starts (`torch.Tensor`): (d_sae + 1,).
        positions (`torch.Tensor`): (entries,), places in `token_ids`.
        values (`torch.Tensor`): (entries,), activations, all positive.
        ranks (`torch.Tensor`): (entries,), from 1, the place of the latent among those of its token by strength.
        label_names (`list[str]`, *optional*): keys of the mapping that the texts came in.
        context_labels (`torch.Tensor`, *optional*): (contexts,), places in `label_names`.
        has_budgets (`bool`, defaults to `True`): of an autoencoder without, all latents count at `k`, and nothing else.
    """

    k: int
    token_ids: torch.Tensor
    context_starts: torch.Tensor
    is_read: torch.Tensor
    latent_starts: torch.Tensor
    positions: torch.Tensor
    values: torch.Tensor
    ranks: torch.Tensor
    label_names: list[str] | None = None
    context_labels: torch.Tensor | None = None
    has_budgets: bool = True

    @property
    def tokens(self) -> int:
        """Number of tokens that were read."""
        return int(self.is_read.sum())

    @property
    def live_latents(self) -> torch.Tensor:
        """(live,): latents that fire on any token."""
        return self.latent_starts.diff().nonzero().flatten()

    @property
    def entry_latents(self) -> torch.Tensor:
        """(entries,): the latent of each entry."""
        return torch.repeat_interleave(self.latent_starts.diff())

    @property
    def position_contexts(self) -> torch.Tensor:
        """(positions,): the context of each token."""
        return torch.repeat_interleave(self.context_starts.diff())

    def check_budgets(self, budgets: Iterable[int] | None) -> list[int]:
        """
        Each of `budgets` once, increasing, by default 1, 2, 4, … and `k`, or `k` alone where there is no other; refuses
        one above the largest rank.
        """
        if budgets is None:
            return powers_of_two_and(self.k) if self.has_budgets else [self.k]
        budgets = sorted(set(integers("budgets", budgets)))
        if not self.has_budgets and budgets != [self.k]:
            raise ValueError(
                f"the autoencoder has no other budget than all of its latents, {self.k} at most, got {budgets}"
            )
        if not budgets or not 1 <= budgets[0] <= budgets[-1] <= self.k:
            raise ValueError(f"budgets must be in [1, {self.k}], the largest rank on record, got {budgets}")
        return budgets

    def latent(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Positions, values and ranks of one latent's activations, in the order of the text; refuses an unknown latent."""
        count = len(self.latent_starts) - 1
        if not 0 <= integer("latent", index) < count:
            raise ValueError(f"latent must be in [0, d_sae={count}), got {index}")
        entries = slice(*self.latent_starts[index : index + 2].tolist())
        return self.positions[entries], self.values[entries], self.ranks[entries]

    def rank_counts(self) -> torch.Tensor:
        """(d_sae, k): on how many tokens each latent has each rank. Summed up to k: the tokens it is used on at k."""
        cells = self.entry_latents * self.k + self.ranks.long() - 1
        return torch.bincount(cells, minlength=(len(self.latent_starts) - 1) * self.k).view(-1, self.k)


@torch.no_grad()
def read_latents(
    sae: HierarchicalSaeModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str | dict] | Mapping[str, Iterable[str | dict]],
    *,
    layer: int | None = None,
    hook_point: str | None = None,
    context_length: int = 128,
    max_tokens: int | None = None,
    show_progress: bool = True,
    **settings: Any,
) -> LatentActivations:
    """
    Run a text through the language model and the autoencoder and keep every activation, 10 bytes each: `sae.config.k`
    per token. Sorting them takes three times as much for a moment.

    Args:
        sae ([`HierarchicalSaeModel`]): left in the mode it came in.
        model (`PreTrainedModel`): the language model that it was trained on.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        texts (`Iterable`): texts, or rows, as in [`iterate_activations`]; or a mapping whose keys label its texts.
        layer (`int`, *optional*): decoder layer, counted from 0; by default the one in the autoencoder's config.
        hook_point (`str`, *optional*): where in the layer, as in [`iterate_activations`]; by default the one in the
            autoencoder's config, or else its output.
        context_length (`int`, defaults to 128): longest piece of text in tokens; longer texts are cut into several.
        max_tokens (`int`, *optional*): stop once exactly this many tokens were read; of each label.
        show_progress (`bool`, defaults to `True`): progress bar.
        settings (*optional*): others of [`ActivationSettings`], such as `text_column` and `skip_special_tokens`.

    Returns:
        [`LatentActivations`]

    Raises:
        `ValueError`: If the language model, layer, site or tokenizer does not fit, texts have no token, or there is no latent
            that fires.
    """
    layer = sae.config.layer if layer is None else layer
    hook_point = hook_point or sae.config.hook_point or "output"
    if layer is None and hook_point in HOOK_POINTS:
        raise ValueError("the autoencoder's config names no layer: say which decoder layer it was trained on")
    labelled = texts if isinstance(texts, Mapping) else {"": texts}
    ids, lengths, is_read, labels, entries = [], [], [], [], []
    k, end = (sae.config.k if sae.config.has_budgets else 1), 0
    total = None if max_tokens is None else max_tokens * len(labelled)
    progress = logging.tqdm(total=total, unit="token", unit_scale=True, desc="read", disable=not show_progress)
    settings |= {"context_length": context_length, "max_tokens": max_tokens, "show_progress": False}
    reading = ActivationSettings(**settings)
    with progress, evaluation_mode(sae):
        for label, rows in enumerate(labelled.values()):
            stream = ActivationStream(model, tokenizer, rows, layer, hook_point=hook_point, settings=reading)
            stream.check_reads(sae)
            for read in stream.passes():
                indices, values = sae.encode(read.states[0][read.kept].to(sae.W_dec.device))
                mask = read.mask.bool()
                flags = read.kept.cpu()[mask]
                entries.append(_entries(indices.cpu(), values.cpu(), end + flags.nonzero().flatten()))
                ids.append(read.ids[mask])
                is_read.append(flags)
                lengths.append(mask.sum(dim=1))
                labels.append(torch.full((len(mask),), label))
                k, end = max(k, indices.shape[1]), end + len(flags)
                progress.update(int(flags.sum()))
    if not ids or not (flags := torch.cat(is_read)).any():
        raise ValueError("the texts gave no tokens: expected texts longer than one token")
    latents, positions, values, ranks = (torch.cat(parts) for parts in zip(*entries))
    if not len(latents):
        raise ValueError(
            f"no latent fires on the {int(flags.sum())} tokens: expected a trained autoencoder and activations of its "
            "layer; check the language model, the layer and the weights"
        )
    order = latents.argsort(stable=True)
    counts = torch.bincount(latents, minlength=sae.config.d_sae)
    return LatentActivations(
        k=k,
        token_ids=torch.cat(ids),
        context_starts=torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(lengths).cumsum(0)]),
        is_read=flags,
        latent_starts=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        positions=positions[order],
        values=values[order],
        ranks=ranks[order],
        label_names=[str(name) for name in labelled] if isinstance(texts, Mapping) else None,
        context_labels=torch.cat(labels) if isinstance(texts, Mapping) else None,
        has_budgets=sae.config.has_budgets,
    )


def decoded(tokenizer: PreTrainedTokenizerBase, *ids: int) -> str:
    """Text of tokens inside a text: some tokenizers drop the space before the first word."""
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    prefix, text = str(tokenizer.decode(before)), str(tokenizer.decode([*before, *ids]))
    return text[len(prefix) :] if text.startswith(prefix) else str(tokenizer.decode(list(ids)))


def _entries(indices: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Latent, position, value and rank of each positive activation of (tokens, k) `indices` and `values`."""
    fires = values > 0
    dtype = torch.int16 if indices.shape[1] < 2**15 else torch.int32
    ranks = torch.arange(1, indices.shape[1] + 1, dtype=dtype).expand_as(indices)
    positions = positions.to(torch.int32).unsqueeze(1).expand_as(indices)
    return indices[fires].to(torch.int32), positions[fires], values[fires].float(), ranks[fires]
