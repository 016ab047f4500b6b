import copy

import pytest
import torch

from hf_based_kernel import RebasedCache, RebasedConfig, RebasedForCausalLM


LAYER_TYPES = ["conv", "linear_attention", "sliding_attention", "full_attention"]


def make_model(**options):
    config = RebasedConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=4,
        layer_types=LAYER_TYPES,
        num_attention_heads=4,
        num_key_value_heads=2,
        feature_dim=4,
        sliding_window=5,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.3,
        **options,
    )
    return RebasedForCausalLM(config).eval().requires_grad_(False)


def tokens(*shape):
    return torch.randint(2, 64, shape)


def after(model, input_ids):
    cache = RebasedCache(model.config)
    model(input_ids, past_key_values=cache)
    return cache


@pytest.mark.parametrize("options", [{}, {"use_feature_map": True, "linear_attention_window": 6}])
def test_only_the_keys_and_values_of_full_attention_grow(options):
    model = make_model(**options)

    def sizes(seq_len):
        layers = after(model, tokens(1, seq_len)).layers
        return [sum(x.numel() for x in layer.tensors()) for layer in layers]

    short, long = sizes(20), sizes(300)
    assert short[:3] == long[:3]
    assert (short[3], long[3]) == (2 * 2 * 8 * 20, 2 * 2 * 8 * 300)


@pytest.mark.parametrize("branch", [RebasedCache.fork, copy.deepcopy])
@pytest.mark.parametrize(
    "use", [RebasedCache.reset, lambda cache: cache.batch_select_indices(torch.tensor([1])), RebasedCache.detach]
)
@pytest.mark.parametrize("options", [{}, {"use_feature_map": True, "linear_attention_window": 6}])
def test_a_branch_does_not_notice_what_becomes_of_its_origin(branch, use, options):
    model, prompt, more = make_model(**options), tokens(2, 9), tokens(2, 3)
    expected = model(more, past_key_values=after(model, prompt)).logits
    cache = after(model, prompt)
    other = branch(cache)
    use(cache)

    assert torch.equal(model(more, past_key_values=other).logits, expected)


def test_a_cache_that_was_reset_is_a_new_one():
    model, prompt = make_model(), tokens(1, 9)
    cache = after(model, tokens(2, 6))
    cache.reset()

    assert (cache.get_seq_length(), cache.num_sequences) == (0, None)
    torch.testing.assert_close(model(prompt, past_key_values=cache).logits, model(prompt).logits)
    assert cache.num_sequences == 1


def test_rows_go_where_they_are_sent():
    model, prompt, more = make_model(), tokens(3, 9), tokens(3, 2)
    mask = torch.ones_like(prompt)
    mask[1, :4] = 0
    expected = model(torch.cat([prompt, more], 1), attention_mask=torch.cat([mask, more > 0], 1)).logits[:, 9:]
    for send in ("reorder_cache", "batch_select_indices"):
        cache, order = RebasedCache(model.config), torch.tensor([2, 1, 1])
        model(prompt, attention_mask=mask, past_key_values=cache)
        getattr(cache, send)(order)
        got = model(more[order], past_key_values=cache).logits
        # Float32 sums in another order.
        torch.testing.assert_close(got, expected[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer_types", [LAYER_TYPES, ["full_attention"] * 4])
def test_no_token_is_taken_back(layer_types):
    config = copy.deepcopy(make_model().config)
    config.layer_types = layer_types
    cache = RebasedCache(config)

    assert not any(layer.is_croppable for layer in cache.layers)
    with pytest.raises(ValueError, match="cannot forget single tokens"):
        cache.crop(-1)
