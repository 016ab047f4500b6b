"""A language model's hidden states over a text: one loop, which everything that reads a text goes through."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .language_model import check_fits, hidden_size, layer_indices, layer_outputs
from .modeling_hierarchical_sae import HierarchicalSaeModel, check_finite


logger = logging.get_logger(__name__)

# Contexts whose lengths differ by less than this share a forward pass.
LENGTH_BUCKET = 32


@dataclass(frozen=True, kw_only=True)
class ActivationSettings:
    """
    How a text is read, see [`iterate_activations`].

    Args:
        text_column (`str`, defaults to `"text"`): where a row holds its text.
        context_length (`int`, defaults to 256): longest piece of text in tokens; longer texts are cut into several.
        batch_tokens (`int`, defaults to 2048): tokens per batch, and positions per forward pass.
        max_tokens (`int`, *optional*): stop once exactly this many tokens were read, those left out not counted.
        shuffle_tokens (`int`, defaults to 0): size of the buffer that tokens are drawn from at random; 0 keeps them
            in order. While it is refilled it takes twice its memory.
        seed (`int`, defaults to 0): seed of the shuffling.
        skip_first_position (`bool`, defaults to `True`): leave out the first token of each context.
        max_norm_ratio (`float`, *optional*, defaults to 5.0): leave out tokens with a norm above this many times the
            median of their forward pass, at any of the layers, so that every layer gives the same tokens.
        show_progress (`bool`, defaults to `True`): progress bar with tokens per second.

    Raises:
        `ValueError`: If a size is out of range.
    """

    text_column: str = "text"
    context_length: int = 256
    batch_tokens: int = 2048
    max_tokens: int | None = None
    shuffle_tokens: int = 0
    seed: int = 0
    skip_first_position: bool = True
    max_norm_ratio: float | None = 5.0
    show_progress: bool = True

    def __post_init__(self) -> None:
        for name, least in (("context_length", 2), ("batch_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.shuffle_tokens < 0 or (self.max_tokens is not None and self.max_tokens < 1):
            raise ValueError(
                "shuffle_tokens must not be negative and max_tokens must be positive or None, "
                f"got {self.shuffle_tokens} and {self.max_tokens}"
            )


@dataclass(frozen=True)
class Pass:
    """
    One forward pass over a part of the text.

    Args:
        ids (`torch.Tensor`): (contexts, positions), token ids.
        mask (`torch.Tensor`): (contexts, positions), zero where a position is padding.
        states (`torch.Tensor`): (contexts, positions, layers, hidden_size), float32, on the model's device.
        kept (`torch.Tensor`): (contexts, positions), which positions are neither left out nor beyond `max_tokens`.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    states: torch.Tensor
    kept: torch.Tensor


def iterate_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[str | dict],
    layer: int | Sequence[int],
    **settings: Any,
) -> "ActivationStream":
    """
    The residual stream after one or several decoder layers, token by token, over a text. The forward pass stops at
    the last layer that is wanted.

    Padding, the first position of each context and tokens whose norm is far above the median are left out: such
    attention sinks (over 100 times the median norm in many models) would dominate the loss. The counts are logged.

    Args:
        model (`PreTrainedModel`): any transformers model with a list of decoder layers.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer. If it starts a text with a BOS token, so starts each
            context.
        dataset (`Iterable`): texts, or rows with a text in `text_column`; a streaming `datasets` dataset too.
        layer (`int` or `Sequence[int]`): decoder layers, counted from 0; negative counts from the end.
        settings (*optional*): those of [`ActivationSettings`].

    Returns:
        [`ActivationStream`]: an iterator of float32 batches on the model's device.

    Raises:
        `ValueError`: If there is no such layer or column or a size is out of range; while iterating, if activations
            are NaN or infinite, a token is not in the model's vocabulary, or the dataset held no token to yield.
    """
    return ActivationStream(model, tokenizer, dataset, layer, settings=ActivationSettings(**settings))


