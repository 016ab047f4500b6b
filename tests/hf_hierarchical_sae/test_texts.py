"""Text as people have it: chats, token ids, files of every kind, and what is left out of them."""

import gzip
import json
import tracemalloc

import datasets
import numpy
import pytest
import torch
from tokenizers import processors
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

from hf_hierarchical_sae import ActivationDataset, iterate_activations, save_shards, texts
from hf_hierarchical_sae.texts import (
    LONGEST_TEXT,
    PASSAGE,
    Passages,
    content_of,
    read_dataset,
    read_files,
    skipped_ids,
    token_contexts,
)


CHAT = [{"role": "user", "content": "To be?"}, {"role": "assistant", "content": "Or not to be."}]
ROWS = [{"text": "To be, or not to be"}, {"text": "that is the question"}]


@pytest.fixture(scope="module")
def model(tiny_language_model):
    return AutoModelForCausalLM.from_pretrained(tiny_language_model).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_language_model):
    return AutoTokenizer.from_pretrained(tiny_language_model)


def ids_of(tokenizer, rows, column="text", context_length=256):
    contents = ((number, content_of(row, column, number)) for number, row in enumerate(rows))
    return list(token_contexts(tokenizer, contents, context_length))


def reader(model, tokenizer, rows, **settings):
    return iterate_activations(
        model, tokenizer, rows, 0, **{"max_norm_ratio": None, "show_progress": False, **settings}
    )


def test_messages_go_through_the_chat_template(tokenizer):
    expected = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]

    for row in ({"messages": CHAT}, {"messages": CHAT, "id": 3}, {"prompt": CHAT[:1], "completion": CHAT[1:]}):
        assert ids_of(tokenizer, [row]) == [(0, expected)]
    assert ids_of(tokenizer, [{"conversation": CHAT}], "conversation") == [(0, expected)]
    assert ids_of(tokenizer, [{"text": "a", "messages": CHAT}]) == ids_of(tokenizer, ["a"])


def test_chats_of_numpy_and_of_parts_are_chats(tokenizer):
    expected = ids_of(tokenizer, [{"messages": CHAT}])
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in CHAT]

    assert ids_of(tokenizer, [{"messages": numpy.array(CHAT, dtype=object)}]) == expected
    assert ids_of(tokenizer, [{"messages": tuple(CHAT)}]) == expected
    assert ids_of(tokenizer, [{"messages": parts}]) == expected


def test_what_datasets_filled_up_is_as_if_it_were_not_there(tiny_language_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_language_model)
    tokenizer.chat_template = "{% for message in messages %}{{ message.tool_calls is defined }} {% endfor %}"
    calls = [{**CHAT[0], "tool_calls": [{"name": "add"}]}]
    rows = datasets.Dataset.from_list([{"messages": CHAT, "text": None}, {"messages": calls}, {"text": "a"}])

    assert rows[0]["messages"][0]["tool_calls"] is None and "messages" in rows[2]
    assert [tokenizer.decode(ids) for _, ids in ids_of(tokenizer, rows)] == ["False False ", "True ", "a"]


def test_a_long_chat_is_tokenised_in_pieces(tokenizer, monkeypatch):
    expected = tokenizer.apply_chat_template(CHAT * 4, tokenize=True, return_dict=True)["input_ids"]
    longest, tokenise = [], type(tokenizer).__call__

    def recorded(self, text, **settings):
        longest.append(len(text))
        return tokenise(self, text, **settings)

    monkeypatch.setattr(texts, "LONGEST_TEXT", 40)
    monkeypatch.setattr(type(tokenizer), "__call__", recorded)

    assert ids_of(tokenizer, [{"messages": CHAT * 4}], context_length=1000) == [(0, expected)]
    assert max(longest) <= 40 and len(longest) > 4


@pytest.mark.parametrize("longest", [12, 1000])
def test_a_long_text_ends_once(tiny_language_model, monkeypatch, longest):
    tokenizer = AutoTokenizer.from_pretrained(tiny_language_model)
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    monkeypatch.setattr(texts, "LONGEST_TEXT", longest)

    contexts = [ids for _, ids in ids_of(tokenizer, ["To be? Or not to be. " * 3], context_length=10)]
    assert (
        sum(ids.count(tokenizer.eos_token_id) for ids in contexts) == 1 and contexts[-1][-1] == tokenizer.eos_token_id
    )


