"""Which tokens of a forward pass the vectors act on: all of them, those of the prompt, or those that were generated."""

import inspect
from collections.abc import Callable, Sequence
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation.utils import ALL_CACHE_NAMES

from .config import as_index


Tokens = Literal["all", "prompt", "generated"]
TOKENS = ("all", "prompt", "generated")
# From transformers 5.24 on the first two are called `cache`, and understood still.
CACHE_NAMES = ("past_key_values", "cache_params", *ALL_CACHE_NAMES)


@dataclass(frozen=True)
class TokenChoice:
    """
    The token at position p, counted without padding, belongs to the prompt if p is less than the prompt's length.

    Args:
        tokens (`tuple[str, ...]`): One of [`TOKENS`] for all rows, or one for each.
        prompt_lengths (`tuple[int, ...]`, *optional*): Tokens of the prompt in each row, for passes outside `generate`.
        prompt_width (`int`, *optional*): Columns of the prompts, padding included, inside `generate`.
    """

    tokens: tuple[str, ...]
    prompt_lengths: tuple[int, ...] | None = None
    prompt_width: int | None = None

    def in_generate(self, args: tuple, kwargs: dict[str, Any]) -> "TokenChoice":
        """
        The choice for the passes of a call of `generate` with these arguments.

        Raises:
            ValueError: If it is given the lengths of prompts, or no prompt, or one that continues an unknown one.
        """
        if self.prompt_lengths is not None:
            raise ValueError("expected no prompt_lengths around generate, which knows its prompts: leave them out")
        names = ("inputs_embeds", "input_ids", "inputs")
        prompt = next((v for v in (*(kwargs.get(name) for name in names), *args[:1]) if v is not None), None)
        mask, cache = kwargs.get("attention_mask"), _given_cache(kwargs)
        if prompt is None or (cache is not None and mask is None):
            raise ValueError(
                "expected input_ids or inputs_embeds in generate, and with a cache an attention_mask over all "
                "that came before: the prompt of steer_tokens has no length otherwise"
            )
        return replace(self, prompt_width=(prompt if mask is None else mask).shape[1])

    def chosen(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        """
        The tokens of one forward pass that the vectors act on: (batch, seq) of booleans.

        Raises:
            ValueError: If the lengths of the prompts are unknown, or are not those of these rows.
        """
        given = {**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs}
        inputs = next((given[name] for name in ("inputs_embeds", "input_ids") if given.get(name) is not None), None)
        if inputs is None:
            raise ValueError("expected input_ids or inputs_embeds in a forward pass inside steer_tokens, got neither")
        (rows, width), device = inputs.shape[:2], inputs.device
        mask = given.get("attention_mask")
        mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
        if self.prompt_width is not None:
            before = _columns_before(given) if mask is None else mask.shape[1] - width
            prompt = (torch.arange(before, before + width, device=device) < self.prompt_width).expand(rows, width)
        elif mask is None:
            prompt = self._prompt_of_documents(_begins(given, rows, width, device), _columns_before(given))
        else:
            # a mask may be as wide as a static cache, of which most is empty
            counts = _counts_tokens(_given_cache(given))
            before = _columns_before(given) if counts else mask.shape[1] - width
            positions = mask[:, : before + width].cumsum(1)[:, before:] - 1
            prompt = positions < torch.tensor(self._lengths_of(rows, "row"), device=device)[:, None]
        return self._of_rows(rows, "all", device) | (self._of_rows(rows, "prompt", device) == prompt)

    def _prompt_of_documents(self, begins: torch.Tensor, before: int) -> torch.Tensor:
        """Of rows without padding, of which these tokens, (rows, width), begin a document; one a row if it is not packed."""
        packed = int(begins.sum()) > len(begins)
        lengths = self._lengths_of(int(begins.sum()), "document of packed rows" if packed else "row")
        columns = torch.arange(begins.shape[1], device=begins.device).expand_as(begins)
        positions = columns - torch.where(begins, columns, 0).cummax(1).values
        # what came before belongs to the first document of each row
        positions += before * (begins.cumsum(1) == 1)
        document = begins.flatten().cumsum(0).view_as(begins) - 1
        return positions < torch.tensor(lengths, device=positions.device)[document]

    def _lengths_of(self, number: int, what: str) -> tuple[int, ...]:
        if self.prompt_lengths is None:
            raise ValueError(
                "expected prompt_lengths in steer_tokens for a forward pass outside model.generate, got none: say how "
                "many tokens the prompt of each row has"
            )
        if len(self.prompt_lengths) != number:
            raise ValueError(
                f"expected one of prompt_lengths per {what}, got {len(self.prompt_lengths)} for {number}: padding needs an "
                "attention_mask of two dimensions"
            )
        return self.prompt_lengths

    def _of_rows(self, rows: int, tokens: str, device: torch.device) -> torch.Tensor:
        """Whether each row chose `tokens`: (rows, 1) of booleans. Within `generate`, rows may be repeated."""
        repeats = 1 if self.prompt_width is None else rows // len(self.tokens)
        if len(self.tokens) == 1:
            repeats = rows
        if repeats * len(self.tokens) != rows:
            raise ValueError(f"expected one choice of tokens per row, got {len(self.tokens)} for {rows}")
        return torch.tensor([one == tokens for one in self.tokens], device=device).repeat_interleave(repeats)[:, None]


def as_choice(
    tokens: Tokens | Sequence[Tokens], prompt_lengths: Sequence[int] | torch.Tensor | None
) -> TokenChoice | None:
    """
    A user's choice, or None where that is all tokens of all rows.

    Raises:
        TypeError: If a length is no integer.
        ValueError: If `tokens` is none of [`TOKENS`], nor a list of them, or a length is negative.
    """
    each = (tokens,) if isinstance(tokens, str) else tuple(tokens)
    unknown = [one for one in each if one not in TOKENS]
    if unknown or not each:
        raise ValueError(f"expected tokens of {', '.join(TOKENS)}, or one of these for each row, got {tokens!r}")
    lengths = None
    if prompt_lengths is not None:
        lengths = tuple(as_index(length, "each of prompt_lengths") for length in prompt_lengths)
        if min(lengths, default=-1) < 0:
            raise ValueError(f"prompt_lengths must hold numbers of tokens, 0 or more, one per row, got {lengths}")
    return None if set(each) == {"all"} else TokenChoice(each, lengths)


class InContext:
    """Gradient checkpointing that computes a layer once more with what the caller asked for in the first place."""

    def __init__(self, checkpoint: Callable) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        # backward may run in another thread, or after the block
        return self.checkpoint(partial(_run_in, copy_context(), function), *args, **kwargs)


def _run_in(context: Any, function: Callable, *args: Any, **kwargs: Any) -> Any:
    return context.copy().run(function, *args, **kwargs)


def recompute_in_context(model: nn.Module) -> None:
    """Wraps whatever gradient checkpointing this model does in [`InContext`], once."""
    for module in model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if checkpoint is not None and not isinstance(checkpoint, InContext):
            cast(Any, module)._gradient_checkpointing_func = InContext(checkpoint)


def _given_cache(given: dict[str, Any]) -> Any:
    return next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)


def _counts_tokens(cache: Any) -> bool:
    return isinstance(cache, Cache) and any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)


def _begins(given: dict[str, Any], rows: int, width: int, device: torch.device) -> torch.Tensor:
    """Where a row begins, and where the positions of packed rows begin again: (rows, width) of booleans."""
    begins = torch.zeros(rows, width, dtype=torch.bool, device=device)
    begins[:, 0] = True
    positions = given.get("position_ids")
    if isinstance(positions, torch.Tensor) and positions.dim() == 2:
        begins[:, 1:] = (positions.diff(dim=1) <= 0).to(device)
    return begins


def _columns_before(given: dict[str, Any]) -> int:
    cache = _given_cache(given)
    if cache is None:
        return 0
    if not _counts_tokens(cache):
        raise ValueError(
            f"expected a cache that counts its tokens, got the {type(cache).__name__} of a model without attention: "
            "with steer_tokens pass use_cache=False"
        )
    return int(cache.get_seq_length())
