"""
The Triton form of the loss against float64, and every kernel of a training step compiled for GPUs that are not there.

Triton decides when it is first imported whether kernels are interpreted or compiled. So that no other test's import
decides it, the tests of each kind run in a process of their own, which `test_interpreter_and_compiler` starts.
"""

import gc
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_hierarchical_sae.hierarchical_topk import (
    choose_form,
    hierarchical_topk_loss,
    hierarchical_topk_loss_reference,
)


REPOSITORY = Path(__file__).parents[2]
PROCESS = os.environ.get("TRITON_TEST_PROCESS")
interpreted = pytest.mark.skipif(PROCESS != "interpreter", reason="runs in a process that interprets kernels")
alone = pytest.mark.skipif(PROCESS is not None, reason="runs where nothing depends on triton's mode")
compiled = pytest.mark.skipif(PROCESS != "compiler", reason="runs in a process that compiles kernels")
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


def in_float64(inputs):
    return inputs[0], *[tensor.detach().double().requires_grad_() for tensor in inputs[1:]]


def assert_close(result, expected, *, rtol, name=""):
    """Within `rtol` of the largest element: rounding errors are as large as the largest summand."""
    assert torch.isfinite(result).all()
    # subnormal numbers are rounded by half of the smallest of them, 2**-25 in float16, however small they are
    subnormal = torch.finfo(result.dtype).smallest_normal * torch.finfo(result.dtype).eps / 2
    atol = rtol * float(expected.detach().abs().max()) + subnormal
    torch.testing.assert_close(
        result.double(), expected.double(), rtol=0, atol=atol, msg=lambda text: f"{name}: {text}"
    )


def assert_equal_to_reference(inputs, *, rtol=1e-5, rtol_gradients=1e-5, **options):
    # float32 sums of up to k and d_in terms: 1e-5 is about 80 units in the last place.
    exact = in_float64(inputs)
    expected = hierarchical_topk_loss_reference(*exact, **options)
    loss = hierarchical_topk_loss(*inputs, backend="triton", **options)
    assert_close(loss, expected, rtol=rtol, name="loss")
    gradients = torch.autograd.grad(loss, inputs[1:])
    expected_gradients = torch.autograd.grad(expected, exact[1:])
    for name, gradient, other, tensor in zip(
        ("top_values", "W_dec", "b_dec", "target"), gradients, expected_gradients, inputs[1:]
    ):
        assert gradient.dtype == tensor.dtype
        assert_close(gradient, other, rtol=rtol_gradients, name=name)


@alone
@pytest.mark.pinned
@pytest.mark.slow
@pytest.mark.parametrize("process, interpret, tests", [("interpreter", "1", 31), ("compiler", "0", 28)])
def test_interpreter_and_compiler(process, interpret, tests, tmp_path):
    environment = {
        "TRITON_TEST_PROCESS": process,
        "TRITON_INTERPRET": interpret,
        "TRITON_CACHE_DIR": str(tmp_path),
    }
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
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= tests


@interpreted
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_value_and_every_gradient_equal_the_reference_at_any_size(data):
    batch, d_sae, d_in = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)), data.draw(st.integers(1, 40))
    k = data.draw(st.integers(1, d_sae))
    budgets = data.draw(st.none() | st.sets(st.integers(1, k), min_size=1).map(sorted))
    count = len(budgets or range(k))
    weights = data.draw(st.none() | st.lists(st.floats(0.1, 10), min_size=count, max_size=count))
    distinct, seed = data.draw(st.booleans()), data.draw(st.integers(0, 1000))

    inputs = make_inputs(batch, k, d_sae, d_in, distinct=distinct, seed=seed)

    assert_equal_to_reference(inputs, budgets=budgets, budget_weights=weights)


