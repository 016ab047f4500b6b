"""What every example script promises: one file, its command in its docstring, declared dependencies, helpful --help."""

import argparse
import ast
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from tests.example_module import load_example
from tests.forked_processes import run_forked
from tests.peft_bias_steer.test_distributed import in_two_processes


REPOSITORY = Path(__file__).parents[1]
# What several examples import is no example itself, and neither is the code beside a model that a notebook saved.
SHARED = REPOSITORY / "examples" / "shared"
EXAMPLES = sorted(
    path for path in (REPOSITORY / "examples").rglob("*.py") if path.parent != SHARED and "outputs" not in path.parts
)
PACKAGES = ["peft_bias_steer", "hf_hierarchical_sae", "hf_based_kernel"]
IMPORTS = """
from datasets import Dataset
from matplotlib import pyplot
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Trainer
from trl import GRPOConfig, GRPOTrainer
"""
examples = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(REPOSITORY / "examples")))


@examples
def test_example_states_its_dependencies_and_its_command(path):
    text = path.read_text()
    docstring = ast.get_docstring(ast.parse(text))

    assert text.startswith("# /// script\n# dependencies = [")
    assert str(path.relative_to(REPOSITORY)) in docstring


@examples
def test_example_imports_nothing_private(path):
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]

    assert all(node.level == 0 for node in imports), "an example is one file"
    assert not [alias.name for node in imports for alias in node.names if alias.name.startswith("_")]
    assert not [node.module for node in imports if "._" in str(node.module)]


@pytest.mark.parametrize("package", PACKAGES)
def test_what_users_copy_is_short(package):
    for path in (REPOSITORY / "examples" / package).glob("*.py"):
        text = path.read_text()

        assert len(text.splitlines()) <= 250 and text.count(".add_argument(") <= 15, path.name


INTERRUPTED = """
import sys
import torch
import torch.distributed as dist
from transformers import TrainerControl, TrainingArguments
sys.path.append("examples/shared")
from interrupts import StopOnInterrupt

dist.init_process_group("gloo")
stop, control = StopOnInterrupt(), TrainerControl()
stop.interrupted = dist.get_rank() == 1
stop.on_step_end(TrainingArguments(sys.argv[1], use_cpu=True, report_to="none"), None, control)
seen = [None, None]
dist.all_gather_object(seen, (control.should_save, control.should_training_stop))
if dist.get_rank() == 0:
    torch.save(seen, sys.argv[1] + "/result.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_stop_after_the_same_step(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert in_two_processes(INTERRUPTED, tmp_path, tmp_path) == [(True, True), (True, True)]


def test_readme_has_a_line_for_every_example():
    named = re.findall(r"^\| `(\S+\.py)` \|", (REPOSITORY / "examples" / "README.md").read_text(), flags=re.MULTILINE)

    assert sorted(named) == [str(path.relative_to(REPOSITORY / "examples")) for path in EXAMPLES]


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Of each example, how `--help` ends."""
    commands = [[path, "--help"] for path in EXAMPLES]
    return dict(zip(EXAMPLES, run_forked(commands, tmp_path_factory.mktemp("help"), imports=IMPORTS)))


@pytest.mark.slow
@examples
def test_help_explains_every_option(path, asked):
    done, text = asked[path], path.read_text()
    options = [
        node.args[0].value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and any(keyword.arg == "help" for keyword in node.keywords)
        and isinstance(node.args[0], ast.Constant)
    ]

    assert done.returncode == 0, done.stderr
    assert options and all(option in done.stdout for option in options)


