"""Activations: a stream of passes and batches that is exact and resumable."""

import logging
import math
from itertools import islice

import datasets
import numpy
import pandas
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from hf_hierarchical_sae import iterate_activations, save_shards, texts


TEXTS = ["To be, or not to be, that is the question.", "Whether", "tis nobler in the mind to suffer " * 3]


@pytest.fixture(scope="module")
def model(tiny_language_model):
    return AutoModelForCausalLM.from_pretrained(tiny_language_model).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_language_model):
    return AutoTokenizer.from_pretrained(tiny_language_model)


@pytest.fixture
def warnings(caplog):
    """What transformers' loggers said."""
    transformers.logging.enable_propagation()
    yield caplog
    transformers.logging.disable_propagation()


def stream(model, tokenizer, texts=TEXTS, layer=0, **options):
    options = {"max_norm_ratio": None, "show_progress": False, **options}
    return torch.cat(list(iterate_activations(model, tokenizer, texts, layer, **options)))


def hidden_states(model, tokenizer, layer, texts=TEXTS, skip=1):
    """Each text alone, from the model's own record: hidden_states[0] is the embedding."""
    found = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found.append(model(ids, output_hidden_states=True).hidden_states[layer + 1][0, skip:])
    return torch.cat(found)


def test_it_yields_the_layer_output_without_padding_and_first_positions(model, tokenizer):
    torch.testing.assert_close(stream(model, tokenizer), hidden_states(model, tokenizer, 0))


def test_first_positions_are_kept_on_request(model, tokenizer):
    states = stream(model, tokenizer, skip_first_position=False)

    torch.testing.assert_close(states, hidden_states(model, tokenizer, 0, skip=0))


SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 300}
LLAMA_LIKE = {**SIZES, "intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8}
ARCHITECTURES = {
    "gpt2": (AutoModelForCausalLM, {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 300}),
    "gpt_neox": (AutoModelForCausalLM, {**SIZES, "intermediate_size": 32}),
    "opt": (AutoModelForCausalLM, {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 16}),
    "bloom": (AutoModelForCausalLM, {"hidden_size": 16, "n_layer": 3, "n_head": 2, "vocab_size": 300}),
    "mpt": (AutoModelForCausalLM, {"d_model": 16, "n_layers": 3, "n_heads": 2, "vocab_size": 300}),
    "gemma2": (AutoModelForCausalLM, LLAMA_LIKE),
    "mixtral": (AutoModelForCausalLM, {**LLAMA_LIKE, "num_local_experts": 3}),
    "llama": (AutoModel, LLAMA_LIKE),
    "bert": (AutoModel, {**SIZES, "intermediate_size": 32}),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_architectures_give_their_layer_output(architecture, tokenizer):
    build, sizes = ARCHITECTURES[architecture]
    config = AutoConfig.for_model(architecture, **sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = build.from_config(config).eval()

    # A batch of padded contexts against one at a time: the order of float32 sums differs.
    torch.testing.assert_close(
        stream(model, tokenizer, layer=1), hidden_states(model, tokenizer, 1), atol=1e-4, rtol=1e-4
    )


def test_the_forward_pass_stops_at_the_layer(model, tokenizer):
    reached, hooks = [], len(model.model.layers[0]._forward_hooks)
    handle = model.model.layers[1].register_forward_hook(lambda *given: reached.append(1))

    stream(model, tokenizer, layer=0)
    handle.remove()

    assert not reached
    assert len(model.model.layers[0]._forward_hooks) == hooks


def test_tokens_of_outlying_norm_are_left_out(model, tokenizer):
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        question = tokenizer("q")["input_ids"][-1]
        saved = embedding[question].clone()
        embedding[question] *= 1000
    try:
        everything = stream(model, tokenizer)
        usual = stream(model, tokenizer, max_norm_ratio=5.0)
    finally:
        with torch.no_grad():
            embedding[question] = saved

    assert len(everything) - len(usual) == "".join(TEXTS).count("q") == 1
    assert torch.linalg.vector_norm(usual, dim=1).max() < torch.linalg.vector_norm(everything, dim=1).max() / 5


def test_long_texts_are_cut_and_max_tokens_is_exact(model, tokenizer):
    states = stream(model, tokenizer, context_length=10, max_tokens=50)

    pieces = torch.tensor(tokenizer(TEXTS[0])["input_ids"][:10]).unsqueeze(0)
    with torch.no_grad():
        first = model(pieces, output_hidden_states=True).hidden_states[1][0, 1:]
    assert states.shape == (50, 32)
    torch.testing.assert_close(states[:9], first)


def test_contexts_of_like_length_share_a_forward_pass_and_none_is_lost(model, tokenizer):
    texts = [str(number) * (1 + number * 7 % 50) for number in range(40)]
    stream = iterate_activations(model, tokenizer, texts, 0, batch_tokens=128, show_progress=False)

    batches = [(inputs.ids, inputs.mask) for inputs in stream.inputs()]

    found = sorted(tuple(row[: int(keep.sum())].tolist()) for ids, mask in batches for row, keep in zip(ids, mask))
    assert found == sorted(tuple(tokenizer(text)["input_ids"]) for text in texts)
    assert all(ids.numel() <= 128 for ids, _ in batches)
    assert all(mask.sum(dim=1).min() > mask.shape[1] - 32 for _, mask in batches)


def test_each_context_starts_with_the_token_that_the_tokenizer_puts_in_front(model, tokenizer):
    class WithBos:
        bos_token_id, pad_token_id = 1, 0

        def __call__(self, text, **options):
            return {"input_ids": [1, *tokenizer(text)["input_ids"]]}

    stream = iterate_activations(model, WithBos(), TEXTS, 0, context_length=10, show_progress=False)
    ids, mask, _ = next(stream.inputs())

    assert (ids[:, 0] == 1).all() and (ids[:, 1:] != 1).all()
    given = torch.cat([row[1:][keep[1:].bool()] for row, keep in zip(ids, mask)]).tolist()
    assert given == [token for text in TEXTS for token in tokenizer(text)["input_ids"]]


def test_batches_hold_the_number_of_tokens_asked_for(model, tokenizer):
    batches = list(iterate_activations(model, tokenizer, TEXTS, 0, batch_tokens=32, show_progress=False))

    assert {len(batch) for batch in batches[:-1]} == {32}
    assert 0 < len(batches[-1]) <= 32


def test_several_layers_come_from_one_pass_with_the_same_tokens(model, tokenizer):
    passes = []
    handle = model.model.embed_tokens.register_forward_hook(lambda *given: passes.append(1))
    both = stream(model, tokenizer, layer=[1, 0])
    handle.remove()

    assert len(passes) == 3
    assert torch.equal(both[:, 0], stream(model, tokenizer, layer=1))
    assert torch.equal(both[:, 1], stream(model, tokenizer, layer=-2))


def test_what_is_left_out_is_counted_and_logged(model, tokenizer, caplog):
    transformers.logging.set_verbosity_info()
    transformers.logging.enable_propagation()
    given = iterate_activations(model, tokenizer, TEXTS, 0, max_norm_ratio=1.2, show_progress=False)
    try:
        with caplog.at_level(logging.INFO):
            tokens = sum(len(batch) for batch in given)
    finally:
        transformers.logging.set_verbosity_warning()
        transformers.logging.disable_propagation()

    assert given.counts["first_position"] == len(TEXTS)
    assert given.counts["outlying_norm"] > 0
    positions = sum(inputs.ids.numel() for inputs in given.inputs())
    assert given.counts["tokens"] == tokens and given.counts.total() == positions
    assert f"left out: 3 at the first position, {given.counts['outlying_norm']} of outlying norm" in caplog.text


def test_shuffling_gives_the_same_tokens_in_an_order_that_the_seed_decides(model, tokenizer):
    options = {"batch_tokens": 16, "shuffle_tokens": 64}
    plain, first, again, other = (
        stream(model, tokenizer, **given) for given in ({"batch_tokens": 16}, options, options, {**options, "seed": 1})
    )

    assert torch.equal(first, again)
    assert not torch.equal(first, plain) and not torch.equal(first, other)
    order = [rows.sum(dim=1).argsort() for rows in (first, plain)]
    assert torch.equal(first[order[0]], plain[order[1]])


def test_passes_give_the_tokens_of_the_stream_and_exactly_max_tokens(model, tokenizer):
    options = {"batch_tokens": 64, "max_tokens": 77, "max_norm_ratio": 1.3}
    given = iterate_activations(model, tokenizer, TEXTS * 3, 0, show_progress=False, **options)

    passes = list(given.passes())

    assert sum(int(read.kept.sum()) for read in passes) == given.counts["tokens"] == 77
    kept = torch.cat([read.states[0][read.kept] for read in passes])
    assert torch.equal(kept, stream(model, tokenizer, TEXTS * 3, **options))
    assert not any(read.kept[:, 0].any() or (read.kept & ~read.mask.bool()).any() for read in passes)
    assert all(read.kept.any() for read in passes)


@pytest.mark.parametrize("shuffle_tokens", [0, 64])
@pytest.mark.parametrize("consumed", [0, 1, 5])
def test_a_stream_continues_exactly_where_its_state_was_taken(model, tokenizer, shuffle_tokens, consumed):
    texts = [f"{number} is a number, and so is {number + 1}." for number in range(20)]

    def start():
        return iterate_activations(
            model,
            tokenizer,
            texts,
            0,
            batch_tokens=16,
            context_length=12,
            shuffle_tokens=shuffle_tokens,
            max_tokens=333,
            show_progress=False,
        )

    whole, interrupted, resumed = start(), start(), start()
    expected = list(whole)
    list(islice(interrupted, consumed))
    resumed.load_state_dict(interrupted.state_dict())

    assert torch.equal(torch.cat(list(resumed)), torch.cat(expected[consumed:]))
    assert resumed.counts == whole.counts and whole.counts["tokens"] == 333


def test_dropout_is_off_while_reading_and_as_before_afterwards(tokenizer):
    config = AutoConfig.for_model("gpt2", **ARCHITECTURES["gpt2"][1], bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config).train()

    assert torch.equal(stream(model, tokenizer), stream(model, tokenizer))
    assert model.training and model.transformer.drop.training


def test_streaming_datasets_are_read(model, tokenizer):
    datasets = pytest.importorskip("datasets")
    streaming = datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()

    assert torch.equal(stream(model, tokenizer, streaming), stream(model, tokenizer))


def test_rows_with_a_text_column_are_read(model, tokenizer):
    rows = [{"body": text} for text in TEXTS]

    assert torch.equal(stream(model, tokenizer, rows, text_column="body"), stream(model, tokenizer))


def test_nan_and_infinite_activations_are_counted_and_refused(tiny_language_model, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_language_model)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("q")["input_ids"][-1]] = torch.nan
    message = r"expected finite activations, got \d+ NaN and 0 infinite of \d+ entries in \d+ tokens"

    with pytest.raises(ValueError, match=message):
        stream(model, tokenizer)
    with pytest.raises(ValueError, match=message):
        save_shards(iterate_activations(model, tokenizer, TEXTS, 0, show_progress=False), tmp_path)
    assert not list(tmp_path.glob("shard-*"))


def test_a_column_that_does_not_exist_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match=r"text_column must name a column of the dataset \['body'\], got 'text'"):
        stream(model, tokenizer, [{"body": "to be"}])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"context_length": 1}, "context_length must be at least 2, got 1"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1, got 0"),
        ({"max_tokens": 0}, "max_tokens must be positive or None, got 0 and 0"),
        ({"layer": []}, r"layer must be in \[0, 1\], got \[\]"),
    ],
)
def test_sizes_out_of_range_are_refused_at_once(model, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        iterate_activations(model, tokenizer, TEXTS, **{"layer": 0, **options})


def test_a_layer_that_does_not_exist_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match=r"layer must be in \[0, 1\], got 2"):
        stream(model, tokenizer, layer=2)


