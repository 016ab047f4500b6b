"""Text as people have it: files, rows of text, chats, token ids; cut into contexts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .configuration_hierarchical_sae import integers, is_integer


# Characters of a text that are tokenised at once: memory and time grow faster than a longer text.
LONGEST_TEXT = 100_000
# Characters of a file that are read at a time; as many again until the line ends.
PASSAGE = 10_000
# What a row is read by if it has no text, in this order.
COLUMNS = ("messages", "prompt", "input_ids")
# Files that hold rows, by the name that `datasets` has for their format.
ROW_FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}


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
            with open(file, encoding="utf-8") as lines:
                try:
                    while piece := lines.read(PASSAGE):
                        yield piece + lines.readline(PASSAGE)
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"expected UTF-8 text in {file}, got {error}: convert it, as iconv does"
                    ) from error


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
        raise ValueError(f"expected files with text, got {', '.join(missing)}, which are none")
    kinds = {ROW_FILES.get(file.suffix) for file in files}
    if kinds == {None}:
        return Passages(files)
    if len(kinds) > 1:
        found = ", ".join(str(file) for file in files)
        raise ValueError(f"expected files of one kind, of text or of rows of one format, got {found}")
    return _datasets().load_dataset(
        kinds.pop(), data_files=[str(file) for file in files], split="train", streaming=True
    )


def read_dataset(name: str, config: str | None = None, split: str = "train") -> Any:
    """
    A dataset of the Hub or of a folder, as a stream; one that `save_to_disk` wrote, memory-mapped.

    Args:
        name (`str`): its id or folder.
        config (`str`, *optional*): which of its configurations.
        split (`str`, defaults to `"train"`): which part of it.

    Raises:
        `ImportError`: If `datasets` is not installed.
        `ValueError`: If it has no such split.
    """
    datasets = _datasets()
    if not any((Path(name) / file).exists() for file in ("state.json", "dataset_dict.json")):
        return datasets.load_dataset(name, config, split=split, streaming=True)
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
    if text_column == "text" and text_column not in row:
        text_column = next((name for name in COLUMNS if name in row), text_column)
    if text_column not in row:
        raise ValueError(
            f"text_column must name a column of the dataset {list(row)}, got {text_column!r} (row {number})"
        )
    content = row[text_column]
    if text_column == "prompt" and content is not None and row.get("completion") is not None:
        content = content + row["completion"]
    if text_column == "input_ids" and content is not None:
        return _unmasked_ids(content, row.get("attention_mask"), number)
    if content is None or isinstance(content, str) or _is_chat(content):
        return content
    raise ValueError(
        f"row {number} of the dataset must hold a text in {text_column!r}, got {content!r:.80}; messages of a chat have a "
        "role and a content each"
    )


def _is_chat(content: Any) -> bool:
    is_list = isinstance(content, list | tuple)
    return is_list and all(isinstance(message, Mapping) and {"role", "content"} <= set(message) for message in content)


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
        special (`bool`): whether its special tokens are among them.
        tokens (`Sequence[int]` or `Sequence[str]`, *optional*): others.

    Raises:
        `ValueError`: If one is no token of the tokenizer.
    """
    if not isinstance(special, bool) or isinstance(tokens, str):
        raise ValueError(
            "skip_special_tokens must be True or False and skip_tokens a list of tokens or None, got "
            f"{special!r} and {tokens!r}"
        )
    vocabulary = tokenizer.get_vocab() if tokens else {}
    ids = set(tokenizer.all_special_ids) if special else set()
    for token in tokens or []:
        known = token in vocabulary if isinstance(token, str) else is_integer(token) and token in vocabulary.values()
        if not known:
            raise ValueError(
                f"skip_tokens must be tokens of the tokenizer, or their ids, got {token!r}, which is none"
            )
        ids.add(vocabulary[token] if isinstance(token, str) else int(token))
    return torch.tensor(sorted(ids), dtype=torch.int64)


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
        for piece in _pieces(content):
            # The piece is cut later, so the tokenizer's warning about its length does not apply.
            yield tokenizer(piece, verbose=False)["input_ids"]
    else:
        try:
            found: Any = tokenizer.apply_chat_template(content, tokenize=True, return_dict=True)
        except Exception as error:
            # Of any type: templates raise what they like.
            raise ValueError(
                f"row {row} of the dataset holds messages that the tokenizer's chat template does not take: {error}"
            ) from error
        yield found["input_ids"]


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
