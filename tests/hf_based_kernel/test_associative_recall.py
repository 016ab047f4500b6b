import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import EvalPrediction

from hf_based_kernel import associative_recall
from hf_based_kernel.associative_recall import IGNORED, make_recall_dataset, recall_accuracy


def arrays(dataset):
    if isinstance(dataset, IterableDataset):
        dataset = Dataset.from_list(list(dataset))
    whole = dataset.with_format("numpy")[:]
    return whole["input_ids"], whole["labels"]


def test_every_key_is_asked_once_and_answered_with_its_value():
    input_ids, labels = arrays(make_recall_dataset(50, seq_len=32, num_pairs=6, vocab_size=40))
    assert input_ids.shape == labels.shape == (50, 32)
    for tokens, answers in zip(input_ids, labels):
        pairs = dict(zip(tokens[0:12:2], tokens[1:12:2]))
        positions = np.flatnonzero(answers != IGNORED)
        assert sorted(tokens[positions - 1]) == sorted(pairs)
        assert [pairs[key] for key in tokens[positions - 1]] == list(answers[positions])
        assert (positions - 1).min() >= 12 and ((positions - 1) % 2 == 0).all()


def test_keys_and_values_come_from_their_halves_of_the_vocabulary():
    input_ids, _ = arrays(make_recall_dataset(400, seq_len=16, num_pairs=4, vocab_size=14))
    assert set(input_ids[:, 0:8:2].ravel()) == set(range(1, 7))
    assert set(input_ids[:, 1:8:2].ravel()) == set(range(7, 14))
    assert set(input_ids[:, 8:].ravel()) == set(range(14))


def chi_square_p(counts, probabilities):
    """Chance of counts at least this far from the probabilities if these are true (Pearson's chi-square)."""
    expected = np.asarray(probabilities) * np.sum(counts)
    assert expected.min() >= 5, "Pearson's approximation needs at least 5 expected counts in each cell"
    statistic = torch.tensor(((counts - expected) ** 2 / expected).sum())
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2, dtype=torch.float64), statistic / 2).item()


def specification_p_values(power, drawn_power):
    """p values of a drawn set against Zoology's specification, by the name of what is compared."""
    num_examples, pairs, vocab_size, seq_len = 20_000, 2, 20, 16
    dataset = make_recall_dataset(
        num_examples, seq_len=seq_len, num_pairs=pairs, vocab_size=vocab_size, power=drawn_power
    )
    input_ids, labels = arrays(dataset)
    positions = np.argwhere(labels != IGNORED)[:, 1].reshape(-1, pairs) - 1
    first_key_comes_first = np.take_along_axis(input_ids, positions[:, :1], 1)[:, 0] == input_ids[:, 0]
    # Gap of the first key and of the second one: the order in which gaps are drawn without replacement.
    gaps = np.where(first_key_comes_first[:, None], positions, positions[:, ::-1])
    gaps = (gaps - 2 * pairs) // 2
    space = (seq_len - 2 * pairs) // 2
    p = np.arange(1, space + 1) ** (power - 1.0)
    p /= p.sum()
    ordered = [(a, b) for a in range(space) for b in range(space) if a != b]
    fillers = np.ones_like(input_ids, dtype=bool)
    fillers[:, : 2 * pairs] = False
    np.put_along_axis(fillers, positions, False, axis=1)

    def pair_p(tokens, first, choices):
        seen = np.bincount((tokens[:, 0] - first) * choices + tokens[:, 1] - first, minlength=choices**2)
        seen = seen.reshape(choices, choices)
        assert np.trace(seen) == 0, "keys and values are distinct"
        return chi_square_p(
            seen[~np.eye(choices, dtype=bool)], np.full(choices * (choices - 1), 1 / choices / (choices - 1))
        )

    return {
        "gaps": chi_square_p(
            np.array([((gaps[:, 0] == a) & (gaps[:, 1] == b)).sum() for a, b in ordered]),
            [p[a] * p[b] / (1 - p[a]) for a, b in ordered],
        ),
        "keys": pair_p(input_ids[:, 0:4:2], 1, 9),
        "values": pair_p(input_ids[:, 1:4:2], 10, 10),
        "fillers": chi_square_p(np.bincount(input_ids[fillers], minlength=20), np.full(20, 1 / 20)),
    }


# Four tests at 2.5e-7 each: a right sampler fails for one seed in a million.
FALSE_ALARM = 1e-6 / 4


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_distribution_is_the_specified_one(power):
    p_values = specification_p_values(power, power)
    assert min(p_values.values()) > FALSE_ALARM, p_values


def test_the_distribution_test_would_notice_another_power():
    p_values = specification_p_values(0.01, 0.15)
    assert p_values["gaps"] < FALSE_ALARM < min(p_values["keys"], p_values["values"], p_values["fillers"])


def test_stream_holds_the_same_examples_in_bounded_memory(monkeypatch):
    monkeypatch.setattr(associative_recall, "BLOCK", 8)
    whole, stream = (make_recall_dataset(20, seed=3, streaming=streaming) for streaming in (False, True))
    assert isinstance(stream, IterableDataset)
    np.testing.assert_array_equal(arrays(whole)[0], arrays(stream)[0])
    assert len(np.unique(arrays(whole)[0], axis=0)) == 20

    drawn, draw = [], associative_recall._draw
    monkeypatch.setattr(
        associative_recall, "_draw", lambda start, *args, **sizes: drawn.append(start) or draw(start, *args, **sizes)
    )
    next(iter(make_recall_dataset(10**12, streaming=True)))
    assert drawn == [0]


def test_fillers_are_zero_where_they_are_not_to_be_random():
    input_ids, labels = arrays(
        make_recall_dataset(50, seq_len=32, num_pairs=4, vocab_size=40, random_non_queries=False)
    )
    assert (input_ids != 0).sum() == 50 * 3 * 4


def test_seed_decides_the_examples():
    first, again, other = (arrays(make_recall_dataset(3, seed=seed))[0] for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


def test_accuracy_counts_only_the_queries():
    labels = np.array([[IGNORED, 7, IGNORED, 5], [IGNORED, IGNORED, 3, IGNORED]])
    predictions = np.array([[7, 0, 4, 0], [0, 3, 0, 0]])
    assert recall_accuracy(EvalPrediction(predictions, labels)) == {"accuracy": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 31}, "seq_len must be even and at least 4 [*] num_pairs = 32, got 31"),
        ({"seq_len": 64, "num_pairs": 17}, "at least 4 [*] num_pairs = 68, got 64"),
        ({"num_pairs": 0}, "num_examples and num_pairs must be at least 1, got 5 and 0"),
        ({"vocab_size": 16}, "vocab_size must be at least 2 [*] num_pairs [+] 2 = 18, got 16"),
    ],
)
def test_sizes_that_do_not_fit_are_one_clear_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        make_recall_dataset(5, **options)