def test_a_dataset_without_text_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="gave no tokens"):
        stream(model, tokenizer, [])


@pytest.mark.parametrize(
    "dataset, message",
    [
        (
            datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})}),
            "DatasetDict of .'train'.: choose",
        ),
        (datasets.IterableDatasetDict({"train": None, "validation": None}), "IterableDatasetDict of .* choose one"),
        ({"train": TEXTS, "validation": TEXTS}, "got a dict of .*: choose one of its splits"),
        ({"text": "to be"}, "got a dict of .'text'.: choose"),
        (pandas.DataFrame({"text": TEXTS}), "got a DataFrame of .'text'.: choose one of its splits, .* or columns"),
        ("to be or not to be", "got a single str: put a text in a list"),
        (b"to be or not to be", "got a single bytes: put a text in a list"),
        (None, "got a single NoneType"),
        (7, "got a single int"),
        (torch.tensor(7), "got a single Tensor"),
    ],
)
def test_what_is_no_list_of_texts_is_refused_at_once(model, tokenizer, dataset, message):
    with pytest.raises(ValueError, match=message):
        iterate_activations(model, tokenizer, dataset, 0)


def test_rows_without_a_text_are_left_out_and_counted(model, tokenizer, warnings):
    empty = [None, {"text": None}, {"text": ""}, ""]
    texts = [TEXTS[0], *empty, {"text": TEXTS[1]}, *empty, TEXTS[2]]
    given = iterate_activations(model, tokenizer, texts, 0, max_norm_ratio=None, batch_tokens=16, show_progress=False)

    first = next(given)
    resumed = iterate_activations(
        model, tokenizer, texts, 0, max_norm_ratio=None, batch_tokens=16, show_progress=False
    )
    resumed.load_state_dict(given.state_dict())

    assert torch.equal(torch.cat([first, *given]), stream(model, tokenizer, batch_tokens=16))
    assert torch.equal(torch.cat([first, *resumed]), stream(model, tokenizer, batch_tokens=16))
    assert given.counts == resumed.counts and given.counts["rows_without_text"] == 8
    assert "row 1 of the dataset has no text: it is left out" in warnings.text
    assert "8 rows without a text" in warnings.text


