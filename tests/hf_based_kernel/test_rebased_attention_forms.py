"""Every form of the operation against a plain loop over tokens, through value, state and every gradient."""

import functools
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd

from hf_based_kernel import rebased_attention as public_rebased_attention
from hf_based_kernel.rebased_attention_chunked import rebased_attention_chunked
from hf_based_kernel.rebased_attention_forms import (
    rebased_attention,
    rebased_attention_reference,
    rebased_attention_step,
    taylor_attention,
)
from hf_based_kernel.rebased_features import REBASED, TAYLOR


KERNELS = {"rebased": (rebased_attention, REBASED), "taylor": (taylor_attention, TAYLOR)}
# Sums of a few hundred float64 terms of order one, formed in another order.
TIGHT = {"rtol": 1e-9, "atol": 1e-10}


def make_inputs(
    *, batch_size=2, seq_len=13, num_heads=3, groups=1, feature_dim=4, head_dim=5, dtype=torch.float64, grad=True
):
    """q, k and v; `groups` heads of q for each of the `num_heads` of k and v."""
    sizes = ((num_heads * groups, feature_dim), (num_heads, feature_dim), (num_heads, head_dim))
    return [torch.randn(batch_size, seq_len, *size, dtype=dtype, requires_grad=grad) for size in sizes]


def make_state(q, v, coefficients):
    """A state as some earlier tokens leave it: its denominators are positive, unlike those of a random tensor."""
    k = torch.randn(q.shape[0], 6, v.shape[2], q.shape[3], dtype=q.dtype)
    values = torch.randn(*k.shape[:3], v.shape[-1], dtype=v.dtype)
    _, state = rebased_attention_reference(k, k, values, scale=1, eps=1, return_state=True, coefficients=coefficients)
    return state.detach().requires_grad_()


