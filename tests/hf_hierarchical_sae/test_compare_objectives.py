"""The comparison of objectives: on planted features, on a tiny language model, and after an interruption."""

import json
import sys
from pathlib import Path

import pytest
from transformers import Trainer

from tests.example_module import load_example


SCRIPT = Path(__file__).parents[2] / "examples" / "studies" / "compare_objectives.py"
TINY = {
    "learning_rate": 1e-2,
    "steps": 6,
    "batch_size": 64,
    "dataset": None,
    "dtype": "float32",
    "tokens": 1500,
    "eval_tokens": 300,
    "spliced_tokens": 200,
    "d_sae": 64,
    "budgets": [2, 4],
}
HIERARCHICAL = ["HierarchicalTopK", "HierarchicalTopK, powers of two", "HierarchicalTopK, prefixes"]
NAMES = {*HIERARCHICAL, *(f"{name}, by threshold" for name in HIERARCHICAL), "TopK-2", "TopK-4", "Matryoshka-2"}
BATCH_TOPK = {"BatchTopK-2", "BatchTopK-4"}


@pytest.fixture
def compare(monkeypatch):
    """The example as a module, and a way to run it with given arguments in this process."""
    module = load_example("studies/compare_objectives.py")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        module.main()

    module.run_with = run
    return module


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_claim_holds_on_planted_features(compare, tmp_path, capsys):
    compare.run_with("--preset", "synthetic", "--seeds", 0, "--output_dir", tmp_path)

    results = json.loads((tmp_path / "results.json").read_text())
    budgets = compare.PRESETS["synthetic"]["budgets"]
    explained = {name: dict(zip(runs[0]["budgets"], runs[0]["explained_variance"])) for name, runs in results.items()}
    ours, widest = explained["HierarchicalTopK"], explained[f"TopK-{budgets[-1]}"]
    # 200 steps leave it 0.023 behind at 2 latents, less elsewhere; a dictionary for one budget is 0.04 and more behind.
    assert all(ours[budget] > explained[f"TopK-{budget}"][budget] - 0.03 for budget in budgets)
    assert ours[2] > widest[2] + 0.03 and ours[4] > widest[4] + 0.03
    assert explained["HierarchicalTopK, powers of two"][2] > ours[2]
    assert list(ours.values()) == sorted(ours.values()) and ours[budgets[-1]] > 0.95
    assert results["HierarchicalTopK"][0]["dead_at_trained_k"] < 0.05 < results["TopK-2"][0]["dead_at_trained_k"]
    # It spreads its latents over tokens as it likes; and its threshold lets through as many as in training.
    assert explained["BatchTopK-2"][2] > explained["TopK-2"][2] + 0.03
    assert results["BatchTopK-2"][0]["latents_per_token"][0] == pytest.approx(2, rel=0.1)
    # With one dictionary, a threshold does what BatchTopK does with one for each budget.
    by_threshold = explained["HierarchicalTopK, powers of two, by threshold"]
    assert all(by_threshold[budget] > explained[f"BatchTopK-{budget}"][budget] - 0.015 for budget in budgets)
    assert by_threshold[2] > explained["TopK-2"][2] + 0.03
    assert results["HierarchicalTopK, by threshold"][0]["latents_per_token"] == pytest.approx(budgets, rel=0.1)
    printed = capsys.readouterr().out
    assert "- explained variance rises with the budget: holds (by at least 0.01" in printed
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def tiny(compare, tiny_language_model, tmp_path):
    compare.PRESETS["minutes"] = TINY
    compare.tiny_model = tiny_language_model
    compare.run_tiny = lambda: compare.run_with(
        "--model", tiny_language_model, "--layer", 1, "--seeds", 0, 1, "--output_dir", tmp_path
    )
    return compare


@pytest.mark.slow
def test_every_objective_is_trained_on_the_same_activations_of_a_language_model(tiny, tmp_path, capsys):
    tiny.run_tiny()

    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == NAMES | BATCH_TOPK and all(len(runs) == 2 for runs in results.values())
    assert {found["tokens"] for runs in results.values() for found in runs} == {300}
    rows = (tmp_path / "summary.md").read_text().splitlines()
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows[2 : 2 + len(results)]] == list(results)
    first, second = (found["explained_variance"] for found in results["HierarchicalTopK"])
    assert first != second
    spliced = {name: runs[0]["spliced"] for name, runs in results.items()}
    assert all(found["tokens"] >= 200 and len(found["kl_divergence"]) in (1, 2) for found in spliced.values())
    assert all(min(found["kl_divergence"]) > 0 for found in spliced.values())
    assert "spliced" not in results["HierarchicalTopK"][1]
    printed = capsys.readouterr().out
    recovered = spliced["HierarchicalTopK"]["loss_recovered"]
    assert f"| HierarchicalTopK | {recovered[0]:.3f} | {recovered[1]:.3f} |" in printed
    assert "- latents per token, held out, of BatchTopK: " in printed
    assert "- latents per token, spliced, of HierarchicalTopK, by threshold: " in printed
    assert "This run: 16 of 16 dictionaries trained, 0." in printed
    description = json.loads((tmp_path / "activations" / "harvest.json").read_text())
    assert description["layers"] == [1] and description["max_tokens"] == 1800


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_where_it_stopped(tiny, tmp_path, monkeypatch):
    evaluate, train, resumed = tiny.evaluate_budgets, Trainer.train, []

    def fail_at_the_third(sae, *given):
        if len(resumed) == 3:
            raise KeyboardInterrupt
        return evaluate(sae, *given)

    def record(self, resume_from_checkpoint=None):
        resumed.append(resume_from_checkpoint and Path(resume_from_checkpoint).name)
        return train(self, resume_from_checkpoint=resume_from_checkpoint)

    monkeypatch.setattr(Trainer, "train", record)
    monkeypatch.setattr(tiny, "evaluate_budgets", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        tiny.run_tiny()
    assert resumed == [None, None, None]
    kept = (tmp_path / "HierarchicalTopK" / "seed0" / "result.json").read_text()

    monkeypatch.setattr(tiny, "evaluate_budgets", evaluate)
    tiny.run_tiny()

    assert resumed[3:5] == ["checkpoint-6", None]
    assert (tmp_path / "HierarchicalTopK" / "seed0" / "result.json").read_text() == kept
    count = len(resumed)
    tiny.run_tiny()
    # With the seeds in another order, another is spliced in, without training it again.
    tiny.run_with("--model", tiny.tiny_model, "--layer", 1, "--seeds", 1, 0, "--output_dir", tmp_path)
    assert len(resumed) == count
    results = json.loads((tmp_path / "results.json").read_text())
    assert all("spliced" in run for runs in results.values() for run in runs)
    # All steps of the third were another process's.
    assert [run["cpu_seconds_per_step"] for runs in results.values() for run in runs].count(None) == 1
    monkeypatch.setitem(tiny.PRESETS, "minutes", {**TINY, "steps": 7})
    with pytest.raises(SystemExit, match="holds results with .*: give another --output_dir"):
        tiny.run_tiny()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--seeds", "-1"], "--seeds must be at least 0, got -1"),
        (["--preset", "synthetic", "--model", "some/model"], "--preset synthetic has no language model"),
        (["--preset", "synthetic", "--layer", "0"], "--preset synthetic has no language model"),
        (["--model", "no/such"], "--model: expected the hub id or the folder of a language model, got 'no/such' ("),
    ],
)
def test_bad_options_end_in_one_sentence(compare, options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare.run_with(*options, "--output_dir", tmp_path / "out")

    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