class ActivationStream(Iterator[torch.Tensor]):
    """
    Batches of activations, (batch_tokens, hidden_size) each, or (batch_tokens, layers, hidden_size) if several layers
    were asked for; the last batch may be smaller. Made by [`iterate_activations`].

    The same arguments give the same batches. [`~ActivationStream.state_dict`] and
    [`~ActivationStream.load_state_dict`] continue an interrupted stream exactly; `counts` says how many tokens were
    given and left out so far. [`~ActivationStream.passes`] gives whole contexts instead.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        dataset: Iterable[str | dict],
        layer: int | Sequence[int],
        *,
        settings: ActivationSettings,
    ):
        self.model, self.tokenizer, self.dataset, self.settings = model, tokenizer, dataset, settings
        self.layers, self._single = layer_indices(model, layer), isinstance(layer, int)
        self.hidden_size = hidden_size(model)
        self.counts = Counter(tokens=0, padding=0, first_position=0, outlying_norm=0)
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._buffer = torch.empty(0, len(self.layers), self.hidden_size)
        self._passes: Iterator[Pass] | None = None
        self._passes_read = 0

    def __next__(self) -> torch.Tensor:
        batch_tokens, shuffle_tokens = self.settings.batch_tokens, self.settings.shuffle_tokens
        if len(self._buffer) < max(batch_tokens, shuffle_tokens // 2):
            self._fill(max(batch_tokens, shuffle_tokens))
        batch, self._buffer = self._buffer[:batch_tokens], self._buffer[batch_tokens:]
        if len(batch) == 0:
            if self.counts["tokens"] == 0:
                raise ValueError(
                    "the dataset gave no tokens: expected texts longer than one token, got none or only such as are "
                    f"left out ({dict(self.counts)})"
                )
            raise StopIteration
        return batch[:, 0] if self._single else batch

    def state_dict(self) -> dict:
        """Everything that the rest of the stream depends on; with shuffling, the tokens in the buffer as well."""
        return {
            "passes_read": self._passes_read,
            "counts": dict(self.counts),
            "buffer": self._buffer.clone(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state` was taken. The text read until then is tokenised again, not run through the model."""
        self.counts = Counter(state["counts"])
        self._passes_read, self._passes = state["passes_read"], None
        self._buffer = state["buffer"].to(self.model.device)
        self._generator.set_state(state["generator"])

    def passes(self) -> Iterator[Pass]:
        """Each forward pass from the start of the text, until exactly `max_tokens` positions were kept."""
        return self._passes_after(0, 0)

    def forward_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Token ids and attention mask of each forward pass, (contexts, positions), from the start of the text."""
        contexts = _contexts(self.tokenizer, self.dataset, self.settings.text_column, self.settings.context_length)
        padding = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        return _batches_of_similar_length(contexts, self.settings.batch_tokens, padding)

    def read(self, ids: torch.Tensor, mask: torch.Tensor, room: int | None = None) -> Pass:
        """
        Run the model and count what is kept and left out.

        Args:
            ids (`torch.Tensor`): (contexts, positions), token ids.
            mask (`torch.Tensor`): (contexts, positions), zero where a position is padding.
            room (`int`, *optional*): keep the first positions only, as many as this.

        Returns:
            [`Pass`]
        """
        vocabulary: Any = self.model.get_input_embeddings().num_embeddings
        if int(ids.max()) >= vocabulary:
            raise ValueError(
                f"the tokenizer gave the token {int(ids.max())}, the language model has a vocabulary of {vocabulary}: "
                "give the tokenizer that belongs to it"
            )
        outputs = layer_outputs(self.model, self.layers, ids, mask)
        states = torch.stack([output.float().to(outputs[0].device) for output in outputs], dim=2)
        kept = self._kept(states, mask)
        if room is not None and int(kept.sum()) > room:
            kept &= kept.flatten().cumsum(0).view_as(kept) <= room
        self.counts["tokens"] += int(kept.sum())
        return Pass(ids, mask, states, kept)

    def log_counts(self) -> None:
        """How many tokens were read and left out so far."""
        counts = self.counts
        logger.info(
            f"{counts['tokens']} tokens; left out: {counts['first_position']} at the first position, "
            f"{counts['outlying_norm']} of outlying norm, {counts['padding']} of padding"
        )

    def check_reads(self, sae: HierarchicalSaeModel) -> None:
        """Raise a `ValueError` unless this is the language model and the layer that an autoencoder was trained on."""
        trained = self.layers[0] if sae.config.layer is None else sae.config.layer
        check_fits(sae, self.model, trained)
        if self.layers != [trained]:
            raise ValueError(
                f"the autoencoder was trained on layer {trained}, the stream gives {self.layers}: read that layer alone"
            )

    def _passes_after(self, passes: int, tokens: int) -> Iterator[Pass]:
        """The passes behind the first `passes`, in which `tokens` were kept."""
        limit, is_quiet = self.settings.max_tokens, not self.settings.show_progress
        form: dict[str, Any] = {"unit": "token", "unit_scale": True, "desc": "read", "disable": is_quiet}
        with logging.tqdm(total=limit, initial=tokens, **form) as progress:
            for ids, mask in islice(self.forward_batches(), passes, None):
                if tokens == limit:
                    break
                found = self.read(ids, mask, None if limit is None else limit - tokens)
                progress.update(int(found.kept.sum()))
                tokens += int(found.kept.sum())
                yield found
        self.log_counts()

    def _kept(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Which positions are neither padding, nor first, nor of outlying norm; those left out are counted."""
        keep = mask.to(states.device).bool()
        self.counts["padding"] += keep.numel() - int(keep.sum())
        if self.settings.skip_first_position:
            self.counts["first_position"] += int(keep[:, 0].sum())
            keep[:, 0] = False
        check_finite(states[keep])
        ratio = self.settings.max_norm_ratio
        if ratio is not None and keep.any():
            norms = torch.linalg.vector_norm(states, dim=-1)
            usual = (norms <= ratio * norms[keep].median(dim=0).values).all(dim=-1)
            self.counts["outlying_norm"] += int((keep & ~usual).sum())
            keep &= usual
        return keep

    def _fill(self, size: int) -> None:
        """Read forward passes until the buffer holds `size` tokens or the text ends, then shuffle it if asked."""
        if self._passes is None:
            self._passes = self._passes_after(self._passes_read, self.counts["tokens"])
        pieces, tokens = [self._buffer.to(self.model.device)], len(self._buffer)
        while tokens < size and (found := next(self._passes, None)) is not None:
            self._passes_read += 1
            pieces.append(found.states[found.kept])
            tokens += len(pieces[-1])
        if len(pieces) == 1:
            return
        self._buffer = torch.cat([piece.to(pieces[-1].device) for piece in pieces])
        if self.settings.shuffle_tokens:
            order = torch.randperm(len(self._buffer), generator=self._generator)
            self._buffer = self._buffer[order.to(self._buffer.device)]


