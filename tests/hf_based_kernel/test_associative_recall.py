import numpy as np
import pytest
from transformers import EvalPrediction

from hf_based_kernel.associative_recall import IGNORED, make_recall_dataset, recall_accuracy


def arrays(dataset):
    return np.array(dataset["input_ids"]), np.array(dataset["labels"])


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


def test_near_queries_follow_the_power_law():
    _, labels = arrays(make_recall_dataset(20_000, seq_len=10, num_pairs=1, vocab_size=8, power=0.01))
    gaps = (np.argwhere(labels != IGNORED)[:, 1] - 3) // 2
    weights = np.arange(1, 5) ** (0.01 - 1)
    # Four standard deviations of a share of 20,000 draws.
    np.testing.assert_allclose(
        np.bincount(gaps, minlength=4) / 20_000, weights / weights.sum(), atol=4 * 0.5 / 20_000**0.5
    )


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
