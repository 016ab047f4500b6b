"""The Triton form against the reference, interpreted on the CPU and run on a GPU; and the operators that torch sees."""

import pytest
import torch


pytest.importorskip("triton", minversion="3.6")

from hf_based_kernel import rebased_attention, taylor_attention  # noqa: E402
from hf_based_kernel.rebased_attention_forms import rebased_attention_reference  # noqa: E402
from hf_based_kernel.rebased_features import REBASED, TAYLOR  # noqa: E402
from tests.hf_based_kernel.triton_form import FLOAT32_TOLERANCE, errors, load_module, make_inputs, run  # noqa: E402


# Inputs are exact in both forms: what is left is rounding of the output, which the gradients read, and of the gradients.
HALF_TOLERANCES = {torch.bfloat16: 2**-6, torch.float16: 2**-9}


CASES = {
    "batch": {"batch_size": 2},
    "state_mask_and_segments": {
        "batch_size": 2,
        "seq_len": 37,
        "with_state": True,
        "with_mask": True,
        "with_segments": True,
    },
    "mask": {"batch_size": 2, "with_mask": True},
    "heads": {"num_heads": 3, "seq_len": 5, "with_state": True},
    "one_token": {"seq_len": 1},
    "shared_heads": {
        "batch_size": 2,
        "seq_len": 37,
        "num_heads": 4,
        "num_key_value_heads": 2,
        "feature_dim": 5,
        "head_dim": 3,
        "with_state": True,
        "with_mask": True,
        "with_segments": True,
    },
    "one_shared_head": {"batch_size": 2, "seq_len": 17, "num_heads": 3, "num_key_value_heads": 1, "with_mask": True},
    "shared_heads_two_value_blocks": {
        "seq_len": 5,
        "num_heads": 4,
        "num_key_value_heads": 2,
        "feature_dim": 4,
        "head_dim": 72,
        "with_state": True,
    },
    "one_token_after_a_state": {"seq_len": 1, "with_state": True},
    "two_value_blocks": {"seq_len": 17, "feature_dim": 4, "head_dim": 72, "with_state": True},
    "wide_features": {"seq_len": 17, "feature_dim": 18, "head_dim": 5},
    "one_feature_one_value": {"feature_dim": 1, "head_dim": 1, "with_state": True},
    "taylor_state_mask_and_segments": {
        "batch_size": 2,
        "feature_dim": 5,
        "head_dim": 3,
        "coefficients": TAYLOR,
        "with_state": True,
        "with_mask": True,
        "with_segments": True,
    },
    "taylor_shared_heads": {
        "batch_size": 2,
        "num_heads": 4,
        "num_key_value_heads": 1,
        "feature_dim": 5,
        "head_dim": 3,
        "coefficients": TAYLOR,
        "with_state": True,
        "with_mask": True,
        "with_segments": True,
    },
    "taylor_mask": {"batch_size": 2, "seq_len": 17, "coefficients": TAYLOR, "with_mask": True},
}


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES.keys())
def test_value_and_every_gradient_match_the_reference(interpreted, sizes):
    assert max(errors(interpreted, *make_inputs(**sizes))) < FLOAT32_TOLERANCE


def test_shared_heads_give_what_copies_of_them_give(interpreted):
    inputs, options = make_inputs(
        seq_len=33, num_heads=3, num_key_value_heads=1, feature_dim=5, head_dim=3, with_state=True
    )
    # three spans
    options["chunk_size"] = 16
    weights = torch.randn(1, 33, 3, 3), torch.randn(1, 1, inputs[3].shape[2], 4)
    results = []
    for copies in (1, 3):
        q, k, v, state = tensors = [x.clone().requires_grad_() for x in inputs]
        k, v = (x.repeat_interleave(copies, dim=2) for x in (k, v))
        out, last = interpreted.rebased_attention_triton(
            q, k, v, initial_state=state.repeat_interleave(copies, dim=1), return_state=True, **options
        )
        last = last[:, ::copies]
        results.append([out, last, *torch.autograd.grad((out, last), tensors, weights)])

    assert [x.shape for x in results[0][2:]] == [x.shape for x in inputs]
    for shared, copied in zip(*results):
        assert (shared - copied).abs().max() <= FLOAT32_TOLERANCE * copied.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", HALF_TOLERANCES, ids=str)