def loop_over_tokens(q, k, v, kernel, *, scale, eps, mask=None, segments=None):
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=v.dtype)
    groups = q.shape[2] // k.shape[2]
    for b, i, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        if mask is not None and not mask[b, i]:
            continue
        numerator, denominator = torch.zeros_like(v[0, 0, 0]), torch.zeros((), dtype=v.dtype)
        for j in range(i + 1):
            seen = (mask is None or mask[b, j]) and (segments is None or segments[b, i] == segments[b, j])
            weight = kernel(scale * q[b, i, h], k[b, j, h // groups]) if seen else torch.zeros((), dtype=v.dtype)
            numerator, denominator = numerator + weight * v[b, j, h // groups], denominator + weight
        out[b, i, h] = numerator / (denominator + eps)
    return out


def gradients(outputs, inputs):
    """Gradients of a fixed random functional of the outputs."""
    generator = torch.Generator().manual_seed(1)
    total = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in outputs)
    return torch.autograd.grad(total, inputs)


def assert_same(got, expected, inputs, **tolerance):
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, **tolerance)
    for a, b in zip(gradients(got, inputs), gradients(expected, inputs)):
        torch.testing.assert_close(a, b, **tolerance)


grouped = pytest.mark.parametrize("groups", [1, 2], ids=["own keys", "shared keys"])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1, 0, 0, 0]])
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 3, 3], [5, 5, 5, 5, 5, 6, 7, 7, 7]])


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one", "packed"])
@pytest.mark.parametrize(
    ("kernel", "formula"),
    [
        ("rebased", lambda q, k: q.dot(k) ** 2 + 1e-4 * q.dot(q) * k.dot(k)),
        ("taylor", lambda q, k: 1 + q.dot(k) + q.dot(k) ** 2 / 2),
    ],
    ids=["rebased", "taylor"],
)
@grouped
def test_reference_is_the_formula(kernel, formula, mask, segments, groups):
    _, coefficients = KERNELS[kernel]
    q, k, v = make_inputs(seq_len=9, num_heads=2, groups=groups, feature_dim=3, head_dim=2)
    expected = loop_over_tokens(q, k, v, formula, scale=0.7, eps=1e-3, mask=mask, segments=segments)
    visible = None if mask is None else mask.bool()
    got = rebased_attention_reference(
        q, k, v, scale=0.7, eps=1e-3, attention_mask=visible, segment_ids=segments, coefficients=coefficients
    )
    assert_same([got], [expected], [q, k, v], **TIGHT)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("with_state", [False, True], ids=["fresh", "continued"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("chunk_size", [1, 4, 9, 64])
@grouped
def test_chunked_matches_reference(kernel, with_state, masked, packed, chunk_size, groups):
    attention, coefficients = KERNELS[kernel]
    q, k, v = make_inputs(seq_len=9, groups=groups)
    inputs = [q, k, v]
    options = {"eps": 1e-3, "return_state": True}
    if with_state:
        options["initial_state"] = make_state(q, v, coefficients)
        inputs.append(options["initial_state"])
    if masked:
        options["attention_mask"] = MASK.bool()
    if packed:
        options["segment_ids"] = SEGMENTS
    out, state = rebased_attention_reference(q, k, v, scale=q.shape[-1] ** -0.5, coefficients=coefficients, **options)
    got = attention(q, k, v, chunk_size=chunk_size, backend="torch", **options)
    assert_same(got, (out, state), inputs, **TIGHT)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@grouped
def test_long_chunks_match_reference(kernel, packed, groups):
    # Longer than the blocks of queries within a chunk.
    attention, coefficients = KERNELS[kernel]
    q, k, v = make_inputs(seq_len=200, num_heads=1, groups=groups)
    options = {"eps": 1e-3, "initial_state": make_state(q, v, coefficients), "return_state": True}
    options["attention_mask"] = torch.rand(2, 200) < 0.9
    if packed:
        options["segment_ids"] = torch.arange(200).div(37, rounding_mode="floor").expand(2, -1)
    expected = rebased_attention_reference(q, k, v, scale=0.5, coefficients=coefficients, **options)
    got = attention(q, k, v, scale=0.5, chunk_size=150, **options)
    assert_same(got, expected, [q, k, v, options["initial_state"]], **TIGHT)


@given(
    batch_size=st.integers(1, 3),
    seq_len=st.integers(1, 40),
    num_heads=st.integers(1, 4),
    groups=st.integers(1, 3),
    feature_dim=st.integers(1, 9),
    head_dim=st.integers(1, 9),
    chunk_size=st.integers(1, 48),
    kernel=st.sampled_from(sorted(KERNELS)),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_chunked_matches_reference_at_every_shape(
    batch_size, seq_len, num_heads, groups, feature_dim, head_dim, chunk_size, kernel
):
    attention, coefficients = KERNELS[kernel]
    sizes = {"num_heads": num_heads, "groups": groups, "feature_dim": feature_dim, "head_dim": head_dim}
    q, k, v = make_inputs(batch_size=batch_size, seq_len=seq_len, **sizes)
    # With one feature, scores and so denominators come close to zero: a larger eps keeps the comparison well posed.
    options = {"eps": 0.1, "initial_state": make_state(q, v, coefficients), "return_state": True}
    expected = rebased_attention_reference(q, k, v, scale=0.5, coefficients=coefficients, **options)
    got = attention(q, k, v, scale=0.5, chunk_size=chunk_size, backend="torch", **options)
    assert_same(got, expected, [q, k, v, options["initial_state"]], **TIGHT)


@pytest.mark.parametrize("coefficients", [REBASED, TAYLOR], ids=["rebased", "taylor"])
@pytest.mark.parametrize("seq_len", [1, 5])
@grouped
def test_gradcheck_of_torch_forms(coefficients, seq_len, groups):
    q, k, v = make_inputs(batch_size=1, seq_len=seq_len, num_heads=2, groups=groups, feature_dim=3, head_dim=2)
    state = make_state(q, v, coefficients)
    form = rebased_attention_step if seq_len == 1 else rebased_attention_chunked

    def attend(q, k, v, state):
        return form(
            q,
            k,
            v,
            scale=0.6,
            eps=0.1,
            initial_state=state,
            return_state=True,
            chunk_size=2,
            coefficients=coefficients,
        )

    assert torch.autograd.gradcheck(attend, (q, k, v, state))


@pytest.mark.parametrize("kernel", KERNELS)
@grouped
def test_steps_match_one_call(kernel, groups):
    attention, _ = KERNELS[kernel]
    q, k, v = make_inputs(seq_len=9, groups=groups)
    expected = attention(q, k, v, return_state=True, attention_mask=MASK)
    state, outputs = None, []
    for t in range(9):
        token = slice(t, t + 1)
        out, state = attention(
            q[:, token],
            k[:, token],
            v[:, token],
            initial_state=state,
            return_state=True,
            attention_mask=MASK[:, token],
        )
        outputs.append(out)
    assert_same((torch.cat(outputs, dim=1), state), expected, [q, k, v], **TIGHT)


@pytest.mark.parametrize("kernel", KERNELS)
def test_prefill_in_pieces_matches_one_call(kernel):
    attention, _ = KERNELS[kernel]
    q, k, v = make_inputs(seq_len=13)
    expected = attention(q, k, v, return_state=True, chunk_size=4)
    state, outputs = None, []
    for piece in (slice(0, 6), slice(6, 7), slice(7, 13)):
        out, state = attention(
            q[:, piece], k[:, piece], v[:, piece], initial_state=state, return_state=True, chunk_size=4
        )
        outputs.append(out)
    assert_same((torch.cat(outputs, dim=1), state), expected, [q, k, v], **TIGHT)


@pytest.mark.parametrize("kernel", KERNELS)
def test_packed_segments_match_separate_sequences(kernel):
    attention, _ = KERNELS[kernel]
    q, k, v = make_inputs(batch_size=1, seq_len=13)
    lengths = [5, 1, 7]
    segment_ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    got, state = attention(q, k, v, segment_ids=segment_ids, chunk_size=4, return_state=True)
    pieces = [attention(*parts, return_state=True) for parts in zip(*(x.split(lengths, dim=1) for x in (q, k, v)))]
    expected = torch.cat([out for out, _ in pieces], dim=1)
    assert_same((got, state), (expected, pieces[-1][1]), [q, k, v], **TIGHT)


def nearly_orthogonal(*, seq_len, component, dtype=torch.float32):
    """Queries and keys of LayerNorm's size, in two halves of the space but for a `component` of the keys; any values."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    q, k = torch.zeros(2, 1, seq_len, 1, 16)
    q[..., :8], k[..., 8:] = torch.randn(2, 1, seq_len, 1, 8, generator=generator)
    k[..., 0] = component
    q, k = (torch.nn.functional.normalize(x @ rotation, dim=-1) * 4 for x in (q, k))
    v = torch.randn(1, seq_len, 1, 8, generator=generator)
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


def in_steps(q, k, v, **options):
    state, outputs = None, []
    for token in zip(*(x.split(1, dim=1) for x in (q, k, v))):
        out, state = rebased_attention(*token, initial_state=state, return_state=True, **options)
        outputs.append(out)
    return torch.cat(outputs, dim=1)


FLOAT32_FORMS = {
    "reference": functools.partial(rebased_attention_reference, scale=0.25, eps=1e-6),
    "chunks of 1": functools.partial(rebased_attention, chunk_size=1),
    "chunks of 16": functools.partial(rebased_attention, chunk_size=16),
    "one chunk": functools.partial(rebased_attention, chunk_size=512),
    "steps": in_steps,
}
NEAR_ORTHOGONAL_OPTIONS = {
    "one": {},
    "packed": {"segment_ids": torch.arange(300)[None] // 130},
    "padded": {"attention_mask": torch.arange(300)[None] > 40},
}


@pytest.mark.parametrize("form", FLOAT32_FORMS)
@pytest.mark.parametrize("component", [0.0, 0.001, 0.01, 0.3])
@pytest.mark.parametrize("case", NEAR_ORTHOGONAL_OPTIONS)
def test_queries_nearly_orthogonal_to_all_keys_are_exact(form, component, case):
    # Without a floor, outputs were 27 here where all values are below 4, and gradients 100 times too large.
    options = NEAR_ORTHOGONAL_OPTIONS[case] if form != "steps" else {}
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = nearly_orthogonal(seq_len=300, component=component, dtype=dtype)
        attention = FLOAT32_FORMS[form] if dtype == torch.float32 else rebased_attention
        out = attention(*inputs, **options)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        results.append([out, *torch.autograd.grad(out, inputs, weights)])
    # What float32 leaves of sums of products of order |q|² |k|², relative to the floor: 6e-8 / 1e-4.
    for got, expected in zip(*results):
        torch.testing.assert_close(
            got.double(), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().clamp(min=1).item()
        )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(kernel, side):
    attention, _ = KERNELS[kernel]
    q, k, v = make_inputs(batch_size=1, seq_len=9)
    expected = attention(q, k, v, return_state=True)
    before, after = (3, 0) if side == "left" else (0, 3)
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 0, before, after), value=float("nan")) for x in (q, k, v)]
    mask = torch.nn.functional.pad(torch.ones(1, 9), (before, after))
    out, state = attention(*padded, attention_mask=mask, return_state=True, chunk_size=4)
    assert_same((out[:, before : before + 9], state), expected, [q, k, v], **TIGHT)
    assert out[:, mask[0] == 0].eq(0).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_numbers_stay_in_their_sequence(kernel, value):
    attention, _ = KERNELS[kernel]
    q, k, v = make_inputs(batch_size=2, seq_len=9)
    expected = attention(q, k, v, chunk_size=4)[0]
    for x in (q, k, v):
        with torch.no_grad():
            x[1, 2, 0, 0] = value
    got = attention(q, k, v, chunk_size=4)
    torch.testing.assert_close(got[0], expected, rtol=0, atol=0)
    assert not got[1].isfinite().all()
    grads = torch.autograd.grad(got.sum(), [q, k, v])
    assert all(grad[0].isfinite().all() for grad in grads)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("damaged", ["q", "k", "v", "grad_out"])
# The last is finite, its square is not.
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("chunk_size", [4, 64])
@grouped
def test_bad_numbers_stay_in_their_packed_sequence(kernel, damaged, value, chunk_size, groups):
    attention, _ = KERNELS[kernel]
    # The second of three sequences in the first row; it shares chunks with both others.
    segment_ids = torch.tensor([[0] * 5 + [1] * 4 + [2] * 5, [0] * 14])
    inputs = make_inputs(seq_len=14, groups=groups, dtype=torch.float32)
    results = []
    for bad in (False, True):
        inputs = [x.detach().clone().requires_grad_() for x in inputs]
        generator = torch.Generator().manual_seed(1)
        grad_out = torch.randn(*inputs[0].shape[:3], inputs[2].shape[-1], generator=generator)
        if bad:
            {"q": inputs[0], "k": inputs[1], "v": inputs[2], "grad_out": grad_out}[damaged].data[0, 6] = value
        out, state = attention(*inputs, segment_ids=segment_ids, chunk_size=chunk_size, return_state=True)
        weights = torch.randn(state.shape, generator=generator)
        results.append((out, state, *torch.autograd.grad((out, state), inputs, (grad_out, weights))))
    others = (segment_ids != 1) | torch.tensor([[False], [True]])
    for expected, got in zip(*results):
        others_only = (lambda x: x[others]) if got.shape[:2] == others.shape else (lambda x: x)
        torch.testing.assert_close(others_only(got), others_only(expected), rtol=0, atol=0)
    reached = results[1][2] if damaged in ("q", "grad_out") else results[1][0]
    assert value == 1e30 or not reached[0, 6].isfinite().any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_state_and_its_gradient_keep_bad_numbers_to_their_packed_sequence(kernel):
    attention, coefficients = KERNELS[kernel]
    q, k, v = make_inputs(batch_size=1, seq_len=9)
    segment_ids = torch.tensor([[0] * 4 + [1] * 5])
    state = make_state(q, v, coefficients)
    results = []
    for bad in (False, True):
        grad_out, grad_state = torch.ones_like(v), torch.ones_like(state)
        if bad:
            state.data.fill_(float("nan"))
        options = {"segment_ids": segment_ids, "chunk_size": 3, "return_state": True}
        out, last = attention(q, k, v, initial_state=state, **options)
        grads = torch.autograd.grad((out, last), (q, k, v), (grad_out, grad_state))
        results.append([last, *(x[:, 4:] for x in (out, *grads))])
    for expected, got in zip(*results):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    _, last = attention(q, k, v, **options)
    *grads, _ = torch.autograd.grad(last, (q, k, v, state), last * float("nan"), allow_unused=True)
    assert all(grad[:, :4].eq(0).all() for grad in grads)
    assert not grads[1][:, 4:].isfinite().any()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("seq_len", [1, 200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_summed_in_float32(kernel, seq_len, dtype):
    attention, coefficients = KERNELS[kernel]
    q, k, v = make_inputs(seq_len=seq_len, feature_dim=16, head_dim=8, dtype=dtype, grad=False)
    out, state = attention(q, k, v, return_state=True, chunk_size=32)
    expected, expected_state = rebased_attention_reference(
        *(x.double() for x in (q, k, v)), scale=0.25, eps=1e-6, return_state=True, coefficients=coefficients
    )
    assert (out.dtype, state.dtype) == (dtype, torch.float32)
    # The output is rounded once, to the input dtype; the state never.
    torch.testing.assert_close(out.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)
    torch.testing.assert_close(state.double(), expected_state, rtol=1e-5, atol=1e-4)


def test_autocast_does_not_reach_the_sums():
    q, k, v = make_inputs(seq_len=70, feature_dim=16, dtype=torch.float32)
    expected = rebased_attention(q, k, v, chunk_size=32)
    with torch.autocast("cpu", torch.bfloat16):
        got = rebased_attention(q, k, v, chunk_size=32)
        grads = gradients([got], [q, k, v])
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    for a, b in zip(grads, gradients([expected], [q, k, v])):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("with_state", [False, True], ids=["fresh", "continued"])
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
def test_compiled_call_is_one_graph_without_the_loop_over_chunks(with_state, packed):
    q, k, v = make_inputs(seq_len=9)
    inputs = [q, k, v]
    options = {"chunk_size": 2, "return_state": True, "attention_mask": MASK.bool()}
    if with_state:
        options["initial_state"] = make_state(q, v, TAYLOR)
        inputs.append(options["initial_state"])
    if packed:
        options["segment_ids"] = SEGMENTS
    graphs = []

    def keep_graph(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(taylor_attention, backend=aot_autograd(fw_compiler=keep_graph), fullgraph=True)
    assert_same(compiled(q, k, v, **options), taylor_attention(q, k, v, **options), inputs, rtol=0, atol=0)
    assert len(graphs[0].graph.nodes) < 60
    assert not any("bmm" in str(node.target) for node in graphs[0].graph.nodes)


BAD_CALLS = {
    "feature_dim": (lambda q, k, v: rebased_attention(q, k[..., :2], v), "q must have the shape .* and k, which"),
    "three_axes": (lambda q, k, v: rebased_attention(q[0], k[0], v[0]), "q must have the shape .* and k, which"),
    "groups": (lambda q, k, v: rebased_attention(q[:, :, :2], k, v), "must be a multiple of those of k, got 2 and 3"),
    "no_heads": (lambda q, k, v: rebased_attention(q, k[:, :, :0], v), "multiple of those of k, got 3 and 0"),
    "value_heads": (lambda q, k, v: rebased_attention(q, k, v[:, :, :1]), "v must have the shape"),
    "dtypes": (lambda q, k, v: rebased_attention(q, k, v.float()), "one floating dtype, got torch.float64"),
    "integers": (lambda q, k, v: rebased_attention(q.long(), k.long(), v.long()), "one floating dtype"),
    "empty": (lambda q, k, v: rebased_attention(q[:, :0], k[:, :0], v[:, :0]), "at least one sequence, token, head"),
    "no_batch": (lambda q, k, v: rebased_attention(q[:0], k[:0], v[:0]), "at least one sequence, token, head"),
    "no_values": (lambda q, k, v: rebased_attention(q, k, v[..., :0]), r"number of each, got q and v of .*, 0\)"),
    "segments_unsigned": (
        lambda q, k, v: rebased_attention(q, k, v, segment_ids=torch.arange(13).flip(0).expand(2, -1).byte()),
        "segment_ids must never decrease",
    ),
    "segments_uint16": (
        lambda q, k, v: rebased_attention(q, k, v, segment_ids=torch.zeros(2, 13, dtype=torch.uint16)),
        "segment_ids must be integers, signed or uint8, got torch.uint16",
    ),
    "mask": (
        lambda q, k, v: rebased_attention(q, k, v, attention_mask=torch.ones(2, 4)),
        r"attention_mask must have the shape \(batch, seq\) = \(2, 13\), got \(2, 4\)",
    ),
    "segments_shape": (
        lambda q, k, v: rebased_attention(q, k, v, segment_ids=torch.zeros(13)),
        r"segment_ids must have the shape",
    ),
    "segments_order": (
        lambda q, k, v: rebased_attention(q, k, v, segment_ids=torch.arange(13).flip(0).expand(2, -1)),
        "segment_ids must never decrease",
    ),
    "state_shape": (
        lambda q, k, v: taylor_attention(q, k, v, initial_state=torch.zeros(2, 3, 12, 6, dtype=torch.float64)),
        r"initial_state must have the shape .* = \(2, 3, 17, 6\), got \(2, 3, 12, 6\)",
    ),
    "state_dtype": (
        lambda q, k, v: rebased_attention(q, k, v, initial_state=torch.zeros(2, 3, 12, 6, dtype=torch.bfloat16)),
        "initial_state must be torch.float64 as it was returned, got torch.bfloat16",
    ),
    "chunk_size": (lambda q, k, v: rebased_attention(q, k, v, chunk_size=0), "chunk_size must be a positive"),
    "chunk_size_fraction": (lambda q, k, v: rebased_attention(q, k, v, chunk_size=2.5), "tokens, got 2.5"),
    "chunk_size_bool": (lambda q, k, v: rebased_attention(q, k, v, chunk_size=True), "tokens, got True"),
    "eps_nan": (lambda q, k, v: rebased_attention(q, k, v, eps=float("nan")), "eps must be a finite number"),
    "eps_negative": (lambda q, k, v: taylor_attention(q, k, v, eps=-1.0), "eps must be .* above 0, got -1.0"),
    "eps_zero": (lambda q, k, v: rebased_attention(q, k, v, eps=0.0), "eps must be .* above 0, got 0.0"),
    "scale_bool": (lambda q, k, v: rebased_attention(q, k, v, scale=True), "scale must be a finite number, got True"),
    "scale_text": (lambda q, k, v: rebased_attention(q, k, v, scale="1"), "scale must be a finite number, got '1'"),
    "lists": (
        lambda q, k, v: rebased_attention([[1.0]], k, v),
        "q, k and v must be tensors, got list, Tensor, Tensor",
    ),
    "mask_list": (
        lambda q, k, v: rebased_attention(q, k, v, attention_mask=[[1] * 13] * 2),
        r"attention_mask must have the shape \(batch, seq\) = \(2, 13\), got list",
    ),
    "segments_dtype": (
        lambda q, k, v: rebased_attention(q, k, v, segment_ids=torch.zeros(2, 13)),
        "segment_ids must be integers, signed or uint8, got torch.float32",
    ),
    "state_list": (lambda q, k, v: rebased_attention(q, k, v, initial_state=[1]), r"= \(2, 3, 12, 6\), got list"),
    "backend": (lambda q, k, v: rebased_attention(q, k, v, backend="cuda"), 'backend must be "auto", "torch" or'),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_one_clear_sentence(case):
    call, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message):
        call(*make_inputs())


def test_segments_may_be_as_far_apart_as_their_type_allows():
    q, k, v = make_inputs()
    ids = torch.tensor([-128] * 4 + [0] * 4 + [127] * 5).expand(2, -1)
    expected = rebased_attention(q, k, v, segment_ids=ids)

    assert torch.equal(rebased_attention(q, k, v, segment_ids=ids.to(torch.int8)), expected)


@pytest.mark.parametrize("attention", [rebased_attention, taylor_attention])
def test_compiled_call_takes_a_scale_that_changes(attention):
    q, k, v = make_inputs()
    compiled = torch.compile(attention, backend="eager", dynamic=True, fullgraph=True)
    for scale in (0.5, 0.7):
        torch.testing.assert_close(compiled(q, k, v, scale=scale), attention(q, k, v, scale=scale))


@pytest.mark.parametrize("attention", [rebased_attention, taylor_attention])
def test_compiled_layers_on_top_of_one_another_take_lengths_that_change(attention):
    def two_layers(q, k, v):
        return attention(q, k, attention(q, k, v))

    compiled = torch.compile(two_layers, backend="eager", dynamic=True, fullgraph=True)
    for length in (13, 9):
        inputs = make_inputs(seq_len=length)
        outputs = [form(*inputs) for form in (compiled, two_layers)]
        got, expected = ([out, *torch.autograd.grad(out.square().sum(), inputs)] for out in outputs)
        torch.testing.assert_close(got, expected)


def test_triton_is_asked_for_only_where_it_is_installed():
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util; found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'triton' else found(name, *rest)\n"
        "import torch; from hf_based_kernel.rebased_attention_forms import rebased_attention\n"
        "x = torch.ones(1, 2, 1, 2); rebased_attention(x, x, x); rebased_attention(x, x, x, backend='triton')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert 'ImportError: backend="triton" needs triton' in done.stderr


def test_package_exports_the_operation():
    assert public_rebased_attention is rebased_attention