def test_a_template_that_starts_with_a_bos_token_does_not_get_another(tiny_language_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_language_model)
    tokenizer.chat_template = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
    )

    contexts = [ids for _, ids in ids_of(tokenizer, [{"messages": CHAT}, "To be?Or not to be."], context_length=10)]

    assert len(contexts) == 6 and contexts[:3] == contexts[3:]
    assert [ids.count(tokenizer.bos_token_id) for ids in contexts] == [1] * 6


def test_a_long_chat_is_cut_into_contexts_that_each_start_as_a_text_does(tokenizer):
    ids = ids_of(tokenizer, [{"messages": CHAT * 4}])[0][1]

    contexts = [context for _, context in ids_of(tokenizer, [{"messages": CHAT * 4}], context_length=16)]

    assert all(context[0] == tokenizer.bos_token_id and len(context) <= 16 for context in contexts)
    assert ids[:1] + [token for context in contexts for token in context[1:]] == ids


def test_prompts_and_completions_of_text_are_one_text(tokenizer):
    assert ids_of(tokenizer, [{"prompt": "To be", "completion": " or not"}]) == ids_of(tokenizer, ["To be or not"])
    assert ids_of(tokenizer, [{"prompt": "To be"}]) == ids_of(tokenizer, ["To be"])


def test_token_ids_are_taken_as_they_are_without_what_is_masked(tokenizer):
    ids = tokenizer("To be, or not to be")["input_ids"]

    for row in ({"input_ids": ids}, {"input_ids": torch.tensor(ids), "attention_mask": [1] * len(ids)}):
        assert ids_of(tokenizer, [row]) == [(0, ids)]
    padded = {"input_ids": [*ids, 0, 0], "attention_mask": [1] * len(ids) + [0, 0]}
    assert ids_of(tokenizer, [padded]) == [(0, ids)]
    contexts = [context for _, context in ids_of(tokenizer, [{"input_ids": ids}], context_length=6)]
    assert max(map(len, contexts)) == 6 and [token for context in contexts for token in context] == ids


@pytest.mark.parametrize("kind", [list, tuple, numpy.array, torch.tensor])
@pytest.mark.parametrize("column", ["input_ids", "tokens"])
def test_token_ids_are_taken_from_any_column_and_of_any_kind(tokenizer, kind, column):
    row = {column: kind([5, 6, 7]), "attention_mask": kind([1, 1, 0])}

    assert ids_of(tokenizer, [row], column) == [(0, [5, 6])]
    assert ids_of(tokenizer, [{column: kind([5, 6, 7])}], column) == [(0, [5, 6, 7])]


def test_a_tokenised_dataset_gives_what_its_text_gives(model, tokenizer):
    tokenised = datasets.Dataset.from_list(ROWS).map(lambda row: tokenizer(row["text"]), remove_columns="text")

    found = torch.cat(list(reader(model, tokenizer, tokenised)))

    assert torch.equal(found, torch.cat(list(reader(model, tokenizer, ROWS))))


def test_rows_without_content_are_counted(model, tokenizer):
    rows = [{"messages": []}, {"messages": None}, {"messages": CHAT}]
    ids = [{"input_ids": []}, {"input_ids": [5, 6, 7]}]

    for given, without in ((rows, 2), (ids, 1)):
        stream = reader(model, tokenizer, given)
        list(stream)
        assert stream.counts["rows_without_text"] == without and stream.counts["tokens"] > 0


@pytest.mark.parametrize("skip_first_position", [True, False])
def test_special_and_given_tokens_are_read_and_not_given(model, tokenizer, skip_first_position):
    settings = {"skip_first_position": skip_first_position}
    ids = torch.tensor(ids_of(tokenizer, [{"messages": CHAT}])[0][1])
    whole = torch.cat(list(reader(model, tokenizer, [{"messages": CHAT}], skip_first_position=False)))
    keep = ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids)) & (ids != ids[2])
    special = 1 - int(keep[0])
    stream = reader(
        model, tokenizer, [{"messages": CHAT}], skip_special_tokens=True, skip_tokens=[int(ids[2])], **settings
    )

    found = torch.cat(list(stream))

    assert torch.equal(found, whole[keep])
    assert stream.counts["skipped_tokens"] == int((~keep).sum()) - special * skip_first_position
    by_name = reader(
        model,
        tokenizer,
        [{"messages": CHAT}],
        skip_special_tokens=True,
        skip_tokens=tokenizer.convert_ids_to_tokens([int(ids[2])]),
    )
    assert torch.equal(torch.cat(list(by_name)), found)