def test_what_a_killed_run_was_writing_is_not_there_and_is_written_anew(tmp_path):
    whole, folder = load_example("shared/interrupts.py").whole, tmp_path / "model"
    with pytest.raises(BrokenPipeError), whole(folder) as unfinished:
        unfinished.mkdir()
        (unfinished / "config.json").write_text("{")
        raise BrokenPipeError
    assert not folder.exists()

    with whole(folder) as unfinished:
        unfinished.mkdir()
        (unfinished / "weights").write_text("all")
    assert [path.name for path in folder.iterdir()] == ["weights"]
    for text in ("long", "new"):
        with whole(tmp_path / "result.json") as unfinished:
            unfinished.write_text(text)
    assert (tmp_path / "result.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "result.json"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    "damage",
    [
        lambda checkpoint: (checkpoint / "trainer_state.json").unlink(),
        lambda checkpoint: cut(checkpoint / "trainer_state.json"),
        lambda checkpoint: cut(checkpoint / "model.safetensors"),
        lambda checkpoint: cut(checkpoint / "optimizer.pt"),
        lambda checkpoint: (checkpoint / "optimizer.pt").unlink(),
        lambda checkpoint: (checkpoint / "trainer_state.json").write_text("[]"),
    ],
    ids=["no state", "state", "weights", "optimizer", "no optimizer", "no step"],
)
def test_examples_go_on_from_the_newest_checkpoint_that_was_written_to_its_end(tmp_path, damage):
    interrupts = load_example("shared/interrupts.py")
    for step in (5, 40, 100):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        save_file({"weight": torch.ones(100)}, checkpoint / "model.safetensors")
        torch.save({"moment": torch.ones(100)}, checkpoint / "optimizer.pt")
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (tmp_path / "checkpoint-best").mkdir()

    assert interrupts.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")
    state = tmp_path / "checkpoint-100" / "trainer_state.json"
    os.utime(state, (0, 0))  # of an earlier and longer training
    assert interrupts.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-40")
    os.utime(state)
    damage(tmp_path / "checkpoint-100")
    assert interrupts.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-40")
    assert interrupts.last_checkpoint(tmp_path / "nothing") is None


def test_examples_make_no_step_after_the_last(tmp_path):
    train_from = load_example("shared/interrupts.py").train_from
    data = [{"input_ids": torch.arange(8) + start, "labels": torch.arange(8) + start} for start in range(4)]

    def train(checkpoint):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        arguments = TrainingArguments(
            str(tmp_path), max_steps=5, per_device_train_batch_size=2, lr_scheduler_type="constant", report_to="none"
        )
        trainer = Trainer(LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)), arguments, train_dataset=data)
        train_from(trainer, checkpoint)
        return trainer

    first = train(None)
    again = train(str(tmp_path / "checkpoint-5"))
    assert (first.state.global_step, again.state.global_step) == (5, 5)
    expected = first.model.state_dict()
    assert all(tensor.equal(expected[name]) for name, tensor in again.model.state_dict().items())


def test_a_folder_keeps_results_of_one_kind(tmp_path):
    record = load_example("shared/interrupts.py").record_settings
    folder = tmp_path / "out"
    record(folder, {"layer": 99, "budgets": (1, 2)})
    # What is refused after that has left nothing.
    (folder / "tasks").mkdir()
    (folder / "tasks" / "words.pt.unfinished").write_text("half")
    record(folder, {"layer": 9, "budgets": (1, 2), "path": None})
    (folder / "tasks" / "words.pt").write_text("all")

    record(folder, {"layer": 9, "budgets": [1, 2], "path": None})
    with pytest.raises(SystemExit, match="holds results with layer 9 and not 8, path None and not 'a': give another"):
        record(folder, {"layer": 8, "budgets": (1, 2), "path": "a"})
    assert json.loads((folder / "settings.json").read_text())["layer"] == 9


@pytest.mark.parametrize(
    ("seeds", "message"), [([0, 1, 0, 2, 1], "got 0, 1 more than once"), ([-1, 2], "must be at least 0, got -1")]
)
def test_a_seed_is_one_draw(seeds, message, capsys):
    options = load_example("shared/options.py")
    options.check_seeds(argparse.ArgumentParser(), [3, 0])
    with pytest.raises(SystemExit):
        options.check_seeds(argparse.ArgumentParser(), seeds)
    assert message in capsys.readouterr().err
