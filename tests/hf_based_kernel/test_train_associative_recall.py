"""The example script itself, on a task that is small enough for a test."""

import json
import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, Trainer


SCRIPT = Path(__file__).parents[2] / "examples" / "hf_based_kernel" / "train_associative_recall.py"
SMALL = [
    "--seq_len",
    "8",
    "--num_pairs",
    "2",
    "--vocab_size",
    "12",
    "--hidden_size",
    "16",
    "--num_attention_heads",
    "2",
    "--feature_dim",
    "4",
    "--batch_size",
    "64",
    "--eval_examples",
    "100",
]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.parametrize("kernel", ["rebased", "taylor", "attention"])
def test_run_leaves_a_model_numbers_and_a_plot(monkeypatch, tmp_path, kernel):
    run(monkeypatch, *SMALL, "--kernel", kernel, "--max_steps", 3, "--output_dir", tmp_path)

    result = json.loads((tmp_path / "associative_recall.json").read_text())
    assert (result["max_steps"], result["kernel"]) == (3, kernel)
    assert [step for step, _ in result["curve"]] == [1, 2, 3]
    assert 0 <= result["accuracy_before"] < 0.5
    assert (tmp_path / "associative_recall.png").stat().st_size > 0
    (metric,) = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert (metric.metric_type, metric.metric_value) == ("accuracy", result["accuracy"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() == result["parameters"]


# Seed 4 sits on the plateau of guessing (.25) for 900 steps with learned positions.
def test_short_run_leaves_the_plateau_whatever_the_seed(monkeypatch, tmp_path):
    run(monkeypatch, "--max_steps", 300, "--seed", 4, "--eval_examples", 200, "--output_dir", tmp_path)

    assert json.loads((tmp_path / "associative_recall.json").read_text())["accuracy"] > 0.9


def test_interrupt_leaves_a_checkpoint_to_resume_from(monkeypatch, tmp_path, capsys):
    training_step = Trainer.training_step

    def interrupted_step(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return training_step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", interrupted_step)
        with pytest.raises(SystemExit, match="^130$"):
            run(patch, *SMALL, "--max_steps", 3, "--output_dir", tmp_path)
    assert "Stopped at step 1 of 3" in capsys.readouterr().out
    run(monkeypatch, *SMALL, "--max_steps", 3, "--output_dir", tmp_path, "--resume_from_checkpoint")
    assert json.loads((tmp_path / "associative_recall.json").read_text())["resumed"]
    assert json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["global_step"] == 3


def test_a_checkpoint_of_another_training_is_refused(monkeypatch, tmp_path, capsys):
    def resume(*options):
        run(monkeypatch, *SMALL, "--output_dir", tmp_path, "--resume_from_checkpoint", *options)

    run(monkeypatch, *SMALL, "--max_steps", 2, "--output_dir", tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    for options, message in (
        (
            ["--seed", 5, "--kernel", "taylor"],
            "was trained with kernel 'rebased' and not 'taylor', seed 0 and not 5; give",
        ),
        (["--max_steps", 1], "--max_steps must be at least the 2 steps that "),
    ):
        with pytest.raises(SystemExit):
            resume("--max_steps", 3, *options)
        assert message in capsys.readouterr().err
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    resume("--max_steps", 3, "--eval_examples", 50)
    assert (tmp_path / "checkpoint-3").is_dir()


def test_batches_ask_for_logits_only_where_a_query_can_stand(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *SMALL])
    script = runpy.run_path(str(SCRIPT))
    arguments = script["parse_arguments"]()
    train, _ = script["make_datasets"](arguments, 1)
    rows = list(train.take(5).with_format("torch"))
    batch = script["make_collator"](arguments)(rows)
    model = script["make_model"](arguments)

    assert batch["logits_to_keep"].tolist() == [4, 6, 7]
    whole = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}
    torch.testing.assert_close(model(**batch).loss, model(**whole).loss)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seq_len", "6"], "the task's sizes do not fit together: seq_len must be even and at least"),
        (["--num_attention_heads", "64"], "the model's sizes do not fit together"),
        (["--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        (["--output_dir", "empty", "--resume_from_checkpoint"], "--resume_from_checkpoint: empty holds no checkpoint"),
        (["--output_dir", __file__], "--output_dir: expected a folder to write, got the file "),
    ],
)
def test_bad_input_is_one_clear_sentence(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *SMALL, "--max_steps", "2", *arguments)
    assert message in capsys.readouterr().err + str(stopped.value)
