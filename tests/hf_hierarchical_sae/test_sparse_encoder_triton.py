"""
The Triton form of the sparse encoder's gradient and of the decoder's tangent gradient, against float64.

Triton decides when it is first imported whether kernels are interpreted, so that without a GPU the tests run in a
process of their own, which `test_in_the_interpreter` starts.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


REPOSITORY = Path(__file__).parents[2]
PROCESS = os.environ.get("TRITON_TEST_PROCESS")
interpreted = pytest.mark.skipif(PROCESS != "interpreter", reason="runs in a process that interprets kernels")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_inputs(batch, k, d_sae, d_in, *, dtype=torch.float32, distinct=False, seed=0, device="cpu"):
    generator = torch.Generator(device).manual_seed(seed)

    def draw(function, *shape):
        return function(*shape, generator=generator, device=device)

    indices = torch.randint(d_sae, (batch, k), generator=generator, device=device)
    if distinct:
        indices = draw(torch.rand, batch, d_sae).topk(k, dim=1).indices
    values = draw(torch.rand, batch, k).sort(dim=1, descending=True).values
    tensors = (values, draw(torch.randn, d_sae, d_in), draw(torch.randn, d_in), draw(torch.randn, batch, d_in))
    return indices, *[tensor.to(dtype).requires_grad_() for tensor in tensors]


def assert_close(result, expected, *, rtol, name=""):
    """Within `rtol` of the largest element: rounding errors are as large as the largest summand."""
    assert torch.isfinite(result).all()
    # subnormal numbers are rounded by half of the smallest of them, 2**-25 in float16, however small they are
    subnormal = torch.finfo(result.dtype).smallest_normal * torch.finfo(result.dtype).eps / 2
    atol = rtol * float(expected.detach().abs().max()) + subnormal
    torch.testing.assert_close(
        result.double(), expected.double(), rtol=0, atol=atol, msg=lambda text: f"{name}: {text}"
    )


@pytest.mark.skipif(PROCESS is not None, reason="runs where nothing depends on triton's mode")
@pytest.mark.slow
def test_in_the_interpreter(tmp_path):
    environment = {"TRITON_TEST_PROCESS": "interpreter", "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).resolve())]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 15


def assert_encoder_gradient_equals_float64(inputs, *, rtol):
    """Each sum in float64, pair by pair, from the same inputs."""
    from hf_hierarchical_sae.sparse_encoder_triton import encoder_gradient_triton

    indices, grad_values, encoder_weight, b_dec, scaled = (tensor.detach() for tensor in inputs)
    centered = scaled.double() - b_dec.double()
    expected = torch.zeros_like(encoder_weight, dtype=torch.float64)
    expected_bias = torch.zeros(len(encoder_weight), dtype=torch.float64, device=scaled.device)
    for index, value in zip(indices.t().long(), grad_values.t().double()):
        expected.index_add_(0, index, value.unsqueeze(1) * centered)
        expected_bias.index_add_(0, index, value)

    grad_weight, grad_bias = encoder_gradient_triton(indices, grad_values, scaled, b_dec, encoder_weight)

    assert grad_weight.dtype == encoder_weight.dtype and grad_bias.dtype == torch.float32
    assert_close(grad_weight, expected, rtol=rtol + torch.finfo(encoder_weight.dtype).eps)
    assert_close(grad_bias, expected_bias, rtol=rtol)


@interpreted
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_encoder_gradient_equals_float64_at_any_size(data):
    batch, d_sae, d_in = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)), data.draw(st.integers(1, 300))
    k, seed = data.draw(st.integers(1, d_sae)), data.draw(st.integers(0, 1000))

    # float32 sums of at most 81 terms.
    assert_encoder_gradient_equals_float64(make_inputs(batch, k, d_sae, d_in, seed=seed), rtol=1e-5)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_encoder_gradient_in_half_precision_is_accumulated_in_float32(dtype):
    indices, values, weight, b_dec, scaled = make_inputs(37, 5, 11, 260)

    assert_encoder_gradient_equals_float64((indices, values, weight.to(dtype), b_dec.to(dtype), scaled), rtol=1e-5)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_sae, d_in", [(1, 1), (3, 33), (5, 1024), (2, 2304)])
def test_tangent_gradient_equals_float64(dtype, d_sae, d_in):
    from hf_hierarchical_sae.sparse_encoder_triton import tangent_gradient_triton_

    weight = torch.nn.functional.normalize(torch.randn(d_sae, d_in), dim=1).to(dtype)
    grad = torch.randn(d_sae, d_in).to(dtype)
    rows, before = weight.double(), grad.double()

    tangent_gradient_triton_(grad, weight)

    along = (before * rows).sum(dim=1, keepdim=True)
    # The difference of numbers of the size of the gradient, rounded once to its dtype.
    assert (
        (grad.double() - (before - along * rows)).abs() <= (1e-5 + torch.finfo(dtype).eps) * before.abs().max()
    ).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "batch, k, d_sae, d_in", [(4096, 64, 65536, 2304), (1001, 33, 4609, 577), (1, 128, 16384, 768)]
)
def test_encoder_gradient_at_real_sizes_on_a_gpu_equals_float64(batch, k, d_sae, d_in):
    # float32 sums of some hundred terms; in the first size some latents have most inputs.
    indices, *tensors = make_inputs(batch, k, d_sae, d_in, device="cuda")
    indices = torch.where(indices % 8 == 0, indices % 16, indices)

    assert_encoder_gradient_equals_float64((indices, *tensors), rtol=2e-5)


@pytest.mark.gpu
def test_tangent_gradient_on_a_gpu_equals_float64():
    from hf_hierarchical_sae.sparse_encoder_triton import tangent_gradient_triton_

    weight = torch.nn.functional.normalize(torch.randn(16384, 2304, device="cuda"), dim=1)
    grad = torch.randn(16384, 2304, device="cuda")
    before, rows = grad.double(), weight.double()

    tangent_gradient_triton_(grad, weight)

    assert_close(grad, before - (before * rows).sum(dim=1, keepdim=True) * rows, rtol=1e-6)