@interpreted
@pytest.mark.parametrize(
    "batch, k, d_sae, d_in",
    [
        pytest.param(1, 1, 1, 1, id="everything-one"),
        pytest.param(1, 6, 6, 100, id="batch-one-and-k-equal-to-d_sae"),
        pytest.param(37, 3, 16, 100, id="batch-beyond-one-block"),
        pytest.param(5, 3, 7, 576, id="several-slabs-and-windows"),
        pytest.param(3, 40, 5, 3, id="windows-of-one-column"),
        pytest.param(2, 9, 300, 33, id="most-latents-unused"),
    ],
)
def test_sizes_at_the_edges_of_blocks_equal_the_reference(batch, k, d_sae, d_in):
    assert_equal_to_reference(make_inputs(batch, k, d_sae, d_in))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("batch, k, d_sae, d_in", [(5, 3, 11, 100), (17, 7, 9, 32)])
def test_half_precision_is_accumulated_in_float32(dtype, batch, k, d_sae, d_in):
    # A gradient is rounded once, when it is returned; the interpreter truncates where GPUs round to the nearest.
    rounding = torch.finfo(dtype).eps

    assert_equal_to_reference(make_inputs(batch, k, d_sae, d_in, dtype=dtype), rtol_gradients=1e-5 + rounding)


@interpreted
def test_mixed_precisions_return_each_gradient_in_its_own():
    indices, values, W_dec, b_dec, target = make_inputs(5, 4, 9, 20)
    halves = (values.detach().bfloat16().requires_grad_(), target.detach().half().requires_grad_())
    inputs = (indices, halves[0], W_dec, b_dec, halves[1])

    assert_equal_to_reference(inputs, rtol_gradients=2**-8)


@interpreted
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_one_latent_in_every_place_equals_the_reference(dtype):
    indices, *tensors = make_inputs(70, 4, 6, 12)

    assert_equal_to_reference((torch.full_like(indices, 5, dtype=dtype), *tensors))


@interpreted
def test_zero_values_have_the_gradient_of_the_reference():
    indices, values, *tensors = make_inputs(4, 5, 8, 10)
    values = torch.where(torch.arange(5) < 2, values, 0.0).detach().requires_grad_()

    assert_equal_to_reference((indices, values, *tensors))
    assert_equal_to_reference((indices, torch.zeros_like(values, requires_grad=True), *tensors))


@interpreted
@pytest.mark.parametrize(
    "budgets, weights", [((6,), None), ((1, 2, 4), None), ((2, 6), (3.0, 1.0)), ((1, 3, 5), (0.0, 1.0, 0.0))]
)
def test_budgets_and_weights_equal_the_reference(budgets, weights):
    assert_equal_to_reference(make_inputs(3, 6, 9, 20), budgets=budgets, budget_weights=weights)


@interpreted
def test_errors_and_reconstruction_and_their_gradients_equal_the_torch_form():
    inputs = make_inputs(6, 5, 9, 70)
    exact = in_float64(inputs)
    errors, reconstruction = choose_form("triton")(*inputs, (2, 5))
    expected_errors, expected_reconstruction = choose_form("torch")(*exact, (2, 5))
    cotangent = torch.randn(70, 6).t()

    def total(errors, reconstruction):
        return errors[0] - 2 * errors[1] + (reconstruction * cotangent).sum()

    assert_close(errors, expected_errors, rtol=1e-5)
    assert_close(reconstruction, expected_reconstruction, rtol=1e-5)
    # As one scalar, and the reconstruction alone: then the errors send no gradient at all.
    for own, other in [
        (total(errors, reconstruction), total(expected_errors, expected_reconstruction)),
        ((reconstruction * cotangent).sum(), (expected_reconstruction * cotangent).sum()),
    ]:
        gradients = torch.autograd.grad(own, inputs[1:4], retain_graph=True)
        for gradient, expected in zip(gradients, torch.autograd.grad(other, exact[1:4], retain_graph=True)):
            assert_close(gradient, expected, rtol=1e-5)


