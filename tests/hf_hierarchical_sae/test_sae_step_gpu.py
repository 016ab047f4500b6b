"""The benchmark of the training step: what it says without a GPU or without a library, and its tables."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "examples" / "benchmarks" / "sae_step_gpu.py"
ROWS = {"ours, HierarchicalTopK": 3, "ours, plain TopK": 3, "SAELens": 3, "sparsify": 2}
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def run_script(*arguments, **environment):
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def step_rows(text, family):
    return [line.split("|")[1:-1] for line in text.splitlines() if line.startswith(f"| {family}")]


@pytest.mark.slow
@without_gpu
def test_without_a_gpu_one_sentence_says_so():
    done = run_script()

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("sae_step_gpu.py found no CUDA GPU: run it on a machine with one")


@pytest.mark.slow
@without_gpu
def test_dry_run_measures_every_library_and_every_stage(tmp_path):
    pytest.importorskip("sae_lens")
    pytest.importorskip("sparsify")
    done = run_script("--dry_run", "--output", str(tmp_path / "step.md"))
    text = (tmp_path / "step.md").read_text()

    assert done.returncode == 0, done.stderr
    assert text in done.stdout and (tmp_path / "step_kernels.txt").exists()
    for family, count in ROWS.items():
        rows = step_rows(text, family)
        assert len(rows) == 2 * count
        assert all(float(row[2]) > 0 for row in rows), rows
    assert text.count("| optimizer | ") == text.count("| the rest | ") == 2
    assert text.count("| selection alone | ") == 2


@pytest.mark.slow
@without_gpu
def test_a_library_that_cannot_be_imported_has_a_row_that_says_so(tmp_path):
    (tmp_path / "sae_lens.py").write_text("raise ImportError('no module named transformer_lens')")

    done = run_script("--dry_run", "--only", "SAELens 6.54, TopK", PYTHONPATH=str(tmp_path))

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("not installed: no module named transformer_lens") == 2 * 3


@pytest.mark.gpu
def test_our_steps_have_times_on_a_gpu(tmp_path):
    sizes = ["--sizes", "256,8,4096,96", "--rounds", "3", "--only", "ours, HierarchicalTopK", "ours, plain TopK"]
    done = run_script(*sizes, "--output", str(tmp_path / "step.md"))
    text = (tmp_path / "step.md").read_text()

    assert done.returncode == 0, done.stderr
    for family in ("ours, HierarchicalTopK", "ours, plain TopK"):
        rows = step_rows(text, family)
        assert len(rows) == ROWS[family]
        assert all(float(row[2]) > 0 and float(row[4]) > 0 for row in rows)
