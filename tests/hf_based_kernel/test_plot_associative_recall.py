"""The example script that draws a sweep, on made-up results."""

import json
import runpy
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "examples" / "studies" / "plot_associative_recall.py"


def run_line(kernel, seed, accuracy, learning_rate=1e-3, hidden_size=32, seq_len=64, **recipe):
    return json.dumps(
        {
            "kernel": kernel,
            "seq_len": seq_len,
            "num_pairs": 8,
            "feature_dim": 4,
            "num_attention_heads": 2,
            "vocab_size": 1024,
            "hidden_size": hidden_size,
            "max_steps": 20,
            "learning_rate": learning_rate,
            "batch_size": 64,
            "fillers": "random",
            "seed": seed,
            "parameters": 1000,
            "accuracy": accuracy,
            "curve": [[10, accuracy / 2], [20, accuracy]],
            "cpu_seconds": 60.0,
            **recipe,
        }
    )


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_table_has_the_best_rate_and_every_seed(monkeypatch, tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    lines = [run_line("rebased", seed, accuracy) for seed, accuracy in ((1, 0.95), (0, 0.85))]
    lines += [run_line("rebased", seed, 0.4, learning_rate=1e-2) for seed in (0, 1)]
    lines += [
        run_line("taylor", 0, 0.3),
        run_line("taylor", 0, 0.2, hidden_size=16),
        run_line("x2", 0, 0.1, seq_len=32),
    ]
    path.write_text("\n".join(lines) + "\n")
    run(monkeypatch, path)

    said = capsys.readouterr().out
    row = "| 32 | 4 | ReBased | 1,000 | 340 | 2 | 0.001: 0.900, 0.01: 0.400 | 0.900 | 0.850 – 0.950 | never, 20 |"
    assert row in said
    assert said.index("| 16 | 4 | Based |") < said.index("| 32 | 4 | ReBased |") < said.index("| 32 | 4 | Based |")
    assert said.index("| x² |") < said.index("| 16 | 4 | Based |"), "shorter tasks come first"
    assert "7 runs, 7 CPU-minutes of training" in said
    for name in ("recall_accuracy.png", "recall_curves.png"):
        assert (tmp_path / name).stat().st_size > 0


def test_runs_that_differ_in_the_recipe_are_no_further_seeds(monkeypatch, tmp_path, capsys):
    recipes = [{}, {"batch_size": 4}, {"batch_size": 4, "fillers": "zero"}]
    lines = [run_line("rebased", 0, 0.1 * number, **recipe) for number, recipe in enumerate(recipes)]
    (tmp_path / "results.jsonl").write_text("\n".join(lines) + "\n")
    run(monkeypatch, tmp_path / "results.jsonl")

    said = capsys.readouterr().out
    task = "| 8 pairs in 64 tokens of 1024, 20 steps"
    for recipe, accuracy in (("4, random", "0.100"), ("4, zero", "0.200"), ("64, random", "0.000")):
        row = f"{task}, batch {recipe} fillers | 32 | 4 | ReBased | 1,000 | 340 | 1 | 0.001: {accuracy} |"
        assert row in said
    assert "heads" not in said


@pytest.mark.parametrize(
    ("kernel", "heads", "numbers"),
    [
        ("rebased", 2, 10 * 2 * (16 + 1)),
        ("taylor", 2, 15 * 2 * (16 + 1)),
        ("attention", 2, 2 * 64 * 32),
        ("mamba2", 2, 2 * 32 * 64),
        # of 32 numbers, 12 heads take 24
        ("rebased", 12, 10 * 12 * (2 + 1)),
        ("attention", 12, 2 * 64 * 12 * 2),
    ],
)
def test_state_counts_what_a_layer_keeps(kernel, heads, numbers):
    script = runpy.run_path(str(SCRIPT))
    assert script["state_size"](json.loads(run_line(kernel, 0, 1.0, num_attention_heads=heads))) == numbers


def test_missing_results_are_one_clear_sentence(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "nothing.jsonl")
    assert "expected the results.jsonl of a sweep" in capsys.readouterr().err
