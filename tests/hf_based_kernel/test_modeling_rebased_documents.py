"""Where documents begin and end: every mark that transformers has for it, in one pass and in pieces, for every kind of layer."""

import copy
import json

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, DataCollatorWithFlattening

from hf_based_kernel import RebasedCache, RebasedConfig, RebasedForCausalLM


ROTARY = {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
LAYERS = {
    "convolution": {"layer_types": ["conv"]},
    "linear attention": {"layer_types": ["linear_attention", "linear_attention"]},
    "window": {"layer_types": ["sliding_attention", "sliding_attention"]},
    "full attention": {"layer_types": ["full_attention", "full_attention"]},
    "all": {"layer_types": ["conv", "linear_attention", "sliding_attention", "conv"]},
    "llama": {"layer_types": ["full_attention", "linear_attention", "sliding_attention"], **ROTARY},
    "converted": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "use_feature_map": True,
        "linear_attention_window": 6,
        **ROTARY,
    },
}
every_kind = pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS.keys())
MIXES = ["all", "llama", "converted"]
mixes = pytest.mark.parametrize("layers", [LAYERS[name] for name in MIXES], ids=MIXES)
LENGTHS = (5, 7, 18)
# float64: of early tokens whose denominators are near zero, float32 keeps three digits
TOLERANCE = {"rtol": 1e-8, "atol": 1e-8}


def make_model(layers, **options):
    torch.manual_seed(0)
    options = copy.deepcopy({**layers, **options})
    config = RebasedConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=len(options["layer_types"]),
        num_attention_heads=4,
        feature_dim=8,
        sliding_window=5,
        initializer_range=0.3,
        **options,
    )
    return RebasedForCausalLM(config).double().eval().requires_grad_(False)


def make_tokens(batch_size=1):
    return torch.randint(1, 97, (batch_size, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))


def positions():
    return torch.cat([torch.arange(n) for n in LENGTHS])[None]


def one_by_one(model, tokens):
    """Logits of each document on its own, in a row."""
    return torch.cat([model(part, use_cache=False).logits for part in tokens.split(LENGTHS, dim=1)], dim=1)


@every_kind
@pytest.mark.parametrize("piece", [1, 2, 5, 6, 11, 12, 13, 29])
def test_a_packed_row_in_pieces_equals_its_documents(layers, piece):
    model, tokens = make_model(layers), make_tokens()
    cache = RebasedCache(model.config)

    logits = [
        model(part, position_ids=places, past_key_values=cache).logits
        for part, places in zip(tokens.split(piece, dim=1), positions().split(piece, dim=1))
    ]

    torch.testing.assert_close(torch.cat(logits, dim=1), one_by_one(model, tokens), **TOLERANCE)


@every_kind
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"use_position_embeddings": True, "max_position_embeddings": 64}]
)
def test_generate_goes_on_from_a_packed_row_as_from_its_last_document(layers, options):
    options = dict(options)
    beams = options.pop("num_beams", 1)
    if options and "rope_parameters" in layers:
        pytest.skip("positions are rotations here")
    model, tokens = make_model(layers, **options), make_tokens(batch_size=2)
    always = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "eos_token_id": None, "pad_token_id": 0}
    cache = model(tokens[:, :-1], position_ids=positions()[:, :-1].expand(2, -1), use_cache=True).past_key_values
    if beams > 1:
        cache.batch_repeat_interleave(beams)

    whole = model.generate(tokens, past_key_values=cache, **always)
    last_alone = model.generate(tokens[:, -LENGTHS[-1] :], **always)

    assert torch.equal(whole[:, -8:], last_alone[:, -8:])


@mixes
def test_only_the_rows_that_start_a_document_forget(layers):
    model, tokens = make_model(layers), make_tokens(2)
    cache = RebasedCache(model.config)
    model(tokens[:, :12], past_key_values=cache)
    places = torch.stack([torch.arange(18), torch.arange(12, 30)])

    logits = model(tokens[:, 12:], position_ids=places, past_key_values=cache).logits

    torch.testing.assert_close(logits[:1], model(tokens[:1, 12:]).logits, **TOLERANCE)
    torch.testing.assert_close(logits[1:], model(tokens[1:]).logits[:, 12:], **TOLERANCE)