@interpreted
@pytest.mark.parametrize(
    "needed, flags",
    [("top_values", {(True, False)}), ("W_dec", {(False, True)}), ("b_dec", set()), ("target", set())],
)
def test_only_the_gradients_that_are_needed_are_computed(monkeypatch, needed, flags):
    from hf_hierarchical_sae import hierarchical_topk_triton as module

    names = ("top_values", "W_dec", "b_dec", "target")
    indices, *tensors = make_inputs(5, 4, 9, 20)
    (expected,) = torch.autograd.grad(
        hierarchical_topk_loss(indices, *tensors, backend="triton"), [tensors[names.index(needed)]]
    )
    tensors = [tensor.detach().requires_grad_(name == needed) for name, tensor in zip(names, tensors)]
    launched, launch = [], module.launch

    def record(kernel, *arguments, **constants):
        launched.append(constants)
        launch(kernel, *arguments, **constants)

    monkeypatch.setattr(module, "launch", record)
    hierarchical_topk_loss(indices, *tensors, backend="triton").backward()

    assert {(sizes["NEEDS_VALUES"], sizes["NEEDS_W_DEC"]) for sizes in launched if "NEEDS_VALUES" in sizes} == flags
    assert [tensor.grad is not None for tensor in tensors] == [name == needed for name in names]
    assert torch.equal(tensors[names.index(needed)].grad, expected)


@interpreted
def test_views_with_strides_equal_the_reference():
    indices, values, W_dec, b_dec, target = make_inputs(5, 4, 9, 20)
    inputs = (
        indices.t().contiguous().t(),
        values.detach().t().contiguous().t().requires_grad_(),
        W_dec.detach().t().contiguous().t().requires_grad_(),
        torch.randn(40)[::2].requires_grad_(),
        torch.randn(5, 40)[:, ::2].requires_grad_(),
    )

    assert_equal_to_reference(inputs)


@interpreted
def test_offsets_beyond_32_bits_reach_the_last_decoder_row():
    # 4.8 GB of address space, of which only the touched pages exist.
    W_dec = torch.empty(2**20, 2304, dtype=torch.bfloat16)
    W_dec[[0, -1]] = torch.randn(2, 2304).bfloat16()
    indices = torch.tensor([[2**20 - 1, 0]], dtype=torch.int32)
    _, values, _, b_dec, target = make_inputs(1, 2, 2, 2304)
    few = (torch.tensor([[1, 0]]), values, W_dec[[0, -1]], b_dec, target)

    loss = hierarchical_topk_loss(indices, values.detach(), W_dec, b_dec, target, backend="triton")

    expected = hierarchical_topk_loss(*few, backend="triton")
    # Equal but for the order of summation: how many columns a block has depends on the size of the dictionary.
    assert_close(loss, expected, rtol=1e-6)
    assert_close(torch.autograd.grad(loss, b_dec)[0], torch.autograd.grad(expected, b_dec)[0], rtol=1e-6)