def test_a_harvest_without_special_tokens_is_one_of_its_own(model, tokenizer, tmp_path):
    rows = [{"messages": CHAT}] * 20
    tokens = save_shards(reader(model, tokenizer, rows, skip_special_tokens=True), tmp_path, shard_tokens=100)

    stream = reader(model, tokenizer, rows, skip_special_tokens=True)
    assert tokens == len(torch.cat(list(stream))) == stream.counts["tokens"]
    with pytest.raises(ValueError, match="a harvest with skip_special_tokens=True, got skip_special_tokens=False"):
        save_shards(reader(model, tokenizer, rows), tmp_path, shard_tokens=100)


def test_a_harvest_of_exactly_max_tokens_leaves_out_special_ones(model, tokenizer, tmp_path):
    rows = [{"messages": CHAT}] * 20
    settings = {"skip_special_tokens": True, "max_tokens": 150}

    assert save_shards(reader(model, tokenizer, rows, **settings), tmp_path, shard_tokens=50) == 150


@pytest.mark.parametrize(
    "row, column, message",
    [
        (
            {"messages": [{"text": "a"}]},
            "text",
            "must hold a text in 'messages', got .*; messages of a chat have a role and",
        ),
        ({"messages": 3}, "messages", "row 0 of the dataset must hold a text in 'messages'"),
        ({"input_ids": [0.5]}, "text", r"row 0 of the dataset: input_ids must be integers, got \[0.5\]"),
        ({"input_ids": [5, -100]}, "text", "must hold ids of tokens and a mask of the same length"),
        (
            {"input_ids": [5, 6], "attention_mask": [1]},
            "text",
            "must hold ids of tokens and a mask of the same length",
        ),
        ({"prompt": CHAT, "completion": "a"}, "text", "two texts, or two lists of messages, .*, got a list and a str"),
        ({"prompt": 7, "completion": 8}, "text", "two texts, or two lists of messages, .*, got a int and a int"),
        ({"messages": [{"from": "human", "value": "a"}]}, "text", "must hold a text in 'messages', got .*'human'"),
        ({"messages": [CHAT]}, "text", "must hold a text in 'messages', got"),
        ({"tokens": [0.5]}, "tokens", r"must hold a text in 'tokens', got \[0.5\].* ids of tokens are integers"),
        ({"input_ids": [[5], [6]]}, "text", "row 0 of the dataset: input_ids must be integers"),
        ({"input_ids": 5}, "text", "row 0 of the dataset: input_ids must be integers"),
        ({"body": "a"}, "text", r"text_column must name a column of the dataset \['body'\], got 'text'"),
    ],
)
def test_rows_of_another_form_are_refused(tokenizer, row, column, message):
    with pytest.raises(ValueError, match=message):
        ids_of(tokenizer, [row], column)


def test_a_tokenizer_without_a_chat_template_is_named(tokenizer, tiny_language_model):
    plain = AutoTokenizer.from_pretrained(tiny_language_model)
    plain.chat_template = None

    with pytest.raises(
        ValueError, match="row 0 of the dataset holds messages, and the tokenizer has no chat template: set"
    ):
        ids_of(plain, [{"messages": CHAT}])


@pytest.mark.parametrize("template", ["{{ raise_exception('No system role') }}", "{{ messages.of.nothing }}"])
def test_a_chat_that_the_template_does_not_take_is_named(tiny_language_model, template):
    tokenizer = AutoTokenizer.from_pretrained(tiny_language_model)
    tokenizer.chat_template = template

    with pytest.raises(
        ValueError, match="row 0 .* chat template does not take: (No system role|.* no attribute 'of')"
    ):
        ids_of(tokenizer, [{"messages": CHAT}])


