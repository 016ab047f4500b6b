import math

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hf_based_kernel import RebasedConfig, RebasedModel
from hf_based_kernel.softmax_attention_rebased import RebasedRMSNorm, RebasedSoftmaxAttention


def make_layer(layer_type="full_attention", **options):
    options = {"num_key_value_heads": 2, "sliding_window": 3, "attn_implementation": "eager", **options}
    config = RebasedConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, head_dim=6, layer_types=[layer_type], **options
    )
    layer = RebasedSoftmaxAttention(config, 0).double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def causal_mask(seq_len, window=None):
    distance = torch.arange(seq_len)[:, None] - torch.arange(seq_len)
    hidden = (distance < 0) | (distance >= (window or seq_len))
    return torch.zeros(seq_len, seq_len, dtype=torch.float64).masked_fill(hidden, -math.inf)[None, None]


def rotate(x, position, theta):
    """A vector of one head at this position: number i turns with number i + half."""
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = torch.tensor(position * theta ** (-i / half), dtype=torch.float64)
        out[i] = x[i] * angle.cos() - x[i + half] * angle.sin()
        out[i + half] = x[i + half] * angle.cos() + x[i] * angle.sin()
    return out


def by_hand(layer, x, window, theta):
    """x: (seq, hidden_size), one token, head and key at a time."""
    config, out = layer.config, []
    q, k, v = (proj(x).unflatten(-1, (-1, 6)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    if config.use_softmax_qk_norm:
        q, k = (
            norm.weight * y / (y.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
            for norm, y in ((layer.q_norm, q), (layer.k_norm, k))
        )
    for i in range(len(x)):
        heads = []
        for head in range(4):
            group, seen = head // 2, range(max(0, i - (window or len(x)) + 1), i + 1)
            query = rotate(q[i, head], i, theta) if theta else q[i, head]
            keys = [rotate(k[j, group], j, theta) if theta else k[j, group] for j in seen]
            weights = torch.stack([query @ key / 6**0.5 for key in keys]).softmax(0)
            heads.append(weights @ v[list(seen), group])
        out.append(layer.o_proj(torch.cat(heads)))
    return torch.stack(out)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("layer_type", "window"), [("full_attention", None), ("sliding_attention", 3)])
@pytest.mark.parametrize("theta", [None, 50.0])
@pytest.mark.parametrize("options", [{}, {"attention_bias": True}, {"use_softmax_qk_norm": True}], ids=str)
def test_layer_is_the_formula(implementation, layer_type, window, theta, options):
    rope = None if theta is None else {"rope_type": "default", "rope_theta": theta}
    layer = make_layer(layer_type, rope_parameters=rope, attn_implementation=implementation, **options)
    x = torch.randn(1, 7, 32, dtype=torch.float64)
    rotations = None if rope is None else LlamaRotaryEmbedding(layer.config)(x, torch.arange(7)[None])

    got, weights = layer(x, attention_mask=causal_mask(7, window), position_embeddings=rotations)

    # transformers has cosines and the softmax in float32.
    torch.testing.assert_close(got[0], by_hand(layer, x[0], window, theta), rtol=1e-5, atol=1e-5)
    assert (weights is None) == (implementation == "sdpa")


def test_biases_stand_where_the_configuration_says():
    layer = make_layer(attention_bias=True, attention_out_bias=False)
    assert {name for name, _ in layer.named_parameters() if "bias" in name} == {f"{x}_proj.bias" for x in "qkv"}
    assert make_layer(attention_bias=True).o_proj.bias is not None
    assert make_layer().q_proj.bias is None


def test_dropout_is_for_training_only():
    layer, x = make_layer(attention_dropout=0.5), torch.randn(1, 7, 32, dtype=torch.float64)
    mask = causal_mask(7)
    assert torch.equal(layer(x, attention_mask=mask)[0], layer(x, attention_mask=mask)[0])
    layer.train()
    assert not torch.equal(layer(x, attention_mask=mask)[0], layer(x, attention_mask=mask)[0])


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_implementations_that_were_not_tried_are_refused(implementation):
    model = RebasedModel(make_layer().config)
    with pytest.raises(ValueError, match="RebasedModel does not support"):
        model.set_attn_implementation(implementation)


def test_norm_is_the_formula():
    norm, x = RebasedRMSNorm(5, 0.1).double(), torch.randn(3, 5, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    expected = norm.weight * x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt()
    torch.testing.assert_close(norm(x), expected)
