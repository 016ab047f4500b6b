import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "examples" / "hf_based_kernel" / "build_hub_kernel.py"
USE_KERNEL = """
import sys
from pathlib import Path

import torch
from kernels import get_local_kernel

kernel = get_local_kernel(Path({path!r}), trust_remote_code=True)
assert "transformers" not in sys.modules
torch.manual_seed(0)
for attention in (kernel.rebased_attention, kernel.taylor_attention):
    q, k, v = (torch.randn(1, 5, 2, 4, requires_grad=True) for _ in range(3))
    results = []
    for backend in ("torch", "triton"):
        out = attention(q, k, v, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for x, y in zip(*results):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
print(kernel.__version__)
"""


def build(path):
    command = [sys.executable, SCRIPT, "--output_dir", path]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.pinned
@pytest.mark.slow
def test_kernel_repository_loads_and_runs_without_the_package(tmp_path, monkeypatch, run_isolated):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = build(tmp_path / "kernel")

    assert done.returncode == 0, done.stderr
    assert run_isolated(USE_KERNEL.format(path=str(tmp_path / "kernel"))).strip() == "0.1.0"


@pytest.mark.slow
def test_an_existing_build_is_not_overwritten(tmp_path):
    (tmp_path / "build").mkdir()
    done = build(tmp_path)

    assert done.returncode == 2
    assert "exists already; delete it or choose another --output_dir" in done.stderr
