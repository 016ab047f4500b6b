import copy

import pytest
import torch

from hf_based_kernel import RebasedCache, RebasedConfig, RebasedForCausalLM


LAYER_TYPES = ["conv", "linear_attention", "sliding_attention", "full_attention"]


def make_model(**options):
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "layer_types": LAYER_TYPES,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "feature_dim": 4,
        "sliding_window": 5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "initializer_range": 0.3,
    }
    config = RebasedConfig(**{**sizes, **options})
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


@pytest.mark.parametrize("options", [{}, {"use_feature_map": True, "linear_attention_window": 6}])
def test_a_state_does_not_keep_the_text_it_was_made_of(options):
    model = make_model(**options)
    for lengths in ((300,), (300, 1), (9, 300)):
        cache = RebasedCache(model.config)
        for length in lengths:
            model(tokens(1, length), past_key_values=cache)
        for layer in cache.layers[:3]:
            for x in layer.tensors():
                assert x.untyped_storage().nbytes() <= 2 * x.nbytes


@pytest.mark.parametrize(
    "options",
    [
        {"layer_types": LAYER_TYPES[::-1]},
        {"sliding_window": 6},
        {"use_feature_map": True, "linear_attention_window": 6},
    ],
)
def test_the_cache_of_another_model_is_refused(options):
    name = [*options][-1]
    cache = after(make_model(), tokens(1, 9))
    with pytest.raises(
        ValueError, match=f"past_key_values is of a model with {name} .*, this one has .*; make another"
    ):
        make_model(**options)(tokens(1, 3), past_key_values=cache)


def test_training_goes_on_after_a_cache_that_was_asked_for():
    model, input_ids = make_model().train(), tokens(2, 12)
    expected = model(input_ids).logits[:, 7:]
    assert model(input_ids).past_key_values is None
    first = model(input_ids[:, :7], use_cache=True)
    got = model(input_ids[:, 7:], past_key_values=first.past_key_values)
    torch.testing.assert_close(got.logits, expected, rtol=1e-4, atol=1e-5)
    assert got.past_key_values.get_seq_length() == 12

    model.gradient_checkpointing_enable()
    assert model(input_ids, use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="gradient checkpointing runs layers twice .* leave out the cache"):
        model(input_ids, past_key_values=RebasedCache(model.config))


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


@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("then", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("branch", [RebasedCache.fork, copy.deepcopy])
def test_two_branches_decode_on_by_themselves(first, then, branch):
    model, prompt = make_model(), tokens(2, 9)
    first_way = tokens(2, 84)
    ways = first_way, torch.cat([first_way[:, :3], tokens(2, 81)], 1)
    with first():
        cache = after(model, prompt)
        for i in range(3):
            model(first_way[:, i : i + 1], past_key_values=cache)
    other = branch(cache)
    got = [[], []]
    with then():
        # In turns, with more than there is memory for at first.
        for i in range(3, 84, 9):
            for logits, way, past in zip(got, ways, (cache, other)):
                logits.append(model(way[:, i : i + 9], past_key_values=past).logits)

    for logits, way in zip(got, ways):
        expected = model(torch.cat([prompt, way], 1)).logits[:, 12:]
        torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_keys_and_values_are_not_copied_at_every_token():
    model = make_model()
    cache = after(model, tokens(2, 500))
    places = set()
    for _ in range(100):
        model(tokens(2, 1), past_key_values=cache)
        places.add((cache.layers[3].keys.data_ptr(), cache.layers[3].values.data_ptr()))

    assert len(places) == 1
    assert cache.layers[3].keys.untyped_storage().nbytes() <= 4 * 2 * 2 * 8 * (501 * 9 // 8 + 64)


def test_gradients_see_the_keys_as_they_were():
    model = make_model().requires_grad_(True)
    cache = RebasedCache(model.config)
    with torch.no_grad():
        for length in (9, 1, 1):
            model(tokens(2, length), past_key_values=cache)
    # The graph of this step holds keys that the next one, without gradients, comes after.
    logits = model(tokens(2, 1), past_key_values=cache).logits
    with torch.no_grad():
        for _ in range(3):
            model(tokens(2, 1), past_key_values=cache)
    logits.sum().backward()
    assert model.model.layers[3].self_attn.q_proj.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_another_dtype_is_promoted_as_it_is_without_memory_for_more():
    layer = RebasedCache(make_model().config).layers[3]
    for _ in range(3):
        layer.update(torch.randn(1, 2, 1, 8).bfloat16(), torch.randn(1, 2, 1, 8).bfloat16())
    new = torch.randn(1, 2, 1, 8)
    keys, _ = layer.update(new, new)

    assert torch.equal(keys[:, :, -1:], new)


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
