"""The Triton kernel of one token against the reference, interpreted on the CPU and run on a GPU."""

import pytest
import torch


pytest.importorskip("triton", minversion="3.6")

from hf_based_kernel import rebased_attention, rebased_attention_forms, taylor_attention  # noqa: E402
from hf_based_kernel.rebased_attention_forms import rebased_attention_reference  # noqa: E402
from hf_based_kernel.rebased_features import REBASED, TAYLOR  # noqa: E402
from tests.hf_based_kernel.triton_form import (  # noqa: E402
    FLOAT32_TOLERANCE,
    interpreted_language,
    load_module,
    make_inputs,
)


# The sums are in float32 whatever the inputs are, and so is the state: half precision rounds the output only (Triton's
# interpreter cuts bfloat16 off).
TOLERANCES = {torch.float32: FLOAT32_TOLERANCE, torch.bfloat16: 2**-7, torch.float16: 2**-10}

CASES = {
    "paper": {"batch_size": 2, "num_heads": 3, "head_dim": 64},
    "two_value_blocks": {"feature_dim": 4, "head_dim": 72},
    "odd_widths": {"batch_size": 2, "feature_dim": 5, "head_dim": 3},
    "wide_features": {"feature_dim": 18, "head_dim": 5},
    "one_feature_one_value": {"feature_dim": 1, "head_dim": 1},
    "shared_state": {"batch_size": 2, "num_heads": 6, "num_key_value_heads": 2, "feature_dim": 5, "head_dim": 3},
    "shared_state_two_value_blocks": {"num_heads": 2, "num_key_value_heads": 1, "feature_dim": 4, "head_dim": 72},
    "more_queries_than_a_program_takes": {"batch_size": 2, "num_heads": 22, "num_key_value_heads": 2, "head_dim": 3},
    "taylor_shared_state": {
        "num_heads": 4,
        "num_key_value_heads": 1,
        "feature_dim": 5,
        "head_dim": 3,
        "coefficients": TAYLOR,
    },
    "taylor": {"batch_size": 2, "num_heads": 2, "feature_dim": 5, "head_dim": 3, "coefficients": TAYLOR},
}


HEADS = [{}, {"num_heads": 4, "num_key_value_heads": 2}]


@pytest.fixture(scope="module")
def step():
    with interpreted_language():
        yield load_module("interpreted_step", interpreted=True, module="rebased_step_triton")


def run_both(form, inputs, options, **others):
    """Output and state of the form, and of the reference in float64."""
    state = {"initial_state": inputs[3]} if len(inputs) == 4 else {}
    results = form(*inputs[:3], **state, return_state=True, **options, **others)
    exact = {name: x.double() for name, x in state.items()}
    options = {"coefficients": REBASED} | options
    return results, rebased_attention_reference(
        *(x.double() for x in inputs[:3]), **exact, return_state=True, **options
    )


def assert_close(results, expected, dtype):
    for result, exact, tolerance in zip(results, expected, (TOLERANCES[dtype], FLOAT32_TOLERANCE)):
        assert ((result - exact).abs().max() / exact.abs().max()).item() < tolerance


