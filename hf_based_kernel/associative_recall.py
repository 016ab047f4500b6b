"""
Multi-query associative recall (MQAR): the task of Zoology (arXiv 2312.04927, section 3) that the ReBased paper reports.

A sequence lists pairs of a key and a value, then asks for some of the keys again; the model has to answer with the value.
"""

import torch
from transformers import EvalPrediction


IGNORED = -100


def make_recall_dataset(
    num_examples: int,
    *,
    seq_len: int = 64,
    num_pairs: int = 8,
    vocab_size: int = 1024,
    power: float = 0.01,
    seed: int = 0,
):
    """
    Draw examples of multi-query associative recall.

    Tokens 0 … 2 `num_pairs` - 1 are the pairs. Every key comes once more at an even distance from them, nearer ones more
    often than farther ones; the tokens in between are drawn at random. Keys are in [1, `vocab_size` // 2), values above.

    Args:
        num_examples (`int`): Number of sequences.
        seq_len (`int`, *optional*, defaults to 64): Tokens per sequence.
        num_pairs (`int`, *optional*, defaults to 8): Pairs of key and value, and queries, per sequence.
        vocab_size (`int`, *optional*, defaults to 1024): Number of tokens.
        power (`float`, *optional*, defaults to 0.01): The distance d of a query has probability ∝ d ** (`power` - 1).
        seed (`int`, *optional*, defaults to 0): Seed of the drawing.

    Returns:
        `datasets.Dataset` with the columns `input_ids` and `labels`, (seq_len,) each. As transformers' losses shift labels,
        the answer to the query at token t is `labels[t + 1]`; all else is -100.

    Raises:
        `ValueError`: If the pairs and queries do not fit into the sequence or the vocabulary.
        `ImportError`: If `datasets` is not installed (`pip install "hf_based_kernel[data]"`).
    """
    from datasets import Dataset

    _check_sizes(num_examples, seq_len, num_pairs, vocab_size)
    generator = torch.Generator().manual_seed(seed)
    keys = 1 + _draw_distinct(torch.zeros(num_examples, vocab_size // 2 - 1), num_pairs, generator)
    values = vocab_size // 2 + _draw_distinct(
        torch.zeros(num_examples, vocab_size - vocab_size // 2), num_pairs, generator
    )
    distances = torch.arange(1, (seq_len - 2 * num_pairs) // 2 + 1)
    log_probability = (power - 1) * distances.double().log()
    gaps = _draw_distinct(log_probability.expand(num_examples, -1), num_pairs, generator)
    queries = 2 * num_pairs + 2 * gaps

    input_ids = torch.randint(vocab_size, (num_examples, seq_len), generator=generator)
    input_ids[:, 0 : 2 * num_pairs : 2] = keys
    input_ids[:, 1 : 2 * num_pairs : 2] = values
    input_ids.scatter_(1, queries, keys)
    labels = torch.full_like(input_ids, IGNORED).scatter_(1, queries + 1, values)
    return Dataset.from_dict({"input_ids": input_ids.numpy(), "labels": labels.numpy()})


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


def _check_sizes(num_examples, seq_len, num_pairs, vocab_size):
    if min(num_examples, num_pairs) < 1:
        raise ValueError(f"num_examples and num_pairs must be at least 1, got {num_examples} and {num_pairs}")
    if seq_len % 2 or seq_len < 4 * num_pairs:
        raise ValueError(
            f"seq_len must be even and at least 4 * num_pairs = {4 * num_pairs}, got {seq_len}; lengthen the sequence or "
            "lower num_pairs"
        )
    if vocab_size // 2 - 1 < num_pairs:
        raise ValueError(f"vocab_size must be at least 2 * num_pairs + 2 = {2 * num_pairs + 2}, got {vocab_size}")


def _draw_distinct(log_weights, count, generator):
    """log_weights: (rows, choices) -> (rows, count) indices, drawn one after the other without replacement."""
    # The largest of log-weights with Gumbel noise are such a draw (arXiv 1903.06059).
    uniform = torch.rand(log_weights.shape, generator=generator, dtype=torch.float64)
    return (log_weights - (-uniform.log()).log()).topk(count, dim=-1).indices
