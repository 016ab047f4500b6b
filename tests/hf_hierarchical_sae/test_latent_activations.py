"""Every activation over a text, sorted by latent: against a loop over texts and tokens."""

import numpy
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from hf_hierarchical_sae import HierarchicalSaeConfig, HierarchicalSaeModel, read_latents
from hf_hierarchical_sae.latent_activations import _entries


TEXTS = ["To be, or not to be, that is the question.", "Whether 'tis nobler in the mind", "to suffer"]


@pytest.fixture(scope="module")
def tokenizer(tiny_language_model):
    return AutoTokenizer.from_pretrained(tiny_language_model)


@pytest.fixture(scope="module")
def model(tiny_language_model):
    return AutoModelForCausalLM.from_pretrained(tiny_language_model)


def make_sae(**options):
    return HierarchicalSaeModel(
        HierarchicalSaeConfig(**{"d_in": 32, "d_sae": 64, "k": 5, "layer": 1, **options})
    ).eval()


def read(sae, model, tokenizer, texts=TEXTS, **options):
    return read_latents(sae, model, tokenizer, texts, show_progress=False, **options)


@torch.no_grad()
def test_every_activation_is_what_a_loop_over_texts_gives(model, tokenizer):
    sae, expected, captured = make_sae(), set(), []
    handle = model.model.layers[1].register_forward_hook(lambda module, args, output: captured.append(output))
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        model(ids)
        for place in range(1, ids.shape[1]):
            indices, values = sae.encode(captured[-1][0, place])
            for rank, (latent, value) in enumerate(zip(indices.tolist(), values.tolist()), start=1):
                if value > 0:
                    expected.add((latent, text, place, rank, round(value, 4)))
    handle.remove()

    found = read(sae, model, tokenizer)

    texts = [
        tokenizer.decode(found.token_ids[start:end])
        for start, end in zip(found.context_starts, found.context_starts[1:])
    ]
    assert sorted(texts) == sorted(TEXTS)
    seen = set()
    for latent in range(64):
        positions, values, ranks = found.latent(latent)
        assert positions.tolist() == sorted(positions.tolist())
        for position, value, rank in zip(positions.tolist(), values.tolist(), ranks.tolist()):
            context = int(found.position_contexts[position])
            place = position - int(found.context_starts[context])
            seen.add((latent, texts[context], place, rank, round(value, 4)))
    assert seen == expected
    assert found.tokens == sum(len(tokenizer(text)["input_ids"]) - 1 for text in TEXTS)
    assert set(found.live_latents.tolist()) == {latent for latent, *_ in expected}


def test_summed_rank_counts_are_the_use_at_each_budget(model, tokenizer):
    sae = make_sae()
    found = read(sae, model, tokenizer)

    for k in (1, 3, 5):
        at_k = torch.zeros(64, dtype=torch.int64)
        for latent in range(64):
            at_k[latent] = (found.latent(latent)[2] <= k).sum()
        assert torch.equal(found.rank_counts()[:, :k].sum(dim=1), at_k)
    assert found.rank_counts()[:, :1].sum() == found.tokens


def test_labels_are_those_of_the_mapping(model, tokenizer):
    found = read(make_sae(), model, tokenizer, {"first": TEXTS[:1] * 2, "second": TEXTS[1:]}, max_tokens=1)

    assert found.label_names == ["first", "second"]
    contexts = [
        tokenizer.decode(found.token_ids[start:end])
        for start, end in zip(found.context_starts, found.context_starts[1:])
    ]
    names = [found.label_names[label] for label in found.context_labels]
    assert names[:2] == ["first", "first"]
    assert all((name == "first") == (text == TEXTS[0]) for text, name in zip(contexts, names))


def test_max_tokens_is_exact_for_each_label(model, tokenizer):
    labelled = {"first": TEXTS * 3, "second": TEXTS[:2]}

    found = read(make_sae(), model, tokenizer, labelled, max_tokens=31, batch_tokens=64)

    labels = found.context_labels[found.position_contexts]
    assert [int(found.is_read[labels == label].sum()) for label in (0, 1)] == [31, 31]
    assert found.is_read[found.positions.long()].all()


def test_a_batch_topk_autoencoder_has_as_many_ranks_as_any_token_uses(model, tokenizer):
    sae = make_sae(selection="batch_topk", budgets=[5])
    sae.threshold.fill_(0.005)

    found = read(sae, model, tokenizer)

    assert found.k == int(found.ranks.max()) > 5
    assert (found.values > 0.005).all()


def test_it_leaves_the_mode_and_the_counters_alone(model, tokenizer):
    sae = make_sae().train()

    read(sae, model, tokenizer)

    assert sae.training and (sae.tokens_since_fired == 0).all()


