"""The layers around the operation; the operation itself is compared in test_rebased_attention_forms.py."""

import pytest
import torch

from hf_based_kernel import RebasedConfig, RebasedModel
from hf_based_kernel.linear_attention_rebased import RebasedMappedAttention


def make_layer(**options):
    config = RebasedConfig(
        hidden_size=24,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        feature_dim=5,
        use_feature_map=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.3,
        **options,
    )
    model = RebasedModel(config).double().eval()
    layer = model.layers[0].self_attn
    for name, parameter in layer.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=float("beta" not in name), std=0.3)
    return model, layer


def normalise(x, norm, per_head):
    """gamma · (x - mean) / deviation + beta of (seq, heads, feature_dim), over all heads or each."""
    dims = (-1,) if per_head else (-2, -1)
    centred = x - x.mean(dims, keepdim=True)
    centred = centred / (centred.square().mean(dims, keepdim=True) + norm.config.norm_eps).sqrt()
    return centred * norm.gamma.view(x.shape[1:]) + norm.beta.view(x.shape[1:])


def by_hand(layer, x, rotations):
    """x: (seq, hidden_size), one token and head at a time."""
    config = layer.config
    query, key, value = (y[0] for y in layer.project(x[None], rotations))
    features = []
    for y, feature_map in ((query, layer.q_map), (key, layer.k_map)):
        mapped = torch.stack([y[h] @ feature_map.weight[h] for h in range(len(y))], dim=1)
        features.append(normalise(mapped, feature_map.norm, config.qk_norm_per_head))
    q, k = features
    window, out = config.linear_attention_window, []
    gates = (x @ layer.window_gate.weight.T + layer.window_gate.bias).sigmoid() if window else None
    for i in range(len(x)):
        heads = []
        for head in range(4):
            g = head // 2
            scores = (k[: i + 1, g] @ q[i, head]) ** 2 / 5
            lengths = 1e-4 * q[i, head].square().sum() * k[: i + 1, g].square().sum(-1) / 5
            weights = (scores + lengths) / ((scores + lengths).sum() + config.attention_eps)
            mixed = weights @ value[g, : i + 1]
            if window:
                seen = slice(max(0, i - window + 1), i + 1)
                weights = (key[g, seen] @ query[head, i] / 6**0.5).softmax(-1)
                mixed = gates[i, head] * (weights @ value[g, seen]) + (1 - gates[i, head]) * mixed
            heads.append(mixed)
        out.append(layer.o_proj(torch.cat(heads)))
    return torch.stack(out)


@torch.no_grad()
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("per_head", [False, True])
def test_a_mapped_layer_is_its_formula(window, per_head):
    model, layer = make_layer(linear_attention_window=window, qk_norm_per_head=per_head)
    x = torch.randn(11, 24, dtype=torch.float64)
    rotations = model.rotary_emb(x[None], torch.arange(11)[None])
    seen = {}
    layer.register_forward_pre_hook(lambda *call: seen.update(call[2]), with_kwargs=True)
    model(inputs_embeds=torch.zeros(1, 11, 24, dtype=torch.float64))

    got = layer(x[None], position_embeddings=rotations, window_mask=seen["window_mask"])[0]
    torch.testing.assert_close(got, by_hand(layer, x, rotations), rtol=1e-8, atol=1e-8)


@torch.no_grad()
@pytest.mark.parametrize("gate", [-torch.inf, torch.inf])
def test_a_closed_gate_leaves_one_of_the_two(gate):
    model, layer = make_layer(linear_attention_window=4)
    torch.nn.init.constant_(layer.window_gate.bias, gate)
    inputs = torch.randn(1, 12, 24, dtype=torch.float64)
    before = model(inputs_embeds=inputs).last_hidden_state[0, -1]
    # Five tokens before the last is outside of the window.
    inputs[0, -6] += 1
    changed = model(inputs_embeds=inputs).last_hidden_state[0, -1] - before

    assert bool(changed.abs().max() > 1e-6) == (gate < 0)


def test_a_map_starts_with_features_of_order_one():
    layer = RebasedMappedAttention(RebasedConfig(hidden_size=64, num_attention_heads=4, use_feature_map=True), 1)
    assert layer.q_map.weight.shape == (4, 16, 16)
    model, layer = make_layer()
    assert 0.2 < layer.q_map.weight.std() < 0.7
