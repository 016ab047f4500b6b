"""A language model's hidden states over a text: one loop, which everything that reads a text goes through."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .configuration_hierarchical_sae import integer, is_integer, positive_number
from .language_model import check_length, check_vocabulary, input_device, layer_indices, vocabulary_size, weights_of
from .large_pages import keep_freed_memory
from .modeling_hierarchical_sae import HierarchicalSaeModel, check_finite
from .sites import HOOK_POINTS, check_fits, find_site, read_sites, target_site
from .texts import check_dataset, content_of, skipped_ids, token_contexts


logger = logging.get_logger(__name__)

# Contexts whose lengths differ by less than this share a forward pass.
LENGTH_BUCKET = 32
# Share of tokens with NaN or infinite activations above which the fault is the model's, not that of a few tokens.
MOST_NOT_FINITE = 0.01


@dataclass(frozen=True, kw_only=True)
class ActivationSettings:
    """
    How a text is read, see [`iterate_activations`].

    Args:
        text_column (`str`, defaults to `"text"`): where a row holds its text, messages of a chat, or token ids. Rows without
            a `"text"` are read by `"messages"`, `"prompt"` and `"completion"`, or `"input_ids"`. Padding of token ids is
            what `"attention_mask"` says.
        context_length (`int`, defaults to 256): longest piece of text in tokens; longer texts are cut into several.
        batch_tokens (`int`, defaults to 2048): tokens per batch, and positions per forward pass.
        max_tokens (`int`, *optional*): stop once exactly this many tokens were read, those left out not counted.
        shuffle_tokens (`int`, defaults to 0): size of the buffer that tokens are drawn from at random; 0 keeps them
            in order. While it is refilled it takes twice its memory.
        seed (`int`, defaults to 0): seed of the shuffling.
        skip_first_position (`bool`, defaults to `True`): leave out the first token of each context.
        skip_special_tokens (`bool`, defaults to `False`): leave out the tokenizer's special tokens, such as those that a chat
            template puts around messages; they are read, and not given.
        skip_tokens (`Sequence[int]` or `Sequence[str]`, *optional*): leave out these tokens likewise: ids, entries of the
            vocabulary, or texts of one token each.
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
    skip_special_tokens: bool = False
    skip_tokens: Sequence[int | str] | None = None
    max_norm_ratio: float | None = 5.0
    show_progress: bool = True

    def __post_init__(self) -> None:
        for name, least in (("context_length", 2), ("batch_tokens", 1), ("shuffle_tokens", None), ("seed", 0)):
            object.__setattr__(self, name, integer(name, getattr(self, name), least))
        if self.max_tokens is not None:
            object.__setattr__(self, "max_tokens", integer("max_tokens", self.max_tokens))
        if self.shuffle_tokens < 0 or (self.max_tokens is not None and self.max_tokens < 1):
            raise ValueError(
                "shuffle_tokens must not be negative and max_tokens must be positive or None, "
                f"got {self.shuffle_tokens} and {self.max_tokens}"
            )
        if self.max_norm_ratio is not None:
            object.__setattr__(self, "max_norm_ratio", positive_number("max_norm_ratio", self.max_norm_ratio))
        if not isinstance(self.text_column, str):
            raise ValueError(f"text_column must be the name of a column, got {self.text_column!r}")
        tokens = [] if self.skip_tokens is None else self.skip_tokens
        tokens = tokens.tolist() if isinstance(tokens, torch.Tensor | numpy.ndarray) else tokens
        if (
            not isinstance(self.skip_special_tokens, bool)
            or isinstance(tokens, str)
            or not isinstance(tokens, Iterable)
        ):
            raise ValueError(
                "skip_special_tokens must be True or False and skip_tokens a list of tokens or None, got "
                f"{self.skip_special_tokens!r} and {tokens!r}"
            )
        # As JSON gives them back.
        tokens = [int(token) if is_integer(token) else token for token in tokens]
        object.__setattr__(self, "skip_tokens", tokens or None)


