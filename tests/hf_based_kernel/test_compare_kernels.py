"""The comparison of kernels, on a text and a model that are small enough for a test."""

import json
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from tests.conftest import byte_tokenizer
from tests.example_module import Killed, kill_while_writing


SCRIPT = Path(__file__).parents[2] / "examples" / "studies" / "compare_kernels.py"
SMALL = [
    "--train_tokenizer",
    "300",
    "--hidden_size",
    "16",
    "--num_hidden_layers",
    "2",
    "--num_attention_heads",
    "2",
    "--feature_dim",
    "4",
    "--seq_len",
    "16",
    "--batch_size",
    "2",
    "--eval_tokens",
    "64",
    "--max_steps",
    "6",
]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.md"
    path.write_text(" ".join(f"{i} green bottles hanging on the wall," for i in range(400)))
    return path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def load_script(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *SMALL, *map(str, arguments)])
    script = runpy.run_path(str(SCRIPT))
    return script, script["parse_arguments"]()


@pytest.mark.parametrize("kernel", ["rebased", "taylor", "attention"])
def test_packed_documents_do_not_see_one_another(monkeypatch, kernel):
    script, arguments = load_script(monkeypatch, "--eval_tokens", 16)
    tokenizer = byte_tokenizer()
    texts = ["green ", "bottles", "on the wall", "and one more accidentally falls", "off", "no bottle at all"]
    train, held_out = script["make_blocks"](arguments, tokenizer, texts)
    rows = {name: torch.cat([held_out[name], train[name]]) for name in train}
    model = script["make_model"](arguments, kernel, tokenizer).eval()
    packed = model(rows["input_ids"], position_ids=rows["position_ids"]).logits

    starts = (rows["position_ids"][:, 1:] == 0).nonzero()
    assert len(starts) >= 3
    for row, start in starts.tolist():
        start += 1
        length = rows["position_ids"][row, start:].argmax() + 1
        alone = model(rows["input_ids"][row : row + 1, start : start + length]).logits[0]
        torch.testing.assert_close(packed[row, start : start + length], alone, rtol=1e-4, atol=1e-5)
        assert rows["labels"][row, start] == -100
        assert rows["input_ids"][row, start - 1] == tokenizer.eos_token_id


def test_recall_hits_end_bigrams_that_their_document_has_already_had(monkeypatch):
    script, _ = load_script(monkeypatch)
    input_ids = torch.randint(4, (20, 30))
    position_ids = torch.stack([torch.cat([torch.arange(n), torch.arange(30 - n)]) for n in range(5, 25)])
    frequent = script["encode_bigrams"](torch.tensor([[1, 2]])).flatten()
    hits = script["recall_hits"]({"input_ids": input_ids, "position_ids": position_ids}, frequent)

    expected = torch.zeros_like(hits)
    for row in range(20):
        seen = set()
        for i in range(30):
            if position_ids[row, i] == 0:
                seen = set()
                continue
            bigram = (input_ids[row, i - 1].item(), input_ids[row, i].item())
            expected[row, i] = bigram in seen and bigram != (1, 2)
            seen.add(bigram)
    assert 50 < expected.sum() < 500
    assert torch.equal(hits, expected)


def test_frequent_bigrams_are_those_seen_more_than_1250_times(monkeypatch):
    script, _ = load_script(monkeypatch)
    rows = torch.tensor([[5, 6]] * 1250 + [[6, 5]] * 1251 + [[7, 7]])
    frequent = script["find_frequent_bigrams"]({"input_ids": rows})
    assert torch.equal(frequent, script["encode_bigrams"](torch.tensor([[6, 5]])).flatten())


def test_perplexities_of_hits_and_others_make_up_that_of_all(monkeypatch):
    script, arguments = load_script(monkeypatch)
    model = script["make_model"](arguments, "rebased", byte_tokenizer())
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    ids = torch.randint(250, (5, 16))
    rows = {"input_ids": ids, "position_ids": torch.arange(16).expand(5, -1), "labels": ids.clone()}
    rows["labels"][:, 7] = -100
    hits = torch.rand(5, 16) < 0.3
    got = script["perplexities"](model, rows, hits, 2)

    assert got["all"] == pytest.approx(math.exp(model(ids, labels=rows["labels"]).loss.item()), rel=1e-5)
    counted = rows["labels"][:, 1:] != -100
    share = hits[:, 1:][counted].double().mean().item()
    mixed = share * math.log(got["recall"]) + (1 - share) * math.log(got["other"])
    assert mixed == pytest.approx(math.log(got["all"]), rel=1e-5)
    assert abs(got["recall"] / got["other"] - 1) > 1e-3
    assert script["perplexities"](model, rows, torch.zeros_like(hits), 2)["recall"] is None


def test_comparison_has_equal_parameters_and_keeps_what_is_finished(monkeypatch, tmp_path, text_file, capsys):
    options = ["--hidden_size", 32, "--kernel", "rebased", "taylor", "attention", "--eval_steps", 3]
    compare = [*SMALL, *options, "--text_files", text_file, "--output_dir", tmp_path]
    run(monkeypatch, *compare)

    results = {
        kernel: json.loads((tmp_path / kernel / "language_model.json").read_text())
        for kernel in ("rebased", "taylor", "attention")
    }
    counts = [result["parameters"] for result in results.values()]
    assert max(counts) / min(counts) < 1.01
    assert results["attention"]["layer_types"] == ["conv", "sliding_attention"]
    assert [step for step, _ in results["rebased"]["held_out_curve"]] == [3, 6]
    assert len(results["rebased"]["generated"]) == 3
    table = (tmp_path / "comparison.md").read_text()
    assert all(f"{result['perplexity_after']:.2f}" in table for result in results.values())
    assert (tmp_path / "comparison.png").stat().st_size > 0

    (tmp_path / "taylor" / "language_model.json").unlink()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_while_writing("language_model.json", patch)
        run(patch, *compare)
    trained, train = [], Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self, **kwargs: trained.append(self) or train(self, **kwargs))
    run(monkeypatch, *compare)
    assert [trainer.model.config.kernel for trainer in trained] == ["taylor"]
    with pytest.raises(SystemExit, match="holds a run with other settings"):
        run(monkeypatch, *compare, "--seed", 1)


def test_minutes_decide_the_steps(monkeypatch, tmp_path, text_file):
    minutes = ["--kernel", "rebased", "--minutes", 0.02]
    run(monkeypatch, *SMALL, "--text_files", text_file, *minutes, "--output_dir", tmp_path)
    result = json.loads((tmp_path / "rebased" / "language_model.json").read_text())
    # 1.2 s at some 10 ms a step; the bounds allow for a busy machine.
    assert 6 < result["steps"] < 1200
    assert 0.005 < result["minutes"] < 0.08


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_steps", "0"], "--max_steps must be at least 1, got 0"),
        (["--minutes", "0"], "--minutes must be above 0, got 0"),
        (
            ["--kernel", "attention", "--layer_types", "conv", "conv"],
            "--layer_types: expected none with --kernel attent",
        ),
        (["--num_attention_heads", "64"], "sizes do not fit together: .*head_dim must be at least 1"),
    ],
)
def test_bad_input_is_one_clear_sentence(monkeypatch, tmp_path, text_file, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *SMALL, "--text_files", text_file, *arguments)
    said = capsys.readouterr().err + str(stopped.value)
    assert re.search(message, said.replace("\n", " ")), said
