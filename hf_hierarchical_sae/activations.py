"""A language model's hidden states as training data for a sparse autoencoder: as a stream, or as shards on disk."""

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .language_model import hidden_size, layer_indices, layer_outputs
from .modeling_hierarchical_sae import check_finite


logger = logging.get_logger(__name__)

# Contexts whose lengths differ by less than this share a forward pass.
LENGTH_BUCKET = 32
# Files of a harvest besides its shards: its settings, and the number of shards once all text was read.
DESCRIPTION, COMPLETE = "harvest.json", "complete.json"


def iterate_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[str | dict],
    layer: int | Sequence[int],
    *,
    text_column: str = "text",
    context_length: int = 256,
    batch_tokens: int = 2048,
    max_tokens: int | None = None,
    shuffle_tokens: int = 0,
    seed: int = 0,
    skip_first_position: bool = True,
    max_norm_ratio: float | None = 5.0,
    show_progress: bool = True,
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
        text_column (`str`, defaults to `"text"`): where a row holds its text.
        context_length (`int`, defaults to 256): longest piece of text in tokens; longer texts are cut into several.
        batch_tokens (`int`, defaults to 2048): tokens per batch, and positions per forward pass.
        max_tokens (`int`, *optional*): stop once the text has given this many tokens.
        shuffle_tokens (`int`, defaults to 0): size of the buffer that tokens are drawn from at random; 0 keeps them
            in order. While it is refilled it takes twice its memory.
        seed (`int`, defaults to 0): seed of the shuffling.
        skip_first_position (`bool`, defaults to `True`): leave out the first token of each context.
        max_norm_ratio (`float`, *optional*, defaults to 5.0): leave out tokens with a norm above this many times the
            median of their forward pass, at any of the layers, so that every layer gives the same tokens.
        show_progress (`bool`, defaults to `True`): progress bar with tokens per second.

    Returns:
        [`ActivationStream`]: an iterator of float32 batches on the model's device.

    Raises:
        `ValueError`: no such layer or column, sizes out of range; while iterating, NaN or infinite activations, or a
            dataset that held no token to yield.
    """
    for name, value, least in (("context_length", context_length, 2), ("batch_tokens", batch_tokens, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if shuffle_tokens < 0 or (max_tokens is not None and max_tokens < 1):
        raise ValueError(
            "shuffle_tokens must not be negative and max_tokens must be positive or None, "
            f"got {shuffle_tokens} and {max_tokens}"
        )
    return ActivationStream(
        model=model,
        tokenizer=tokenizer,
        dataset=dataset,
        layer=layer,
        text_column=text_column,
        context_length=context_length,
        batch_tokens=batch_tokens,
        max_tokens=max_tokens,
        shuffle_tokens=shuffle_tokens,
        seed=seed,
        skip_first_position=skip_first_position,
        max_norm_ratio=max_norm_ratio,
        show_progress=show_progress,
    )


class ActivationStream(Iterator[torch.Tensor]):
    """
    Batches of activations, (batch_tokens, hidden_size) each, or (batch_tokens, layers, hidden_size) if several layers
    were asked for; the last batch may be smaller. Made by [`iterate_activations`].

    The same arguments give the same batches. [`~ActivationStream.state_dict`] and
    [`~ActivationStream.load_state_dict`] continue an interrupted stream exactly; `counts` says how many tokens were
    given and left out so far.
    """

    def __init__(self, *, model, tokenizer, dataset, layer, seed, **settings):
        self.model, self.tokenizer, self.dataset = model, tokenizer, dataset
        self._single = isinstance(layer, int)
        self.layers = layer_indices(model, layer)
        self.hidden_size = hidden_size(model)
        self.settings = settings
        self.counts = Counter(tokens=0, padding=0, first_position=0, outlying_norm=0)
        self._generator = torch.Generator().manual_seed(seed)
        self._buffer = torch.empty(0, len(self.layers), self.hidden_size)
        self._batches = None
        self._batches_read = 0
        self._bar = None

    def __next__(self) -> torch.Tensor:
        batch_tokens, shuffle_tokens = self.settings["batch_tokens"], self.settings["shuffle_tokens"]
        if len(self._buffer) < max(batch_tokens, shuffle_tokens // 2):
            self._fill(max(batch_tokens, shuffle_tokens))
        batch, self._buffer = self._buffer[:batch_tokens], self._buffer[batch_tokens:]
        if len(batch) == 0:
            self._log_counts()
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
            "batches_read": self._batches_read,
            "counts": dict(self.counts),
            "buffer": self._buffer.clone(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict):
        """Continue where `state` was taken. The text read until then is tokenised again, not run through the model."""
        self.counts = Counter(state["counts"])
        self._batches_read, self._batches = state["batches_read"], None
        self._buffer = state["buffer"].to(self.model.device)
        self._generator.set_state(state["generator"])

    def forward_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Token ids and attention mask of each forward pass, (contexts, positions), from the start of the text."""
        contexts = _contexts(
            self.tokenizer, self.dataset, self.settings["text_column"], self.settings["context_length"]
        )
        padding = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        return _batches_of_similar_length(contexts, self.settings["batch_tokens"], padding)

    def hidden_states(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(contexts, positions) token ids and mask to (contexts, positions, layers, hidden_size), in float32."""
        states = layer_outputs(self.model, self.layers, ids, mask)
        return torch.stack([state.float().to(states[0].device) for state in states], dim=2)

    def kept(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Which positions are neither padding, nor first, nor of outlying norm; those left out are counted."""
        keep = mask.to(states.device).bool()
        self.counts["padding"] += keep.numel() - int(keep.sum())
        if self.settings["skip_first_position"]:
            self.counts["first_position"] += int(keep[:, 0].sum())
            keep[:, 0] = False
        check_finite(states[keep])
        ratio = self.settings["max_norm_ratio"]
        if ratio is not None and keep.any():
            norms = torch.linalg.vector_norm(states, dim=-1)
            usual = (norms <= ratio * norms[keep].median(dim=0).values).all(dim=-1)
            self.counts["outlying_norm"] += int((keep & ~usual).sum())
            keep &= usual
        return keep

    def save_shards(
        self,
        folder: str | os.PathLike,
        *,
        shard_tokens: int = 65536,
        dtype: torch.dtype = torch.float32,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        """
        Write the activations to safetensors files, in the order of the text. Run again after an interruption, it goes
        on with the first shard that is missing or damaged. Read them with [`ActivationShards`].

        Each process writes every `num_processes`-th shard; together they write what one alone would. For that, a
        shard ends, and `max_tokens` counts, by tokens of text, those left out included.

        Args:
            folder (`str` or `os.PathLike`): made if it is not there.
            shard_tokens (`int`, defaults to 65536): tokens of text per shard; an interruption costs at most one.
            dtype (`torch.dtype`, defaults to `torch.float32`): of the values on disk.
            process_index (`int`, defaults to 0): number of this process, on this machine or another.
            num_processes (`int`, defaults to 1): how many processes share the work.

        Raises:
            `ValueError`: the folder holds a harvest with other settings or of another text.
        """
        if shard_tokens < 1 or not 0 <= process_index < num_processes:
            raise ValueError(
                f"shard_tokens must be positive and process_index in [0, num_processes={num_processes}), "
                f"got {shard_tokens} and {process_index}"
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        description = {
            "model_name": self.model.config.name_or_path,
            "layers": self.layers,
            "hidden_size": self.hidden_size,
            "shard_tokens": shard_tokens,
            "dtype": str(dtype).removeprefix("torch."),
            **{
                name: value for name, value in self.settings.items() if name not in ("shuffle_tokens", "show_progress")
            },
        }
        _write_description(folder, description)
        number = -1
        for number, batches in enumerate(self._shards_of_text(shard_tokens)):
            if number % num_processes == process_index:
                self._save_shard(folder / _shard_name(number), batches, dtype)
        if number < 0:
            raise ValueError("the dataset gave no tokens: expected texts, got none")
        _write_json(folder / COMPLETE, {"num_shards": number + 1})
        self._log_counts()

    def _shards_of_text(self, shard_tokens):
        """Lists of forward batches of about `shard_tokens` tokens each, `max_tokens` in all."""
        shard, tokens, total, limit = [], 0, 0, self.settings["max_tokens"]
        for ids, mask in self.forward_batches():
            shard.append((ids, mask))
            tokens += int(mask.sum())
            is_last = limit is not None and total + tokens >= limit
            if tokens >= shard_tokens or is_last:
                yield shard
                shard, tokens, total = [], 0, total + tokens
            if is_last:
                return
        if shard:
            yield shard

    def _save_shard(self, path, batches, dtype):
        text = hashlib.sha256(b"".join(ids.numpy().tobytes() for ids, _ in batches)).hexdigest()
        if path.exists():
            try:
                record = _read_shard(path, check=True)[1]
            except ValueError as error:
                logger.warning(f"{error}; harvesting it again")
            else:
                if record["text_sha256"] != text:
                    raise ValueError(
                        f"{path} was harvested from another text: expected the dataset and order of that harvest; "
                        "give these, or another folder"
                    )
                self.counts.update(record["counts"])
                self._progress().update(record["counts"]["tokens"])
                return
        before = Counter(self.counts)
        states = torch.cat([self._tokens(ids, mask) for ids, mask in batches]).to("cpu", dtype)
        tensors = {f"layer_{layer}": states[:, place].contiguous() for place, layer in enumerate(self.layers)}
        counts = {name: self.counts[name] - before[name] for name in self.counts}
        _write_shard(path, tensors, {"counts": counts, "text_sha256": text})

    def _fill(self, size):
        """Read forward passes until the buffer holds `size` tokens or the text ends, then shuffle it if asked."""
        limit = self.settings["max_tokens"]
        if self._batches is None:
            self._batches = islice(self.forward_batches(), self._batches_read, None)
        pieces, tokens = [self._buffer.to(self.model.device)], len(self._buffer)
        while tokens < size and (limit is None or self.counts["tokens"] < limit):
            batch = next(self._batches, None)
            if batch is None:
                break
            self._batches_read += 1
            room = None if limit is None else limit - self.counts["tokens"]
            pieces.append(self._tokens(*batch, room))
            tokens += len(pieces[-1])
        if len(pieces) == 1:
            return
        self._buffer = torch.cat([piece.to(pieces[-1].device) for piece in pieces])
        if self.settings["shuffle_tokens"]:
            order = torch.randperm(len(self._buffer), generator=self._generator)
            self._buffer = self._buffer[order.to(self._buffer.device)]

    def _tokens(self, ids, mask, room=None):
        """(tokens, layers, hidden_size): the positions that are kept, at most `room` of them."""
        progress = self._progress()
        states = self.hidden_states(ids, mask)
        tokens = states[self.kept(states, mask)][:room]
        self.counts["tokens"] += len(tokens)
        progress.update(len(tokens))
        return tokens

    def _progress(self):
        if self._bar is None:
            self._bar = logging.tqdm(
                total=self.settings["max_tokens"],
                initial=self.counts["tokens"],
                unit="token",
                unit_scale=True,
                desc="harvest",
                disable=not self.settings["show_progress"],
            )
        return self._bar

    def _log_counts(self):
        self._progress().close()
        counts = self.counts
        logger.info(
            f"{counts['tokens']} tokens; left out: {counts['first_position']} at the first position, "
            f"{counts['outlying_norm']} of outlying norm, {counts['padding']} of padding"
        )


class ActivationShards(torch.utils.data.Dataset):
    """
    Activations that [`~ActivationStream.save_shards`] wrote, memory-mapped: a dataset for `Trainer` whose items are
    `{"hidden_states": (hidden_size,) float32}`. `description` holds the settings of the harvest.

    Args:
        folder (`str` or `os.PathLike`): what was given to `save_shards`.
        layer (`int`, *optional*): which layer to read; needed only if several were harvested.

    Raises:
        `ValueError`: no harvest, an unfinished one, a torn or missing shard, no such layer, or no tokens.
    """

    def __init__(self, folder: str | os.PathLike, layer: int | None = None):
        self.folder = Path(folder)
        if not (self.folder / DESCRIPTION).exists():
            raise ValueError(f"expected a folder written by save_shards, got {folder}, which has no {DESCRIPTION}")
        self.description = json.loads((self.folder / DESCRIPTION).read_text())
        layers = self.description["layers"]
        if layer is None and len(layers) == 1:
            layer = layers[0]
        if layer not in layers:
            raise ValueError(f"layer must be one of the harvested layers {layers}, got {layer}")
        if not (self.folder / COMPLETE).exists():
            written = len(list(self.folder.glob("shard-*.safetensors")))
            raise ValueError(
                f"the harvest in {folder} is not finished, it has {written} shards so far: run it again, it goes on "
                "where it stopped"
            )
        count = json.loads((self.folder / COMPLETE).read_text())["num_shards"]
        self._paths = [self.folder / _shard_name(number) for number in range(count)]
        self._shards = [_read_shard(path)[0][f"layer_{layer}"] for path in self._paths]
        self._ends = torch.tensor([len(shard) for shard in self._shards]).cumsum(0)
        if len(self) == 0:
            raise ValueError(f"the {count} shards in {folder} hold no tokens: harvest more text")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        return [{"hidden_states": row} for row in self.rows(torch.as_tensor(indices))]

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """(n,) token numbers to (n, hidden_size) activations, in float32."""
        if len(indices) and not -len(self) <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(
                f"token numbers must be in [0, {len(self)}), got {int(indices.min())}…{int(indices.max())}"
            )
        indices = indices % len(self)
        numbers = torch.searchsorted(self._ends, indices, right=True)
        rows = torch.empty(len(indices), self._shards[0].shape[1])
        for number in numbers.unique().tolist():
            here = numbers == number
            start = int(self._ends[number]) - len(self._shards[number])
            rows[here] = self._shards[number][indices[here] - start].float()
        return rows

    def batches(self, batch_tokens: int = 4096) -> Iterator[torch.Tensor]:
        """All activations in order, (batch_tokens, hidden_size) each, fewer at the end of a shard."""
        for shard in self._shards:
            for batch in shard.split(batch_tokens):
                yield batch.float()

    def verify(self):
        """Read every shard in full and compare its checksum; raises `ValueError` at the first that differs."""
        for path in self._paths:
            _read_shard(path, check=True)


def _contexts(tokenizer, dataset, text_column, context_length):
    for row in dataset:
        if not isinstance(row, str) and text_column not in row:
            raise ValueError(f"text_column must name a column of the dataset {list(row)}, got {text_column!r}")
        # The piece is cut here, so the tokenizer's warning about its length does not apply.
        ids = tokenizer(row if isinstance(row, str) else row[text_column], verbose=False)["input_ids"]
        start = ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
        ids, size = ids[len(start) :], context_length - len(start)
        for place in range(0, len(ids), size):
            yield start + ids[place : place + size]


def _batches_of_similar_length(contexts, batch_tokens, padding):
    """Ids and mask, (contexts, positions), of up to `batch_tokens` positions; a longer context comes alone."""
    waiting = defaultdict(list)
    for context in contexts:
        bucket = -(-len(context) // LENGTH_BUCKET)
        waiting[bucket].append(context)
        if (len(waiting[bucket]) + 1) * bucket * LENGTH_BUCKET > batch_tokens:
            yield _pad(waiting.pop(bucket), padding)
    for contexts in waiting.values():
        yield _pad(contexts, padding)


def _pad(contexts, padding):
    ids = torch.full((len(contexts), max(map(len, contexts))), padding)
    mask = torch.zeros_like(ids)
    for row, context in enumerate(contexts):
        ids[row, : len(context)] = torch.tensor(context)
        mask[row, : len(context)] = 1
    return ids, mask


def _shard_name(number):
    return f"shard-{number:05d}.safetensors"


def _checksum(tensors):
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write_shard(path, tensors, record):
    """Under its name only once it is whole and on disk."""
    unfinished = path.with_suffix(".tmp")
    # One entry: safetensors writes several in random order, and equal harvests should be equal files.
    record = json.dumps({**record, "sha256": _checksum(tensors)})
    save_file(tensors, unfinished, metadata={"harvest": record})
    with open(unfinished, "rb+") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)


def _read_shard(path, check=False):
    """Memory-mapped tensors, and the record of their harvest. Raises `ValueError` if the file is not as written."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(
            f"{path} is torn or missing ({error}): run the harvest again, it replaces this shard"
        ) from error
    record = json.loads(metadata["harvest"])
    if check and _checksum(tensors) != record["sha256"]:
        raise ValueError(f"{path} is damaged, its checksum differs: run the harvest again, it replaces this shard")
    return tensors, record


def _write_json(path, content):
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    unfinished.replace(path)


def _write_description(folder, description):
    path = folder / DESCRIPTION
    if not path.exists():
        _write_json(path, description)
    found = json.loads(path.read_text())
    differing = [name for name in description if found.get(name) != description[name]]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{folder} holds a harvest with {name}={found.get(name)!r}, got {name}={description[name]!r}: give the "
            "settings of that harvest to go on with it, or another folder"
        )
