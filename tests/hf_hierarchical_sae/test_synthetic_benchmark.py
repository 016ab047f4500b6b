"""The study on data whose features are known: what it judges, resumes and prints."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from hf_hierarchical_sae import HierarchicalSaeModel
from tests.example_module import load_example


pytestmark = pytest.mark.skipif(find_spec("sae_lens") is None, reason="needs sae-lens")
SCRIPT = Path(__file__).parents[2] / "examples" / "studies" / "synthetic_benchmark.py"
TINY = {
    "features": 64,
    "roots": 2,
    "d_in": 24,
    "d_sae": 32,
    "batch_size": 64,
    "steps": 30,
    "save_steps": 10,
    "learning_rate": 1e-2,
    "eval_samples": 640,
    "budgets": [2, 4],
    "k": 8,
}


@pytest.fixture
def study(monkeypatch):
    module = load_example("studies/synthetic_benchmark.py")
    module.PRESETS["tiny"] = TINY

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--preset", "tiny", *map(str, arguments)])
        module.main()

    module.run_with = run
    return module


@pytest.mark.slow
def test_it_judges_every_dictionary_at_its_budgets_and_goes_on_with_more_seeds(study, tmp_path, capsys):
    study.run_with("--seeds", 0, "--output_dir", tmp_path)
    first = json.loads((tmp_path / "results.json").read_text())
    study.run_with("--seeds", 0, 1, "--output_dir", tmp_path)

    results = json.loads((tmp_path / "results.json").read_text())
    # Of all budgets and of the largest, read by threshold and but for BatchTopK by the strongest; one for each budget.
    assert len(results) == 2 * 5 + 4 + 3 * 2
    assert {name: runs[:1] for name, runs in results.items()} == first
    assert all(len(runs) == 2 and runs[0] != runs[1] for runs in results.values())
    for name, runs in results.items():
        budgets = [name.rpartition("-")[2]] if "-" in name else ["2", "4"]
        assert list(runs[0]) == budgets
        assert all(0 <= run[budget]["f1"] <= 1 and 0 < run[budget]["mcc"] <= 1 for run in runs for budget in budgets)
        assert all(run[budget]["latents"] == pytest.approx(int(budget), rel=0.3) for run in runs for budget in budgets)
    out = capsys.readouterr().out
    assert "| HierarchicalTopK | 1 |" in out and "| BatchTopK | 2 |" in out and "±" in out
    assert (tmp_path / "curves.png").stat().st_size > 10_000 and not list(tmp_path.glob("data*"))
    study.run_with("--seeds", 0, 1, "--check", 2, "--objectives", "TopK-2", "--output_dir", tmp_path)
    # One dictionary at one budget, by four measures.
    assert "Of 4 numbers of seed 2, " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds results with steps 30 and not 31: give another --output_dir"):
        study.run_with("--output_dir", tmp_path, "--steps", 31)


@pytest.mark.slow
def test_an_interrupted_training_ends_with_the_same_weights(study, tmp_path, monkeypatch):
    options = ["--objectives", "TopK-4", "--seeds", 0, "--output_dir"]
    study.run_with(*options, tmp_path / "whole")
    batch = study.Batches.batch

    def stopping(self, number):
        if number == 25:
            raise KeyboardInterrupt
        return batch(self, number)

    monkeypatch.setattr(study, "keep_batches", lambda *given: None)
    monkeypatch.setattr(study.Batches, "batch", stopping)
    with pytest.raises(KeyboardInterrupt):
        study.run_with(*options, tmp_path / "stopped")
    monkeypatch.setattr(study.Batches, "batch", batch)

    study.run_with(*options, tmp_path / "stopped")

    whole, stopped = (
        HierarchicalSaeModel.from_pretrained(tmp_path / name / "TopK-4" / "seed0") for name in ("whole", "stopped")
    )
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), stopped.parameters()))


def test_intervals_hold_another_seed(study):
    torch.manual_seed(0)
    inside = 0
    for _ in range(2000):
        *seen, new = torch.randn(4).tolist()
        mean, width = study.interval(seen)
        inside += abs(new - mean) <= width

    assert inside / 2000 == pytest.approx(0.95, abs=0.02)
    assert study.interval([0.3]) == (pytest.approx(0.3), None)


def test_numbers_of_another_seed_are_held_against_the_intervals(study):
    def numbers(f1):
        return {5: {**dict.fromkeys(study.MEASURES, 0.5), "f1": f1}}

    results = {"TopK-5": [numbers(0.50), numbers(0.52), numbers(0.54)]}

    assert study.inside_intervals(results, {"TopK-5": numbers(0.6)}, 7) == (
        "Of 4 numbers of seed 7, 4 lie in the intervals of the others."
    )
    assert study.inside_intervals(results, {"TopK-5": numbers(0.7)}, 7).endswith(
        "3 lie in the intervals of the others; outside are TopK-5 at 5: F1 0.700."
    )


def test_unknown_objectives_are_named(study, capsys):
    with pytest.raises(SystemExit):
        study.run_with("--objectives", "Gated")
    assert "--objectives must begin one of HierarchicalTopK, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", 15], "--steps must be at least 16, got 15"),
        (["--steps", 0], "--steps must be at least 16, got 0"),
        (["--learning_rate", 0], "--learning_rate must be positive, got 0.0"),
        (["--seeds", 0, 0], "--seeds: every seed is one draw, got 0 more than once"),
        (["--seeds", 0, 1, "--check", 1], "got 1 more than once"),
        (["--seeds", 0, "--check", 1], "--check needs at least 2 --seeds for an interval, got 1"),
    ],
)
def test_options_that_give_no_result_are_refused_before_anything_is_trained(study, options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        study.run_with(*options, "--output_dir", tmp_path / "out")
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
