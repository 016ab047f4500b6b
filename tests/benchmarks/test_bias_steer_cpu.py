"""The benchmark of a steering step: what is timed stands in the table, with an interval where processes were started again."""

import re
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


SCRIPT = str(REPOSITORY / "examples" / "benchmarks" / "bias_steer_cpu.py")
SMALL = ["--batch_size", "1", "--sequence_length", "64", "--step_rounds", "1", "--methods", "base", "BiasSteer"]


@pytest.mark.slow
def test_a_step_is_timed_in_as_many_processes_as_asked_for_and_nothing_else(tiny_language_model, tmp_path):
    options = ["--model", tiny_language_model, *SMALL, "BEFT down_proj", "--rounds", "0", "--step_starts", "2"]
    command = [sys.executable, SCRIPT, *options, "--output", str(tmp_path / "page.md")]
    subprocess.run(command, check=True, capture_output=True)
    page = (tmp_path / "page.md").read_text()
    base, ours, beft = ([cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()[7:10])

    assert base == ["base", *"–––––––"]
    assert ours[3:6] == beft[3:6] == ["–", "–", "–"]
    assert re.fullmatch(r"\d+\.\d{3} \(1\.000×\)", ours[6]) and re.fullmatch(
        r"\d+\.\d{3} \(\d+\.\d{3} ± \d+\.\d{3}×\)", beft[6]
    )
    assert int(ours[7]) >= 0
    assert "1 of the training step, in 2 processes of each" in page


@pytest.mark.slow
def test_forward_passes_and_generation_are_beside_the_base(tiny_language_model):
    command = [sys.executable, SCRIPT, "--model", tiny_language_model, *SMALL, "--rounds", "1"]
    table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    base, ours = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[-2:])

    assert base[3].endswith("(1.000×)") and base[4].endswith("(1.000×)") and base[7].endswith("(forward)")
    assert all(re.fullmatch(r"\d+\.\d{3} \(\d+\.\d{3}×\)", cell) for cell in ours[3:5]) and float(ours[5]) > 0