class Inputs(NamedTuple):
    """
    What one forward pass takes.

    Args:
        ids (`torch.Tensor`): (contexts, positions), token ids.
        mask (`torch.Tensor`): (contexts, positions), zero where a position is padding.
        rows (`list[int]`): (contexts,), the row of the dataset that each context is from.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    rows: list[int]


@dataclass(frozen=True)
class Pass:
    """
    One forward pass over a part of the text.

    Args:
        ids (`torch.Tensor`): (contexts, positions), token ids.
        mask (`torch.Tensor`): (contexts, positions), zero where a position is padding.
        states (`list[torch.Tensor]`): (contexts, positions, width) of each site, float32, on one device.
        kept (`torch.Tensor`): (contexts, positions), which positions are neither left out nor beyond `max_tokens`.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    states: list[torch.Tensor]
    kept: torch.Tensor


def iterate_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[str | dict],
    layer: int | Sequence[int] | None,
    *,
    hook_point: str | Sequence[str] = "output",
    target_hook_point: str | None = None,
    **settings: Any,
) -> "ActivationStream":
    """
    Hidden states of one or several decoder layers, token by token, over a text. The forward pass stops at
    the last layer that is wanted.

    Padding, the first position of each context and tokens whose norm is far above the median are left out: such
    attention sinks (over 100 times the median norm in many models) would dominate the loss. So are tokens with NaN or
    infinite activations, and rows whose text is empty or `None`, with a warning. The counts are logged.

    Args:
        model (`PreTrainedModel`): any transformers model with a list of decoder layers.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer. If it starts a text with a BOS token, so starts each
            context.
        dataset (`Iterable`): texts, or rows with a text in `text_column`; a streaming `datasets` dataset too. Messages of a
            chat go through the tokenizer's chat template, and token ids are taken as they are.
        layer (`int` or `Sequence[int]`, *optional*): decoder layers, counted from 0; negative counts from the end. `None`
            for modules by their paths within the model.
        hook_point (`str` or `Sequence[str]`, defaults to `"output"`): sites of each layer, for batches of one width:
            `"input"`, `"middle"` and `"output"`, the residual stream before the layer, between attention and MLP, and
            after the layer; `"attention.input"`, `"attention.output"`, `"mlp.input"` and `"mlp.output"`, what they take
            and what they add to it; `"attention.heads"`, what its heads give; or the output of a module, by its path
            within the layer.
        target_hook_point (`str`, *optional*): the site of the same layer that a transcoder computes, of any width: batches
            are pairs then, of what it reads and what it is to compute.
        settings (*optional*): those of [`ActivationSettings`].

    Returns:
        [`ActivationStream`]: an iterator of float32 batches on the model's device.

    Raises:
        `ValueError`: If there is no such layer, it has no such site, sites differ in width, a size is out of range or above
            the model's positions, or the dataset is one text or several splits; while iterating, if a row has no such column
            or something else than a text in it, a token is not in the model's vocabulary, or the dataset held no token to
            yield.
    """
    settings: Any = ActivationSettings(**settings)
    sites: Any = {"hook_point": hook_point, "target_hook_point": target_hook_point}
    return ActivationStream(model, tokenizer, dataset, layer, **sites, settings=settings)


