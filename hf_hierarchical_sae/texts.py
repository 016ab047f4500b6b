"""Text as people have it: files, rows of text, chats, token ids; cut into contexts."""

import glob
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import PreTrainedTokenizerBase

from .configuration_hierarchical_sae import integers, is_integer


# Characters of a text that are tokenised at once: memory and time grow faster than a longer text.
LONGEST_TEXT = 100_000
# Characters of a file that are read at a time; as many again until the line ends.
PASSAGE = 10_000
# What a row is read by unless a column is named: the first of these that is not empty.
COLUMNS = ("text", "messages", "prompt", "input_ids")
# Files that hold rows, by the name that `datasets` has for their format; and how they may be packed.
ROW_FILES = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".arrow": "arrow",
}
PACKED = (".gz", ".bz2", ".xz", ".zst")


class Passages(Iterable[str]):
    """
    Text files in pieces, so that a large one is not tokenised at once, whether or not it has lines.

    Args:
        files (`Sequence[Path]`): in UTF-8.
    """

    def __init__(self, files: Sequence[Path]):
        self.files = files

    def __iter__(self) -> Iterator[str]:
        for file in self.files:
            with open(file, encoding="utf-8-sig") as lines:
                try:
                    while piece := lines.read(PASSAGE):
                        yield piece + lines.readline(PASSAGE)
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"expected UTF-8 text in {file}, got {error}: convert it, as iconv does, or unpack it"
                    ) from error


class Rows(Iterable[dict]):
    """
    Rows of one stream after the other.

    Args:
        streams (`Mapping[str, Callable]`): what gives the rows of each, by what a user calls it.
        kind (`str`): what they are to be, for errors.
    """

    def __init__(self, streams: Mapping[str, Callable[[], Iterable[dict]]], kind: str):
        self.streams, self.kind = streams, kind

    def __iter__(self) -> Iterator[dict]:
        for name, stream in self.streams.items():
            try:
                yield from stream()
            except Exception as error:
                # Of any type: each format raises its own, an empty file StopIteration.
                raise ValueError(f"expected {self.kind} in {name}, got: {str(error) or 'none'}") from error


def read_files(files: Sequence[Path]) -> Any:
    """
    Rows of JSON Lines, JSON, Parquet, CSV or Arrow files, as a stream, or passages of files of plain text.

    Args:
        files (`Sequence[Path]`): all of one kind.

    Raises:
        `ImportError`: If there are rows and `datasets` is not installed.
        `ValueError`: If there is no such file, or they are of several kinds.
    """
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"expected files with text, got {', '.join(missing)}, which are none: a folder of files is a dataset"
        )
    kinds = {_kind(file) for file in files}
    if len(kinds) > 1:
        found = ", ".join(str(file) for file in files)
        raise ValueError(f"expected files of one kind, of text or of rows of one format, got {found}")
    kind = kinds.pop()
    if kind is None:
        return Passages(files)
    load = partial(_datasets().load_dataset, kind, split="train", streaming=True)
    # By its own name, whatever that would stand for as a pattern.
    streams = {str(file): partial(load, data_files=glob.escape(str(file))) for file in files}
    return Rows(streams, f"rows of {kind}, in UTF-8,")


