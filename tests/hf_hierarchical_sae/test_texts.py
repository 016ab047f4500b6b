"""Text as people have it: chats, token ids, files of every kind, and what is left out of them."""

import json
import subprocess
import sys

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_hierarchical_sae import ActivationDataset, iterate_activations, save_shards
from hf_hierarchical_sae.texts import (
    LONGEST_TEXT,
    PASSAGE,
    Passages,
    content_of,
    read_dataset,
    read_files,
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
        ({"body": "a"}, "text", r"text_column must name a column of the dataset \['body'\], got 'text'"),
    ],
)
def test_rows_of_another_form_are_refused(tokenizer, row, column, message):
    with pytest.raises(ValueError, match=message):
        ids_of(tokenizer, [row], column)


def test_a_tokenizer_without_a_chat_template_is_named(tokenizer, tiny_language_model):
    plain = AutoTokenizer.from_pretrained(tiny_language_model)
    plain.chat_template = None

    with pytest.raises(ValueError, match="row 0 of the dataset holds messages that the tokenizer's chat template"):
        ids_of(plain, [{"messages": CHAT}])


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


@pytest.mark.parametrize("text", ["x" * 100_000, "word " * 20_000, "line\n" * 20_000])
def test_files_of_text_are_read_in_pieces_with_and_without_lines(tmp_path, text):
    (tmp_path / "text").write_text(text)
    passages = read_files([tmp_path / "text"])

    pieces = list(passages)

    assert "".join(pieces) == text and max(map(len, pieces)) <= 2 * PASSAGE
    assert list(passages) == pieces


def test_memory_does_not_grow_with_a_file_of_one_line(tmp_path):
    (tmp_path / "large.txt").write_bytes(b"To be, or not to be, " * 3_000_000)
    program = f"""
import resource
from pathlib import Path
from hf_hierarchical_sae.texts import Passages
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = sum(map(len, Passages([Path({str(tmp_path / "large.txt")!r})])))
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    count, kibibytes = map(int, done.stdout.split())
    assert count == 63_000_000 and kibibytes < 8 * 1024


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
