"""The state as the Triton kernels make and read it."""

import pytest
import torch


pytest.importorskip("triton")

from tests.hf_based_kernel.triton_form import make_inputs  # noqa: E402


def test_prefill_in_two_parts_equals_one(interpreted):
    (q, k, v), options = make_inputs(seq_len=23)
    whole, final_state = interpreted.rebased_attention_triton(q, k, v, return_state=True, **options)
    first, state = interpreted.rebased_attention_triton(*(x[:, :9] for x in (q, k, v)), return_state=True, **options)
    second, state = interpreted.rebased_attention_triton(
        *(x[:, 9:] for x in (q, k, v)), initial_state=state, return_state=True, **options
    )

    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=0, atol=1e-4)
    torch.testing.assert_close(state, final_state, rtol=1e-5, atol=1e-5)
