"""The study that probes latents: its texts, what it reads of them, absorption where it is known, a tiny run of all of it."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_hierarchical_sae import HierarchicalSaeConfig, HierarchicalSaeModel
from tests.example_module import load_example


pytestmark = pytest.mark.skipif(find_spec("sae_bench") is None, reason="needs sae-bench and sae-probes")
SCRIPT = Path(__file__).parents[2] / "examples" / "studies" / "probe_latents.py"
TINY = {
    "learning_rate": 1e-2,
    "steps": 6,
    "batch_size": 64,
    "dtype": "float32",
    "tokens": 1500,
    "eval_tokens": 100,
    "characters": 800,
    "d_sae": 64,
    "budgets": [2, 4],
    "longest": 24,
    "train_texts": 130,
    "test_texts": 40,
    "train_words": 30,
    "test_words": 19,
    "in_context": 3,
}


@pytest.fixture
def study(monkeypatch):
    module = load_example("studies/probe_latents.py")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        module.main()

    module.run_with = run
    return module


@pytest.fixture
def wordnet(tmp_path):
    """Nouns, verbs and adjectives with example sentences in WordNet's format."""
    folder = tmp_path / "wordnet"
    folder.mkdir()
    for kind, files in (("noun", (4, 6, 10, 18)), ("verb", (38,)), ("adj", (0,))):
        lines = ["  1 This software and database is being provided to you"]
        for number in range(240):
            word = f"{kind}{number}"
            form = f"{word}(a)" if kind == "adj" else word
            file = files[number % len(files)]
            lines.append(
                f"{number:08} {file:02} {kind[0]} 02 other_thing 0 {form} 0 001 @ 00001740 n 0000 | what it is; "
                f'"it is here that they saw a {word} again"; "{word} first"'
            )
        (folder / f"data.{kind}").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_dictionary_is_probed_at_its_budgets_and_more_seeds_are_added(
    study, tiny_language_model, wordnet, tmp_path, capsys, monkeypatch
):
    from reasoning_gym.factory import DATASETS

    study.PRESETS["minutes"] = TINY
    # Two generators of questions and not a hundred.
    monkeypatch.setattr(sys.modules["labelled_text"], "LEFT_OUT", DATASETS.keys() - {"chain_sum", "syllogism"})
    command = ["--model", tiny_language_model, "--layer", 0, "--wordnet", wordnet, "--output_dir", tmp_path / "out"]
    command += ["--tasks", "sae-probes: 105", "words: verb"]
    study.run_with(*command, "--seeds", 0)
    first = json.loads((tmp_path / "out" / "results.json").read_text())
    study.run_with(*command, "--seeds", 0, 1)

    results = json.loads((tmp_path / "out" / "results.json").read_text())
    references = results.pop("references")
    assert list(references) == ["sae-probes: 105_click_bait", "words: verb"]
    assert all(
        0 <= one["dense"]["auc"] <= 1 and list(one["neurons"]) == ["1", "2", "5"] for one in references.values()
    )
    assert list(results) == ["HierarchicalTopK", "HierarchicalTopK, powers of two", "TopK-2", "TopK-4"]
    assert all(runs[:1] == first[name] and runs[0] != runs[1] for name, runs in results.items())
    read = {name: [(one["kind"], one["budget"]) for one in runs[1]] for name, runs in results.items()}
    assert read["HierarchicalTopK"] == [("HierarchicalTopK", 2), ("HierarchicalTopK", 4)]
    assert read["TopK-2"] == [("TopK", 2)] and read["TopK-4"] == [("TopK", 4), ("TopK-4 read at less", 2)]
    aucs = [task["5"]["auc"] for runs in results.values() for one in runs[1] for task in one["tasks"].values()]
    assert all(0 <= auc <= 1 for auc in aucs) and len(set(aucs)) > 2
    printed = capsys.readouterr().out
    assert "| less the TopK of the budget, 2 latents | at 2 | at 4 |" in printed and "±" in printed
    assert printed.count("HierarchicalTopK, seed 1") == 1
    assert (tmp_path / "out" / "probes.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="holds results with tasks "):
        study.run_with(*command[:-1])


@pytest.mark.slow
def test_a_text_is_read_at_its_last_token_or_the_last_that_fits(study, tiny_language_model):
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_language_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_language_model)
    texts = ["a long text that is cut where it is longest", "short", "of medium size"]

    states = study.last_states(texts, TINY | {"model": tiny_language_model, "layer": 0})

    for text, state in zip(texts, states):
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, : TINY["longest"]]
        torch.testing.assert_close(state, model(ids, output_hidden_states=True).hidden_states[1][0, -1])


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 1], ids=["first", "last"])
def test_words_have_the_states_of_their_whole_prompts(study, tiny_language_model, layer):
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_language_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_language_model)
    assert len(model.model.layers) == 2
    outputs = []
    model.model.layers[layer].register_forward_hook(lambda module, args, output: outputs.append(output))

    words = study.read_words(TINY | {"model": tiny_language_model, "layer": layer})

    assert len(words["words"]) == 49 and int(words["is_test"].sum()) == 19
    assert words["prompts"][0].startswith(f"\n{words['examples'][0]} has the first letter: ")
    assert [chr(97 + letter) for letter in words["letters"]] == [word.lower() for word in words["words"]]
    for prompt, state in zip(words["prompts"][:3], words["states"]):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        after = len(tokenizer(" has the first letter:")["input_ids"])
        model(ids)
        torch.testing.assert_close(state, outputs[-1][0, -1 - after], atol=1e-5, rtol=1e-5)