def test_half_precision_differs_from_the_reference_by_its_rounding(interpreted, dtype):
    out, state, *gradients = errors(interpreted, *make_inputs(dtype=dtype, with_state=True))

    assert state < FLOAT32_TOLERANCE
    assert max(out, *gradients) < HALF_TOLERANCES[dtype]


def test_layout_in_memory_and_chunk_size_change_nothing(interpreted):
    (q, k, v), options = make_inputs(num_heads=2, head_dim=8, seq_len=18, dtype=torch.float16)
    expected = interpreted.rebased_attention_triton(q, k, v, **options)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]

    assert not heads_first[0].is_contiguous()
    assert torch.equal(interpreted.rebased_attention_triton(*heads_first, **options), expected)
    # By default one span holds all tokens; in spans of 16 there are two.
    smaller = interpreted.rebased_attention_triton(q, k, v, chunk_size=5, **options)
    torch.testing.assert_close(smaller, expected, rtol=2**-9, atol=2**-10)


def test_a_mask_may_lie_transposed_in_memory(interpreted):
    (q, k, v), options = make_inputs(batch_size=3, seq_len=18, dtype=torch.float32)
    options = {**options, "coefficients": TAYLOR}
    mask = torch.ones(3, 18, dtype=torch.bool)
    mask[0, :7] = mask[2, 11:] = False
    segment_ids = torch.arange(18).expand(3, -1) // 5
    for marks in ({"attention_mask": mask}, {"attention_mask": mask, "segment_ids": segment_ids}):
        expected = interpreted.rebased_attention_triton(q, k, v, **options, **marks)
        transposed = {name: x.t().contiguous().t() for name, x in marks.items()}
        assert torch.equal(interpreted.rebased_attention_triton(q, k, v, **options, **transposed), expected)


def test_float64_is_refused_in_a_sentence(interpreted):
    inputs, options = make_inputs(dtype=torch.float64, seq_len=2)

    with pytest.raises(ValueError, match="takes float32, bfloat16 or float16, got torch.float64"):
        interpreted.rebased_attention_triton(*inputs, **options)


@pytest.mark.parametrize("heads", [{}, {"num_heads": 2, "num_key_value_heads": 1}], ids=str)
def test_operators_obey_the_rules_of_torch_library(interpreted, heads):
    (q, k, v, state), options = make_inputs(seq_len=3, feature_dim=4, head_dim=4, with_state=True, **heads)
    inputs = [x.requires_grad_() for x in (q, k, v, state)]
    arguments = (*inputs, None, options["scale"], options["eps"], list(REBASED), 16, True)

    checks = torch.library.opcheck(interpreted._forward, arguments)

    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph_forward_and_backward(interpreted, backend):
    inputs, options = make_inputs(seq_len=3, feature_dim=4, head_dim=4, with_state=True, with_mask=True)
    dtypes = [torch.float32] * 4
    torch.compiler.reset()
    compiled = torch.compile(interpreted.rebased_attention_triton, backend=backend, fullgraph=True)

    for x, y in zip(
        run(compiled, inputs, options, dtypes), run(interpreted.rebased_attention_triton, inputs, options, dtypes)
    ):
        assert torch.equal(x, y)


def test_a_gradient_of_a_state_that_was_not_wanted_is_none(interpreted):
    (q, k, v), options = make_inputs(seq_len=3, feature_dim=4, head_dim=4)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, _, state = interpreted._forward(
        *inputs, None, None, options["scale"], options["eps"], list(REBASED), None, False
    )

    with_empty = torch.autograd.grad((out, state), inputs, (torch.ones_like(out), state), retain_graph=True)

    assert all(map(torch.equal, with_empty, torch.autograd.grad(out.sum(), inputs)))


def test_the_final_state_alone_has_gradients(interpreted):
    inputs, options = make_inputs(
        seq_len=3, num_heads=2, num_key_value_heads=1, feature_dim=4, head_dim=4, with_state=True
    )
    gradients = []
    for form in (interpreted.rebased_attention_triton, rebased_attention_reference):
        q, k, v, state = tensors = [x.clone().requires_grad_() for x in inputs]
        _, last = form(q, k, v, initial_state=state, return_state=True, **options)
        gradients.append(torch.autograd.grad(last.sum(), tensors, materialize_grads=True))

    for got, expected in zip(*gradients):
        torch.testing.assert_close(got, expected)