def test_special_tokens_without_a_name_are_special_and_texts_of_one_token_are_tokens(tiny_language_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_language_model)
    tokenizer.add_tokens([AddedToken("<|header|>", special=True), AddedToken("plain", special=False)])
    space, header = tokenizer(" ")["input_ids"][0], tokenizer.convert_tokens_to_ids("<|header|>")

    assert header not in tokenizer.all_special_ids
    assert skipped_ids(tokenizer, True, None).tolist() == [0, 1, 2, header]
    assert (
        skipped_ids(tokenizer, False, [" "]).tolist() == skipped_ids(tokenizer, False, ["\u0120"]).tolist() == [space]
    )
    with pytest.raises(ValueError, match="texts of one token each, or ids, got 'user', which is 4"):
        skipped_ids(tokenizer, False, ["user"])


def test_tokens_of_a_tuple_or_an_array_go_on_with_a_harvest(model, tokenizer, tmp_path):
    for tokens in ([5, 6], (5, 6), numpy.array([5, 6])):
        assert save_shards(reader(model, tokenizer, ["To be, or not"], skip_tokens=tokens), tmp_path) == 12
    for tokens in (7, "be"):
        with pytest.raises(ValueError, match="skip_tokens a list of tokens or None, got"):
            reader(model, tokenizer, ROWS, skip_tokens=tokens)


@pytest.mark.parametrize("wrong", [["no such token"], [10**6], "<|im_end|>", [True]])
def test_tokens_that_are_none_are_not_skipped(model, tokenizer, wrong):
    with pytest.raises(ValueError, match="skip_tokens (must be tokens of the tokenizer|a list of tokens)"):
        reader(model, tokenizer, ROWS, skip_tokens=wrong)


def write(rows, path):
    data = datasets.Dataset.from_list(rows)
    kinds = {".parquet": "to_parquet", ".csv": "to_csv", ".jsonl": "to_json"}
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        getattr(data, kinds[path.suffix])(path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_files_of_rows_are_read_again_and_again(tmp_path, suffix):
    paths = [write(ROWS[:1], tmp_path / f"a{suffix}"), write(ROWS[1:], tmp_path / f"b{suffix}")]

    found = read_files(paths)

    assert [row["text"] for row in found] == [row["text"] for row in found] == [row["text"] for row in ROWS]


def test_packed_files_and_rows_that_differ_in_their_columns_are_read(tmp_path):
    with gzip.open(tmp_path / "a.JSONL.gz", "wt") as file:
        file.write(json.dumps({"text": "a"}))
    (tmp_path / "b.ndjson").write_text(f"{json.dumps({'messages': CHAT})}\n{json.dumps({'text': 'b'})}\n")

    found = read_files([tmp_path / "a.JSONL.gz", tmp_path / "b.ndjson"])

    assert [content_of(row, "text", 0) for row in found] == ["a", CHAT, "b"]


@pytest.mark.parametrize("name", ["a[1].jsonl", "what?.jsonl", "all*.jsonl", "with space, comma.jsonl"])
def test_the_name_of_a_file_is_no_pattern(tmp_path, name):
    write(ROWS[:1], tmp_path / name)
    for other in ("a1.jsonl", "what1.jsonl", "all of them.jsonl"):
        write(ROWS[1:], tmp_path / other)

    assert list(read_files([tmp_path / name])) == ROWS[:1]


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "a.jsonl",
            b'{"text": "a"\nno json\n',
            "expected rows of json, in UTF-8, in .*a.jsonl, got: JSON parse error",
        ),
        (
            "a.jsonl",
            '{"text": "Größe"}'.encode("latin-1"),
            "expected rows of json, in UTF-8, in .*, got: 'utf-8' codec",
        ),
        ("a.jsonl", b"", "expected rows of json, in UTF-8, in .*, got: none"),
        ("a.csv", "text\nGröße\n".encode("latin-1"), "expected rows of csv, in UTF-8, in .*, got: 'utf-8' codec"),
        ("a.parquet", b"text", "expected rows of parquet, .*, got: Parquet file size is 4 bytes"),
        ("a.json.gz", b"text", "expected rows of json, .*a.json.gz, got: "),
    ],
)
def test_files_that_hold_no_rows_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(ValueError, match=message):
        list(read_files([tmp_path / name]))


def test_the_mark_at_the_start_of_a_file_is_no_text(tmp_path):
    (tmp_path / "notepad.txt").write_bytes("\ufeffTo be".encode())

    assert list(read_files([tmp_path / "notepad.txt"])) == ["To be"]