def _contexts(
    tokenizer: PreTrainedTokenizerBase, dataset: Iterable[str | dict], text_column: str, context_length: int
) -> Iterator[list[int]]:
    for row in dataset:
        if not isinstance(row, str) and text_column not in row:
            raise ValueError(f"text_column must name a column of the dataset {list(row)}, got {text_column!r}")
        # The piece is cut here, so the tokenizer's warning about its length does not apply.
        ids = tokenizer(row if isinstance(row, str) else row[text_column], verbose=False)["input_ids"]
        start = ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
        ids, size = ids[len(start) :], context_length - len(start)
        for first in range(0, len(ids), size):
            yield start + ids[first : first + size]


def _batches_of_similar_length(
    contexts: Iterable[list[int]], batch_tokens: int, padding: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and mask, (contexts, positions), of up to `batch_tokens` positions; a longer context comes alone."""
    waiting = defaultdict(list)
    for context in contexts:
        bucket = -(-len(context) // LENGTH_BUCKET)
        waiting[bucket].append(context)
        if (len(waiting[bucket]) + 1) * bucket * LENGTH_BUCKET > batch_tokens:
            yield _pad(waiting.pop(bucket), padding)
    for rest in waiting.values():
        yield _pad(rest, padding)


def _pad(contexts: list[list[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.full((len(contexts), max(map(len, contexts))), padding)
    mask = torch.zeros_like(ids)
    for row, context in enumerate(contexts):
        ids[row, : len(context)] = torch.tensor(context)
        mask[row, : len(context)] = 1
    return ids, mask