def test_two_copies_of_the_module_live_side_by_side(interpreted):
    """As the package and a checkpoint's remote code do; and one copy may be loaded again."""
    copies = [load_module(name, interpreted=True) for name in ("a-copy_of_it", "another_copy", "another_copy")]
    inputs, options = make_inputs(seq_len=2)
    expected = interpreted.rebased_attention_triton(*inputs, **options)

    for copy in copies[::2]:
        assert torch.equal(copy.rebased_attention_triton(*inputs, **options), expected)


PUBLIC_FORM = """
import torch
from hf_based_kernel import rebased_attention, taylor_attention

torch.manual_seed(0)
mask = torch.tensor([[False] + [True] * 6])
for attention, heads in ((rebased_attention, 2), (rebased_attention, 1), (taylor_attention, 2)):
    results = []
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 7, count, 4, requires_grad=True) for count in (2, heads, heads))
        with torch.autocast("cpu", torch.bfloat16):
            out = attention(q, k, v, attention_mask=mask, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for x, y in zip(*results):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
print("equal")
"""


@pytest.mark.slow
def test_public_function_runs_it_under_the_interpreter_and_under_autocast(monkeypatch, run_isolated):
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    assert run_isolated(PUBLIC_FORM, visible=["hf_based_kernel"]).strip() == "equal"


# On a GPU, at the sizes of the paper's models.

REAL_SIZES = {
    "many_heads": {"batch_size": 2, "seq_len": 4099, "num_heads": 12},
    "one_long_head": {"batch_size": 1, "seq_len": 16384, "num_heads": 1},
    "shared_heads": {"batch_size": 2, "seq_len": 4099, "num_heads": 12, "num_key_value_heads": 4},
    "mask_and_segments": {"batch_size": 2, "seq_len": 2048, "num_heads": 4, "with_mask": True, "with_segments": True},
    "wide": {"batch_size": 2, "seq_len": 1025, "num_heads": 4, "feature_dim": 24, "head_dim": 128},
}
# TF32x3 keeps about 22 bits; sums have up to 16384 terms. Half precision: as on the CPU, and TF32 rounds to 11 bits.
REAL_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2**-5, torch.float16: 2**-7}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", REAL_TOLERANCES, ids=str)
@pytest.mark.parametrize("attention", [rebased_attention, taylor_attention])
@pytest.mark.parametrize("sizes", REAL_SIZES.values(), ids=REAL_SIZES.keys())
def test_on_a_gpu_value_and_every_gradient_match_float64(sizes, attention, dtype):
    coefficients = REBASED if attention is rebased_attention else TAYLOR
    sizes = {"feature_dim": 16, "head_dim": 64} | sizes
    inputs, options = make_inputs(**sizes, with_state=True, dtype=dtype, device="cuda", coefficients=coefficients)
    # The state of another sequence like this one: of numbers that are no state, denominators come out near zero.
    earlier, _ = make_inputs(**sizes, dtype=torch.float64, device="cuda")
    inputs[3] = attention(*earlier, return_state=True, backend="torch")[1].float()
    # Denominators away from zero: else what is measured is how far a quotient by almost nothing magnifies rounding.
    options["eps"] = 0.1
    del options["coefficients"]

    def form(backend):
        return lambda q, k, v, **others: attention(q, k, v, backend=backend, **others)

    expected = run(form("torch"), inputs, options, [torch.float64] * 4)
    results = run(form("triton"), inputs, options, [x.dtype for x in inputs])
    for x, y in zip(results, expected):
        assert ((x - y).abs().max() / y.abs().max()).item() < REAL_TOLERANCES[dtype]


@pytest.mark.gpu
def test_on_a_gpu_a_compiled_call_equals_an_eager_one():
    (q, k, v), _ = make_inputs(
        batch_size=2, seq_len=1000, num_heads=4, head_dim=64, dtype=torch.bfloat16, device="cuda"
    )
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    results = []
    for attention in (rebased_attention, torch.compile(rebased_attention, fullgraph=True)):
        out = attention(q, k, v, backend="triton")
        results.append([out, *torch.autograd.grad(out.sum(), (q, k, v))])

    for x, y in zip(*results):
        torch.testing.assert_close(x, y)


@pytest.mark.gpu
def test_on_a_gpu_memory_grows_linearly_with_length():
    peaks = []
    for seq_len in (8192, 16384):
        (q, k, v), _ = make_inputs(seq_len=seq_len, num_heads=4, head_dim=64, dtype=torch.bfloat16, device="cuda")
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        rebased_attention(q, k, v).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)

    assert peaks[1] < 2.5 * peaks[0]
