"""The example as a user runs it: interrupted, resumed, finished, reloaded."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


REPOSITORY = Path(__file__).parents[2]
EXAMPLE = "examples/peft_bias_steer/train_grpo.py"


def command(*arguments) -> list[str]:
    return [sys.executable, EXAMPLE, *map(str, arguments)]


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), cwd=REPOSITORY, capture_output=True, text=True)


@pytest.mark.slow
def test_interrupted_run_is_resumed_and_finished(tiny_language_model, tmp_path):
    small = ["--prompts_per_step", 1, "--num_generations", 2, "--eval_size", 2, "--save_steps", 1000]
    always = ["--model", tiny_language_model, "--output_dir", tmp_path, *small]

    process = subprocess.Popen(
        command(*always, "--max_steps", 5000), cwd=REPOSITORY, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    progress = b""
    while b"reward=" not in progress:  # the bar shows a reward once the first step is done
        chunk = os.read(process.stderr.fileno(), 4096)
        assert chunk, progress.decode()
        progress += chunk
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0].decode()
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))

    assert process.returncode == 0
    assert 1 <= step < 5000
    assert f"Stopped after step {step}. Go on with: --resume_from_checkpoint {checkpoint}" in output

    done = run(*always, "--max_steps", step + 2, "--resume_from_checkpoint", checkpoint)
    result = json.loads((tmp_path / "result.json").read_text())

    assert done.returncode == 0, done.stderr
    assert "Held out:" in done.stdout and f"{tmp_path}/reward.png" in done.stdout
    assert result["steps"] == len(result["rewards"]) == step + 2
    assert result["trainable_parameters"] == 2 * 32
    assert (tmp_path / "reward.png").stat().st_size > 10_000
    vectors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(vectors) == 2 and all(torch.isfinite(vector).all() for vector in vectors.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--model", "no/such/folder"],
            "--model must be a folder with a transformers checkpoint or a reachable hub id",
        ),
        (["--eval_size", 0], "--eval_size must be in [1, 359] so that questions are left to train on, got 0"),
    ],
)
def test_bad_arguments_end_in_one_sentence(tiny_language_model, tmp_path, arguments, sentence):
    done = run("--model", tiny_language_model, "--output_dir", tmp_path / "out", *arguments)

    assert done.returncode == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
