"""The state as the Triton kernels make and read it."""

import pytest
import torch


pytest.importorskip("triton", minversion="3.6")

from tests.hf_based_kernel.triton_form import errors, make_inputs  # noqa: E402


def test_prefill_in_two_parts_equals_one(interpreted):
    (q, k, v), options = make_inputs(seq_len=23)
    whole, final_state = interpreted.rebased_attention_triton(q, k, v, return_state=True, **options)
    first, state = interpreted.rebased_attention_triton(*(x[:, :9] for x in (q, k, v)), return_state=True, **options)
    second, state = interpreted.rebased_attention_triton(
        *(x[:, 9:] for x in (q, k, v)), initial_state=state, return_state=True, **options
    )

    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=0, atol=1e-4)
    torch.testing.assert_close(state, final_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("component", [0.0, 0.01])
def test_queries_nearly_orthogonal_to_all_keys_are_exact(interpreted, component):
    (q, k, v), options = make_inputs(seq_len=48)
    with torch.no_grad():
        q[..., 8:], k[..., :8] = 0, 0
        k[..., 0] = component
    rotation = torch.linalg.qr(torch.randn(16, 16))[0]
    q, k = (torch.nn.functional.normalize(x @ rotation, dim=-1) * 4 for x in (q, k))

    # Three spans of 16. What float32 leaves of sums of products of order |q|² |k|², relative to the floor: 6e-8 / 1e-4.
    assert max(errors(interpreted, [q, k, v], options | {"chunk_size": 16})) < 1e-3
