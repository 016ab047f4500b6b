import pytest
import torch
import torch.nn.functional as F

from hf_based_kernel import RebasedCache, RebasedConfig
from hf_based_kernel.convolution_rebased import RebasedBaseConv, RebasedCausalConv, RebasedGatedConv


TAPS = 3


def make_config(**options):
    return RebasedConfig(
        hidden_size=8,
        num_hidden_layers=1,
        layer_types=["conv"],
        conv_kernel_size=TAPS,
        num_attention_heads=2,
        **options,
    )


def make_conv(channels=8):
    conv = RebasedCausalConv(channels, make_config(), 0, bias=True)
    torch.nn.init.normal_(conv.weight)
    torch.nn.init.normal_(conv.bias)
    return conv


def test_it_is_a_causal_convolution_per_channel():
    conv, x = make_conv(), torch.randn(2, 7, 8)
    padded = F.pad(x.mT, (TAPS - 1, 0))
    torch.testing.assert_close(conv(x), F.conv1d(padded, conv.weight.mT[:, None], conv.bias, groups=8).mT)


def test_pieces_with_a_cache_give_the_whole():
    conv, x = make_conv(), torch.randn(2, 7, 8)
    cache = RebasedCache(make_config())
    pieces = [conv(piece, past_key_values=cache) for piece in x.split([1, 4, 2], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), conv(x))


def test_segments_and_padding_are_not_seen():
    conv, x = make_conv(), torch.randn(1, 7, 8)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    apart = torch.cat([conv(x[:, :3]), conv(x[:, 3:])], dim=1)
    torch.testing.assert_close(conv(x, segment_ids=segments), apart)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    torch.testing.assert_close(conv(x, attention_mask=mask)[:, 3:], conv(x[:, 3:]))


@pytest.mark.parametrize("kind", ["gated", "base"])
def test_the_mixers_are_their_formulas(kind):
    layer = (RebasedGatedConv if kind == "gated" else RebasedBaseConv)(make_config(), 0)
    torch.nn.init.normal_(layer.conv.weight)
    if kind == "base":
        torch.nn.init.normal_(layer.conv.bias)
    x = torch.randn(2, 5, 8)
    if kind == "gated":
        a, b = layer.in_proj(x).chunk(2, dim=-1)
        expected = layer.out_proj(layer.conv(a) * F.silu(b))
    else:
        expected = layer.conv(x) * layer.proj(x)
    torch.testing.assert_close(layer(x), expected)