@pytest.mark.parametrize(
    "row, message",
    [
        (7, "row 1 of the dataset must be a text, or hold one in 'text', got a int"),
        (b"to be", "row 1 of the dataset must be a text, .* got a bytes"),
        (["to be"], "row 1 of the dataset must be a text, .* got a list"),
        ({"text": 7}, "row 1 of the dataset must hold a text in 'text', got 7"),
        ({"text": ["to", "be"]}, r"row 1 of the dataset must hold a text in 'text', got \['to', 'be'\]"),
        ({"text": b"to be"}, "row 1 of the dataset must hold a text in 'text', got b'to be'"),
        ({"body": "to be"}, r"text_column must name a column of the dataset \['body'\], got 'text' \(row 1\)"),
    ],
)
def test_a_row_that_holds_something_else_is_named(model, tokenizer, row, message):
    with pytest.raises(ValueError, match=message):
        stream(model, tokenizer, [TEXTS[0], row])


def test_few_tokens_that_are_not_finite_are_left_out_and_counted(tiny_language_model, tokenizer, warnings):
    model = AutoModelForCausalLM.from_pretrained(tiny_language_model).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("~")["input_ids"][-1]] = torch.inf
    clean = ["to be or not to be " * 5] * 30
    given = iterate_activations(model, tokenizer, [*clean, "t~", "b"], 0, max_norm_ratio=None, show_progress=False)

    states = torch.cat(list(given))

    assert given.counts["not_finite"] == 1 and states.isfinite().all()
    torch.testing.assert_close(states, stream(model, tokenizer, [*clean, "t", "b"]))
    assert "1 tokens in rows [30] have NaN or infinite activations: they are left out" in warnings.text


