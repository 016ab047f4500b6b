"""The example that reads a steering vector in the dictionaries of autoencoders, end to end on tiny models."""

import argparse
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_based_kernel import RebasedConfig, RebasedForCausalLM
from peft_bias_steer import BiasSteerConfig
from tests.example_module import load_example


SCRIPT = Path(__file__).parents[2] / "examples" / "studies" / "read_steering_vector.py"


@pytest.fixture(scope="module")
def matching_pursuit():
    return runpy.run_path(str(SCRIPT))["matching_pursuit"]


def test_matching_pursuit_finds_the_rows_that_a_vector_is_made_of(matching_pursuit):
    dictionary = torch.nn.functional.normalize(torch.randn(40, 24), dim=1)
    vector = 3 * dictionary[5] - 2 * dictionary[17] + dictionary[30]

    steps = matching_pursuit(vector, dictionary, 3)

    indices, coefficients, left = steps[-1]
    found = dict(zip(indices, coefficients.tolist()))
    assert found == {5: pytest.approx(3, abs=1e-4), 17: pytest.approx(-2, abs=1e-4), 30: pytest.approx(1, abs=1e-4)}
    assert left < 1e-8 and [len(step[0]) for step in steps] == [1, 2, 3]


def test_matching_pursuit_leaves_less_at_each_step_and_fits_what_it_chose(matching_pursuit):
    dictionary, vector = torch.nn.functional.normalize(torch.randn(40, 24), dim=1), torch.randn(24)

    for (indices, coefficients, left), (*_, more) in zip(
        matching_pursuit(vector, dictionary, 10)[1:], matching_pursuit(vector, dictionary, 9)
    ):
        residual = vector - coefficients @ dictionary[indices]
        assert left < more and left == pytest.approx(float(residual.square().sum() / vector.square().sum()), abs=1e-5)
        assert (dictionary[indices] @ residual).abs().max() < 1e-4


def test_no_held_out_question_is_one_that_the_vectors_were_trained_on():
    training = load_example("peft_bias_steer/train_grpo.py")
    parser = argparse.ArgumentParser()
    training.add_options(parser)
    arguments = parser.parse_args([])
    _, *questions = runpy.run_path(str(SCRIPT))["make_questions"](arguments.eval_size)

    asked = [[item["question"] for item in items] for items in questions]
    assert asked == [[row["question"] for row in rows] for rows in training.make_questions(arguments)]


@pytest.mark.slow
def test_it_decomposes_verifies_and_goes_on_after_a_stop(tiny_language_model, tmp_path, monkeypatch, capsys):
    base = AutoModelForCausalLM.from_pretrained(tiny_language_model)
    get_peft_model(base, BiasSteerConfig(init_weights=False, task_type="CAUSAL_LM")).save_pretrained(
        tmp_path / "adapter"
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_language_model)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    rebased = RebasedForCausalLM(RebasedConfig(vocab_size=len(tokenizer), feature_dim=4, **sizes))
    rebased.save_pretrained(tmp_path / "rebased")
    tokenizer.save_pretrained(tmp_path / "rebased")
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 400)
    options = {
        "model": tiny_language_model,
        "adapter": tmp_path / "adapter",
        "rebased": tmp_path / "rebased",
        "text_files": tmp_path / "text.txt",
        "output_dir": tmp_path / "out",
        "tokens": 2000,
        "d_sae": 64,
        "k": 8,
        "max_steps": 20,
        "batch_size": 64,
        "eval_size": 4,
    }
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments, "--layers", "0", "1", "--budgets", "1", "8"])

    runpy.run_path(str(SCRIPT), run_name="__main__")
    first = (tmp_path / "out" / "report.md").read_text()
    trained = capsys.readouterr().out.count("Training an autoencoder")
    runpy.run_path(str(SCRIPT), run_name="__main__")

    assert trained == 3 and "Training an autoencoder" not in capsys.readouterr().out
    assert (tmp_path / "out" / "report.md").read_text() == first and "expl. var." in first
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert list(result["accuracies"])[-2:] == ["latents in each: 8", "random latents in each: 8"]
    for shares in result["left"].values():
        assert len(shares) == 8 and shares == sorted(shares, reverse=True) and shares[0] < 1
    assert (tmp_path / "out" / "steering_vector.png").exists()
    for change in (["--layers", "0"], ["--seed", "1"], ["--k", "4"]):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments, "--layers", "0", "1", "--budgets", "1", *change])
        with pytest.raises(SystemExit, match=rf"holds results with {change[0][2:]} .*: give another --output_dir"):
            runpy.run_path(str(SCRIPT), run_name="__main__")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments, "--layers", "0", "1", "--budgets", "65"])
    with pytest.raises(SystemExit, match="--k and --budgets must be at most 64, the number of latents"):
        runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--budgets", "0", "4"], "--budgets must be at least 1, got 0"),
        (["--max_steps", "0"], "--max_steps must be at least 1, got 0"),
        (["--d_sae", "8"], "--d_sae must be at least 64, got 8"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(option, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *option])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert message in capsys.readouterr().err


def test_a_missing_adapter_ends_in_one_sentence(tiny_language_model, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("To be, or not to be.")
    options = ["--model", tiny_language_model, "--adapter", str(tmp_path), "--eval_size", "1"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options, "--text_files", str(tmp_path / "text.txt")])

    with pytest.raises(SystemExit, match="--adapter: expected an adapter, got .*; make one with"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
