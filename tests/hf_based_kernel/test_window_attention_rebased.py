"""Block by block against all scores at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_based_kernel.window_attention_rebased import make_window_mask, window_attention


def dense(query, key, value, window, *, seen_tokens, first_tokens, attention_mask):
    """The same from one matrix of scores: query i and key j are tokens seen_tokens + i and seen_tokens - window + j."""
    seq_len, group = query.shape[2], query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    i = torch.arange(seq_len)[:, None] + seen_tokens
    j = torch.arange(window + seq_len) + seen_tokens - window
    visible = ((j <= i) & (i - j < window) & (j >= 0)).expand(query.shape[0], -1, -1)
    if first_tokens is not None:
        visible = visible & (j >= first_tokens.expand(-1, seq_len)[:, :, None])
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, j.clamp(min=0)]
    visible = visible | (i == j)
    scores = torch.einsum("bhid,bhjd->bhij", query, key) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhij,bhjd->bihd", weights, value)


@given(
    seq_len=st.integers(1, 23),
    window=st.integers(1, 9),
    seen_tokens=st.integers(0, 12),
    groups=st.integers(1, 2),
    group=st.integers(1, 3),
    packed=st.booleans(),
    padded=st.booleans(),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_blocks_match_all_scores(seq_len, window, seen_tokens, groups, group, packed, padded):
    torch.manual_seed(0)
    query = torch.randn(2, groups * group, seq_len, 4, dtype=torch.float64, requires_grad=True)
    key, value = (
        torch.randn(2, groups, window + seq_len, size, dtype=torch.float64, requires_grad=True) for size in (4, 3)
    )
    first = None
    if packed:
        starts = torch.rand(2, seq_len) < 0.2
        first = torch.where(starts, torch.arange(seq_len) + seen_tokens, 0).cummax(dim=1).values
    options = {
        "seen_tokens": seen_tokens,
        "first_tokens": first,
        "attention_mask": torch.rand(2, seen_tokens + seq_len) < 0.7 if padded else None,
    }
    mask = make_window_mask(window, seq_len, device=query.device, **options)
    got = window_attention(query, key, value, mask)
    expected = dense(query, key, value, window, **options)

    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(got)
    results = zip(*(torch.autograd.grad(out, (query, key, value), weights) for out in (got, expected)))
    for a, b in results:
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_one_first_token_of_a_row_stands_for_all_of_its_tokens():
    options = {"seen_tokens": 4, "attention_mask": None, "device": torch.device("cpu")}
    one = make_window_mask(3, 5, first_tokens=torch.tensor([[2], [3]]), **options)
    each = make_window_mask(3, 5, first_tokens=torch.tensor([[2] * 5, [3] * 5]), **options)

    assert torch.equal(one, each)


@pytest.mark.parametrize("seq_len", [100, 1000])
def test_the_mask_grows_with_the_length_alone(seq_len):
    options = {"seen_tokens": 0, "first_tokens": None, "attention_mask": None, "device": torch.device("cpu")}

    assert make_window_mask(10, seq_len, **options).numel() == seq_len * 20