@interpreted
def test_compiled_without_graph_breaks_and_under_autocast():
    inputs = make_inputs(5, 4, 9, 20)
    loss = hierarchical_topk_loss(*inputs, backend="triton")
    expected = torch.autograd.grad(loss, inputs[1:])

    def step(*inputs):
        return hierarchical_topk_loss(*inputs, backend="triton")

    compiled_step = torch.compile(step, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast_loss, compiled_loss = step(*inputs), compiled_step(*inputs)

    assert torch.equal(autocast_loss, loss) and torch.equal(compiled_loss, loss)
    for result in (autocast_loss, compiled_loss):
        assert all(map(torch.equal, torch.autograd.grad(result, inputs[1:]), expected))


@interpreted
def test_a_second_copy_of_the_module_leaves_the_first_one_working(monkeypatch):
    import importlib.util

    from hf_hierarchical_sae import hierarchical_topk_triton as module

    inputs = make_inputs(5, 4, 9, 20)
    name = "transformers_modules.organisation.sae_hyphen_model.0a1b.hierarchical_topk_triton"
    specification = importlib.util.spec_from_file_location(name, module.__file__)
    copy = importlib.util.module_from_spec(specification)
    package = types.ModuleType(name.rpartition(".")[0])
    package.__path__ = [str(Path(module.__file__).parent)]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    specification.loader.exec_module(copy)

    results = [form.budget_errors_triton(*inputs, (1, 4)) for form in (module, copy)]

    gradients = [torch.autograd.grad(errors.sum(), inputs[1:]) for errors, _ in results]
    assert all(map(torch.equal, *results)) and all(map(torch.equal, *gradients))

    def refuse(*arguments, **constants):
        raise AssertionError("the first copy runs the kernels of the second")

    monkeypatch.setattr(copy, "launch", refuse)
    assert torch.equal(module.budget_errors_triton(*inputs, (1, 4))[0], results[0][0])


def check_operators(device):
    from hf_hierarchical_sae.hierarchical_topk_triton import _backward, _forward
    from hf_hierarchical_sae.sparse_encoder_triton import encoder_gradient_triton, tangent_gradient_triton_

    indices, *tensors = (tensor.detach() for tensor in make_inputs(3, 2, 5, 8, device=device))
    values, W_dec, b_dec, target = tensors
    residual, scales = torch.randn(3, 8, device=device), torch.rand(2, device=device)

    torch.library.opcheck(_forward, (indices, *tensors))
    for grad_reconstruction, needs_values, needs_W_dec in [(None, True, True), (residual, False, False)]:
        inputs = (indices, values, W_dec, residual, scales, grad_reconstruction, needs_values, needs_W_dec)
        torch.library.opcheck(_backward, inputs)
    torch.library.opcheck(encoder_gradient_triton, (indices, values, target, b_dec, W_dec))
    torch.library.opcheck(tangent_gradient_triton_, (torch.randn(5, 8, device=device), W_dec))


@interpreted
def test_operators_are_correctly_registered():
    check_operators("cpu")


@interpreted
def test_a_training_step_with_every_kernel_equals_the_torch_form(monkeypatch):
    from hf_hierarchical_sae import HierarchicalSaeConfig, HierarchicalSaeModel, hierarchical_topk_loss, sparse_latents

    x, results = torch.randn(33, 20), []
    for use_triton in (False, True):
        torch.manual_seed(0)
        sae = HierarchicalSaeModel(HierarchicalSaeConfig(d_in=20, d_sae=64, k=4)).train()
        if use_triton:
            loss_module = sys.modules[hierarchical_topk_loss.__module__]
            for module in (sparse_latents, loss_module):
                monkeypatch.setattr(module, "suits_triton", lambda *tensors: True)
        output = sae(x)
        output.loss.backward()
        results.append([output.loss, *[parameter.grad for parameter in sae.parameters()]])

    for result, expected in zip(*reversed(results)):
        assert_close(result, expected, rtol=1e-5)


def compile_launches(monkeypatch, target, *, batch, k, d_sae, d_in, dtype):
    """Compile for `target` each different kernel that the loss, its gradients and the encoder's launch at these sizes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hf_hierarchical_sae import hierarchical_topk_triton as module
    from hf_hierarchical_sae import sparse_encoder_triton as encoder

    types = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int64": "*i64"}
    launched = {}

    def record(kernel, programs, *arguments, **constants):
        assert 0 < programs < 2**31
        signature, attributes = {}, {}
        for place, (name, argument) in enumerate(zip(kernel.arg_names, arguments)):
            is_tensor = isinstance(argument, torch.Tensor)
            signature[name] = types[str(argument.dtype)[6:]] if is_tensor else "i32"
            # Allocations are aligned on a GPU; triton specialises on multiples of 16 in the same way.
            if is_tensor or argument % 16 == 0:
                attributes[place,] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys(constants, "constexpr")
        launched[kernel.__name__, str(attributes)] = ASTSource(kernel, signature, constants, attributes)

    for each in (module, encoder):
        monkeypatch.setattr(each, "launch", record)
    values, W_dec = torch.ones(batch, k, dtype=dtype), torch.empty(d_sae, d_in, dtype=dtype)
    indices, b_dec, target_ = torch.zeros(batch, k, dtype=torch.int64), W_dec[0], torch.empty(batch, d_in, dtype=dtype)
    _, residual = module._forward(indices, values, W_dec, b_dec, target_)
    module._backward(indices, values, W_dec, residual, torch.ones(k), None, True, True)
    encoder.encoder_gradient_triton(indices, values.float(), residual, b_dec, W_dec)
    encoder.tangent_gradient_triton_(W_dec, W_dec)
    options = {"num_warps": 1}
    return {
        key: triton.compile(source, target=GPUTarget(*target), options=options) for key, source in launched.items()
    }


def spilled_bytes(kernel):
    """What one compiled kernel keeps in memory because its registers do not suffice."""
    if "amdgcn" in kernel.asm:
        return sum(map(int, re.findall(r"gpr_spill_count:\s*(\d+)", kernel.asm["amdgcn"])))
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage)))


@compiled
@pytest.mark.parametrize(
    "target, shared_memory",
    [
        pytest.param(("cuda", 80, 32), 163 * 1024, id="sm_80"),
        pytest.param(("cuda", 90, 32), 227 * 1024, id="sm_90"),
        pytest.param(("hip", "gfx942", 64), 64 * 1024, id="gfx942"),
    ],
)
@pytest.mark.parametrize(
    "batch, k, d_sae, d_in, dtype",
    [
        *[
            pytest.param(4096, k, 65536, 2304, dtype, id=f"{str(dtype)[6:]}-{k}")
            for k in (32, 64, 128)
            for dtype in (torch.float32, torch.bfloat16)
        ],
        pytest.param(4096, 32, 16384, 768, torch.float32, id="smaller-float32"),
        pytest.param(1001, 33, 4609, 577, torch.float16, id="ragged-float16"),
    ],
)
def test_kernels_compile_and_fit(monkeypatch, target, shared_memory, batch, k, d_sae, d_in, dtype):
    kernels = compile_launches(monkeypatch, target, batch=batch, k=k, d_sae=d_sae, d_in=d_in, dtype=dtype)

    names = ("forward", "suffix", "latent", "encoder", "tangent")
    assert {name for name, _ in kernels} == {f"_{name}_kernel" for name in names}
    for kernel in kernels.values():
        assert kernel.metadata.shared <= shared_memory
        assert spilled_bytes(kernel) == 0


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoder_rows_are_read_sixteen_bytes_at_a_time(monkeypatch, dtype):
    sizes = {"batch": 4096, "k": 64, "d_sae": 65536, "d_in": 2304}
    kernels = compile_launches(monkeypatch, ("cuda", 90, 32), **sizes, dtype=dtype)

    for kernel in kernels.values():
        assert "ld.global.v4.b32" in kernel.asm["ptx"]


@compiled
def test_cpu_tensors_without_the_interpreter_are_refused():
    with pytest.raises(ValueError, match="needs tensors on a GPU, got cpu: use backend='torch'"):
        hierarchical_topk_loss(*make_inputs(2, 2, 3, 4), backend="triton")


@interpreted
def test_a_float64_decoder_is_refused():
    with pytest.raises(ValueError, match="W_dec in float32, bfloat16 or float16, got torch.float64"):
        hierarchical_topk_loss(*make_inputs(2, 2, 3, 4, dtype=torch.float64), backend="triton")


@alone
def test_without_triton_the_loss_works_and_an_explicit_backend_says_what_to_install(run_isolated):
    printed = run_isolated(
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from hf_hierarchical_sae import hierarchical_topk_loss as loss\n"
        "inputs = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), torch.ones(2, 3), torch.ones(3), torch.ones(1, 3)\n"
        "print(float(loss(*inputs)))\n"
        "try: loss(*inputs, backend='triton')\n"
        "except ImportError as error: print(error)\n",
        visible=["hf_hierarchical_sae"],
    )

    assert printed.splitlines() == [
        "1.0",
        "backend='triton' needs triton: pip install triton, or use backend='torch'",
    ]


def memory_above_inputs(function):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def loss_and_gradients(inputs, backend, **options):
    loss = hierarchical_topk_loss(*inputs, backend=backend, **options)
    return loss.detach(), *torch.autograd.grad(loss, inputs[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "batch, k, d_sae, d_in", [(4096, 64, 65536, 2304), (1001, 33, 4609, 577), (1, 128, 16384, 768)]
)
def test_real_sizes_on_a_gpu_equal_the_torch_form_in_float64(dtype, batch, k, d_sae, d_in):
    inputs = make_inputs(batch, k, d_sae, d_in, dtype=dtype, device="cuda")
    exact = loss_and_gradients(in_float64(inputs), "torch")

    results = loss_and_gradients(inputs, "auto")

    for result, expected, rounding in zip(results, exact, [0.0] + 4 * [torch.finfo(dtype).eps / 2]):
        assert_close(result, expected, rtol=2e-5 + rounding)


@pytest.mark.gpu
def test_two_runs_on_a_gpu_give_the_same_bits():
    # Half of all pairs fall on 16 latents: atomic additions would meet.
    indices, *tensors = make_inputs(4096, 64, 65536, 2304, device="cuda")
    inputs = (torch.where(indices % 2 == 0, indices % 16, indices), *tensors)

    assert all(map(torch.equal, loss_and_gradients(inputs, "triton"), loss_and_gradients(inputs, "triton")))


@pytest.mark.gpu
def test_memory_on_a_gpu_does_not_grow_with_k():
    gradient = 65536 * 2304 * 4
    residual = 4096 * 2304 * 4
    for k in (16, 128, 512):
        inputs = make_inputs(4096, k, 65536, 2304, device="cuda")
        used = memory_above_inputs(lambda inputs=inputs: loss_and_gradients(inputs, "triton"))

        # The decoder's gradient, half of it for the window, some residuals, and the sort's integers and spare space.
        assert used < 1.5 * gradient + 8 * residual + 64 * 4096 * k


def free_gpu_memory():
    """What earlier tests left in torch's cache, which other processes on the card lack."""
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.gpu
def test_a_dictionary_beyond_32_bit_offsets_on_a_gpu():
    free_gpu_memory()
    d_sae, used = 2**20, 64
    indices, values, W_used, b_dec, target = make_inputs(256, 16, used, 2304, dtype=torch.bfloat16, device="cuda")
    latents = torch.arange(used, device="cuda") * (d_sae // used) + d_sae // used - 1
    W_dec = torch.zeros(d_sae, 2304, dtype=torch.bfloat16, device="cuda")
    W_dec[latents] = W_used.detach()
    W_dec.requires_grad_()

    loss, *gradients = loss_and_gradients((latents[indices], values, W_dec, b_dec, target), "triton")
    expected_loss, *expected = loss_and_gradients((indices, values, W_used, b_dec, target), "triton")

    assert_close(loss, expected_loss, rtol=1e-6)
    assert torch.equal(gradients[1][latents], expected[1])
    assert int(gradients[1].count_nonzero()) == int(expected[1].count_nonzero())
    for gradient, other in zip(gradients, [expected[0], gradients[1], *expected[2:]]):
        assert_close(gradient, other, rtol=2**-8)


@pytest.mark.gpu
def test_compiled_step_on_a_gpu_equals_the_plain_one():
    inputs = make_inputs(1001, 32, 8192, 768, device="cuda")
    step = torch.compile(lambda *inputs: hierarchical_topk_loss(*inputs, backend="triton"), fullgraph=True)

    loss = step(*inputs)

    expected = loss_and_gradients(inputs, "triton")
    for result, other in zip((loss, *torch.autograd.grad(loss, inputs[1:])), expected):
        assert_close(result, other, rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("budgets", [None, (32,)])
def test_a_cuda_graph_replays_what_runs_eagerly(budgets):
    inputs = make_inputs(1001, 32, 8192, 768, device="cuda")
    others = [make_inputs(1001, 32, 8192, 768, seed=seed, device="cuda") for seed in (1, 2)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loss_and_gradients(inputs, "triton", budgets=budgets)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = loss_and_gradients(inputs, "triton", budgets=budgets)

    for other in others:
        with torch.no_grad():
            for tensor, new in zip(inputs, other):
                tensor.copy_(new)
        graph.replay()

        assert all(map(torch.equal, results, loss_and_gradients(other, "triton", budgets=budgets)))


@pytest.mark.gpu
def test_two_streams_at_once_give_what_one_gives():
    inputs = [make_inputs(4096, 32, 16384, 768, seed=seed, device="cuda") for seed in (0, 1)]
    expected = [loss_and_gradients(each, "triton") for each in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results = []
    for each, stream in zip(inputs, streams):
        with torch.cuda.stream(stream):
            results.append([loss_and_gradients(each, "triton") for _ in range(5)])
    torch.cuda.synchronize()

    for rounds, other in zip(results, expected):
        for result in rounds:
            assert all(map(torch.equal, result, other))


@pytest.mark.gpu
def test_operators_are_correctly_registered_on_a_gpu():
    check_operators("cuda")
