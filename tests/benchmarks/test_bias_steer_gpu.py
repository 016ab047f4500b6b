import json
import subprocess
import sys

import pytest
import torch

from tests.conftest import REPOSITORY


SCRIPT = REPOSITORY / "examples" / "benchmarks" / "bias_steer_gpu.py"


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, cwd=REPOSITORY)


@pytest.mark.slow
def test_dry_run_measures_every_method_at_everything(tmp_path):
    done = run_script("--dry_run", "--output_dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "bias_steer.json").read_text())
    methods = {}
    for row in result["times"]:
        methods.setdefault(row["workload"], []).append(row["method"])
    costs = {row["method"]: row for row in result["costs"]}

    assert [len(of_workload) for of_workload in methods.values()] == [6, 7, 7, 7, 2, 2]
    assert all(isinstance(row["ms"], float) and row["ratio to base"] > 0 for row in result["times"]), result["times"]
    # two layers of width 32; AdamW keeps two numbers and a step count for each tensor, all float32
    assert costs["BiasSteer"]["trainable"] == costs["BEFT down_proj"]["trainable"] == 64
    assert costs["BiasSteer"]["optimizer, bytes"] == 2 * 64 * 4 + 2 * 4
    assert costs["LoRA r=8"]["trainable"] == 8 * costs["LoRA r=1"]["trainable"]
    assert "| training step | BiasSteer |" in (tmp_path / "bias_steer.md").read_text()
    assert (tmp_path / "bias_steer.png").stat().st_size > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_what_to_do():
    done = run_script()

    assert done.returncode == 2
    assert "needs a CUDA GPU: run it on a machine with one, or give --dry_run" in done.stderr