def planted_words(form):
    """Twelve words of each letter, half of them to test on; each state is a letter's direction and a word's own."""
    from sae_bench.evals.absorption.prompting import create_icl_prompt

    letters = [letter for letter in "abcdefghijklmnopqrstuvwxyz" for _ in range(12)]
    words = [letter + chr(97 + place % 12) for place, letter in enumerate(letters)]
    labels = torch.tensor([ord(letter) - 97 for letter in letters])
    return {
        "words": words,
        "examples": ["one", "two"],
        "prompts": [create_icl_prompt(word, ["one", "two"], **form).base for word in words],
        "letters": labels,
        "states": 10 * torch.cat([torch.nn.functional.one_hot(labels, 26), torch.eye(len(words))], dim=1),
        "is_test": torch.arange(len(words)) % 12 >= 6,
    }


def planted_dictionary(words, absorbed):
    """A latent for each letter and one for each word; of absorbed words the latter stands in for the former."""
    d_in = words["states"].shape[1]
    sae = HierarchicalSaeModel(HierarchicalSaeConfig(d_in=d_in, d_sae=d_in, k=4))
    encoder, decoder = torch.eye(d_in), torch.eye(d_in)
    for word in absorbed.nonzero().flatten().tolist():
        letter = words["letters"][word]
        encoder[letter, 26 + word] = -2
        encoder[26 + word, 26 + word] = 2**0.5
        decoder[26 + word, letter] = 1
    with torch.no_grad():
        sae.encoder_weight.copy_(encoder)
        sae.W_dec.copy_(torch.nn.functional.normalize(decoder, dim=1))
    return sae


@pytest.mark.slow
@pytest.mark.parametrize("share", [0, 3])
def test_planted_absorption_is_found_and_none_where_there_is_none(study, share):
    first_letters = sys.modules["first_letters"]
    words = planted_words(first_letters.prompt_form(2))
    absorbed = torch.arange(len(words["words"])) % 3 < (share > 0)
    is_letter = torch.nn.functional.one_hot(words["letters"]) > 0
    assert torch.equal(study.letter_probes(words)["finds"], is_letter)
    dense = {"directions": torch.eye(26, words["states"].shape[1]), "finds": is_letter, "letters": list(range(26))}

    found = study.absorption(study.AtBudget(planted_dictionary(words, absorbed), 4), words, dense)

    assert found["full"] == pytest.approx(1 / 3 if share else 0)
    assert found["fraction"] == pytest.approx(1 / 3 if share else 0)
    assert found["main_latents"] == 1 and found["letters"] == 26
    assert found["f1"] == pytest.approx(0.8 if share else 1)


def test_a_letter_that_no_probe_finds_is_not_looked_at(study):
    assert study.absorption(None, {}, {"letters": []}) is None


