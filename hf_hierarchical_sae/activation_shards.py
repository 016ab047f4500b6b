"""Activations on disk: shards that survive a kill, written by one process or several, and read through memory maps."""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import logging

from .activations import ActivationStream, Inputs
from .configuration_hierarchical_sae import integer, place_name
from .modeling_hierarchical_sae import HierarchicalSaeModel
from .whole_files import whole_file


logger = logging.get_logger(__name__)

# Files of a harvest besides its shards: its settings, and the numbers of shards and tokens once all text was read.
DESCRIPTION, COMPLETE = "harvest.json", "complete.json"
DAMAGED = "run the harvest again, it replaces this shard"


def save_shards(
    stream: ActivationStream,
    folder: str | os.PathLike,
    *,
    shard_tokens: int = 65536,
    dtype: torch.dtype = torch.float32,
    process_index: int = 0,
    num_processes: int = 1,
) -> int | None:
    """
    Write activations to safetensors files, in the order of the text. Run again after an interruption, it goes on with
    the first shard that is missing or damaged; run again with more `max_tokens`, the harvest grows: whole shards stay.
    Read them with [`ActivationShards`].

    Each process writes every `num_processes`-th shard; together they write what one alone would. The last to finish
    finds all shards there and completes the harvest, with more text if the tokens left out made it too short.

    Args:
        stream ([`ActivationStream`]): from [`iterate_activations`]; its order, not its shuffling.
        folder (`str` or `os.PathLike`): made if it is not there.
        shard_tokens (`int`, defaults to 65536): tokens of text per shard; an interruption costs at most one.
        dtype (`torch.dtype`, defaults to `torch.float32`): of the values on disk.
        process_index (`int`, defaults to 0): number of this process, on this machine or another.
        num_processes (`int`, defaults to 1): how many processes share the work and the folder.

    Returns:
        `int`: tokens of the harvest, exactly `max_tokens` if the text has as many; `None` while other processes still
            write.

    Raises:
        `ValueError`: If the folder holds a harvest with other settings, of more tokens or of another text, or an activation
            is too large for `dtype`; no shard is written then.
    """
    if not isinstance(stream, ActivationStream):
        raise ValueError(f"expected a stream from iterate_activations, got a {type(stream).__name__}")
    shard_tokens, process_index, num_processes = (
        integer(name, value)
        for name, value in (
            ("shard_tokens", shard_tokens),
            ("process_index", process_index),
            ("num_processes", num_processes),
        )
    )
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype!r}")
    if shard_tokens < 1 or not 0 <= process_index < num_processes:
        raise ValueError(
            f"shard_tokens must be positive and process_index in [0, num_processes={num_processes}), "
            f"got {shard_tokens} and {process_index}"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    description = {
        **stream.description(),
        "widths": {_tensor_name(site.layer, site.hook_point): site.width for site in stream.sites},
        "shard_tokens": shard_tokens,
        "dtype": str(dtype).removeprefix("torch."),
    }
    grows = _write_description(folder, description, is_alone=num_processes == 1)
    writer, limit = _Writer(stream, folder, dtype, grows), stream.settings.max_tokens
    batches, most = stream.inputs(), 0
    with writer.progress:
        while shard := _next_shard(stream, batches, shard_tokens, limit, given=most):
            writer.take(shard, is_own=writer.shards % num_processes == process_index)
            most += sum(map(stream.most_kept, shard))
        tokens = writer.tokens_on_disk()
        if tokens is None:
            return None
        # Which tokens have an outlying norm is known only now.
        while shard := _next_shard(stream, batches, shard_tokens, limit, given=tokens):
            tokens += writer.take(shard)
    if tokens == 0:
        # Those of this text, which would be taken for a harvest; there may be another.
        for number in range(writer.shards):
            (folder / _shard_name(number)).unlink(missing_ok=True)
        raise stream.no_tokens()
    tokens = tokens if limit is None else min(tokens, limit)
    for path in folder.glob("shard-*.safetensors"):
        # Of a shorter harvest that grew, whose last shards were smaller.
        if grows and path.name >= _shard_name(writer.shards):
            path.unlink(missing_ok=True)
    _write_json(folder / DESCRIPTION, description)
    _write_json(folder / COMPLETE, {"num_shards": writer.shards, "tokens": tokens})
    stream.log_counts()
    return tokens


class _Writer:
    """Shards of one harvest, whose texts so far have the checksums `texts`."""

    def __init__(self, stream: ActivationStream, folder: Path, dtype: torch.dtype, grows: bool):
        self.stream, self.folder, self.dtype, self.grows = stream, folder, dtype, grows
        self.texts: list[str] = []
        form: dict[str, Any] = {"unit": "token", "unit_scale": True, "desc": "harvest"}
        settings = stream.settings
        self.progress = logging.tqdm(total=settings.max_tokens, disable=not settings.show_progress, **form)
        self.to_show = settings.max_tokens

    @property
    def shards(self) -> int:
        return len(self.texts)

    def take(self, batches: list[Inputs], is_own: bool = True) -> int:
        """Tokens of the next shard, which is written if it is this process's own, and left alone if it is there."""
        texts = _prefix_checksums(batches)
        tokens = self._written(batches, texts)["tokens"] if is_own else 0
        self.texts.append(texts[-1])
        return tokens

    def _written(self, batches: list[Inputs], texts: list[str]) -> dict[str, int]:
        path, stream = self.folder / _shard_name(self.shards), self.stream
        found = _counts_on_disk(path, texts if self.grows else texts[-1:], self.grows and self.shards > 0)
        if found is not None:
            stream.counts.update(found)
            self._show(found["tokens"])
            return found
        before, pieces = Counter(stream.counts), []
        for inputs in batches:
            read = stream.read(inputs)
            pieces.append([states[read.kept] for states in read.states])
            self._show(len(pieces[-1][0]))
        names = [_tensor_name(site.layer, site.hook_point) for site in stream.sites]
        tensors = {name: self._stored(torch.cat(parts)) for name, parts in zip(names, zip(*pieces))}
        counts = {name: stream.counts[name] - before[name] for name in stream.counts}
        _write_shard(path, tensors, {"counts": counts, "text_sha256": texts[-1]})
        return counts

    def _show(self, tokens: int) -> None:
        """Moves the bar, and not beyond its end: the last batch is read whole."""
        if self.to_show is not None:
            tokens = min(tokens, self.to_show)
            self.to_show -= tokens
        self.progress.update(tokens)

    def _stored(self, states: torch.Tensor) -> torch.Tensor:
        """The values as they are written, if their type can hold them."""
        stored = states.to("cpu", self.dtype)
        if not stored.isfinite().all():
            raise ValueError(
                f"activations of up to {states.abs().max():.6g} are too large for {str(self.dtype)[6:]}, which ends at "
                f"{torch.finfo(self.dtype).max:,.6g}: harvest into another folder with dtype=torch.bfloat16 or "
                "torch.float32"
            )
        return stored

    def tokens_on_disk(self) -> int | None:
        """Of all shards so far, or None if other processes have not written theirs, or replaced those that grow."""
        try:
            records = [_read_shard(self.folder / _shard_name(number))[1] for number in range(self.shards)]
        except ValueError:
            return None
        differing = [number for number, record in enumerate(records) if record["text_sha256"] != self.texts[number]]
        if differing and not self.grows:
            raise _other_text(self.folder / _shard_name(differing[0]))
        if differing:
            return None
        return sum(record["counts"]["tokens"] for record in records)


class ActivationShards(torch.utils.data.Dataset):
    """
    Activations that [`save_shards`] wrote, memory-mapped: a dataset for `Trainer` whose items are
    `{"hidden_states": (d_in,) float32}`, and of a transcoder `{"hidden_states": (d_in,), "targets": (d_out,)}`.
    `description` holds the settings of the harvest.

    Args:
        folder (`str` or `os.PathLike`): what was given to `save_shards`.
        layer (`int`, *optional*): which layer to read; needed only if several were harvested.
        hook_point (`str`, *optional*): which site of it; likewise.
        target_hook_point (`str`, *optional*): the site that a transcoder computes from it.

    Raises:
        `ValueError`: If there is no harvest, an unfinished one, a torn or missing shard, a damaged record, no such layer or
            site, or no token.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        layer: int | None = None,
        hook_point: str | None = None,
        target_hook_point: str | None = None,
    ):
        # A worker process may have another working directory.
        self.folder = Path(folder).absolute()
        if not (self.folder / DESCRIPTION).exists():
            raise ValueError(f"expected a folder written by save_shards, got {folder}, which has no {DESCRIPTION}")
        self.description = _read_description(self.folder)
        layer = None if layer is None else integer("layer", layer)
        self.layer: int | None = _harvested(self.description, "layer", layer)
        self.hook_point: str = _harvested(self.description, "hook_point", hook_point)
        self.target_hook_point: str | None = None
        if target_hook_point is not None:
            self.target_hook_point = _harvested(self.description, "hook_point", target_hook_point)
        if not (self.folder / COMPLETE).exists():
            written = len(list(self.folder.glob("shard-*.safetensors")))
            raise ValueError(
                f"the harvest in {folder} is not finished, it has {written} shards so far: run it again, it goes on "
                "where it stopped"
            )
        complete = _read_json(self.folder / COMPLETE, num_shards=int, tokens=int)
        count = complete["num_shards"]
        self._paths = [self.folder / _shard_name(number) for number in range(count)]
        read = [name for name in (self.hook_point, self.target_hook_point) if name is not None]
        sites = [[self._site(path, name) for path in self._paths] for name in read]
        self._shards, self._targets = sites[0], sites[-1]
        ends = torch.tensor([len(shard) for shard in self._shards], dtype=torch.int64).cumsum(0)
        there = sum(map(len, self._shards))
        if there == 0:
            raise ValueError(f"the {count} shards in {folder} hold no tokens: harvest more text")
        if not 0 < complete["tokens"] <= there:
            raise ValueError(
                f"{self.folder / COMPLETE} says {complete['tokens']} tokens, the {count} shards hold {there}: run the "
                "harvest again"
            )
        # The last shard may hold more tokens than were asked for.
        last = len(self._shards[-1]) - int(ends[-1]) + complete["tokens"]
        for shards in sites:
            shards[-1] = shards[-1][:last]
        self._ends = ends.clamp(max=complete["tokens"])

    def __reduce__(self) -> tuple:
        # A worker process maps the files itself: the shards would be sent to it in full.
        return type(self), (self.folder, self.layer, self.hook_point, self.target_hook_point)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        rows = self.rows(torch.as_tensor(indices))
        if self.target_hook_point is None:
            return [{"hidden_states": row} for row in rows]
        return [{"hidden_states": row, "targets": target} for row, target in zip(*rows)]

    def rows(self, indices: torch.Tensor) -> Any:
        """(n,) token numbers to (n, d_in) activations, in float32, or a pair of these and (n, d_out) targets."""
        if indices.is_floating_point() or indices.dtype == torch.bool:
            raise IndexError(f"token numbers must be integers, got {indices.dtype}")
        if len(indices) and not -len(self) <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(
                f"token numbers must be in [0, {len(self)}), got {int(indices.min())}…{int(indices.max())}"
            )
        indices = indices % len(self)
        rows = self._rows(self._shards, indices)
        return rows if self.target_hook_point is None else (rows, self._rows(self._targets, indices))

    def _rows(self, shards: list[torch.Tensor], indices: torch.Tensor) -> torch.Tensor:
        numbers = torch.searchsorted(self._ends, indices, right=True)
        rows = torch.empty(len(indices), shards[0].shape[1])
        for number in numbers.unique().tolist():
            here = numbers == number
            start = int(self._ends[number]) - len(shards[number])
            rows[here] = shards[number][indices[here] - start].float()
        return rows

    def batches(self, batch_tokens: int = 4096) -> Iterator[Any]:
        """All activations in order, as [`~ActivationShards.rows`], (batch_tokens, d_in) each, fewer at the end of a shard."""
        batch_tokens = integer("batch_tokens", batch_tokens, 1)
        for shard, targets in zip(self._shards, self._targets):
            for batch, goals in zip(shard.split(batch_tokens), targets.split(batch_tokens)):
                yield batch.float() if self.target_hook_point is None else (batch.float(), goals.float())

    def verify(self) -> None:
        """Read every shard in full and compare its checksum; raises `ValueError` at the first that is not as written."""
        for path in self._paths:
            _read_shard(path, check=True)
        more = sorted(set(self.folder.glob("shard-*.safetensors")) - set(self._paths))
        if more:
            raise ValueError(
                f"{more[0]} belongs to no harvest: {COMPLETE} says {len(self._paths)} shards; run the harvest again, or "
                "delete what is not of it"
            )

    @property
    def widths(self) -> tuple[int, int]:
        """Size of the activations and of the targets, which are the same for an autoencoder."""
        return self._shards[0].shape[1], self._targets[0].shape[1]

    def check_reads(self, sae: HierarchicalSaeModel) -> None:
        """Raise a `ValueError` unless these are activations of the kind that an autoencoder was trained on."""
        config = sae.config
        layer = self.layer if config.layer is None else config.layer
        hook_point = config.hook_point or self.hook_point
        trained = _kind((config.d_in, config.d_out), layer, hook_point, config.target_hook_point)
        found = _kind(self.widths, self.layer, self.hook_point, self.target_hook_point)
        if found != trained:
            raise ValueError(
                f"the {config.kind} was trained on activations of {trained}, {self.folder} holds those of {found}"
            )
        named, harvested = config.model_name, self.description.get("model_name")
        if named not in (None, harvested):
            logger.warning(f"the {config.kind} was trained on {named}, {self.folder} was harvested from {harvested}")

    def _site(self, path: Path, hook_point: str) -> torch.Tensor:
        """(tokens, width) of a site in a shard."""
        name = _tensor_name(self.layer, hook_point)
        tensor, width = _read_shard(path)[0].get(name), self.description["widths"].get(name)
        if tensor is None or tensor.ndim != 2 or tensor.shape[1] != width:
            found = None if tensor is None else tuple(tensor.shape)
            raise ValueError(f"{path} must hold {name} of shape (tokens, {width}), got {found}: {DAMAGED}")
        return tensor


def pieces_of(activations: Any, sae: HierarchicalSaeModel) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """
    Pieces of activations, (tokens, d_in), and of what is to be computed from them, (tokens, d_out), the same for an
    autoencoder.

    Args:
        activations (`torch.Tensor`, iterable of them, [`ActivationStream`] or [`ActivationShards`]): for a transcoder,
            pairs in their place.
        sae ([`HierarchicalSaeModel`]): what is to read them.

    Raises:
        `ValueError`: If a stream or a harvest is of something else than it was trained on, or pieces have other shapes or
            are not floating point.
    """
    pairs = sae.config.is_transcoder
    given = isinstance(activations, torch.Tensor) or (pairs and isinstance(activations, tuple))
    if isinstance(activations, str | bytes | Mapping) or not (
        given or isinstance(activations, Iterable | ActivationShards)
    ):
        raise ValueError(f"expected activations, a tensor or several, got a {type(activations).__name__}")
    if isinstance(activations, ActivationStream):
        activations.check_reads(sae, with_targets=True)
    if isinstance(activations, ActivationShards):
        activations.check_reads(sae)
        activations = activations.batches()
    return (_pair(piece, sae) for piece in ([activations] if given else activations))


def _pair(piece: Any, sae: HierarchicalSaeModel) -> tuple[torch.Tensor, torch.Tensor]:
    if not sae.config.is_transcoder:
        sae._check_input(piece, None)
        x = piece.reshape(-1, sae.config.d_in)
        return x, x
    if not isinstance(piece, tuple | list) or len(piece) != 2:
        raise ValueError(
            f"a transcoder needs pairs of activations and targets, got a {type(piece).__name__}: give tuples, or a stream "
            "or harvest with target_hook_point"
        )
    x, targets = piece
    sae._check_input(x, None)
    sae._check_targets(x, targets)
    return x.reshape(-1, x.shape[-1]), targets.reshape(-1, targets.shape[-1])


def _kind(widths: tuple[int, int | None], layer: int | None, hook_point: str, target_hook_point: str | None) -> str:
    """What activations are, for comparison and errors."""
    found = f"size {widths[0]} of {place_name(layer, hook_point)}"
    if target_hook_point is None:
        return found
    return f"{found}, and of size {widths[1]} of {place_name(layer, target_hook_point)} to compute from them"


def _next_shard(
    stream: ActivationStream, batches: Iterator[Inputs], shard_tokens: int, limit: int | None, *, given: int
) -> list[Inputs]:
    """Forward passes of `shard_tokens` tokens of text, fewer at its end or where `given` + these can be the limit."""
    shard, tokens = [], 0
    while tokens < shard_tokens and (limit is None or given < limit):
        inputs = next(batches, None)
        if inputs is None:
            break
        shard.append(inputs)
        tokens += int(inputs.mask.sum())
        given += stream.most_kept(inputs)
    return shard


def _prefix_checksums(batches: list[Inputs]) -> list[str]:
    """Of the text of the first forward pass, of the first two, and so on."""
    digest, found = hashlib.sha256(), []
    for inputs in batches:
        digest.update(inputs.ids.numpy().tobytes())
        found.append(digest.hexdigest())
    return found


def _counts_on_disk(path: Path, texts: list[str], is_replaced: bool) -> dict[str, int] | None:
    """
    Counts of a shard that is there and whole, of the last of these texts; else None, if it is of an earlier one, or to be
    replaced; refuses one of another text.
    """
    if not path.exists():
        return None
    try:
        record = _read_shard(path, check=True)[1]
    except ValueError as error:
        logger.warning(f"{error}; harvesting it again")
        return None
    if record["text_sha256"] == texts[-1]:
        return record["counts"]
    # A harvest that grew: the last shard of the shorter one held less text, and those behind it other text.
    if is_replaced or record["text_sha256"] in texts:
        return None
    raise _other_text(path)


def _other_text(path: Path) -> ValueError:
    return ValueError(
        f"{path} was harvested from another text: expected the dataset and order of that harvest; "
        "give these, or another folder"
    )


def _harvested(description: dict, name: str, given: Any) -> Any:
    """The layer or hook point that is asked for, by default the only one that was harvested."""
    found = description[f"{name}s"]
    given = found[0] if given is None and len(found) == 1 else given
    if given not in found:
        raise ValueError(f"{name} must be one of the harvested {name}s {found}, got {given}")
    return given


def _tensor_name(layer: int | None, hook_point: str) -> str:
    """What a shard calls the activations of a site."""
    if layer is None:
        return hook_point
    return f"layer_{layer}" if hook_point == "output" else f"layer_{layer}.{hook_point}"


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)} ".encode())
        digest.update(tensors[name].view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write_shard(path: Path, tensors: dict[str, torch.Tensor], record: dict) -> None:
    # One entry: safetensors writes several in random order, and equal harvests should be equal files.
    harvest = json.dumps({**record, "sha256": _checksum(tensors)})
    with whole_file(path) as unfinished:
        save_file(tensors, unfinished, metadata={"harvest": harvest})


def _read_shard(path: Path, check: bool = False) -> tuple[dict[str, torch.Tensor], dict]:
    """Memory-mapped tensors, and the record of their harvest. Raises `ValueError` if the file is not as written."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is torn or missing ({error}): {DAMAGED}") from error
    record = _parsed(path, (metadata or {}).get("harvest", ""), counts=dict, text_sha256=str, sha256=str)
    if "tokens" not in record["counts"] or (check and _checksum(tensors) != record["sha256"]):
        raise ValueError(f"{path} is damaged, its checksum differs: {DAMAGED}")
    return tensors, record