MARKS = {
    "position_ids": {"position_ids": positions()},
    "one row of position_ids for the batch": {"position_ids": positions()[0][None]},
    "cu_seq_lens_q": {"cu_seq_lens_q": torch.tensor([0, 5, 12, 30], dtype=torch.int32)},
    "cu_seqlens with an empty document": {"cu_seqlens": torch.tensor([0, 5, 5, 12, 30])},
    "seq_idx": {"seq_idx": torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None]},
}


@mixes
@pytest.mark.parametrize("marks", MARKS.values(), ids=MARKS.keys())
def test_every_mark_of_documents_is_followed(marks, layers):
    model, tokens = make_model(layers), make_tokens()

    torch.testing.assert_close(model(tokens, **marks).logits, one_by_one(model, tokens), **TOLERANCE)


@mixes
@pytest.mark.parametrize("return_position_ids", [True, False])
def test_the_collator_for_flash_attention_is_followed(return_position_ids, layers):
    model, tokens = make_model(layers), make_tokens()
    documents = [{"input_ids": part[0].tolist()} for part in tokens.split(LENGTHS, dim=1)]
    collate = DataCollatorWithFlattening(
        return_position_ids=return_position_ids, return_flash_attn_kwargs=True, return_seq_idx=True
    )
    batch = collate(documents)
    batch.pop("labels")

    torch.testing.assert_close(model(**batch).logits, one_by_one(model, tokens), **TOLERANCE)


@mixes
def test_learned_positions_start_again_with_each_document(layers):
    model = make_model(layers, use_position_embeddings=True, max_position_embeddings=18)
    tokens = make_tokens()
    expected = one_by_one(model, tokens)

    for marks in MARKS.values():
        torch.testing.assert_close(model(tokens, **marks).logits, expected, **TOLERANCE)


@every_kind
@pytest.mark.parametrize("whole", [True, False])
def test_a_mask_of_the_new_tokens_or_of_all_is_taken_after_a_cache(layers, whole):
    model, tokens = make_model(layers), make_tokens(2)
    mask = torch.ones_like(tokens)
    mask[0, :4] = mask[1, 15:18] = 0
    expected = model(tokens, attention_mask=mask).logits
    cache = RebasedCache(model.config)
    logits = []
    for start, stop in ((0, 3), (3, 16), (16, 17), (17, 30)):
        part = mask[:, :stop] if whole else mask[:, start:stop]
        logits.append(model(tokens[:, start:stop], attention_mask=part, past_key_values=cache).logits)

    kept = mask.bool()
    torch.testing.assert_close(torch.cat(logits, dim=1)[kept], expected[kept], **TOLERANCE)


def test_a_step_of_padding_leaves_the_state_alone():
    model, tokens = make_model({"layer_types": ["conv", "linear_attention"]}), make_tokens(2)
    cache = RebasedCache(model.config)
    model(tokens[:, :10], past_key_values=cache)
    before = cache.layers[1].recurrent_states[0].clone()
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, 10] = 0

    model(tokens[:, 10:11], attention_mask=mask, past_key_values=cache)

    after = cache.layers[1].recurrent_states[0]
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


