"""The GPU benchmark of ReBased attention: every line of it runs without a GPU, and it says so where there is none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "examples" / "benchmarks" / "rebased_attention_gpu.py"


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], cwd=REPOSITORY, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


@pytest.mark.slow
def test_dry_run_measures_every_part_and_draws_the_plot(tmp_path):
    pytest.importorskip("triton")
    done = run_script("--dry_run", "--lengths", "32", "--dtype", "float32", "--output_dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rebased_attention.json").read_text())["rows"]
    measured = {(row["part"], row["name"]) for row in rows if "ms" in row}
    errors = [row["error"] for row in rows if row["name"].startswith("ReBased") and "error" in row]

    assert {part for part, name in measured if name.startswith("ReBased")} == {
        "forward",
        "backward",
        "decode",
        "training",
        "generate",
    }
    assert {("decode", "softmax (SDPA)"), ("training", "Llama (SDPA)"), ("generate", "Llama (SDPA)")} < measured
    assert len(errors) == 2
    # sums of up to 16 float32 terms in another order, divided by sums that may be small
    assert max(errors) < 1e-4
    assert all("ms" in row or row["note"] for row in rows)
    assert (tmp_path / "rebased_attention.md").read_text().count("| 32 | 1 | ReBased (hf_based_kernel) |") == 3
    assert (tmp_path / "rebased_attention.png").stat().st_size > 0


@pytest.mark.slow
def test_rows_after_the_time_limit_say_that_they_were_not_measured(tmp_path):
    done = run_script("--dry_run", "--parts", "decode", "--seconds", "0", "--output_dir", str(tmp_path))
    rows = json.loads((tmp_path / "rebased_attention.json").read_text())["rows"]

    assert done.returncode == 0, done.stderr
    assert [row["note"] for row in rows] == ["not measured"] * 4


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_sentence_says_so():
    done = run_script()

    assert done.returncode == 1
    # the last line: torchao, if installed, complains of missing GPU libraries before
    assert done.stderr.splitlines()[-1] == (
        "rebased_attention_gpu.py found no CUDA GPU: run it on a machine with one, or give --dry_run."
    )
