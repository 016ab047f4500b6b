"""What is particular to the chunked form; its values and gradients are compared in test_rebased_attention_forms.py."""

import pytest
import torch

from hf_based_kernel.rebased_attention_chunked import (
    _backward_operator,
    _forward,
    _forward_operator,
    rebased_attention_chunked,
)
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
    q, k, v = (torch.randn(2, 5, 3, size, dtype=torch.float64) for size in (4, 4, 5))
    mask, segments = torch.tensor([[0, 1, 1, 0, 1], [1] * 5]).bool(), torch.tensor([[0, 0, 0, 1, 1], [5, 5, 6, 6, 7]])
    state = torch.rand(2, 3, state_size(4), 6, dtype=torch.float64)
    options = (0.5, 1e-6, list(REBASED), 2, True, True)
    for arguments in ((state, None, None), (None, mask, segments)):
        inputs = (q, k, v, *arguments)
        out, denominators, final_state, states = _forward(*inputs, *options)
        saved = (out, final_state, *inputs, *options, out, denominators, states)
        for operator, given in ((_forward_operator, (*inputs, *options)), (_backward_operator, saved)):
            checks = torch.library.opcheck(operator, given)
            assert set(checks.values()) == {"SUCCESS"}