@mixes
def test_a_pass_that_fails_leaves_its_cache_as_it_was(layers):
    model, tokens = make_model(layers), make_tokens()
    cache = RebasedCache(model.config)
    model(tokens[:, :12], past_key_values=cache)
    hook = model.model.layers[-1].register_forward_pre_hook(lambda *_: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        model(tokens[:, 12:20], position_ids=torch.arange(8)[None], past_key_values=cache)

    hook.remove()
    assert cache.get_seq_length() == 12
    rest = model(tokens[:, 12:], past_key_values=cache).logits
    torch.testing.assert_close(rest, model(tokens).logits[:, 12:], **TOLERANCE)


@mixes
@pytest.mark.parametrize("cut", [False, True])
def test_a_detached_cache_cuts_the_graph_and_nothing_else(cut, layers):
    model, tokens = make_model(layers), make_tokens()
    embeds = model.model.embed_tokens(tokens).requires_grad_()
    cache = RebasedCache(model.config)
    model(inputs_embeds=embeds[:, :12], past_key_values=cache)
    if cut:
        assert cache.detach() is cache
    logits = model(inputs_embeds=embeds[:, 12:], past_key_values=cache).logits

    (gradient,) = torch.autograd.grad(logits.square().sum(), embeds)

    assert bool(gradient[:, :12].any()) != cut
    assert gradient[:, 12:].all()
    torch.testing.assert_close(logits, model(tokens).logits[:, 12:], **TOLERANCE)


REFUSED = {
    "a mask of neither length": (
        {"attention_mask": torch.ones(1, 11)},
        r"\(1, 30\) or .*\(1, 18\), got \(1, 11\)",
    ),
    "a mask for each kind of layer": ({"attention_mask": {}}, "attention_mask must have the shape .* got dict"),
    "cu_seq_lens after a cache": ({"cu_seq_lens_q": torch.tensor([0, 18])}, "do not say whether the first token"),
    "seq_idx after a cache": ({"seq_idx": torch.zeros(1, 18)}, "mark sequences by position_ids"),
    "position_ids of another length": ({"position_ids": torch.arange(3)[None]}, "position_ids must have the shape"),
}


@mixes
@pytest.mark.parametrize(("options", "sentence"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_followed_after_a_cache_is_refused(options, sentence, layers):
    model, tokens = make_model(layers), make_tokens()
    cache = RebasedCache(model.config)
    model(tokens[:, :12], past_key_values=cache)

    with pytest.raises(ValueError, match=sentence):
        model(tokens[:, 12:], past_key_values=cache, **options)


@pytest.mark.parametrize(
    ("marks", "sentence"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 5, 29])}, "must rise from 0 to the number of tokens, 30"),
        ({"cu_seq_lens_q": torch.tensor([0, 30]), "cu_seq_lens_k": torch.tensor([0, 5, 30])}, "must be equal"),
        ({"seq_idx": torch.zeros(1, 3)}, "seq_idx must have the shape"),
    ],
)
def test_marks_that_do_not_fit_are_refused(marks, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_model(LAYERS["all"])(make_tokens(), **marks)


@mixes
def test_a_cache_of_another_batch_size_is_refused(layers):
    model, tokens = make_model(layers), make_tokens()
    cache = RebasedCache(model.config)
    model(tokens, past_key_values=cache)

    with pytest.raises(ValueError, match="holds 1 sequences, the inputs 2"):
        model(make_tokens(2), past_key_values=cache)


@mixes
def test_checkpointing_with_a_cache_is_refused(layers):
    model = make_model(layers).train()
    model.gradient_checkpointing_enable()

    with pytest.raises(ValueError, match="gradient checkpointing runs layers twice"):
        model(make_tokens(), past_key_values=RebasedCache(model.config), use_cache=True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sliding_window": 1}, "sliding_window must be at least 2, got 1"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        ({"attention_eps": float("nan")}, "attention_eps must be a finite number"),
        ({"norm_eps": float("inf")}, "norm_eps must be a finite number"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(options, sentence):
    with pytest.raises(Exception, match=sentence):
        RebasedConfig(**options)


def test_a_causal_checkpoint_names_every_class_that_can_start_from_it(tmp_path):
    model = make_model(LAYERS["all"])
    model.save_pretrained(tmp_path)
    names = json.loads((tmp_path / "config.json").read_text())["auto_map"]

    assert names == {
        "AutoConfig": "configuration_rebased.RebasedConfig",
        "AutoModel": "modeling_rebased.RebasedModel",
        "AutoModelForCausalLM": "modeling_rebased.RebasedForCausalLM",
        "AutoModelForQuestionAnswering": "modeling_rebased.RebasedForQuestionAnswering",
        "AutoModelForSequenceClassification": "modeling_rebased.RebasedForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_rebased.RebasedForTokenClassification",
    }


ISOLATED = """
import transformers

for head in ("", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"):
    auto_class = getattr(transformers, f"AutoModel{{head}}")
    print(type(auto_class.from_pretrained({path!r}, trust_remote_code=True)).__name__)
"""


@pytest.mark.slow
def test_a_causal_checkpoint_starts_a_classifier_without_our_package(tmp_path, run_isolated):
    make_model(LAYERS["all"]).save_pretrained(tmp_path / "causal")

    names = run_isolated(ISOLATED.format(path=str(tmp_path / "causal"))).split()

    heads = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
    assert names == ["RebasedModel", *(f"RebasedFor{head}" for head in heads)]
    assert isinstance(AutoModel.from_pretrained(tmp_path / "causal"), torch.nn.Module)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "causal").score.weight.isfinite().all()