@pytest.mark.slow
def test_probes_choose_the_latents_that_tell_the_classes_apart(study):
    torch.manual_seed(0)
    labels = torch.arange(200) % 2
    latents = torch.rand(200, 50)
    latents[:, 7] += 0.2 * labels
    latents[:, 31] = 0.2 * labels * torch.rand(200)
    task = study.Task(latents, labels, torch.arange(200) >= 120)

    found = study.probes(latents, task)

    # Of the two, the one that differs most beside its own mean activation, though the other is larger.
    assert found["1"]["auc"] > 0.99 and found["5"]["auc"] > 0.99
    assert study.probes(latents[:, :7], task)["1"]["auc"] < 0.7


def test_no_group_is_on_both_sides_and_half_of_each_is_positive(study):
    labelled_text = sys.modules["labelled_text"]
    examples = [
        labelled_text.Example(f"{group} {number}", number % (group + 1) == 0, f"group {group}")
        for group in range(1, 9)
        for number in range(40)
    ]
    by_label = [one._replace(group=f"{one.group} {one.label}") for one in examples]
    for given in (examples, by_label):
        sides = study.split(given, 60, 30)

        groups = [{one.group for one in side} for side in sides]
        assert not groups[0] & groups[1] and all(groups)
        assert all(2 * sum(one.label for one in side) == len(side) for side in sides)
        assert len(sides[0]) <= 60 and len(sides[1]) <= 30 and min(map(len, sides)) >= 20


def test_tasks_from_plays_and_wordnet_hold_what_their_names_say(study, wordnet):
    labelled_text = sys.modules["labelled_text"]

    verbs = labelled_text.part_of_speech(wordnet, "verb")
    people = labelled_text.supersense(wordnet, "person")
    asking = labelled_text.sentences_that_ask()
    falstaff = labelled_text.speaker("FALSTAFF")

    assert len(verbs) == 480 and sum(one.label for one in verbs) == 240
    assert verbs[-1] == ("it is here that they saw a verb239", True, "verb239")
    assert [one.group for one in people if one.label] == [f"noun{number}" for number in range(3, 240, 4)]
    assert all(len(one.text) >= 30 and one.text[-1] not in ".?!;:" for one in asking)
    assert 500 < sum(one.label for one in asking) < len(asking) / 2
    assert {one.group for one in falstaff} == {"henry-iv-part-1", "henry-iv-part-2", "the-merry-wives-of-windsor"}
    assert not any("**" in one.text for one in falstaff)


def test_what_is_missing_is_named(study, tiny_language_model, wordnet, tmp_path, monkeypatch, capsys):
    given = ("--model", tiny_language_model, "--layer", 1, "--output_dir", tmp_path / "out")
    with pytest.raises(SystemExit, match="there is no .*data.noun: install Debian's wordnet-base, or give --wordnet"):
        study.run_with(*given, "--wordnet", tmp_path)
    with pytest.raises(SystemExit):
        study.run_with("--tasks", "poems")
    assert "--tasks must begin one of sae-probes: 5_hist_fig_ismale, " in capsys.readouterr().err
    monkeypatch.setitem(study.PACKAGES, "not_there", "not-there")
    with pytest.raises(SystemExit, match="not-there not installed: `pip install not-there`"):
        study.run_with(*given, "--wordnet", wordnet)
    assert not (tmp_path / "out").exists()


def test_a_difference_counts_where_every_other_seed_would_show_it(study):
    def seeds(*values):
        return [{"kind": "k", "budget": 2, "score": value} for value in values]

    found = {
        "TopK": {2: seeds(0.5, 0.6, 0.7)},
        "ours": {2: seeds(0.61, 0.70, 0.81)},
        "same": {2: seeds(0.6, 0.6, 0.6)},
    }

    def score(one):
        return one["score"]

    lines = study.difference_table(found, [2], "difference", score, [score]).splitlines()

    assert lines[0] == "| difference | at 2 |"
    assert lines[2:] == ["| ours | +0.107 ± 0.029 (1, 0) |", "| same | +0.000 ± 0.497 (0, 0) |"]
