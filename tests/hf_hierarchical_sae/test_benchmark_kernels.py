"""The benchmark of the kernels: what it says without a GPU, and its table with one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch


REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "examples" / "hf_hierarchical_sae" / "benchmark_kernels.py"


def run_script(*arguments):
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], cwd=REPOSITORY, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_sentence_says_so():
    done = run_script()

    assert done.returncode == 1
    # the last line: torchao, if installed, complains of missing GPU libraries before
    assert done.stderr.splitlines()[-1] == (
        "benchmark_kernels.py times GPU kernels and found no CUDA GPU: run it on a machine with one, or give "
        "--bandwidth to list floors."
    )


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_floors_are_listed_for_a_given_bandwidth():
    done = run_script("--bandwidth", "3.35")

    assert done.returncode == 0, done.stderr
    assert "| 32 | HierarchicalTopK, Triton | not measured | | | 1.56 |" in done.stdout
    assert done.stdout.count("not measured") == 15


@pytest.mark.gpu
def test_table_has_a_time_for_every_form(tmp_path):
    sizes = ["--k", "4", "8", "--batch_size", "64", "--d_sae", "512", "--d_in", "96", "--rounds", "3"]
    done = run_script(*sizes, "--output", str(tmp_path / "table.md"))
    rows = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith(("| 4", "| 8"))]

    assert done.returncode == 0, done.stderr
    assert len(rows) == 10
    assert all(float(row.split("|")[3]) > 0 for row in rows)
