"""What is particular to the chunked form; its values and gradients are compared in test_rebased_attention_forms.py."""

import pytest
import torch

from hf_based_kernel import rebased_attention
from hf_based_kernel.rebased_attention_chunked import (
    _backward_operator,
    _forward,
    _forward_operator,
    rebased_attention_chunked,
)
from hf_based_kernel.rebased_attention_forms import rebased_attention_reference
from hf_based_kernel.rebased_features import REBASED, state_size


def test_forward_and_backward_allocate_nothing_of_seq_by_seq():
    seq_len = 2048
    q, k, v = (torch.randn(1, seq_len, 1, 4, requires_grad=True) for _ in range(3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        rebased_attention_chunked(q, k, v, scale=0.5, eps=1e-6, chunk_size=64).sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    # The inputs and the stored states are the largest things; scores of all pairs would take seq_len² numbers.
    assert 0 < largest < seq_len**2 * 4 / 16


@pytest.mark.parametrize("outputs", [[0], [1], [0, 1]], ids=["out", "state", "both"])
def test_an_output_that_is_not_used_sends_no_gradient(outputs):
    q, k, v = (torch.randn(1, 9, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def attend(q, k, v):
        results = rebased_attention_chunked(q, k, v, scale=0.5, eps=0.1, chunk_size=4, return_state=True)
        return tuple(results[index] for index in outputs)

    assert torch.autograd.gradcheck(attend, (q, k, v))


def test_operators_obey_the_rules_of_torch_library():
    q, k, v = (torch.randn(2, 5, *size, dtype=torch.float64) for size in ((6, 4), (3, 4), (3, 5)))
    mask, segments = torch.tensor([[0, 1, 1, 0, 1], [1] * 5]).bool(), torch.tensor([[0, 0, 0, 1, 1], [5, 5, 6, 6, 7]])
    state = torch.rand(2, 3, state_size(4), 6, dtype=torch.float64)
    options = (0.5, 1e-6, list(REBASED), 2, True, True)
    for arguments in ((state, None, None), (None, mask, segments)):
        inputs = (q, k, v, *arguments)
        out, final_state, denominators, states = _forward(*inputs, *options)
        saved = (out, final_state, *inputs, *options, out, denominators, states)
        for operator, given in ((_forward_operator, (*inputs, *options)), (_backward_operator, saved)):
            checks = torch.library.opcheck(operator, given)
            assert set(checks.values()) == {"SUCCESS"}


def chunked(q, k, v, **options):
    return rebased_attention_chunked(q, k, v, scale=0.5, eps=0.1, chunk_size=2, **options)


def reference(q, k, v, **options):
    return rebased_attention_reference(q, k, v, scale=0.5, eps=0.1, **options)


TRANSFORMS = {
    "grad": lambda form, q, k, v: torch.func.grad(lambda *x: form(*x).square().sum(), argnums=(0, 1, 2))(q, k, v),
    "gradients of each sample": lambda form, q, k, v: torch.func.vmap(
        torch.func.grad(lambda *x: form(*(y[None] for y in x)).square().sum(), argnums=(0, 1, 2))
    )(q, k, v),
    "gradients through vmap": lambda form, q, k, v: torch.func.grad(
        lambda q: torch.func.vmap(lambda one: form(one[None], k[:1], v[:1]))(q).square().sum()
    )(q),
    "jacobian": lambda form, q, k, v: torch.func.jacrev(form, argnums=(0, 2))(q, k, v),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms_see_the_gradients_of_the_formula(transform):
    q, k, v = (torch.randn(2, 5, *size, dtype=torch.float64) for size in ((4, 4), (2, 4), (2, 3)))
    got, expected = (TRANSFORMS[transform](form, q, k, v) for form in (chunked, reference))

    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("outputs", [[0], [1], [0, 1]], ids=["out", "state", "both"])
def test_batched_gradients_are_those_of_each_one(outputs, create_graph):
    k, v = (torch.randn(2, 5, 2, size, dtype=torch.float64, requires_grad=True) for size in (4, 3))
    state = torch.rand(2, 2, state_size(4), 4, dtype=torch.float64, requires_grad=True)
    results = chunked(k.detach(), k, v, initial_state=state, return_state=True)
    numbers = torch.cat([results[index].flatten()[:3] for index in outputs])

    of_each = [torch.autograd.grad(number, (k, v, state), retain_graph=True) for number in numbers]
    batched = torch.autograd.grad(
        numbers,
        (k, v, state),
        torch.eye(len(numbers), dtype=torch.float64),
        is_grads_batched=True,
        create_graph=create_graph,
    )
    torch.testing.assert_close(batched, tuple(map(torch.stack, zip(*of_each))))


def test_each_sample_may_be_packed_otherwise():
    q, k, v = (torch.randn(2, 1, 6, 2, size) for size in (4, 4, 3))
    segment_ids = torch.tensor([[[0, 0, 0, 1, 1, 1]], [[0, 0, 1, 1, 2, 2]]])

    def attend(q, k, v, segment_ids):
        return rebased_attention(q, k, v, segment_ids=segment_ids)

    expected = torch.stack([attend(*sample) for sample in zip(q, k, v, segment_ids)])
    torch.testing.assert_close(torch.func.vmap(attend)(q, k, v, segment_ids), expected)


def test_each_sample_may_have_a_mask_and_a_state():
    q, k, v = (torch.randn(2, 5, 2, size, dtype=torch.float64) for size in (4, 4, 3))
    state = torch.rand(2, 1, 2, state_size(4), 4, dtype=torch.float64)
    mask = torch.tensor([[[0, 1, 1, 1, 1]], [[1] * 5]]).bool()

    def total(form, q, k, v, state, mask):
        q, k, v = (x[None].masked_fill(~mask[:, :, None, None], 0) for x in (q, k, v))
        out, last = form(q, k, v, initial_state=state, attention_mask=mask, return_state=True)
        return (out * mask[:, :, None, None]).square().sum() + last.square().sum()

    def of_each_sample(form):
        gradient = torch.func.grad(lambda *x: total(form, *x), argnums=(0, 1, 2, 3))
        return torch.func.vmap(gradient)(q, k, v, state, mask)

    torch.testing.assert_close(of_each_sample(chunked), of_each_sample(reference), rtol=1e-9, atol=1e-10)


def test_gradients_of_gradients_are_refused():
    q, k, v = (torch.randn(1, 5, 2, 4, requires_grad=True) for _ in range(3))
    (gradient,) = torch.autograd.grad(chunked(q, k, v).sum(), q, create_graph=True)

    with pytest.raises(NotImplementedError, match="gradients of gradients are not implemented"):
        gradient.square().sum().backward()