def _parsed(path: Path, text: str, **kinds: type) -> dict:
    """JSON that stands in a file, with these names of these types. Raises `ValueError` if it is anything else."""
    found: Any = None
    with suppress(ValueError):
        found = json.loads(text)
    found = found if isinstance(found, dict) else {}
    wrong = [name for name in kinds if not isinstance(found.get(name), kinds[name])]
    if wrong:
        raise ValueError(
            f"{path} is damaged or was not written by save_shards, it has no {wrong[0]}: delete it and run the harvest "
            "again, it goes on with what is whole"
        )
    return found


def _read_json(path: Path, **kinds: type) -> dict:
    return _parsed(path, path.read_text(encoding="utf-8", errors="replace"), **kinds)


def _write_json(path: Path, content: dict) -> None:
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n")


def _read_description(folder: Path) -> dict:
    """The settings of a harvest; what is missing in an older one is as it was before it could be chosen."""
    before = {"hook_points": ["output"], "skip_special_tokens": False, "skip_tokens": None}
    found: dict[str, Any] = {**before, **_read_json(folder / DESCRIPTION, layers=list)}
    if "widths" in found:
        return {**found, **_read_json(folder / DESCRIPTION, widths=dict)}
    width = _read_json(folder / DESCRIPTION, hidden_size=int)["hidden_size"]
    names = [_tensor_name(layer, name) for layer in found["layers"] for name in found["hook_points"]]
    return {**found, "widths": dict.fromkeys(names, width)}


def _write_description(folder: Path, description: dict, *, is_alone: bool) -> bool:
    """Whether a shorter harvest with these settings is there, which grows; refuses one with others, or a longer one."""
    path = folder / DESCRIPTION
    # Of a harvest that failed before its first shard nothing is there that other settings could spoil.
    is_begun = not is_alone or any(folder.glob("shard-*.safetensors"))
    if not path.exists() or not is_begun:
        _write_json(path, description)
    # An older one does not say of what type the language model was.
    unknown = {name: description[name] for name in ("model_dtype", "quantization")}
    found = {**unknown, **_read_description(folder)}
    differing = [name for name in description if found.get(name) != description[name]]
    limits = [math.inf if each["max_tokens"] is None else each["max_tokens"] for each in (found, description)]
    if differing == ["max_tokens"] and limits[1] > limits[0]:
        (folder / COMPLETE).unlink(missing_ok=True)
        _write_json(path, {**description, "grows": True})
        return True
    if differing:
        name = differing[0]
        raise ValueError(
            f"{folder} holds a harvest with {name}={found.get(name)!r}, got {name}={description[name]!r}: give the "
            "settings of that harvest to go on with it, more max_tokens to let it grow, or another folder"
        )
    return found.get("grows", False)
