"""The Triton kernels: spans and segments interpreted on the CPU, and all compiled for GPUs that need not be there."""

import pytest
import torch


pytest.importorskip("triton", minversion="3.6")

from hf_based_kernel.rebased_features import TAYLOR  # noqa: E402
from tests.hf_based_kernel.triton_form import (  # noqa: E402
    FLOAT32_TOLERANCE,
    TARGETS,
    compile_launch,
    errors,
    load_module,
    make_inputs,
    record_kernels,
    stack_bytes,
)


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


def record_launches(monkeypatch, *, hip, spans, dtype, with_segments=True, num_key_value_heads=12):
    """The launches of a forward and a backward pass, with an initial and a final state, on a GPU that is not there."""
    module = load_module("rebased_attention_to_compile", interpreted=False)
    launches = record_kernels(monkeypatch, module)
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


@pytest.mark.pinned
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


@pytest.mark.slow
@pytest.mark.parametrize("num_key_value_heads", [12, 4, 1])
@pytest.mark.parametrize("batch_size", [1, 256])
def test_registers_of_an_h100_hold_what_the_step_works_on(monkeypatch, num_key_value_heads, batch_size):
    module = load_module("step_to_compile", interpreted=False, module="rebased_step_triton")
    launches = record_kernels(monkeypatch, module)
    with torch._subclasses.FakeTensorMode():
        (q, k, v, state), options = make_inputs(
            batch_size=batch_size,
            seq_len=1,
            num_heads=12,
            num_key_value_heads=num_key_value_heads,
            head_dim=64,
            with_state=True,
            dtype=torch.bfloat16,
            device="cuda",
        )
        mask = torch.ones(batch_size, 1, dtype=torch.bool, device="cuda")
        module._step(q, k, v, state, mask, options["scale"], options["eps"], list(options["coefficients"]), True)

    (launch,) = launches
    assert stack_bytes(compile_launch(*launch, TARGETS["sm_90"][0])) == 0
