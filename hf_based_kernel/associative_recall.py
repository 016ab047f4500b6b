"""
Multi-query associative recall (MQAR): the task of Zoology (arXiv 2312.04927, section 3) that the ReBased paper reports.

A sequence lists pairs of a key and a value, then asks for some of the keys again; the model has to answer with the value.
"""

import itertools
import math
from collections.abc import Iterator
from numbers import Integral
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction


IGNORED = -100
BLOCK = 1024


def make_recall_dataset(
    num_examples: int,
    *,
    seq_len: int = 64,
    num_pairs: int = 8,
    vocab_size: int = 1024,
    power: float = 0.01,
    random_non_queries: bool = True,
    seed: int = 0,
    streaming: bool = False,
) -> Any:
    """
    Draw examples of multi-query associative recall.

    Tokens 0 … 2 `num_pairs` - 1 are the pairs. Every key comes once more at an even distance from them, nearer ones more
    often than farther ones; all other tokens are fillers. Keys are in [1, `vocab_size` // 2), values above.

    Args:
        num_examples (`int`): Number of sequences.
        seq_len (`int`, *optional*, defaults to 64): Tokens per sequence.
        num_pairs (`int`, *optional*, defaults to 8): Pairs of key and value, and queries, per sequence.
        vocab_size (`int`, *optional*, defaults to 1024): Number of tokens.
        power (`float`, *optional*, defaults to 0.01): The distance d of a query has probability ∝ d ** (`power` - 1).
        random_non_queries (`bool`, *optional*, defaults to `True`): Draw the fillers from the whole vocabulary, so they can
            repeat keys and values by chance. `False` takes token 0, as the ReBased authors' code does.
        seed (`int`, *optional*, defaults to 0): Seed of the drawing.
        streaming (`bool`, *optional*, defaults to `False`): Draw the examples while they are read instead of now: memory
            for 1,024 of them at a time, whatever `num_examples` is. They are the same examples.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` if `streaming`, with the columns `input_ids` and `labels`,
        (seq_len,) each. As transformers' losses shift labels, the answer to the query at token t is `labels[t + 1]`; all
        else is -100.

    Raises:
        TypeError: If a number is of another type.
        ValueError: If the pairs and queries do not fit into the sequence or the vocabulary, or the seed is negative.
        ImportError: If `datasets` is not installed (`pip install "hf_based_kernel[data]"`).
    """
    from datasets import Dataset, IterableDataset

    _check_numbers(num_examples=num_examples, seq_len=seq_len, num_pairs=num_pairs, vocab_size=vocab_size, seed=seed)
    _check_sizes(num_examples, seq_len, num_pairs, vocab_size)
    if not isinstance(power, int | float) or isinstance(power, bool) or not math.isfinite(power):
        raise TypeError(f"power must be a finite number, got {power!r}")
    if not isinstance(random_non_queries, bool):
        raise TypeError(f"random_non_queries must be True or False, got {random_non_queries!r}")
    sizes: dict[str, Any] = {"seq_len": seq_len, "num_pairs": num_pairs, "vocab_size": vocab_size, "power": power}
    sizes |= {"random_non_queries": random_non_queries, "seed": seed}
    starts = range(0, num_examples, BLOCK)
    if streaming:
        # A list among the arguments is what `datasets` divides between processes and workers.
        share = -(-len(starts) // min(64, len(starts)))
        spans = [starts[i : i + share] for i in range(0, len(starts), share)]
        arguments = {"spans": spans, "num_examples": num_examples, **sizes}
        return IterableDataset.from_generator(_stream, gen_kwargs=arguments)
    blocks = [_draw(start, num_examples, **sizes) for start in starts]
    return Dataset.from_dict(
        {column: np.concatenate([block[column] for block in blocks]) for column in ("input_ids", "labels")}
    )


def query_positions(seq_len: int, num_pairs: int) -> torch.Tensor:
    """
    Where a query can stand: every second token behind the pairs.

    Args:
        seq_len (`int`): Tokens per sequence.
        num_pairs (`int`): Pairs of key and value per sequence.

    Returns:
        `torch.Tensor`: (positions,) in ascending order.
    """
    return torch.arange(2 * num_pairs, seq_len, 2)


def recall_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """
    Share of queries that are answered with the right value: a `compute_metrics` for `Trainer`.

    Args:
        prediction (`EvalPrediction`): `predictions`, (batch, seq) token ids, the argmax of the logits at each token, and
            `label_ids`, (batch, seq), as in the dataset.
    """
    answers, labels = (torch.as_tensor(x) for x in (prediction.predictions, prediction.label_ids))
    asked = labels[:, 1:] != IGNORED
    return {"accuracy": (answers[:, :-1] == labels[:, 1:])[asked].double().mean().item()}


def _check_numbers(**numbers: int) -> None:
    for name, number in numbers.items():
        if not isinstance(number, Integral) or isinstance(number, bool):
            raise TypeError(f"{name} must be an integer, got {number!r}")
        if number < 0:
            raise ValueError(f"{name} must not be negative, got {number}")


def _check_sizes(num_examples: int, seq_len: int, num_pairs: int, vocab_size: int) -> None:
    if min(num_examples, num_pairs) < 1:
        raise ValueError(f"num_examples and num_pairs must be at least 1, got {num_examples} and {num_pairs}")
    if seq_len % 2 or seq_len < 4 * num_pairs:
        raise ValueError(
            f"seq_len must be even and at least 4 * num_pairs = {4 * num_pairs}, got {seq_len}; lengthen the sequence or "
            "lower num_pairs"
        )
    if vocab_size // 2 - 1 < num_pairs:
        raise ValueError(f"vocab_size must be at least 2 * num_pairs + 2 = {2 * num_pairs + 2}, got {vocab_size}")


def _stream(spans: list[range], num_examples: int, **sizes: Any) -> Iterator[dict[str, np.ndarray]]:
    for start in itertools.chain(*spans):
        block = _draw(start, num_examples, **sizes)
        for input_ids, labels in zip(block["input_ids"], block["labels"]):
            yield {"input_ids": input_ids, "labels": labels}


def _draw(
    start: int,
    num_examples: int,
    *,
    seq_len: int,
    num_pairs: int,
    vocab_size: int,
    power: float,
    random_non_queries: bool,
    seed: int,
) -> dict[str, np.ndarray]:
    """Examples `start` … `start + BLOCK - 1`, fewer at the end: two arrays (examples, seq_len)."""
    generator = np.random.default_rng([seed, start])
    rows = min(BLOCK, num_examples - start)
    half = vocab_size // 2
    keys = 1 + _draw_distinct(np.zeros(half - 1), rows, num_pairs, generator)
    values = half + _draw_distinct(np.zeros(vocab_size - half), rows, num_pairs, generator)
    positions = query_positions(seq_len, num_pairs).numpy()
    log_probability = (power - 1) * np.log(np.arange(1, len(positions) + 1))
    queries = positions[_draw_distinct(log_probability, rows, num_pairs, generator)]

    input_ids = generator.integers(vocab_size if random_non_queries else 1, size=(rows, seq_len))
    input_ids[:, 0 : 2 * num_pairs : 2] = keys
    input_ids[:, 1 : 2 * num_pairs : 2] = values
    np.put_along_axis(input_ids, queries, keys, axis=1)
    labels = np.full_like(input_ids, IGNORED)
    np.put_along_axis(labels, queries + 1, values, axis=1)
    return {"input_ids": input_ids, "labels": labels}


def _draw_distinct(log_weights: np.ndarray, rows: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """log_weights: (choices,) -> (rows, count) indices, drawn one after the other without replacement."""
    scores = generator.random((rows, len(log_weights)))
    # The largest of log-weights with Gumbel noise are such a draw (arXiv 1903.06059); equal weights need no noise's form.
    if log_weights.any():
        scores = log_weights - np.log(-np.log(scores))
    return torch.from_numpy(scores).topk(count, dim=-1).indices.numpy()