def test_a_language_model_without_a_head_is_enough(tiny_language_model, model, tokenizer):
    sae = make_sae()
    with_head, without = (
        read(sae, model, tokenizer),
        read(sae, AutoModel.from_pretrained(tiny_language_model), tokenizer),
    )

    assert torch.equal(with_head.values, without.values)


@pytest.mark.parametrize(
    "options, given, message",
    [
        ({"d_in": 16}, {}, "takes activations of size 16 .* hidden_size 32: give the model that it was trained on"),
        ({"layer": None}, {}, "names no layer: say which decoder layer it was trained on"),
        ({}, {"layer": 0}, r"was trained on layer 1, the stream gives layer 0"),
        ({"layer": 7}, {}, r"layer must be in \[0, 1\], got 7"),
        ({}, {"texts": []}, "the texts gave no tokens"),
        ({}, {"texts": ["a"]}, "the texts gave no tokens"),
        ({}, {"texts": [{"body": "a b"}]}, "text_column must name a column"),
    ],
)
def test_what_does_not_fit_is_refused(options, given, message, model, tokenizer):
    with pytest.raises(ValueError, match=message):
        read(make_sae(**options), model, tokenizer, **given)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(model, tokenizer):
    class Other(type(tokenizer)):
        def __call__(self, *given, **options):
            found = super().__call__(*given, **options)
            found["input_ids"] = [token + 200 for token in found["input_ids"]]
            return found

    other = Other(tokenizer_object=tokenizer._tokenizer)

    with pytest.raises(ValueError, match="has a vocabulary of 259: give the tokenizer that belongs to it"):
        read(make_sae(), model, other)


def test_latents_that_never_fire_are_reported(model, tokenizer):
    sae = make_sae()
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)

    with pytest.raises(ValueError, match="no latent fires on the .* tokens: expected a trained autoencoder"):
        read(sae, model, tokenizer)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"texts": "to be or not"}, "got a single str: put a text in a list"),
        ({"texts": {"text": "to be or not"}}, "got a single str: put a text in a list"),
        ({"texts": {"a": TEXTS, "b": {"train": TEXTS}}}, "got a dict of .*: choose one of its splits"),
        ({"texts": [TEXTS[0], 7]}, "row 1 of the dataset must be a text"),
        ({"layer": True}, "layer must be an integer, got True"),
        ({"layer": 1.0}, "layer must be an integer, got 1.0"),
        ({"max_tokens": 9.5}, "max_tokens must be an integer, got 9.5"),
        ({"context_length": 512}, "has 256 positions: context_length must be at most 256, got 512"),
    ],
)
def test_what_is_no_text_or_no_number_is_refused(model, tokenizer, given, message):
    with pytest.raises(ValueError, match=message):
        read(make_sae(), model, tokenizer, **given)


@pytest.mark.parametrize(
    "index, message", [(64, "got 64"), (-1, "got -1"), (True, "integer, got True"), (1.5, "got 1.5")]
)
def test_a_latent_that_there_is_not_is_refused(model, tokenizer, index, message):
    with pytest.raises(ValueError, match=f"latent must be .*{message}"):
        read(make_sae(), model, tokenizer).latent(index)


def test_budgets_are_whole_numbers_of_any_kind(model, tokenizer):
    found = read(make_sae(), model, tokenizer)

    assert found.check_budgets(torch.tensor([5, 1])) == found.check_budgets([numpy.int64(1), 5]) == [1, 5]
    for budgets in ([True], [2.5], torch.tensor([1.0])):
        with pytest.raises(ValueError, match="budgets must be integers, got"):
            found.check_budgets(budgets)


def test_ranks_beyond_sixteen_bits_are_numbers(model, tokenizer):
    indices = torch.arange(40_000).unsqueeze(0)

    ranks = _entries(indices, torch.ones(indices.shape), torch.zeros(1, dtype=torch.int64))[3]

    assert ranks.tolist() == list(range(1, 40_001))


def test_tokens_that_are_left_out_stand_in_their_contexts_and_no_latent_fires_on_them(model, tokenizer):
    chats = [{"chat": [{"role": "user", "content": text}]} for text in TEXTS]
    settings = {"text_column": "chat", "skip_special_tokens": True, "skip_tokens": [" "]}

    whole = read(make_sae(), model, tokenizer, chats, text_column="chat")
    found = read(make_sae(), model, tokenizer, chats, **settings)

    left_out = torch.isin(found.token_ids, torch.tensor([0, 1, 2, *tokenizer(" ")["input_ids"]]))
    assert torch.equal(found.token_ids, whole.token_ids) and left_out.any()
    assert torch.equal(found.is_read, whole.is_read & ~left_out)
    assert not left_out[found.positions.long()].any()
