"""The benchmark of large dictionaries: training and evaluation stay within twice the weights and the optimizer."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


SCRIPT = str(REPOSITORY / "examples" / "benchmarks" / "sae_scale.py")


@pytest.mark.slow
def test_training_and_evaluation_take_less_than_twice_the_weights_and_the_optimizer(tmp_path):
    size = ["--d_in", "256", "--d_sae", "65536", "--encoder_chunk_size", "8192", "--tokens", "256", "--k", "16"]
    command = [sys.executable, SCRIPT, *size, "--output", str(tmp_path / "scale.md")]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    rows = [line.split(" | ") for line in (tmp_path / "scale.md").read_text().splitlines()[-2:]]
    ratios = [float(row[-1].rstrip(" |")) for row in rows]

    # Below the weights, the optimizer and the gradients, 4/3, something would not have been measured.
    assert len(ratios) == 2 and all(1.3 < ratio < 2 for ratio in ratios), rows
