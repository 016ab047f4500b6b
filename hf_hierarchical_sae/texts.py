"""From a user's data to the token ids of contexts: files and datasets, rows, pieces of long texts."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Characters of a file that are tokenised at a time; as many again until the line ends.
PASSAGE = 10_000
# Characters of a text that are tokenised at once: memory and time grow faster than a longer text.
LONGEST_TEXT = 100_000


class TextFiles:
    """
    Passages of text files, so that a large file is not tokenised at once, whether or not it has lines.

    Args:
        files (`Sequence[Path]`): UTF-8 text.

    Raises:
        `ValueError`: While iterating, if a file is not UTF-8 text.
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
                    raise ValueError(f"expected UTF-8 text in {file}, got {error}") from error


def load_texts(dataset: str, split: str) -> Any:
    """Rows of a dataset of the Hub, as a stream."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("--dataset needs one more package: pip install 'hf_hierarchical_sae[cli]'") from error
    return load_dataset(dataset, split=split, streaming=True)


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


def read_contexts(
    rows: Iterable[tuple[int, Any]],
    tokenizer: PreTrainedTokenizerBase,
    text_column: str,
    context_length: int,
    *,
    counts: Counter,
) -> Iterator[tuple[int, list[int]]]:
    """
    The row and the token ids of each context.

    Args:
        rows (`Iterable`): number and content of each row.
        tokenizer (`PreTrainedTokenizerBase`): if it starts a text with a BOS token, so starts each context.
        text_column (`str`): where a row holds its text.
        context_length (`int`): longest context in tokens.
        counts (`Counter`): gets the `rows_without_text`.

    Raises:
        `ValueError`: If a row has no such column or something else than a text in it.
    """
    # The text is read from its start whenever it is read, after an interruption too.
    counts["rows_without_text"] = 0
    for number, row in rows:
        if text := _text_of(row, text_column, number):
            for piece in _pieces(text):
                # The piece is cut here, so the tokenizer's warning about its length does not apply.
                ids = tokenizer(piece, verbose=False)["input_ids"]
                yield from ((number, context) for context in _cut(ids, tokenizer.bos_token_id, context_length))
            continue
        if not counts["rows_without_text"]:
            logger.warning(f"row {number} of the dataset has no text: it is left out, as are others like it")
        counts["rows_without_text"] += 1


def _text_of(row: Any, text_column: str, number: int) -> str | None:
    """The text of a row, None if it has none."""
    if row is None or isinstance(row, str):
        return row
    if not isinstance(row, Mapping):
        raise ValueError(
            f"row {number} of the dataset must be a text, or hold one in {text_column!r}, got a {type(row).__name__}"
        )
    if text_column not in row:
        raise ValueError(
            f"text_column must name a column of the dataset {list(row)}, got {text_column!r} (row {number})"
        )
    text = row[text_column]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"row {number} of the dataset must hold a text in {text_column!r}, got {text!r:.80}")
    return text


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


def _cut(ids: list[int], bos_token_id: int | None, context_length: int) -> Iterator[list[int]]:
    """Contexts of a text; if it starts with a BOS token, so does each."""
    start = ids[:1] if ids and ids[0] == bos_token_id else []
    ids, size = ids[len(start) :], context_length - len(start)
    for first in range(0, len(ids), size):
        yield start + ids[first : first + size]