def test_configurations_and_splits_that_are_not_there_are_listed(tmp_path):
    files = {"one": "a.jsonl", "two": "b.jsonl"}
    configs = [{"config_name": name, "data_files": file} for name, file in files.items()]
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    for name, file in files.items():
        (tmp_path / file).write_text(json.dumps({"text": name}))

    assert [row["text"] for row in read_dataset(str(tmp_path), "two")] == ["two"]
    for config in (None, "three"):
        with pytest.raises(ValueError, match=rf"no part with dataset_config={config!r} .*\['one', 'two'\]$"):
            read_dataset(str(tmp_path), config)


def test_rows_of_a_dataset_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "To be"}\n' + '{"text": "or"\n' * 3)

    with pytest.raises(ValueError, match=f"(expected rows in|no part with).*{tmp_path.name}.*JSON parse error"):
        list(read_dataset(str(tmp_path)))


@pytest.mark.parametrize("text", ["x" * 100_000, "word " * 20_000, "line\n" * 20_000])
def test_files_of_text_are_read_in_pieces_with_and_without_lines(tmp_path, text):
    (tmp_path / "text").write_text(text)
    passages = read_files([tmp_path / "text"])

    pieces = list(passages)

    assert "".join(pieces) == text and max(map(len, pieces)) <= 2 * PASSAGE
    assert list(passages) == pieces


def test_memory_does_not_grow_with_a_file_of_one_line(tmp_path):
    (tmp_path / "large.txt").write_bytes(b"To be, or not to be, " * 1_000_000)

    tracemalloc.start()
    characters = sum(map(len, read_files([tmp_path / "large.txt"])))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert characters == 21_000_000 and peak < 2**20


def test_a_text_longer_than_the_tokenizer_takes_at_once_is_cut_before_a_space(tokenizer):
    text = "word " * (LONGEST_TEXT // 2)

    ids = [token for _, context in ids_of(tokenizer, [text]) for token in context if token != tokenizer.bos_token_id]

    assert tokenizer.decode(ids) == text


def test_files_of_several_kinds_missing_ones_and_other_encodings_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    write(ROWS, tmp_path / "b.jsonl")

    with pytest.raises(ValueError, match="expected files of one kind, of text or of rows of one format"):
        read_files([tmp_path / "a.txt", tmp_path / "b.jsonl"])
    with pytest.raises(ValueError, match="expected files with text, got .*gone.txt, which are none"):
        read_files([tmp_path / "gone.txt"])
    with pytest.raises(ValueError, match="expected UTF-8 text in .*latin.txt, got .*: convert it"):
        list(Passages([tmp_path / "latin.txt"]))


def test_datasets_on_disk_are_read_by_their_splits(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "parts")
    (tmp_path / "files").mkdir()
    write(ROWS, tmp_path / "files" / "train.jsonl")

    assert [row["text"] for row in read_dataset(str(tmp_path / "plain"))] == [row["text"] for row in ROWS]
    assert len(list(read_dataset(str(tmp_path / "parts"), split="test"))) == 1
    assert len(list(read_dataset(str(tmp_path / "files")))) == 2
    with pytest.raises(ValueError, match="has the splits train, test, got 'validation'"):
        read_dataset(str(tmp_path / "parts"), split="validation")
    with pytest.raises(ValueError, match=r"split.*validation.*train"):
        list(read_dataset(str(tmp_path / "files"), split="validation"))


def test_a_generator_that_ended_is_not_trained_on_again(model, tokenizer):
    endless = iter(ActivationDataset(reader(model, tokenizer, (row for row in ROWS))))

    with pytest.raises(ValueError, match="the text ended after 3. tokens, and a generator is read only once"):
        for _ in range(100):
            next(endless)


def test_each_process_reads_its_own_rows(model, tokenizer):
    rows = [f"row number {number}" for number in range(7)]
    parts = []
    for process in range(3):
        stream = reader(model, tokenizer, rows)
        stream.take_part(process, 3)
        parts.append(torch.cat(list(stream)))

    expected = [torch.cat(list(reader(model, tokenizer, rows[process::3]))) for process in range(3)]
    assert all(torch.equal(part, other) for part, other in zip(parts, expected))
    with pytest.raises(ValueError, match=r"process_index must be in \[0, num_processes=3\), got 3"):
        stream.take_part(3, 3)
