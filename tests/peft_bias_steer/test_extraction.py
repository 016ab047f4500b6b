"""Vectors from contrasting prompts, against the formulas in float64, and from merged biases; then all that adapters do."""

import itertools
import math

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_bias_steer import (
    export_control_vector,
    export_stock_checkpoint,
    extract_vectors,
    from_control_vector,
    from_merged,
    from_vectors,
    load_vectors,
    logit_lens,
    serving_routes,
    steering_vectors,
)
from peft_bias_steer.analysis import vector_statistics
from peft_bias_steer.serving.routes import adapter_routes
from tests.peft_bias_steer.tiny_models import CLOSE, GPT2, SMALL, logits, make_base, steer


WORDS = ["one", "two", "three", "seventeen", "a hundred", "none"]
# of different lengths, so that batches are padded
PAIRS = [
    {"positive": f"I am glad of {a} and {b}", "negative": f"I am so very sad about {b} {a}"}
    for a, b in itertools.permutations(WORDS, 2)
]
METHODS = ["mean", "pca_diff", "pca_center"]


@pytest.fixture(scope="module")
def tokenizer(tiny_language_model):
    return AutoTokenizer.from_pretrained(tiny_language_model)


@pytest.fixture(scope="module")
def base(tiny_language_model):
    return AutoModelForCausalLM.from_pretrained(tiny_language_model).eval()


def plain_differences(base, tokenizer, pairs, layer, token=-1):
    """Prompt by prompt, without padding, from the states that transformers records: (pairs, width) in float64."""

    def read(text):
        outputs = base.model(torch.tensor([tokenizer(text).input_ids]), output_hidden_states=True)
        # the last of them is normed
        assert len(outputs.hidden_states) > layer + 2
        return outputs.hidden_states[layer + 1][0, token].double()

    with torch.no_grad():
        return torch.stack([read(pair["positive"]) - read(pair["negative"]) for pair in pairs])


def count_hooks(base):
    # transformers has some of its own
    return [len(layer._forward_hooks) for layer in base.model.layers]


def plain_direction(differences, method):
    if method == "mean":
        return differences.mean(0)
    centre = differences.mean(0) if method == "pca_diff" else 0
    _, axes = torch.linalg.eigh((differences - centre).T @ (differences - centre))
    axis = axes[:, -1]
    return axis * torch.sign((differences @ axis).mean())