def test_many_tokens_that_are_not_finite_are_refused_with_their_rows(tiny_language_model, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_language_model).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("~")["input_ids"][-1]] = torch.nan

    with pytest.raises(ValueError, match=r"expected finite activations, .* they are in rows \[1, 3\] of the dataset"):
        stream(model, tokenizer, ["to be", "to~be", "or not", "~"], skip_first_position=False)


def test_a_long_text_is_tokenised_in_pieces_cut_before_white_space(model, tokenizer, monkeypatch):
    monkeypatch.setattr(texts, "LONGEST_TEXT", 20)
    text = "to be or not to be, that is the question:\nWhether'tisnoblerinthemindtosuffer the slings"

    pieces = list(texts._pieces(text))

    assert "".join(pieces) == text and max(map(len, pieces)) <= 20
    assert pieces[:3] == ["to be or not to be,", " that is the", " question:"]
    torch.testing.assert_close(stream(model, tokenizer, [text]), stream(model, tokenizer, pieces))


def test_contexts_longer_than_the_positions_are_refused_at_once(tokenizer):
    config = AutoConfig.for_model("gpt2", n_embd=16, n_layer=2, n_head=2, n_positions=16, vocab_size=300)
    gpt2 = AutoModelForCausalLM.from_config(config).eval()

    with pytest.raises(ValueError, match="has 16 positions: context_length must be at most 16, got 256"):
        iterate_activations(gpt2, tokenizer, TEXTS, 0)
    assert stream(gpt2, tokenizer, context_length=16).isfinite().all()


