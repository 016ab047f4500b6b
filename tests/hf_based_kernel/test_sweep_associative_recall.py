"""The sweep of the recall example, on a task that is small enough for a test."""

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from tests.example_module import Killed, kill_while_writing, load_example


SCRIPT = Path(__file__).parents[2] / "examples" / "studies" / "sweep_associative_recall.py"
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


def results(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kernel", ["gamma_x2", "mamba2"])
def test_run_leaves_a_line_and_a_model(monkeypatch, tmp_path, kernel):
    run(monkeypatch, *SMALL, "--kernel", kernel, "--max_steps", 3, "--output_dir", tmp_path)

    (result,) = results(tmp_path)
    assert (result["max_steps"], result["kernel"], result["fillers"]) == (3, kernel, "random")
    assert [step for step, _ in result["curve"]] == [1, 2, 3]
    assert 0 <= result["accuracy_before"] < 0.5
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() == result["parameters"]


def test_interrupted_sweep_goes_on_from_its_checkpoint(monkeypatch, tmp_path, capsys):
    training_step = Trainer.training_step

    def interrupted_step(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return training_step(*args, **kwargs)

    sweep = [*SMALL, "--seed", 0, 1, "--max_steps", 3, "--output_dir", tmp_path]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(Trainer, "training_step", interrupted_step)
        run(patch, *sweep)
    printed = capsys.readouterr().out
    assert "Stopped at step 1 of 3" in printed and "0 of 2 runs are in" in printed
    assert not (tmp_path / "results.jsonl").exists()
    run(monkeypatch, *sweep)
    assert [row["resumed"] for row in results(tmp_path)] == [True, False]


def test_sweep_is_one_line_per_run_and_goes_on_where_it_was_cut_off(monkeypatch, tmp_path):
    grid = [
        "--kernel",
        "rebased",
        "taylor",
        "--seed",
        0,
        1,
        "--max_steps",
        4,
        "--save_steps",
        2,
        "--output_dir",
        tmp_path,
    ]
    runs, trained = [], Trainer.train

    def counted(trainer, resume_from_checkpoint=None):
        runs.append(resume_from_checkpoint)
        if len(runs) == 3:
            trainer.add_callback(CutOff())
        return trained(trainer, resume_from_checkpoint=resume_from_checkpoint)

    monkeypatch.setattr(Trainer, "train", counted)
    with pytest.raises(BrokenPipeError):
        run(monkeypatch, *SMALL, *grid)
    assert [(row["seed"], row["kernel"]) for row in results(tmp_path)] == [(0, "rebased"), (0, "taylor")]
    run(monkeypatch, *SMALL, *grid)

    rows = results(tmp_path)
    assert [(row["seed"], row["kernel"]) for row in rows] == [(s, k) for s in (0, 1) for k in ("rebased", "taylor")]
    assert [row["resumed"] for row in rows] == [False, False, True, False]
    assert [Path(runs[3]).name, runs[4], len(runs)] == ["checkpoint-2", None, 5]


def test_sweep_that_is_killed_while_it_writes_goes_on(monkeypatch, tmp_path):
    sweep = [*SMALL, "--max_steps", 1, "--output_dir", tmp_path]
    run(monkeypatch, *sweep)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_while_writing("results.jsonl", patch)
        run(patch, *sweep, "--seed", 0, 1)
    run(monkeypatch, *sweep, "--seed", 0, 1)

    assert [row["seed"] for row in results(tmp_path)] == [0, 1]
    with pytest.raises(SystemExit, match="holds results with eval_examples 100 and not 99: give another --output_dir"):
        run(monkeypatch, *sweep, "--eval_examples", 99)


class CutOff(TrainerCallback):
    """As if the power failed after step 3."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise BrokenPipeError


@pytest.mark.slow
def test_sweep_in_two_processes_gives_what_one_gives(monkeypatch, tmp_path):
    grid = [*SMALL, "--seed", 0, 1, "--max_steps", 3]
    run(monkeypatch, *grid, "--output_dir", tmp_path / "one")
    command = [sys.executable, SCRIPT, *grid, "--jobs", 2, "--output_dir", tmp_path / "two"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)

    one, two = (sorted(results(tmp_path / name), key=lambda row: row["seed"]) for name in ("one", "two"))
    assert [row["curve"] for row in one] == [row["curve"] for row in two]


@pytest.fixture
def begin_sweep(tmp_path):
    """Two workers, in processes of their own, and a function that waits for what they do."""
    grid = [*SMALL, "--seed", 0, 1, 2, "--jobs", 2, "--save_steps", 1, "--output_dir", tmp_path]
    begun = []

    def begin(max_steps, until):
        command = [str(part) for part in [sys.executable, SCRIPT, *grid, "--max_steps", max_steps]]
        process = subprocess.Popen(
            command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        begun.append(process)
        while not until(process):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.01)
        return process

    yield begin
    for process in begun:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_interrupt_while_workers_import_begins_no_run(begin_sweep, tmp_path):
    def has_workers(process):
        return (tmp_path / "settings.json").exists() and psutil.Process(process.pid).children()

    process = begin_sweep(2, until=has_workers)
    os.killpg(process.pid, signal.SIGINT)

    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Ctrl-C: saving checkpoints" in said and "0 of 3 runs are in" in said and "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


@pytest.mark.slow
def test_workers_end_with_the_sweep_that_is_killed(begin_sweep, tmp_path):
    process = begin_sweep(10**6, until=lambda process: len([*tmp_path.glob("*/checkpoint-*")]) > 1)
    process.kill()

    # What is printed comes to its end once nobody is left to print.
    process.communicate(timeout=60)


def test_interrupt_while_a_run_is_evaluated_stops_it_at_its_first_step(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *SMALL, "--max_steps", "3", "--output_dir", str(tmp_path)])
    sweep, evaluate = load_example("studies/sweep_associative_recall.py"), Trainer.evaluate
    (run,) = sweep.parse_arguments()

    def interrupted(*args, **kwargs):
        sweep.heard.value = True
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(Trainer, "evaluate", interrupted)
    assert sweep.run_in_sweep(run) is None
    assert [path.name for path in tmp_path.glob("*/checkpoint-*")] == ["checkpoint-1"]
    (begun,) = tmp_path.iterdir()
    begun.rename(tmp_path / "away")
    assert sweep.run_in_sweep(run) is None
    assert [path.name for path in tmp_path.iterdir()] == ["away"]


def test_presets_are_the_grids_that_they_are_called_after(monkeypatch):
    def runs(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        return runpy.run_path(str(SCRIPT))["parse_arguments"]()

    paper = runs("--preset", "paper", "--seed", "7")
    assert len(paper) == 4 * (4 * 4 * 5 + 6 * 4 * 2)
    assert {(run.seq_len, run.num_pairs) for run in paper} == {
        (128, 16), (256, 64), (512, 128), (1024, 256), (2048, 512), (256, 32), (2048, 32)
    }  # fmt: skip
    for name, feature_dims, widths in (("minutes", {4, 5, 6}, {32}), ("hours", {4, 5, 8}, {16, 32, 64})):
        preset = runs("--preset", name)
        cells = Counter((run.kernel, run.seq_len, run.feature_dim, run.hidden_size) for run in preset)
        assert set(cells.values()) == {3 * 5}, "each kernel has three rates, and five seeds at each"
        assert {(run.feature_dim, run.hidden_size) for run in preset} == {(d, w) for d in feature_dims for w in widths}
        assert {"rebased", "taylor", "attention"} <= {run.kernel for run in preset}
    assert len(runs("--preset", "minutes", "--kernel", "rebased", "--feature_dim", "5")) == 3 * 5, "no run twice"


def test_sweep_takes_the_recipe_of_the_example(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--hidden_size", "16", "--num_attention_heads", "2"])
    script = runpy.run_path(str(SCRIPT))
    config = script["make_model"](script["parse_arguments"]()[0]).config
    assert (config.initializer_range, config.use_position_embeddings) == (0.125, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_attention_heads", "64"], "the model's sizes do not fit together"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--seq_len", "8", "16"], "--num_pairs must give one number for each --seq_len, got 1 for 2"),
    ],
)
def test_bad_input_is_one_clear_sentence(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *SMALL, "--max_steps", "2", *arguments)
    assert message in capsys.readouterr().err + str(stopped.value)