# float32 states of width 32; an axis is as far off as its singular value is near the next one
NEAR = {"atol": 2e-5, "rtol": 1e-4}


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("method", METHODS)
def test_vectors_are_those_of_the_formulas_in_float64(base, tokenizer, method, batch_size):
    vectors = extract_vectors(base, tokenizer, PAIRS, method=method, batch_size=batch_size, layers_to_transform=0)

    assert list(vectors) == [0] and vectors[0].dtype == torch.float32
    expected = plain_direction(plain_differences(base, tokenizer, PAIRS, 0), method)
    torch.testing.assert_close(vectors[0].double(), expected, **NEAR)
    assert method == "mean" or math.isclose(vectors[0].norm(), 1, rel_tol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_more_pairs_than_memory_holds_give_the_same(base, tokenizer, method, monkeypatch):
    import peft_bias_steer.extraction as extraction

    kept = []
    fold = extraction._folded
    monkeypatch.setattr(extraction, "_folded", lambda rows, method: kept.append(len(rows)) or fold(rows, method))
    pairs = [{side: f"{text} {number}" for side, text in pair.items()} for pair in PAIRS for number in range(7)]

    vectors = extract_vectors(base, tokenizer, iter(pairs), method=method, batch_size=20, layers_to_transform=[0])

    assert len(pairs) == 210 and len(kept) > 3 and max(kept) <= 2 * 32 + 20
    expected = plain_direction(plain_differences(base, tokenizer, pairs, 0), method)
    torch.testing.assert_close(vectors[0].double(), expected, **NEAR)


@pytest.mark.parametrize("options", [{}, GPT2], ids=["llama", "gpt2"])
def test_what_is_read_is_what_the_vector_is_added_to(options, tokenizer):
    base = make_base("gpt2" if options else "llama", **{**(options or SMALL), "vocab_size": len(tokenizer)})
    pairs = [{"positive": "short", "negative": "quite a bit longer"}]
    vectors = extract_vectors(base, tokenizer, pairs, batch_size=1)
    assert list(vectors) == [0, 1, 2]

    # added at the last layer, the difference of two states gives one prompt the logits of the other
    model = from_vectors({2: vectors[2]}, base).eval()
    with model.disable_adapter():
        expected = logits(model, torch.tensor([tokenizer("short").input_ids]))[0, -1]
    steered = logits(model, torch.tensor([tokenizer("quite a bit longer").input_ids]))[0, -1]
    torch.testing.assert_close(steered, expected, **CLOSE)


def test_an_adapter_of_the_model_is_not_read(base, tokenizer):
    expected, hooks = extract_vectors(base, tokenizer, PAIRS), count_hooks(base)
    model = steer(base)
    try:
        vectors = extract_vectors(model, tokenizer, PAIRS)
    finally:
        model.unload()

    assert all(torch.equal(vectors[index], expected[index]) for index in expected)
    assert count_hooks(base) == hooks


def test_token_and_layers_are_the_ones_that_were_asked_for(base, tokenizer):
    vectors = extract_vectors(base, tokenizer, PAIRS, token=6, layers_to_transform=[-2])

    assert list(vectors) == [0]
    expected = plain_differences(base, tokenizer, PAIRS, 0, token=6).mean(0)
    torch.testing.assert_close(vectors[0].double(), expected, **NEAR)


def test_messages_go_through_the_chat_template(base, tokenizer):
    def chat(*turns):
        return [{"role": role, "content": text} for role, text in turns]

    start, end = "<|im_start|>", "<|im_end|>\n"
    asked = f"{start}user\nHi{end}{start}assistant\n"
    messages = {
        "positive": chat(("system", "Be glad"), ("user", "Hi")),
        "negative": chat(("user", "Hi"), ("assistant", "No")),
    }
    texts = {"positive": f"{start}system\nBe glad{end}{asked}", "negative": f"{asked}No"}

    from_messages = extract_vectors(base, tokenizer, [messages])

    assert all(
        torch.equal(vector, from_messages[layer])
        for layer, vector in extract_vectors(base, tokenizer, [texts]).items()
    )


def test_an_axis_points_to_the_positive_prompts(base, tokenizer):
    swapped = [{"positive": pair["negative"], "negative": pair["positive"]} for pair in PAIRS]
    for method in METHODS:
        vectors = extract_vectors(base, tokenizer, PAIRS, method=method, layers_to_transform=0)
        others = extract_vectors(base, tokenizer, swapped, method=method, layers_to_transform=0)

        torch.testing.assert_close(vectors[0], -others[0], **NEAR)


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([], {}, "expected at least 1 pairs for mean, got 0"),
        (PAIRS[:1], {"method": "pca_diff"}, "expected at least 2 pairs for pca_diff, got 1"),
        ([*PAIRS, ("a", "b")], {}, r"a positive and a negative prompt as pair 30, got \('a', 'b'\)"),
        ([{"positive": "a"}], {}, "a positive and a negative prompt as pair 0"),
        ([{"positive": "a", "negative": ""}], {}, "a token -1 in the negative prompt of pair 0, got one of 0 tokens"),
        (
            [{"positive": "a", "negative": "b"}],
            {"token": 1},
            "a token 1 in the positive prompt of pair 0, .* 1 tokens",
        ),
        (
            [{"positive": 3, "negative": "b"}],
            {},
            "a text or a list of messages as the positive prompt of pair 0, got 3",
        ),
        ([{"positive": "a", "negative": []}], {}, r"list of messages as the negative prompt of pair 0, got \[\]"),
        ([{"positive": "a", "negative": ["b"]}], {}, "list of messages as the negative prompt of pair 0"),
        ([{"positive": "a", "negative": "a"}], {}, "prompts that differ, got none after layer 0 whose mean"),
        (2 * PAIRS[:1], {"method": "pca_diff"}, "got none after layer 0 whose pca_diff is not zero"),
        (PAIRS, {"method": "pca"}, "method must be one of mean, pca_diff, pca_center, got 'pca'"),
        (PAIRS, {"layers_to_transform": [0, 2]}, r"indices in \[-2, 1\], got \[2\]"),
        (PAIRS, {"layers_to_transform": []}, r"indices in \[-2, 1\], got \[\]"),
        (PAIRS, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(base, tokenizer, pairs, options, message):
    hooks = count_hooks(base)
    with pytest.raises(ValueError, match=message):
        extract_vectors(base, tokenizer, pairs, **options)
    assert count_hooks(base) == hooks


def test_a_chat_that_the_template_refuses_is_named(base, tiny_language_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_language_model)
    pairs = [{"positive": "a", "negative": [{"role": "system", "content": "b"}]}]
    for template, reason in [
        ("{{ raise_exception('only users') }}", "only users"),
        (None, "chat_template is not set"),
    ]:
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=f"the negative prompt of pair 0 to be a chat .*{reason}"):
            extract_vectors(base, tokenizer, pairs)


@pytest.mark.parametrize("options", [{"token": 0.5}, {"batch_size": True}, {"layers_to_transform": ["0"]}], ids=str)
def test_numbers_that_are_none_are_refused(base, tokenizer, options):
    with pytest.raises(TypeError, match="must be an integer"):
        extract_vectors(base, tokenizer, PAIRS, **options)


def test_models_that_give_no_such_states_are_refused(tokenizer):
    base = make_base(**{**SMALL, "vocab_size": len(tokenizer)})
    base.model.layers[1].mlp.down_proj.weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="NaN or infinity after layer 1 in pairs 0 to 7: load the model with dtype"):
        extract_vectors(base, tokenizer, PAIRS)
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        extract_vectors(base.train(), tokenizer, PAIRS)

    base.eval().model.layers[0].register_forward_hook(lambda module, args, output: output.transpose(0, 1))
    with pytest.raises(ValueError, match=r"layers that return \(batch, seq, hidden_size\), got \("):
        extract_vectors(base, tokenizer, PAIRS[:3])


