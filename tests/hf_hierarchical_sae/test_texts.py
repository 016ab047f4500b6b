"""Texts: rows and files of many kinds become the token ids of contexts."""

from collections import Counter

import pytest
from transformers import AutoTokenizer

from hf_hierarchical_sae import texts
from hf_hierarchical_sae.texts import TextFiles, read_contexts


def contexts(tokenizer, rows, text_column="text", context_length=256):
    return list(read_contexts(enumerate(rows), tokenizer, text_column, context_length, counts=Counter()))


@pytest.mark.parametrize("text", ["x" * 100_000, "word " * 20_000, "line\n" * 20_000])
def test_a_file_is_read_in_pieces_with_and_without_lines(tmp_path, text):
    (tmp_path / "text").write_text(text)

    files = TextFiles([tmp_path / "text"])
    pieces = list(files)

    assert list(files) == pieces
    assert "".join(pieces) == text and max(map(len, pieces)) <= 2 * texts.PASSAGE


def test_a_long_text_is_tokenised_in_pieces_cut_before_white_space(tiny_language_model, monkeypatch):
    monkeypatch.setattr(texts, "LONGEST_TEXT", 20)
    tokenizer = AutoTokenizer.from_pretrained(tiny_language_model)
    text = "to be or not to be, that is the question:\nWhether'tisnoblerinthemindtosuffer the slings"

    pieces = list(texts._pieces(text))

    assert "".join(pieces) == text and max(map(len, pieces)) <= 20
    assert pieces[:3] == ["to be or not to be,", " that is the", " question:"]
    assert contexts(tokenizer, [text]) == [(0, ids) for _, ids in contexts(tokenizer, pieces)]
