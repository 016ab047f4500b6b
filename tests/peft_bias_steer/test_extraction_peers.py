"""Extracted vectors beside those of repeng and steering-vectors, on the same prompts."""

import importlib

import numpy
import pytest
import torch
from transformers import AutoTokenizer

from peft_bias_steer import extract_vectors, from_control_vector, from_vectors, steering_vectors
from tests.peft_bias_steer.test_extraction import PAIRS
from tests.peft_bias_steer.tiny_models import CLOSE, INPUT_IDS, SMALL, logits, make_base


pytestmark = pytest.mark.pinned
# float32 states, and an axis is as far off as its singular value is near the next one
NEAR = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture
def tokenizer(tiny_language_model):
    # theirs pad the shorter prompts of a batch; on the left that would move learned positions
    return AutoTokenizer.from_pretrained(tiny_language_model, padding_side="right")


@pytest.fixture
def base(tokenizer):
    return make_base(**{**SMALL, "vocab_size": len(tokenizer)})


@pytest.fixture
def repeng(monkeypatch):
    # the name that an annotation of repeng 0.4 has from numpy 1
    monkeypatch.setattr(numpy, "float_", numpy.float64, raising=False)
    return importlib.import_module("repeng")


@pytest.mark.parametrize(("method", "aggregator"), [("mean", "mean_aggregator"), ("pca_center", "pca_aggregator")])
def test_vectors_are_those_of_steering_vectors(base, tokenizer, method, aggregator):
    theirs = importlib.import_module("steering_vectors")
    trained = theirs.train_steering_vector(
        base,
        tokenizer,
        [(pair["positive"], pair["negative"]) for pair in PAIRS],
        aggregator=getattr(theirs, aggregator)(),
        batch_size=7,
    )

    vectors = extract_vectors(base, tokenizer, PAIRS, method=method)

    assert vectors.keys() == trained.layer_activations.keys() == {0, 1, 2}
    for index, vector in trained.layer_activations.items():
        torch.testing.assert_close(vectors[index], vector, **NEAR)
    with trained.apply(base, multiplier=1.0):
        expected = logits(base)
    torch.testing.assert_close(logits(from_vectors(vectors, base).eval()), expected, **CLOSE)


@pytest.mark.parametrize("method", ["pca_diff", "pca_center"])
def test_axes_are_those_of_repeng_up_to_its_vote_on_the_sign(base, tokenizer, repeng, method):
    entries = [repeng.DatasetEntry(**pair) for pair in PAIRS]
    trained = repeng.ControlVector.train(base, tokenizer, entries, method=method, batch_size=7)

    vectors = extract_vectors(base, tokenizer, PAIRS, method=method)

    # by default it leaves out layer 0; what it reads at the last layer has gone through the final norm
    assert trained.directions.keys() == {1, 2}
    theirs = torch.from_numpy(trained.directions[1])
    torch.testing.assert_close(vectors[1] * torch.sign(vectors[1] @ theirs), theirs, **NEAR)
    assert (vectors[2] @ torch.from_numpy(trained.directions[2])).abs() < 0.99


def test_a_file_of_repeng_steers_as_it_does_there(base, tokenizer, repeng, tmp_path):
    entries = [repeng.DatasetEntry(**pair) for pair in PAIRS]
    trained = repeng.ControlVector.train(base, tokenizer, entries)
    trained.export_gguf(tmp_path / "v.gguf")
    theirs = repeng.ControlModel(base, [1, 2])
    theirs.set_control(trained, 2.0)
    with torch.no_grad():
        expected = theirs(input_ids=INPUT_IDS[:1]).logits  # its mask of padding is made for one row

    model = from_control_vector(tmp_path / "v.gguf", theirs.unwrap()).eval()
    model.set_scale("default", 2.0)

    assert list(steering_vectors(model)) == [1, 2]
    torch.testing.assert_close(logits(model, INPUT_IDS[:1]), expected, **CLOSE)