def test_a_model_with_encoder_and_decoder_is_refused(tokenizer):
    from transformers import T5Config, T5ForConditionalGeneration

    base = T5ForConditionalGeneration(T5Config(vocab_size=300, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4))
    with pytest.raises(ValueError, match="a decoder or an encoder, got a T5ForConditionalGeneration"):
        extract_vectors(base.eval(), tokenizer, PAIRS)


def test_an_extracted_adapter_does_what_adapters_do(tiny_language_model, tokenizer, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_language_model).eval()
    plain = logits(base)
    vectors = extract_vectors(base, tokenizer, PAIRS)
    model = from_vectors(vectors, base).eval()
    steered = logits(model)

    assert all(torch.equal(vector, vectors[index]) for index, vector in steering_vectors(model).items())
    model.set_scale("default", 0.0)
    assert torch.equal(logits(model), plain)
    model.set_scale("default", 1.0)
    assert model.check_merge(torch.arange(20)[None]) < 1e-5
    assert [lens.layer for lens in logit_lens(model, tokenizer, top_k=3)] == [0, 1]

    model.save_pretrained(tmp_path / "adapter")
    assert vector_statistics(load_vectors(tmp_path / "adapter")).norms == pytest.approx(
        [vector.norm().item() for vector in vectors.values()]
    )
    assert adapter_routes(tmp_path / "adapter") == serving_routes(base)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), steered)
    export_stock_checkpoint(loaded, tmp_path / "stock", tokenizer=tokenizer)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "stock")), steered, **CLOSE)
    assert export_control_vector(loaded, tmp_path / "v.gguf", drop_first_layer=True) == pytest.approx(
        vectors[0].norm().item()
    )
    again = from_control_vector(tmp_path / "v.gguf", loaded, "again")
    assert torch.equal(steering_vectors(again, "again")[1], vectors[1])


@pytest.mark.parametrize(
    ("model_type", "config"), [("llama", {}), ("gpt2", GPT2), ("granite", {**SMALL, "residual_multiplier": 0.25})]
)
def test_merged_biases_become_the_vectors_again(model_type, config):
    base, merged = (make_base(model_type, **config) for _ in range(2))
    model = steer(merged, layers_to_transform=[0, 2])
    vectors, expected = steering_vectors(model), logits(model)

    returned = from_merged(model.merge_and_unload(), base).eval()

    read = steering_vectors(returned)
    assert list(read) == [0, 2]
    for index, vector in vectors.items():
        torch.testing.assert_close(read[index], vector, **CLOSE)
    torch.testing.assert_close(logits(returned), expected, **CLOSE)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_stock_checkpoint_of_another_class_gives_its_vectors(model_type, tmp_path):
    base = make_base(model_type)
    model = steer(base)
    vectors = steering_vectors(model)
    export_stock_checkpoint(model, tmp_path / "stock")

    read = steering_vectors(
        from_merged(AutoModelForCausalLM.from_pretrained(tmp_path / "stock"), model, "read"), "read"
    )

    assert all(torch.equal(read[index], vectors[index]) for index in vectors)


