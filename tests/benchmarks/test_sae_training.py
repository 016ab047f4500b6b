"""The benchmark of training on CPU: contestants in processes of their own, which run one round at a time."""

import json
import subprocess
import sys
import textwrap

import pytest

from tests.conftest import REPOSITORY
from tests.example_module import load_example


SCRIPT = REPOSITORY / "examples" / "benchmarks" / "sae_training.py"
SHARED = REPOSITORY / "examples" / "shared"


def load_turns():
    return load_example("shared/turns.py")


def contestant(name: str, log) -> list[str]:
    """A process that writes down its name at each call."""
    program = f"""
        import sys
        sys.path.append({str(SHARED)!r})
        from turns import take_turns

        def call():
            print("something else")
            with open({str(log)!r}, "a") as file:
                file.write({name!r})

        take_turns(lambda: call, warm_up=2)
    """
    return [sys.executable, "-c", textwrap.dedent(program)]


def test_contestants_warm_up_and_then_take_turns(tmp_path):
    log = tmp_path / "log"
    measured = load_turns().medians_in_turns({name: contestant(name, log) for name in "ab"}, rounds=3)

    assert log.read_text() == "aabb" + "ab" * 3
    assert set(measured) == {"a", "b"}
    assert all(row["cpu_ms"] >= 0 and row["faults"] >= 0 and row["peak_mib"] >= 0 for row in measured.values())


def test_a_contestant_that_fails_is_named_with_its_command():
    with pytest.raises(SystemExit, match="ended before its turn; to see why, run: .*-c"):
        load_turns().medians_in_turns({"a": [sys.executable, "-c", "raise ValueError"]}, rounds=1)


def test_short_calls_are_repeated_until_a_turn_is_long_enough(monkeypatch, capsys):
    turns, called = load_turns(), []
    monkeypatch.setattr(sys, "stdin", ["\n", "\n"])
    turns.take_turns(lambda: lambda: called.append(sum(range(100_000))), warm_up=3, turn_seconds=0.2)
    answers = [json.loads(line.removeprefix("turn: ")) for line in capsys.readouterr().out.splitlines()[1:]]

    per_turn, rest = divmod(len(called) - 3, 2)
    assert rest == 0 and per_turn > 5
    assert all(0.05 < per_turn * answer["cpu_ms"] / 1e3 < 0.8 for answer in answers)


@pytest.mark.parametrize("size", ["C", "512,64", "512,64,16384,x", "512,0,16384,576"])
def test_what_is_no_size_is_refused_in_one_sentence(size, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sae_training.py", "--sizes", "A", size])

    with pytest.raises(SystemExit):
        load_example("benchmarks/sae_training.py").parse_arguments()

    assert f"--sizes: expected A, B or batch,k,d_sae,d_in, got {size!r}" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step:our transcoder (all budgets)", "loss:HierarchicalTopK, compiled (numba)"])
def test_a_contestant_of_training_answers_once_for_each_turn(name):
    command = [sys.executable, str(SCRIPT), "--sizes", "16,4,64,8", "--contestant", name]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, input="\n\n")
    answers = [line.removeprefix("turn: ") for line in done.stdout.splitlines() if line.startswith("turn: ")]

    assert answers[0] == "ready" and len(answers) == 3
    assert json.loads(answers[1])["cpu_ms"] > 0
