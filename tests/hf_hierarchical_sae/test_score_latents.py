"""The example that scores latents: its labels, a tiny run with every kind of score, and its tables."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from hf_hierarchical_sae import HierarchicalSaeConfig, HierarchicalSaeModel, LatentActivations
from tests.example_module import load_example


SCRIPT = Path(__file__).parents[2] / "examples" / "studies" / "score_latents.py"


@pytest.fixture
def example(monkeypatch):
    """The example as a module, and a way to run it with given arguments in this process."""
    module = load_example("studies/score_latents.py")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        module.main()

    module.run_with = run
    return module


@pytest.fixture
def wordnet(tmp_path):
    """A dictionary of a few senses in WordNet's formats."""
    folder = tmp_path / "wordnet"
    folder.mkdir()
    senses = [
        "dog%1:05:00:: 1 42",
        "dog%2:38:00:: 1 2",
        "run%2:38:00:: 1 106",
        "wolf%1:05:00:: 1 9",
        "good%3:00:01:: 1 190",
        "be%2:42:00:: 1 99",
        "man%1:18:00:: 1 99",
        "have%2:40:00:: 1 99",
        "love%1:12:00:: 1 99",
    ]
    (folder / "cntlist.rev").write_text("\n".join(senses) + "\n")
    (folder / "noun.exc").write_text("wolves wolf\n")
    (folder / "verb.exc").write_text("ran run\n")
    return folder


def test_a_word_has_the_supersense_of_its_most_frequent_sense_at_its_last_token(example, wordnet, tiny_language_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_language_model)
    text = "The dogs ran; good wolves"
    ids = torch.tensor(tokenizer(text)["input_ids"])
    empty = torch.zeros(0, dtype=torch.int64)
    activations = LatentActivations(
        k=1,
        token_ids=ids,
        context_starts=torch.tensor([0, len(ids)]),
        is_read=torch.ones(len(ids), dtype=torch.bool),
        latent_starts=empty,
        positions=empty,
        values=empty,
        ranks=empty,
    )

    labels, names = example.supersenses(wordnet, tokenizer, activations)

    shift = len(ids) - len(text)
    found = {place - shift: names[label] for place, label in enumerate(labels.tolist()) if label >= 0}
    assert found == {7: "noun.animal", 11: "verb.motion", 24: "noun.animal"}


def test_speakers_have_a_text_each_without_names_or_directions(example):
    found = example.texts_by_speaker(6, seed=0)

    assert len(found) == 6 and all(len(texts) > 50 for texts in found.values())
    assert "Hamlet (hamlet)" in found
    assert not any("**" in text or "\n_" in text for texts in found.values() for text in texts)
    assert found != example.texts_by_speaker(6, seed=1)


@pytest.mark.slow
def test_two_autoencoders_are_scored_and_what_was_scored_is_kept(
    example, wordnet, tiny_language_model, tmp_path, capsys, monkeypatch
):
    for name in ("first", "second"):
        torch.manual_seed(len(name))
        config = HierarchicalSaeConfig(
            d_in=32, d_sae=64, k=4, budgets=[2, 4], budget_weights=[1, 3], layer=0, model_name=tiny_language_model
        )
        HierarchicalSaeModel(config).save_pretrained(tmp_path / name / "seed0")
    themes = tmp_path / "themes"
    themes.mkdir()
    for name, word in (("cats", "purr"), ("dogs", "bark")):
        (themes / name).write_text("\n%\n".join(f"they {word} {number}" * 20 for number in range(60)))
    (themes / "cats.dat").write_bytes(b"\xff\x00")
    command = [
        "--sae",
        tmp_path / "first" / "seed0",
        tmp_path / "second" / "seed0",
        "--budgets",
        2,
        4,
        "--speakers",
        3,
    ]
    command += ["--tokens", 3000, "--permutations", 2, "--wordnet", wordnet, "--themes", themes]
    command += ["--judge", tiny_language_model, "--judge_latents", 1, "--output_dir", tmp_path / "scores"]

    example.run_with(*command)

    scores = json.loads((tmp_path / "scores" / "second.json").read_text())
    assert set(scores) == {"weights", "speakers", "supersenses", "themes", "judge"}
    assert scores["themes"]["labels"] == 2 and scores["speakers"]["labels"] == 3
    assert set(scores["judge"]) == {"2", "4"}
    # One explanation has no other to be swapped with.
    assert all("detection, swapped" not in found for found in scores["judge"].values())
    printed = capsys.readouterr().out
    assert "### themes: 2 labels" in printed and "| second |" in printed
    assert (tmp_path / "scores" / "scores.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(example, "score", None)
    example.run_with(*command)
    with pytest.raises(SystemExit, match="holds results with .*: give another --output_dir"):
        example.run_with(*command, "--seed", 1)
    command[2] = tmp_path / "first" / "seed0"
    with pytest.raises(SystemExit, match=r"second.json holds the scores of another autoencoder than .*first/seed0"):
        example.run_with(*command, "--names", "first", "second")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sae", "a", "b", "--names", "x"], "--names must be as many as --sae and give files of different names"),
        (["--sae", "a", "b", "--names", "x", "x", "y"], "--names must be as many as --sae"),
        (["--sae", "a/b", "a_b"], "give files of different names, got ['a/b', 'a_b']"),
        (["--sae", "a", "--wordnet", "nowhere"], "--wordnet: expected a folder with cntlist.rev, got nowhere"),
        (["--sae", "a", "--themes", "nowhere"], "--themes: expected a folder, got nowhere"),
        (["--sae", "{tmp}/gone"], "--sae: expected the folder or hub id of an autoencoder, got "),
        (["--sae", "{model}"], "--sae: expected autoencoders, got a llama in "),
        (["--sae", "{tmp}/topk", "--budgets", "9"], "--budgets must be at most 8, the latents in "),
        (
            ["--sae", "{tmp}/batch_topk", "--budgets", "2"],
            "expected autoencoders with selection topk, got batch_topk in ",
        ),
    ],
)
def test_wrong_arguments_are_named(example, arguments, message, tiny_language_model, tmp_path, capsys):
    for selection in ("topk", "batch_topk"):
        HierarchicalSaeConfig(d_in=4, d_sae=8, k=2, budgets=[2], selection=selection).save_pretrained(
            tmp_path / selection
        )
    with pytest.raises(SystemExit):
        example.run_with(*(argument.format(tmp=tmp_path, model=tiny_language_model) for argument in arguments))

    assert message in capsys.readouterr().err


def test_every_autoencoder_has_a_name(example):
    assert example.short_names(["runs/a"]) == ["a"]
    assert example.short_names(["runs/a/sae", "runs/b/sae"]) == ["a", "b"]
    assert example.short_names(["runs/a", "runs/a/checkpoint-60"]) == ["a", "checkpoint-60"]