def test_all_experts_share_one_vector():
    config = {**SMALL, "head_dim": 8, "num_local_experts": 4}
    base, merged = (make_base("gpt_oss", **config) for _ in range(2))
    model = steer(merged)
    vectors = steering_vectors(model)

    read = steering_vectors(from_merged(model.merge_and_unload(), base))

    assert all(torch.allclose(read[index], vectors[index], **CLOSE) for index in vectors)


def another_weight(merged):
    merged.model.layers[1].self_attn.q_proj.weight.data[0, 0] += 1


def another_bias(merged):
    linear = merged.model.layers[1].self_attn.q_proj
    linear.bias = nn.Parameter(torch.ones(linear.out_features))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_weight, "merged biases alone, got another model.layers.1.self_attn.q_proj.weight"),
        (another_bias, "merged biases alone, got another model.layers.1.self_attn.q_proj.bias"),
        (lambda merged: merged.bfloat16(), "got another model.embed_tokens.weight: load both in the dtype"),
    ],
    ids=["weight", "bias", "dtype"],
)
def test_a_checkpoint_that_differs_in_more_is_refused(change, message):
    base, merged = make_base(), steer(make_base()).merge_and_unload()
    change(merged)

    with pytest.raises(ValueError, match=message):
        from_merged(merged, base)
    assert not hasattr(base, "peft_config")


def test_a_checkpoint_without_such_biases_is_refused():
    base = make_base()
    with pytest.raises(ValueError, match="biases that a merge wrote, got none that differ"):
        from_merged(make_base(), base)
    with pytest.raises(ValueError, match=r"\(layers, width\) = \(3, 32\), got \(2, 32\)"):
        from_merged(make_base(**{**SMALL, "num_hidden_layers": 2}), base)
    with pytest.raises(ValueError, match="Gemma2DecoderLayer has no known place for a bias"):
        from_merged(make_base("gemma2", **{**SMALL, "head_dim": 8}), base)


def test_vectors_make_an_adapter_or_change_nothing():
    base = make_base()
    for vectors, message in [
        ({}, "at least one vector, got none"),
        ({3: torch.ones(32)}, "layers 0 to 2, got one for layer 3"),
        ({0: torch.ones(31)}, r"shape \(32,\) for layer 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            from_vectors(vectors, base)
    assert not [name for name, _ in base.named_modules() if "bias_steer" in name]
    model = from_vectors({1: torch.ones(32)}, base)
    with pytest.raises(ValueError, match="a new adapter name, got 'default'"):
        from_vectors({1: torch.ones(32)}, model)

    from_vectors({0: torch.ones(32), 2: torch.ones(32)}, model, "other")
    assert list(steering_vectors(model, "other")) == [0, 2]
    with pytest.raises(ValueError):
        from_vectors({0: torch.ones(32)}, get_peft_model(make_base(), LoraConfig(target_modules=["q_proj"])), "steer")


@pytest.mark.slow
@pytest.mark.parametrize(("method", "scale"), [("mean", 1.0), ("pca_center", 10.0)])
def test_extracted_vectors_turn_the_mood_of_a_language_model(smollm2, method, scale):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    base = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    pairs = [
        {"positive": f"{start} {topic} and I felt happy", "negative": f"{start} {topic} and I felt sad"}
        for start in ("I thought about", "We talked about")
        for topic in ("the weather", "my day", "our neighbours", "the film")
    ]
    vectors = extract_vectors(base, tokenizer, pairs, method=method, layers_to_transform=range(10, 20))
    model = from_vectors(vectors, base).eval()
    prompt = tokenizer("My opinion of this hotel: it is", return_tensors="pt").input_ids
    good, bad = (tokenizer(f" {word}").input_ids[0] for word in ("excellent", "awful"))

    def lead():
        log_probs = logits(model, prompt)[0, -1].log_softmax(-1)
        return (log_probs[good] - log_probs[bad]).item()

    leads = []
    for factor in (-1.0, 0.0, 1.0):
        model.set_scale("default", factor * scale)
        leads.append(lead())
    assert leads[0] + 1 < leads[1] < leads[2] - 1, leads