def test_a_padding_token_that_the_model_does_not_know_does_no_harm(model, tiny_language_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_language_model)
    expected = stream(model, tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})

    assert tokenizer.pad_token_id == model.config.vocab_size
    torch.testing.assert_close(stream(model, tokenizer), expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"context_length": True}, "context_length must be an integer, got True"),
        ({"batch_tokens": 1.5}, "batch_tokens must be an integer, got 1.5"),
        ({"max_tokens": 7.0}, "max_tokens must be an integer, got 7.0"),
        ({"shuffle_tokens": "9"}, "shuffle_tokens must be an integer, got '9'"),
        ({"text_column": ["text"]}, r"text_column must be the name of a column, got \['text'\]"),
        ({"max_norm_ratio": "5"}, "max_norm_ratio must be a positive number, got '5'"),
        ({"seed": 0.5}, "seed must be an integer, got 0.5"),
        ({"layer": True}, "layer must be an integer, got True"),
        ({"max_norm_ratio": -1.0}, "max_norm_ratio must be a positive number, got -1.0"),
        ({"max_norm_ratio": math.nan}, "max_norm_ratio must be a positive number, got nan"),
        ({"max_norm_ratio": True}, "max_norm_ratio must be a positive number, got True"),
    ],
)
def test_what_is_no_number_of_its_kind_is_refused(model, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        stream(model, tokenizer, **options)


def test_numbers_of_numpy_are_numbers(model, tokenizer):
    options = {name: numpy.int64(number) for name, number in {"context_length": 32, "max_tokens": 20}.items()}
    given = iterate_activations(model, tokenizer, TEXTS, numpy.int64(1), show_progress=False, **options)

    assert next(given).shape == (20, 32)
    assert type(given.settings.max_tokens) is int and type(given.layers[0]) is int


def test_several_sites_of_several_layers_come_from_one_pass_with_the_same_tokens(model, tokenizer):
    sites = ["input", "middle", "attention.output", "mlp.output", "output"]
    passes, reader = [], iterate_activations(model, tokenizer, TEXTS, [1, 0], hook_point=sites, show_progress=False)
    handle = model.model.embed_tokens.register_forward_hook(lambda *given: passes.append(1))
    found = torch.cat(list(reader))
    handle.remove()

    assert len(passes) == len(list(reader.passes())) and found.shape[1:] == (10, 32)
    second, first = found.split(5, dim=1)
    for before, middle, attention, mlp, after in (first.unbind(1), second.unbind(1)):
        torch.testing.assert_close(before + attention, middle)
        torch.testing.assert_close(middle + mlp, after)
    assert torch.equal(second[:, 0], first[:, 4])
    alone = iterate_activations(model, tokenizer, TEXTS, 1, hook_point="mlp.output", show_progress=False)
    torch.testing.assert_close(torch.cat(list(alone)), second[:, 3])


def test_a_module_by_its_path_gives_its_own_width(model, tokenizer):
    path = "model.layers.0.mlp.up_proj"
    by_path = stream(model, tokenizer, layer=None, hook_point=path)

    assert by_path.shape[1] == model.config.intermediate_size != model.config.hidden_size
    assert torch.equal(by_path, stream(model, tokenizer, layer=0, hook_point="mlp.up_proj"))


@pytest.mark.parametrize(
    "layer, hook_point, message",
    [
        (0, [], "hook_point must name one site or several, got none"),
        ([0, 1], "mlp_out", "hook_point must be one of input, middle, output, .*, got 'mlp_out'"),
        (None, "mlp.output", "hook_point='mlp.output' is a site of a layer: say which layer"),
        (0, 5, "hook_point must be .* or a module's path, got 5"),
    ],
)
def test_sites_that_do_not_exist_or_fit_are_refused_at_once(model, tokenizer, layer, hook_point, message):
    with pytest.raises(ValueError, match=message):
        iterate_activations(model, tokenizer, TEXTS, layer, hook_point=hook_point)


def test_sites_of_several_widths_are_no_batch(model, tokenizer):
    widths = r"one site or several of one width, got \{'layer 0': 32, 'mlp.up_proj of layer 0': \d+\}"
    with pytest.raises(ValueError, match=widths):
        stream(model, tokenizer, layer=0, hook_point=["output", "mlp.up_proj"])


def test_a_transcoders_stream_gives_pairs_of_any_widths(model, tokenizer):
    sites = {"hook_point": "mlp.input", "target_hook_point": "mlp.up_proj"}
    settings = {"show_progress": False, "batch_tokens": 16, "max_norm_ratio": None}

    pairs = list(iterate_activations(model, tokenizer, TEXTS, 1, **sites, **settings))

    x, targets = (torch.cat(parts) for parts in zip(*pairs))
    assert len(pairs) > 1 and len(pairs[0][0]) == len(pairs[0][1]) == 16
    with torch.no_grad():
        torch.testing.assert_close(model.model.layers[1].mlp.up_proj(x), targets)
    assert torch.equal(x, stream(model, tokenizer, layer=1, hook_point="mlp.input", **settings))


def test_a_shuffled_stream_of_pairs_keeps_them_together_and_goes_on_exactly(model, tokenizer):
    sites = {"hook_point": "mlp.input", "target_hook_point": "mlp.up_proj"}
    settings = {"show_progress": False, "batch_tokens": 16, "shuffle_tokens": 64, "max_norm_ratio": None}
    whole = list(iterate_activations(model, tokenizer, TEXTS * 4, 1, **sites, **settings))
    begun = iterate_activations(model, tokenizer, TEXTS * 4, 1, **sites, **settings)
    next(begun)
    rest = iterate_activations(model, tokenizer, TEXTS * 4, 1, **sites, **settings)

    rest.load_state_dict(begun.state_dict())

    for pair, expected in zip(rest, whole[1:], strict=True):
        assert all(torch.equal(part, other) for part, other in zip(pair, expected))
        with torch.no_grad():
            torch.testing.assert_close(model.model.layers[1].mlp.up_proj(pair[0]), pair[1])


def test_a_target_of_several_sites_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match=r"target_hook_point goes with one layer and one hook_point, got \[0, 1\]"):
        iterate_activations(model, tokenizer, TEXTS, [0, 1], target_hook_point="mlp.output")


def test_a_process_without_a_row_of_its_own_is_told_so(model, tokenizer):
    given = iterate_activations(model, tokenizer, TEXTS[:1], 0, show_progress=False)
    given.take_part(1, 2)

    with pytest.raises(ValueError, match="gave no tokens to process 1 of 2, of which each reads its own rows"):
        next(given)