class ActivationStream(Iterator[Any]):
    """
    Batches of activations, (batch_tokens, hidden_size) each, or (batch_tokens, sites, hidden_size) if several layers or
    hook points were asked for: all sites of the first layer, then of the next; with a `target_hook_point`, pairs of
    (batch_tokens, d_in) and (batch_tokens, d_out). The last batch may be smaller. Made by [`iterate_activations`].

    The same arguments give the same batches. [`~ActivationStream.state_dict`] and
    [`~ActivationStream.load_state_dict`] continue an interrupted stream exactly; `counts` says how many tokens were
    given and left out so far. [`~ActivationStream.passes`] gives whole contexts instead.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        dataset: Iterable[str | dict],
        layer: int | Sequence[int] | None,
        *,
        hook_point: str | Sequence[str] = "output",
        target_hook_point: str | None = None,
        settings: ActivationSettings,
    ):
        keep_freed_memory()
        check_dataset(dataset)
        check_length(model, "context_length", settings.context_length)
        self.model, self.tokenizer, self.dataset, self.settings = model, tokenizer, dataset, settings
        self.layers = [None] if layer is None else layer_indices(model, layer)
        several = isinstance(hook_point, Iterable) and not isinstance(hook_point, str)
        self.hook_points: list[Any] = list(hook_point) if several else [hook_point]
        self.target_hook_point = target_hook_point
        self._single = not isinstance(layer, Iterable) and not several
        if target_hook_point is not None:
            if not self._single:
                raise ValueError(
                    f"target_hook_point goes with one layer and one hook_point, got {layer} and {hook_point}"
                )
            self.hook_points.append(target_hook_point)
        self.sites = [find_site(model, index, name) for index in self.layers for name in self.hook_points]
        if not self.sites:
            raise ValueError("hook_point must name one site or several, got none")
        self.counts = Counter(
            tokens=0,
            padding=0,
            first_position=0,
            skipped_tokens=0,
            not_finite=0,
            outlying_norm=0,
            rows_without_text=0,
        )
        self._skipped = skipped_ids(tokenizer, settings.skip_special_tokens, settings.skip_tokens)
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._buffer = [torch.empty(0, site.width) for site in self.sites]
        self._passes: Iterator[Pass] | None = None
        self._passes_read = 0
        self._part = (0, 1)

    def __next__(self) -> Any:
        batch_tokens, shuffle_tokens = self.settings.batch_tokens, self.settings.shuffle_tokens
        if self.target_hook_point is None:
            self._check_widths()
        if len(self._buffer[0]) < max(batch_tokens, shuffle_tokens // 2):
            self._fill(max(batch_tokens, shuffle_tokens))
        batch = [states[:batch_tokens] for states in self._buffer]
        self._buffer = [states[batch_tokens:] for states in self._buffer]
        if len(batch[0]) == 0:
            if self.counts["tokens"] == 0:
                raise self.no_tokens()
            raise StopIteration
        return self._together(batch)

    def no_tokens(self) -> ValueError:
        """What is raised if the dataset came to its end without a token."""
        index, count = self._part
        to_part = f" to process {index} of {count}, of which each reads its own rows" if count > 1 else ""
        return ValueError(
            f"the dataset gave no tokens{to_part}: expected texts longer than one token, got none or only such as are "
            f"left out ({dict(self.counts)})"
        )

    def _together(self, states: list[torch.Tensor]) -> Any:
        """Those of all sites as they are given."""
        if self.target_hook_point is not None:
            return tuple(states)
        return states[0] if self._single else torch.stack(states, dim=1)

    def state_dict(self) -> dict:
        """Everything that the rest of the stream depends on; with shuffling, the tokens in the buffer as well."""
        return {
            "passes_read": self._passes_read,
            "counts": dict(self.counts),
            "buffer": [states.clone() for states in self._buffer],
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state` was taken. The text read until then is tokenised again, not run through the model."""
        self.counts = Counter(state["counts"])
        self._passes_read, self._passes = state["passes_read"], None
        self._buffer = [states.to(input_device(self.model)) for states in state["buffer"]]
        self._generator.set_state(state["generator"])

    def sample(self, tokens: int) -> Any:
        """The next activations, at least as many as a batch and at most `tokens`, which stay in the stream."""
        if self.target_hook_point is None:
            self._check_widths()
        if len(self._buffer[0]) < tokens:
            self._fill(max(self.settings.batch_tokens, self.settings.shuffle_tokens))
        return self._together([states[:tokens].clone() for states in self._buffer])

    def restart(self) -> None:
        """Read the text from its start again, behind what is in the buffer; the counts start from 0."""
        self.counts = Counter(dict.fromkeys(self.counts, 0))
        self._passes_read, self._passes = 0, None

    def take_part(self, process_index: int, num_processes: int) -> None:
        """Read every `num_processes`-th row of the dataset from now on, beginning with row `process_index`."""
        process_index, num_processes = integer("process_index", process_index), integer("num_processes", num_processes)
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index must be in [0, num_processes={num_processes}), got {process_index}")
        self._part = (process_index, num_processes)

    def description(self) -> dict[str, Any]:
        """What has to be the same for activations to belong together, but for the order that shuffling gives them."""
        settings = asdict(self.settings)
        for name in ("shuffle_tokens", "seed", "show_progress"):
            del settings[name]
        return {
            "model_name": self.model.config.name_or_path,
            **weights_of(self.model),
            "layers": self.layers,
            "hook_points": self.hook_points,
            **settings,
        }

    def passes(self) -> Iterator[Pass]:
        """Each forward pass from the start of the text, until exactly `max_tokens` positions were kept."""
        return self._passes_after(0, 0)

    def inputs(self) -> Iterator[Inputs]:
        """What each forward pass takes, from the start of the text."""
        contexts = token_contexts(self.tokenizer, self._rows(), self.settings.context_length)
        padding = self.tokenizer.pad_token_id or 0
        # Where a padding token was added to the tokenizer alone, any other does: padding is masked.
        padding = padding if padding < vocabulary_size(self.model) else 0
        return _batches_of_similar_length(contexts, self.settings.batch_tokens, padding)

    def read(self, inputs: Inputs, room: int | None = None) -> Pass:
        """
        Run the model and count what is kept and left out.

        Args:
            inputs ([`Inputs`]): from [`~ActivationStream.inputs`].
            room (`int`, *optional*): keep the first positions only, as many as this.

        Returns:
            [`Pass`]
        """
        check_vocabulary(self.model, inputs.ids)
        outputs = read_sites(self.model, self.sites, inputs.ids, inputs.mask)
        states = [output.float().to(outputs[0].device) for output in outputs]
        kept = self._kept(states, inputs)
        if room is not None and int(kept.sum()) > room:
            kept &= kept.flatten().cumsum(0).view_as(kept) <= room
        self.counts["tokens"] += int(kept.sum())
        return Pass(inputs.ids, inputs.mask, states, kept)

    def most_kept(self, inputs: Inputs) -> int:
        """Tokens that a forward pass gives if none has an outlying norm: all that is known without running the model."""
        kept = inputs.mask.bool() & ~torch.isin(inputs.ids, self._skipped)
        kept[:, 0] &= not self.settings.skip_first_position
        return int(kept.sum())

    def log_counts(self) -> None:
        """How many tokens were read and left out so far."""
        counts = self.counts
        logger.info(
            f"{counts['tokens']} tokens; left out: {counts['first_position']} at the first position, "
            f"{counts['outlying_norm']} of outlying norm, {counts['padding']} of padding, "
            f"{counts['skipped_tokens']} special or given ones"
        )
        if counts["not_finite"] or counts["rows_without_text"]:
            logger.warning(
                f"left out {counts['not_finite']} tokens whose activations are NaN or infinite and "
                f"{counts['rows_without_text']} rows without a text"
            )

    def check_reads(self, sae: HierarchicalSaeModel, with_targets: bool = False) -> None:
        """
        Raise a `ValueError` unless this is the language model and the site that an autoencoder was trained on; with a
        transcoder's targets too, if they are asked for.
        """
        first, layer = self.sites[0], sae.config.layer
        hook_point = sae.config.hook_point or first.hook_point
        if layer is None and hook_point in (first.hook_point, *HOOK_POINTS):
            layer = first.layer
        trained = [check_fits(sae, self.model, layer, hook_point)]
        if with_targets and sae.config.is_transcoder:
            trained.append(target_site(sae, self.model, trained[0]))
        if self.sites != trained:
            raise ValueError(
                f"the {sae.config.kind} was trained on {' to '.join(map(str, trained))}, the stream gives "
                f"{', '.join(map(str, self.sites))}: read that {'site' if len(trained) == 1 else 'pair of sites'} alone"
            )

    def _check_widths(self) -> None:
        widths = {str(site): site.width for site in self.sites}
        if len(set(widths.values())) != 1:
            raise ValueError(
                f"hook_point must name one site or several of one width, got {widths}: read each width by itself, or "
                "harvest them with save_shards"
            )

    def _rows(self) -> Iterator[tuple[int, Any]]:
        """The number and content of each row of this process; rows without one are counted."""
        # The text is read from its start whenever it is read, after an interruption too.
        self.counts["rows_without_text"] = 0
        for number, row in islice(enumerate(self.dataset), self._part[0], None, self._part[1]):
            content = content_of(row, self.settings.text_column, number)
            if content is not None and len(content):
                yield number, content
                continue
            if not self.counts["rows_without_text"]:
                logger.warning(f"row {number} of the dataset has no text: it is left out, as are others like it")
            self.counts["rows_without_text"] += 1

    def _passes_after(self, passes: int, tokens: int) -> Iterator[Pass]:
        """The passes behind the first `passes`, in which `tokens` were kept."""
        limit, is_quiet = self.settings.max_tokens, not self.settings.show_progress
        form: dict[str, Any] = {"unit": "token", "unit_scale": True, "desc": "read", "disable": is_quiet}
        with logging.tqdm(total=limit, initial=tokens, **form) as progress:
            for inputs in islice(self.inputs(), passes, None):
                if tokens == limit:
                    break
                found = self.read(inputs, None if limit is None else limit - tokens)
                progress.update(int(found.kept.sum()))
                tokens += int(found.kept.sum())
                yield found
        self.log_counts()

    def _kept(self, states: list[torch.Tensor], inputs: Inputs) -> torch.Tensor:
        """Which positions are neither padding, nor first, nor NaN, nor of outlying norm; the others are counted."""
        keep = inputs.mask.to(states[0].device).bool()
        self.counts["padding"] += keep.numel() - int(keep.sum())
        if self.settings.skip_first_position:
            self.counts["first_position"] += int(keep[:, 0].sum())
            keep[:, 0] = False
        if len(self._skipped):
            skipped = keep & torch.isin(inputs.ids, self._skipped).to(keep.device)
            self.counts["skipped_tokens"] += int(skipped.sum())
            keep &= ~skipped
        keep &= self._finite(states, keep, inputs.rows)
        ratio = self.settings.max_norm_ratio
        if ratio is not None and keep.any():
            norms = [torch.linalg.vector_norm(each, dim=-1) for each in states]
            usual = torch.stack([each <= ratio * each[keep].median() for each in norms]).all(dim=0)
            self.counts["outlying_norm"] += int((keep & ~usual).sum())
            keep &= usual
        return keep

    def _finite(self, states: list[torch.Tensor], keep: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """Which positions hold numbers; a few that do not are counted with a warning, many are refused."""
        # In float64 a sum is finite unless an entry is not.
        finite = torch.stack([each.sum(dim=-1, dtype=torch.float64).isfinite() for each in states]).all(dim=0)
        lost = keep & ~finite
        if not lost.any():
            return finite
        where = f"rows {sorted({rows[context] for context in lost.any(dim=1).nonzero().flatten().tolist()})}"
        before = self.counts["tokens"] + self.counts["not_finite"]
        self.counts["not_finite"] += int(lost.sum())
        if self.counts["not_finite"] > MOST_NOT_FINITE * (before + int(keep.sum())):
            try:
                for each in states:
                    check_finite(each[keep])
            except ValueError as error:
                raise ValueError(f"{error}; they are in {where} of the dataset") from error
        logger.warning(f"{int(lost.sum())} tokens in {where} have NaN or infinite activations: they are left out")
        return finite

    def _fill(self, size: int) -> None:
        """Read forward passes until the buffer holds `size` tokens or the text ends, then shuffle it if asked."""
        if self._passes is None:
            self._passes = self._passes_after(self._passes_read, self.counts["tokens"])
        pieces, tokens = [[states.to(input_device(self.model)) for states in self._buffer]], len(self._buffer[0])
        while tokens < size and (found := next(self._passes, None)) is not None:
            self._passes_read += 1
            pieces.append([states[found.kept] for states in found.states])
            tokens += len(pieces[-1][0])
        if len(pieces) == 1:
            return
        self._buffer = [torch.cat([part.to(parts[-1].device) for part in parts]) for parts in zip(*pieces)]
        if self.settings.shuffle_tokens:
            order = torch.randperm(len(self._buffer[0]), generator=self._generator)
            self._buffer = [states[order.to(states.device)] for states in self._buffer]


class ActivationDataset(torch.utils.data.IterableDataset):
    """
    A stream as a dataset for `Trainer`, whose items are those of [`ActivationShards`]: `{"hidden_states": (d_in,) float32}`,
    and of a transcoder `{"hidden_states": (d_in,), "targets": (d_out,)}`. It has no end: behind its last token the text
    is read again, in another order if it is shuffled.

    [`~ActivationDataset.state_dict`] and [`~ActivationDataset.load_state_dict`] continue an interrupted training exactly;
    [`train_sae`](hf_hierarchical_sae.training.train_sae) keeps the state in the checkpoints.

    Args:
        stream ([`ActivationStream`]): of one site, or of a pair; best with `shuffle_tokens`.
    """

    def __init__(self, stream: ActivationStream):
        if not isinstance(stream, ActivationStream) or (stream.target_hook_point is None and len(stream.sites) > 1):
            raise ValueError(
                "expected a stream from iterate_activations of one site, or of one with a target_hook_point, got "
                f"{getattr(stream, 'sites', type(stream).__name__)}"
            )
        self.stream = stream
        self._rest: list[torch.Tensor] = []

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if torch.utils.data.get_worker_info() is not None:
            raise ValueError(
                "a stream is read in the process that trains, workers would each read all of it: give "
                "dataloader_num_workers=0"
            )
        names = ["hidden_states", "targets"]
        while True:
            if not self._rest or not len(self._rest[0]):
                batch = self._next_batch()
                self._rest = list(batch) if isinstance(batch, tuple) else [batch]
            item = {name: part[0] for name, part in zip(names, self._rest)}
            self._rest = [part[1:] for part in self._rest]
            yield item

    def _next_batch(self) -> Any:
        batch = next(self.stream, None)
        if batch is None:
            if iter(self.stream.dataset) is self.stream.dataset:
                raise ValueError(
                    f"the text ended after {self.stream.counts['tokens']} tokens, and a generator is read only once: give a "
                    "list or a dataset, or fewer steps"
                )
            # Once: behind the first round there are as many tokens in each.
            logger.warning_once(f"all {self.stream.counts['tokens']} tokens of the text were read: it starts again")
            self.stream.restart()
            batch = next(self.stream)
        return batch

    def state_dict(self) -> dict:
        """Everything that the items to come depend on."""
        return {"stream": self.stream.state_dict(), "rest": [part.clone() for part in self._rest]}

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state` was taken."""
        self.stream.load_state_dict(state["stream"])
        self._rest = [part.to(input_device(self.stream.model)) for part in state["rest"]]


def _batches_of_similar_length(
    contexts: Iterable[tuple[int, list[int]]], batch_tokens: int, padding: int
) -> Iterator[Inputs]:
    """Up to `batch_tokens` positions each; a longer context comes alone."""
    waiting = defaultdict(list)
    for row, context in contexts:
        bucket = -(-len(context) // LENGTH_BUCKET)
        waiting[bucket].append((row, context))
        if (len(waiting[bucket]) + 1) * bucket * LENGTH_BUCKET > batch_tokens:
            yield _padded(waiting.pop(bucket), padding)
    for rest in waiting.values():
        yield _padded(rest, padding)


def _padded(contexts: list[tuple[int, list[int]]], padding: int) -> Inputs:
    ids = torch.full((len(contexts), max(len(context) for _, context in contexts)), padding)
    mask = torch.zeros_like(ids)
    for index, (_, context) in enumerate(contexts):
        ids[index, : len(context)] = torch.tensor(context)
        mask[index, : len(context)] = 1
    return Inputs(ids, mask, [row for row, _ in contexts])
