"""The example that shares a dictionary out over processes: as one process trains it, saved whole, and with bad input."""

import json
import runpy
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_hierarchical_sae import (
    ActivationShards,
    HierarchicalSaeModel,
    explained_variance,
    iterate_activations,
    save_shards,
)
from tests.conftest import REPOSITORY


SCRIPT = REPOSITORY / "examples" / "hf_hierarchical_sae" / "train_sharded.py"
TEXT = ["To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer. "] * 40
SMALL = ["--d_sae", "65", "--k", "8", "--max_steps", "20", "--learning_rate", "1e-2", "--eval_tokens", "300"]
LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


@pytest.fixture(scope="module")
def harvest(tiny_language_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("harvest")
    model = AutoModelForCausalLM.from_pretrained(tiny_language_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_language_model)
    texts = [f"{number} {text}" for number, text in enumerate(TEXT)]
    save_shards(iterate_activations(model, tokenizer, texts, 1, show_progress=False), folder, shard_tokens=1000)
    return folder


@pytest.fixture
def run(harvest, tmp_path, monkeypatch):
    """The script as the only process, in this one."""

    def run_script(*options):
        for name, value in LAUNCHED.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(
            sys, "argv", [str(SCRIPT), str(harvest), *SMALL, "--output_dir", str(tmp_path / "one"), *options]
        )
        runpy.run_path(str(SCRIPT), run_name="__main__")

    return run_script


# Pinned: torch before 2.10 sums FSDP2's gradients over gloo, of a plain linear layer too.
@pytest.mark.pinned
@pytest.mark.slow
def test_two_processes_keep_half_each_and_train_what_one_trains(harvest, run, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = [*SMALL, "--batch_size", "32", "--encoder_chunk_size", "16", "--output_dir", str(tmp_path / "two")]
    done = subprocess.run(
        [*launcher, SCRIPT, harvest, *options], cwd=REPOSITORY, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    run("--batch_size", "64")

    result = json.loads((tmp_path / "two" / "result.json").read_text())
    # 65 rows: the last process has one less.
    assert result["processes"] == 2 and 0.5 <= result["parameters_of_a_process"] / result["parameters"] < 0.53
    two, one = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    assert torch.equal(two.pop("tokens_since_fired"), one.pop("tokens_since_fired"))
    for name, tensor in one.items():
        # Adam turns the rounding of a gradient near zero into a step of its own; twenty steps keep it this small.
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-3)
    sae = HierarchicalSaeModel.from_pretrained(tmp_path / "two")
    assert sae.config.hook_point == "output" and sae.config.layer == 1 and sae.input_scale == 1
    assert sae.median_norm > 0 and done.stdout.count("explained_variance_8") == 10
    assert result["explained_variance"]["8"] > 0.5


def test_it_says_how_much_is_explained_of_what_it_did_not_see(harvest, run, tmp_path):
    run("--batch_size", "64")

    sae, result = HierarchicalSaeModel.from_pretrained(tmp_path / "one"), tmp_path / "one" / "result.json"
    held_out = torch.cat(list(ActivationShards(harvest).batches()))[-300:]
    found = {int(k): value for k, value in json.loads(result.read_text())["explained_variance"].items()}
    assert found == pytest.approx(explained_variance(sae, held_out), abs=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--k", "900"], "k must be in [1, d_sae=65], got 900"),
        (["--max_steps", "0"], "--max_steps must be at least 1, got 0"),
        (["--eval_tokens", "1"], "--eval_tokens must be at least 2, got 1"),
        (["--d_sae", "0"], "--d_sae must be at least 1, got 0"),
        (["--learning_rate", "nan"], "--learning_rate must be positive, got nan"),
        (["--layer", "7"], "layer must be one of the harvested layers [1], got 7"),
        (["--batch_size", "100000"], "expected at least 100300 tokens"),
    ],
)
def test_bad_input_ends_in_one_sentence(run, options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*options)

    # Nobody is left waiting for a process that gave up.
    assert not torch.distributed.is_initialized()
    # argparse prints its sentence and exits with 2; elsewhere the sentence is the exit status.
    said = capsys.readouterr().err.splitlines()[-1] if stopped.value.code == 2 else stopped.value.code
    assert message in said


def test_it_says_how_it_is_started(harvest, monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(harvest)])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT), run_name="__main__")

    assert "expected to be started by torchrun" in capsys.readouterr().err


def test_an_autoencoder_is_not_replaced_in_silence(run, tmp_path, capsys):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "model.safetensors").write_bytes(b"hours of work")
    with pytest.raises(SystemExit):
        run()

    assert "holds an autoencoder: give --overwrite" in capsys.readouterr().err
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == b"hours of work"