def _kind(file: Path) -> str | None:
    """The format of a file of rows, packed or not, None for plain text."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    is_packed = suffixes[-1:] != [] and suffixes[-1] in PACKED
    return ROW_FILES.get("".join(suffixes[:-1][-1:] if is_packed else suffixes[-1:]))


def read_dataset(name: str, config: str | None = None, split: str = "train") -> Any:
    """
    A dataset of the Hub or of a folder, as a stream; one that `save_to_disk` wrote, memory-mapped.

    Args:
        name (`str`): its id or folder.
        config (`str`, *optional*): which of its configurations.
        split (`str`, defaults to `"train"`): which part of it.

    Raises:
        `ImportError`: If `datasets` is not installed.
        `ValueError`: If it has no such configuration or split, or `datasets` does not read it; while iterating, if its
            rows cannot be read.
    """
    datasets = _datasets()
    if not any((Path(name) / file).exists() for file in ("state.json", "dataset_dict.json")):
        try:
            found = datasets.load_dataset(name, config, split=split, streaming=True)
            return Rows({name: lambda: found}, "rows")
        except OSError:
            raise
        except Exception as error:
            reason = " ".join(str(error).partition("Example of usage")[0].split())
            raise ValueError(
                f"{name} has no part with dataset_config={config!r} and split={split!r}: {reason}"
            ) from error
    found = datasets.load_from_disk(name)
    if not isinstance(found, Mapping):
        return found
    if split not in found:
        raise ValueError(f"{name} has the splits {', '.join(map(str, found))}, got {split!r}")
    return found[split]


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "datasets and files of rows need one more package: pip install 'hf_hierarchical_sae[cli]'"
        ) from error
    return datasets


def check_dataset(dataset: Any) -> None:
    """Raise a `ValueError` for one text, or for the splits of a dataset, in the place of texts."""
    # A data frame gives the names of its columns, as a mapping its keys.
    if isinstance(dataset, Mapping) or hasattr(dataset, "columns"):
        raise ValueError(
            f"expected texts or rows with a text, got a {type(dataset).__name__} of {[*dataset][:10]}: choose one of its "
            "splits, as in load_dataset(…, split='train'), or columns"
        )
    if isinstance(dataset, str | bytes | torch.Tensor) or not isinstance(dataset, Iterable):
        raise ValueError(
            f"expected a list of texts, or rows with a text, got a single {type(dataset).__name__}: put a text in a list"
        )


def content_of(row: Any, text_column: str, number: int) -> Any:
    """
    The text of a row, its messages or its token ids; None if it has none.

    Args:
        row (`str` or `Mapping`): a text, or columns.
        text_column (`str`): which column; for `"text"`, others are known where it is missing.
        number (`int`): of the row, for errors.

    Raises:
        `ValueError`: If the row has no such column, or something else in it.
    """
    if row is None or isinstance(row, str):
        return row
    if not isinstance(row, Mapping):
        raise ValueError(
            f"row {number} of the dataset must be a text, or hold one in {text_column!r}, got a {type(row).__name__}"
        )
    if text_column == "text":
        # Where rows differ in their columns, `datasets` gives each row all of them.
        found = [name for name in COLUMNS if name in row]
        text_column = next((name for name in found if row[name] is not None), (found or COLUMNS)[0])
    if text_column not in row:
        raise ValueError(
            f"text_column must name a column of the dataset {list(row)}, got {text_column!r} (row {number})"
        )
    content = row[text_column].tolist() if isinstance(row[text_column], numpy.ndarray) else row[text_column]
    if text_column == "prompt" and content is not None and row.get("completion") is not None:
        content = _with_completion(content, row["completion"], number)
    if content is None or isinstance(content, str) or _is_chat(content):
        return content
    if text_column == "input_ids" or isinstance(content, torch.Tensor) or _are_all(content, Integral):
        return _unmasked_ids(content, row.get("attention_mask"), number)
    raise ValueError(
        f"row {number} of the dataset must hold a text in {text_column!r}, got {content!r:.80}; messages of a chat have a "
        "role and a content each, and ids of tokens are integers"
    )


def _with_completion(prompt: Any, completion: Any, number: int) -> Any:
    """Both as one text, or as the messages of one chat."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion
    if isinstance(prompt, list) and isinstance(completion, list | numpy.ndarray):
        return [*prompt, *completion]
    raise ValueError(
        f"row {number} of the dataset must hold two texts, or two lists of messages, in 'prompt' and 'completion', got a "
        f"{type(prompt).__name__} and a {type(completion).__name__}"
    )


def _are_all(content: Any, kind: type) -> bool:
    """Whether it is a list of these."""
    return isinstance(content, list | tuple) and all(issubclass(found, kind) for found in set(map(type, content)))


def _is_chat(content: Any) -> bool:
    is_list = _are_all(content, Mapping)
    return is_list and all("role" in message and {"content", "tool_calls"} & set(message) for message in content)


def _unmasked_ids(ids: Any, mask: Any, number: int) -> torch.Tensor:
    """(tokens,) ids at which the mask, if there is one, is not 0."""
    try:
        found = torch.tensor(integers("input_ids", ids), dtype=torch.int64)
        keep = found.new_ones(len(found)) if mask is None else torch.tensor(integers("attention_mask", mask))
    except ValueError as error:
        raise ValueError(f"row {number} of the dataset: {error}") from error
    if keep.shape != found.shape or (len(found) and int(found.min()) < 0):
        raise ValueError(
            f"row {number} of the dataset must hold ids of tokens and a mask of the same length, got {ids!r:.80}"
        )
    return found[keep.bool()]


