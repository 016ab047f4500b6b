import subprocess
import sys
from pathlib import Path

import pytest

from hf_based_kernel import RebasedConfig, RebasedForCausalLM


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

USE_HOOK = """
import inspect
import sys

import torch
from transformers.utils import import_utils

# transformers asks for a newer kernels than the pinned one, and for an accelerator; what comes after is as it is.
inspect.unwrap(import_utils.is_kernels_available).__defaults__ = ("0.17", "0.19")
import_utils.is_kernels_available.cache_clear()

from transformers import AutoModelForCausalLM, KernelConfig
from transformers.utils import kernel_config

kernel_config.KERNELS_SUPPORTED_DEVICE_TYPES.append("cpu")


def results(model, input_ids):
    logits = model(input_ids).logits
    grads = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
    return [logits, *grads, model.generate(input_ids, max_new_tokens=4, do_sample=False)]


for path in {models!r}:
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    input_ids = torch.arange(18).view(2, 9)
    expected = results(model, input_ids)
    layers = {{"RebasedAttention": {kernel!r} + ":RebasedAttention"}}
    model.set_use_kernels(True, KernelConfig(layers, use_local_kernel=True))
    operation = model.model.layers[0].self_attn.attention
    assert operation.forward.__func__.__module__.startswith("_rebased_attention_"), operation.forward
    for got, wanted in zip(results(model, input_ids), expected, strict=True):
        assert torch.equal(got, wanted)
print("same")
"""


def build(path, *options):
    command = [sys.executable, SCRIPT, "--output_dir", path, *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.pinned
@pytest.mark.slow
def test_kernel_repository_loads_and_runs_without_the_package(tmp_path, monkeypatch, run_isolated):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = build(tmp_path / "kernel")

    assert done.returncode == 0, done.stderr
    assert run_isolated(USE_KERNEL.format(path=str(tmp_path / "kernel"))).strip() == "0.1.0"


@pytest.mark.pinned
@pytest.mark.slow
def test_a_checkpoint_without_the_package_takes_its_operation_from_a_kernel_repository(tmp_path, run_isolated):
    assert build(tmp_path / "kernel").returncode == 0
    options = {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "feature_dim": 4,
    }
    layers = ["linear_attention", "full_attention"]
    for name, mix in {"rebased": {}, "mapped": {"use_feature_map": True}, "taylor": {"kernel": "taylor"}}.items():
        config = RebasedConfig(**options, **mix, num_hidden_layers=2, layer_types=layers, initializer_range=0.3)
        RebasedForCausalLM(config).save_pretrained(tmp_path / name)
    models = [str(tmp_path / name) for name in ("rebased", "mapped", "taylor")]

    assert run_isolated(USE_HOOK.format(models=models, kernel=str(tmp_path / "kernel"))).strip() == "same"


@pytest.mark.slow
def test_an_existing_build_is_not_overwritten(tmp_path):
    (tmp_path / "build").mkdir()
    done = build(tmp_path)

    assert done.returncode == 2
    assert "exists already; delete it or choose another --output_dir" in done.stderr
    (tmp_path / "file").touch()
    assert "--output_dir: expected a folder to write, got the file" in build(tmp_path / "file").stderr


@pytest.mark.slow
def test_a_name_that_no_kernel_can_have_is_refused(tmp_path):
    done = build(tmp_path, "--name", "my-name/rebased-attention")

    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert "--name: expected a small letter and then small letters, digits and dashes, got 'my-name/reb" in done.stderr
