"""The benchmark of the loss: what it says without a GPU, its dry run, and its table with a GPU."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch


REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "examples" / "benchmarks" / "sae_loss_gpu.py"


def run_script(*arguments):
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], cwd=REPOSITORY, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


def table_rows(path):
    return [
        line.split("|")[1:-1] for line in path.read_text().splitlines() if line.startswith(("| float", "| bfloat"))
    ]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_sentence_says_so():
    done = run_script()

    assert done.returncode == 1
    # the last line: torchao, if installed, complains of missing GPU libraries before
    assert done.stderr.splitlines()[-1] == (
        "sae_loss_gpu.py times GPU kernels and found no CUDA GPU: run it on a machine with one, give --bandwidth to "
        "list floors, or --dry_run to see it run."
    )


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_floors_are_listed_for_a_given_bandwidth():
    done = run_script("--bandwidth", "3.35")

    assert done.returncode == 0, done.stderr
    assert "| float32 | 32 | HierarchicalTopK, Triton | not measured | |  | 1.56 |" in done.stdout
    assert done.stdout.count("not measured") == 24


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_dry_run_has_a_time_for_every_form(tmp_path):
    done = run_script("--dry_run", "--output", str(tmp_path / "table.md"))
    rows = table_rows(tmp_path / "table.md")

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "table.md").read_text() in done.stdout
    assert len(rows) == 2 * 2 * 5
    assert all(float(row[3]) > 0 and float(row[4]) > 0 for row in rows)
    assert {float(row[4]) for row in rows if row[2].startswith(" TopK")} >= {1.0}


@pytest.mark.gpu
def test_table_has_a_time_for_every_form(tmp_path):
    # the script is a process of its own, which lacks what earlier tests left in torch's cache
    gc.collect()
    torch.cuda.empty_cache()
    sizes = ["--k", "4", "8", "--batch_size", "64", "--d_sae", "512", "--d_in", "96", "--rounds", "3"]
    done = run_script(*sizes, "--output", str(tmp_path / "table.md"))
    rows = table_rows(tmp_path / "table.md")

    assert done.returncode == 0, done.stderr
    assert len([row for row in rows if "compiled" not in row[2]]) == 2 * 2 * 4
    without_time = {(row[0].strip(), row[2].strip()) for row in rows if row[3].strip() == "no backward in torch"}
    assert without_time <= {("bfloat16", "TopK, `embedding_bag`")}
    assert all(float(row[3]) > 0 for row in rows if (row[0].strip(), row[2].strip()) not in without_time)