def skipped_ids(tokenizer: PreTrainedTokenizerBase, special: bool, tokens: Sequence[int | str] | None) -> torch.Tensor:
    """
    (n,) ids of tokens that are read and not given.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the language model's.
        special (`bool`): whether its special tokens are among them, those that were added too.
        tokens (`Sequence[int]` or `Sequence[str]`, *optional*): others: ids, entries of the vocabulary, or texts of one token.

    Raises:
        `ValueError`: If one is no token of the tokenizer.
    """
    vocabulary = tokenizer.get_vocab() if tokens else {}
    ids = {_id_of(token, vocabulary, tokenizer) for token in tokens or []}
    if special:
        # Not all of them have a name, as that of the BOS token.
        added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        ids |= added | set(tokenizer.all_special_ids)
    return torch.tensor(sorted(ids), dtype=torch.int64)


def _id_of(token: Any, vocabulary: Mapping[str, int], tokenizer: PreTrainedTokenizerBase) -> int:
    if isinstance(token, str):
        found = tokenizer(token, add_special_tokens=False)["input_ids"]
        found = [vocabulary[token]] if token in vocabulary else found
    else:
        found = [int(token)] if is_integer(token) and token in vocabulary.values() else []
    if len(found) != 1:
        raise ValueError(
            f"skip_tokens must be tokens of the tokenizer, texts of one token each, or ids, got {token!r}, which is "
            f"{len(found) or 'none'}"
        )
    return found[0]


def token_contexts(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[tuple[int, Any]], context_length: int
) -> Iterator[tuple[int, list[int]]]:
    """
    The row and the token ids of each context. If the tokenizer starts a text with a BOS token, so starts each context.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the language model's.
        rows (`Iterable`): the number and content of each row, from [`content_of`].
        context_length (`int`): longest context; longer contents are cut into several.
    """
    for row, content in rows:
        for ids in _token_ids(tokenizer, content, row):
            start = ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
            ids, size = ids[len(start) :], context_length - len(start)
            for first in range(0, len(ids), size):
                yield row, start + ids[first : first + size]


def _token_ids(tokenizer: PreTrainedTokenizerBase, content: Any, row: int) -> Iterator[list[int]]:
    """Of a content, or of a long text's pieces."""
    if isinstance(content, torch.Tensor):
        yield content.tolist()
    elif isinstance(content, str):
        rest = len(content)
        for piece in _pieces(content):
            # The piece is cut later, so the tokenizer's warning about its length does not apply.
            ids, rest = tokenizer(piece, verbose=False)["input_ids"], rest - len(piece)
            # The text goes on where a tokenizer has put its end.
            ends = rest and ids[-1:] == [tokenizer.eos_token_id] and not piece.endswith(tokenizer.eos_token)
            yield ids[:-1] if ends else ids
    else:
        pieces = _pieces(_chat_text(tokenizer, content, row))
        found = (tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"] for piece in pieces)
        yield [token for ids in found for token in ids]


def _chat_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping], row: int) -> str:
    """A chat as the tokenizer's template writes it."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"row {row} of the dataset holds messages, and the tokenizer has no chat template: set "
            "tokenizer.chat_template, take the tokenizer of an instruction-tuned model, or give text_column a column of text"
        )
    try:
        return str(tokenizer.apply_chat_template([_message(message) for message in messages], tokenize=False))
    except Exception as error:
        # Of any type: templates raise what they like.
        raise ValueError(
            f"row {row} of the dataset holds messages that the tokenizer's chat template does not take: {error}"
        ) from error


def _message(message: Mapping) -> dict:
    """A message without the keys that `datasets` adds because others have them, parts of text alone as one text."""
    message = {key: value for key, value in message.items() if key == "content" or value is not None}
    parts = message.get("content")
    if _are_all(parts, Mapping) and parts and all(part.get("type") == "text" for part in parts):
        message["content"] = "".join(part["text"] for part in parts)
    return message


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces of at most `LONGEST_TEXT` characters, cut before white space where there is any."""
    start = 0
    while len(text) - start > LONGEST_TEXT:
        end = start + LONGEST_TEXT
        end = max(text.rfind(space, start + 1, end) for space in (" ", "\n")) if not text[end].isspace() else end
        end = end if end > start else start + LONGEST_TEXT
        yield text[start:end]
        start = end
    yield text[start:]
