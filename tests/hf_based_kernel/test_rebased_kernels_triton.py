"""The Triton kernels: spans and segments interpreted on the CPU, and all compiled for GPUs that need not be there."""

import contextlib
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch


triton = pytest.importorskip("triton", minversion="3.6")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from hf_based_kernel.rebased_features import TAYLOR  # noqa: E402
from tests.hf_based_kernel.triton_form import FLOAT32_TOLERANCE, errors, load_module, make_inputs  # noqa: E402


CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@pytest.mark.parametrize(
    "sizes",
    [
        {"seq_len": 50},
        {"seq_len": 64, "with_state": True, "with_segments": True, "num_heads": 2},
        {"seq_len": 50, "with_state": True, "with_segments": True, "coefficients": TAYLOR, "feature_dim": 5},
        {"seq_len": 64, "with_state": True, "with_segments": True, "num_heads": 3, "num_key_value_heads": 1},
    ],
    ids=["rebased", "whole_blocks", "taylor_with_segments", "shared_heads"],
)
@pytest.mark.parametrize("chunk_size", [16, 32, 64])
def test_spans_of_any_size_give_the_same(interpreted, sizes, chunk_size):
    inputs, options = make_inputs(**sizes)

    assert max(errors(interpreted, inputs, options | {"chunk_size": chunk_size})) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("spoilt", ["q", "k", "v", "grad_out"])
# The last is finite, its square is not.
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("chunk_size", [16, 32])
def test_bad_numbers_stay_in_their_packed_sequence(interpreted, spoilt, value, chunk_size):
    # The middle sequence shares blocks of 16 tokens with both others.
    segment_ids = torch.tensor([[0] * 13 + [1] * 11 + [2] * 13])
    tensors, options = make_inputs(seq_len=37, feature_dim=4, head_dim=4, with_state=True)
    results = []
    for bad in (False, True):
        q, k, v, state = inputs = [x.clone().requires_grad_() for x in tensors]
        generator = torch.Generator().manual_seed(1)
        grad_out = torch.randn(v.shape, generator=generator)
        if bad:
            {"q": q, "k": k, "v": v, "grad_out": grad_out}[spoilt].data[0, 18] = value
        out, final_state = interpreted.rebased_attention_triton(
            q, k, v, initial_state=state, return_state=True, segment_ids=segment_ids, chunk_size=chunk_size, **options
        )
        weights = torch.randn(final_state.shape, generator=generator)
        results.append((out, final_state, *torch.autograd.grad((out, final_state), inputs, (grad_out, weights))))
    for i, (expected, got) in enumerate(zip(*results)):
        # The final and the initial state, and every token of the first and the last sequence.
        others = slice(None) if i in (1, 5) else segment_ids != 1
        torch.testing.assert_close(got[others], expected[others], rtol=0, atol=0)
    reached = results[1][2] if spoilt in ("q", "grad_out") else results[1][0]
    assert value == 1e30 or not reached[0, 18].isfinite().any()


def test_a_sequence_that_is_not_finite_leaves_the_others_alone(interpreted):
    (q, k, v), options = make_inputs(batch_size=2)
    expected = interpreted.rebased_attention_triton(q, k, v, **options)
    k[0, 3], v[0, 5] = float("nan"), float("inf")
    out = interpreted.rebased_attention_triton(q, k, v, **options)

    assert torch.equal(out[1], expected[1])
    assert not out[0, 5:].isfinite().any()


# Compiling for a GPU without one. The launcher runs on fake tensors, so what is compiled is what it would launch.

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
TYPE_NAMES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    int: "i32",
    float: "fp32",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg")


class Recorder:
    """Stands for a kernel and notes how it is launched."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.launches.append((self.kernel, args, constants))

        return launch


def record_launches(monkeypatch, *, hip, spans, dtype, with_segments=True, num_key_value_heads=12):
    """The launches of a forward and a backward pass, with an initial and a final state, on a GPU that is not there."""
    module, launches = load_module("rebased_attention_to_compile", interpreted=False), []
    for name, member in list(vars(module).items()):
        if name.endswith("_kernel"):
            monkeypatch.setattr(module, name, Recorder(member, launches))
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.version, "hip", "7.0" if hip else None)
    with torch._subclasses.FakeTensorMode():
        (q, k, v, state), options = make_inputs(
            batch_size=2,
            seq_len=4096,
            num_heads=12,
            num_key_value_heads=num_key_value_heads,
            head_dim=64,
            with_state=True,
            dtype=dtype,
            device="cuda",
        )
        segments = torch.zeros(2, 4096, dtype=torch.int32, device="cuda") if with_segments else None
        kernel = list(options["coefficients"])
        span_tokens = 4096 // spans
        # The functions beneath the operators: called as an operator, a fake tensor stops at the fake implementation.
        forward, backward = module._forward._init_fn, module._backward._init_fn
        results = forward(q, k, v, state, segments, options["scale"], options["eps"], kernel, span_tokens, True)
        out, denominators, final_state = results
        saved = (q, k, v, state, segments, out, denominators)
        backward(out, final_state, *saved, options["scale"], kernel, span_tokens)
    return launches


def compile_launch(kernel, args, constants, target):
    options = {name: constants.pop(name) for name in OPTIONS if name in constants}
    positional = dict(zip(kernel.arg_names, args))
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = positional.get(name)
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = TYPE_NAMES[value.dtype if isinstance(value, torch.Tensor) else type(value)]
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def stack_bytes(compiled):
    """Bytes of a thread's registers that were spilled to memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


@pytest.mark.slow
@pytest.mark.parametrize("num_key_value_heads", [12, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_and_fits_the_shared_memory(monkeypatch, target, dtype, num_key_value_heads):
    gpu, shared_memory = TARGETS[target]
    launches = record_launches(
        monkeypatch, hip=gpu.backend == "hip", spans=4, dtype=dtype, num_key_value_heads=num_key_value_heads
    )
    compiled = {
        (kernel.fn.__name__, constants.get("OF_QUERIES")): compile_launch(kernel, args, constants, gpu)
        for kernel, args, constants in launches
    }

    assert {name for name, _ in compiled} == {
        name for name in vars(load_module("names", interpreted=False)) if name.endswith("_kernel")
    }
    assert {
        name: kernel.metadata.shared for name, kernel in compiled.items() if kernel.metadata.shared > shared_memory
    } == {}


# With a loop over the queries that share a head, the gradient of its keys has twelve numbers of a thread too many.
SPILLED_BYTES = {12: {}, 4: {"key_value_gradient_kernel": 48}}


@pytest.mark.slow
@pytest.mark.parametrize(("num_key_value_heads", "spilled"), SPILLED_BYTES.items())
def test_registers_of_an_h100_hold_what_the_kernels_work_on(monkeypatch, num_key_value_heads, spilled):
    gpu, _ = TARGETS["sm_90"]
    launches = record_launches(
        monkeypatch,
        hip=False,
        spans=16,
        dtype=torch.bfloat16,
        with_segments=False,
        num_key_value_heads=num_key_value_heads,
    )

    # Sums, scan and forward; then deltas, sums and scan both ways, and the two kernels of gradients.
    assert len(launches) == 10
    spills = [(kernel.fn.__name__, stack_bytes(compile_launch(kernel, *rest, gpu))) for kernel, *rest in launches]
    assert [(name, count) for name, count in spills if count > spilled.get(name, 0)] == []