@pytest.mark.parametrize("with_state", [True, False], ids=["state", "first token"])
@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES.keys())
def test_output_and_state_match_the_reference(step, sizes, with_state):
    inputs, options = make_inputs(seq_len=1, with_state=with_state, **sizes)
    (out, state), expected = run_both(step.rebased_attention_step_triton, inputs, options)

    assert (out.dtype, state.dtype) == (torch.float32, torch.float32)
    assert_close((out, state), expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_the_output_only(step, dtype):
    inputs, options = make_inputs(seq_len=1, with_state=True, dtype=dtype)
    (out, state), expected = run_both(step.rebased_attention_step_triton, inputs, options)

    assert (out.dtype, state.dtype) == (dtype, torch.float32)
    assert_close((out, state), expected, dtype)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("coefficients", [REBASED, TAYLOR], ids=["rebased", "taylor"])
def test_padding_adds_nothing(step, coefficients, heads):
    inputs, options = make_inputs(seq_len=1, batch_size=2, with_state=True, coefficients=coefficients, **heads)
    options["attention_mask"] = torch.tensor([[True], [False]])
    inputs[:3] = [x.masked_fill(~options["attention_mask"][:, :, None, None], 0) for x in inputs[:3]]
    results, expected = run_both(step.rebased_attention_step_triton, inputs, options)

    assert_close([x[:1] for x in results], [x[:1] for x in expected], torch.float32)
    assert torch.equal(results[1][1], inputs[3][1])
    assert not torch.equal(results[1][0], inputs[3][0])


def test_a_query_orthogonal_to_what_it_reads_gives_what_the_reference_gives(step):
    """The kernel's floor alone is left of every score, and of the token's own."""
    inputs, options = make_inputs(seq_len=1, with_state=False)
    q, k, v = inputs
    q[..., 8:], k[..., :8] = 0, 0
    (_, state), _ = run_both(step.rebased_attention_step_triton, [q, k, v], options)
    results, expected = run_both(step.rebased_attention_step_triton, [q, k, -v, state], options)

    assert ((results[0] - expected[0]).abs().max() / v.abs().max()).item() < FLOAT32_TOLERANCE


def test_layout_in_memory_changes_nothing(step):
    (q, k, v, state), options = make_inputs(seq_len=1, batch_size=3, num_heads=2, head_dim=8, with_state=True)
    expected = step.rebased_attention_step_triton(q, k, v, initial_state=state, return_state=True, **options)
    # one more head behind each, and the state's columns first
    q, k, v = (torch.cat([x, x], dim=2)[:, :, :2] for x in (q, k, v))
    state = state.mT.contiguous().mT

    assert not (q.is_contiguous() or state.is_contiguous())
    results = step.rebased_attention_step_triton(q, k, v, initial_state=state, return_state=True, **options)
    assert all(map(torch.equal, results, expected))


def test_the_state_is_not_written_in_place(step):
    (q, k, v, state), options = make_inputs(seq_len=1, with_state=True)
    before = state.clone()
    step.rebased_attention_step_triton(q, k, v, initial_state=state, return_state=True, **options)

    assert torch.equal(state, before)


def test_float64_is_refused_in_a_sentence(step):
    inputs, options = make_inputs(seq_len=1, dtype=torch.float64)

    with pytest.raises(ValueError, match="takes float32, bfloat16 or float16, got torch.float64"):
        step.rebased_attention_step_triton(*inputs, return_state=True, **options)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_operator_obeys_the_rules_of_torch_library(step, heads):
    (q, k, v, state), options = make_inputs(seq_len=1, feature_dim=4, head_dim=4, with_state=True, **heads)
    arguments = (q, k, v, state, None, options["scale"], options["eps"], list(REBASED), True)

    assert set(torch.library.opcheck(step._step_operator, arguments).values()) == {"SUCCESS"}


def test_compiles_into_one_graph(step):
    (q, k, v, state), options = make_inputs(seq_len=1, feature_dim=4, head_dim=4, with_state=True)
    torch.compiler.reset()
    compiled = torch.compile(step.rebased_attention_step_triton, backend="aot_eager", fullgraph=True)
    results = [
        form(q, k, v, initial_state=state, return_state=True, **options)
        for form in (compiled, step.rebased_attention_step_triton)
    ]

    assert all(map(torch.equal, *results))


def test_it_is_chosen_where_nothing_needs_a_gradient():
    q, k, v = torch.zeros(3, 1, 1, 2, 4)

    def chosen(q, state=None, *, return_state=True, backend="triton"):
        choose = rebased_attention_forms._choose_form
        return choose(q, k, v, state, return_state=return_state, backend=backend).__name__

    assert chosen(q) == "rebased_attention_step_triton"
    assert chosen(q, torch.zeros(1, 2, 12, 5), return_state=False) == "rebased_attention_step_triton"
    assert chosen(q, backend="torch") == chosen(q, backend="auto") == "rebased_attention_step"
    assert chosen(q, return_state=False) == "rebased_attention_triton"
    assert chosen(torch.zeros(1, 2, 2, 4)) == "rebased_attention_triton"
    assert chosen(q.clone().requires_grad_()) == "rebased_attention_triton"
    with torch.no_grad():
        assert chosen(q.clone().requires_grad_()) == "rebased_attention_step_triton"


# On a GPU: the sizes of a served model, and of one sequence.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("attention", [rebased_attention, taylor_attention])
@pytest.mark.parametrize(
    "sizes",
    [
        {"batch_size": 1},
        {"batch_size": 64},
        {"feature_dim": 24, "head_dim": 128},
        {"batch_size": 1, "num_key_value_heads": 4},
        {"batch_size": 64, "num_key_value_heads": 4},
        {"batch_size": 64, "num_key_value_heads": 1},
    ],
    ids=str,
)
def test_on_a_gpu_a_thousand_tokens_match_float64(sizes, attention, dtype):
    coefficients = REBASED if attention is rebased_attention else TAYLOR
    sizes = {"num_heads": 12, "head_dim": 64} | sizes
    (q, k, v), options = make_inputs(**sizes, seq_len=1000, dtype=dtype, device="cuda", coefficients=coefficients)
    del options["coefficients"]
    state, outs = None, []
    for token in range(1000):
        now = [x[:, token : token + 1] for x in (q, k, v)]
        out, state = attention(*now, initial_state=state, return_state=True, **options)
        outs.append(out)
    expected, last = attention(*(x[:1].double() for x in (q, k, v)), return_state=True, **options)

    # The first tokens have almost nothing to divide by.
    error = (torch.cat(outs, dim=1)[:1] - expected)[:, 16:].abs().max() / expected.abs().max()
    assert error.item() < 10 * TOLERANCES[dtype]
    assert ((state[:1] - last).abs().max() / last.abs().max()).item() < 10 * FLOAT32_TOLERANCE


@pytest.mark.gpu
def test_on_a_gpu_a_graph_replays_it():
    (q, k, v, state), options = make_inputs(seq_len=1, num_heads=4, head_dim=64, with_state=True, device="cuda")
    del options["coefficients"]
    expected = rebased_attention(q, k, v, initial_state=state, return_state=True, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = rebased_attention(q, k, v, initial_state=state, return_state=True, **options)
    graph.replay()

    assert all(map(torch.equal, results, expected))
