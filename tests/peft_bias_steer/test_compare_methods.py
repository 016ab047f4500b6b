"""The comparison: which processes it starts, what it makes of their results, and that it never repeats one."""

import json
import sys
from dataclasses import replace

import pytest

from tests.example_module import load_example


# stands in for train_methods.py where only the handling of processes is tested
RECORDER = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
if "refuse" in sys.argv:
    sys.exit("refused")
with (folder / "commands.txt").open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if "fail" in sys.argv:
    sys.exit("no such thing")
if (folder / "checkpoint-1" / "optimizer.bin").exists() != ("--resume_from_checkpoint" in sys.argv):
    sys.exit("resumed from nothing, or not at all")
(folder / "result.json").write_text("{}")
"""


@pytest.fixture(scope="module")
def example():
    """The example as a module."""
    return load_example("studies/compare_methods.py")


@pytest.fixture
def recorder(example, monkeypatch, tmp_path):
    script = tmp_path / "recorder.py"
    script.write_text(RECORDER)
    monkeypatch.setattr(example, "TRAIN", script)


@pytest.fixture
def three(example, monkeypatch):
    """The preset of that name: three methods, three seeds, one rate each."""
    preset = replace(
        example.PRESETS["league"],
        methods=["bias", "lora_8", "full"],
        seeds=[0, 1, 2],
        rates=example.BEST,
        choosing_seed=None,
    )
    monkeypatch.setitem(example.PRESETS, "three", preset)
    return preset


def score(accuracy: float, format_rate: float = 0.8) -> dict:
    greedy = {"accuracy": accuracy, "interval": [0.0, 1.0], "format_rate": format_rate, "unparsable": 2}
    greedy |= {
        "exact_string": 0.0,
        "finished": 0.5,
        "most_frequent": 0.2,
        "accuracy_when_formatted": accuracy / format_rate,
    }
    return {"greedy": greedy, "sampled": {"accuracy": accuracy / 2}}


def write_results(runs, accuracies: dict[int, float], base: float = 0.1) -> None:
    """A result.json for each run, with an accuracy by seed."""
    for run in runs:
        run.folder.mkdir(parents=True)
        result = {"before": score(base)}
        if run.method:
            result = {"after": score(accuracies[run.seed]), "rewards": [0.1, accuracies[run.seed]], "during": []}
            result |= {"no_signal_warning": None, "trainable_parameters": 1000, "optimizer_bytes": 8000}
            result |= {"file_bytes": 4000, "peak_memory_bytes": 2**30, "seconds_per_step": 2.0}
            result |= {"cpu_seconds_per_step": 1.0 + run.seed, "cpu_seconds_sampling": 0.5}
        (run.folder / "result.json").write_text(json.dumps(result))


def test_every_run_of_a_preset_has_a_folder_of_its_own(example, tmp_path):
    for preset in example.PRESETS.values():
        runs = example.list_runs(preset, tmp_path, [])
        assert len({run.folder for run in runs}) == len(runs)


def test_finished_runs_are_not_repeated_and_broken_off_ones_resumed(example, recorder, tmp_path):
    runs = [example.Run(name, "task", tmp_path / name, ["--task", name], "bias") for name in "abcd"]
    runs[0].folder.mkdir()
    (runs[0].folder / "result.json").write_text("{}")
    for run in runs[1:3]:
        (run.folder / "checkpoint-1").mkdir(parents=True)
        (run.folder / "checkpoint-1" / "trainer_state.json").write_text('{"global_step": 1}')
    # without it, a checkpoint is one that was not written to its end
    (runs[1].folder / "checkpoint-1" / "optimizer.bin").write_text("")
    example.carry_out_all(runs, [sys.executable], jobs=2)
    example.carry_out_all(runs, [sys.executable], jobs=2)

    assert all(run.is_done for run in runs)
    assert not (runs[0].folder / "commands.txt").exists()
    for run, end in zip(runs[1:], ("b --resume_from_checkpoint", "c", "d")):
        assert (run.folder / "commands.txt").read_text() == f"--output_dir {run.folder} --task {end}\n"
        assert not (run.folder / "checkpoint-1").exists()


def test_a_result_that_was_made_with_other_settings_is_refused(example, recorder, tmp_path):
    runs = [example.Run("a", "task", tmp_path / "a", ["--max_steps", steps], "bias") for steps in ("1", "3")]
    example.carry_out_all(runs[:1], [sys.executable], jobs=1)

    with pytest.raises(SystemExit, match=r"a holds results with max_steps \['1'\] and not \['3'\]"):
        example.carry_out_all(runs[1:], [sys.executable], jobs=1)


def test_a_corrected_run_takes_the_place_of_one_that_was_refused(example, recorder, tmp_path):
    runs = [example.Run("a", "task", tmp_path / "a", ["--task", task], "bias") for task in ("refuse", "a")]
    with pytest.raises(SystemExit, match="refused"):
        example.carry_out_all(runs[:1], [sys.executable], jobs=1)
    example.carry_out_all(runs[1:], [sys.executable], jobs=1)

    assert runs[1].is_done


def test_a_failing_run_ends_the_comparison_in_one_sentence(example, recorder, tmp_path):
    runs = [example.Run(name, "task", tmp_path / name, ["--task", name], "bias") for name in ("fail", "later")]
    with pytest.raises(SystemExit, match=r"fail ended with 1, see .*fail.log: no such thing$"):
        example.carry_out_all(runs, [sys.executable], jobs=1)

    assert not (runs[1].folder / "commands.txt").exists()


def test_prediction_intervals_cover_a_further_seed_at_their_rate_even_where_two_agree(example):
    import torch

    draws = torch.randn(1000, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.02 + 0.5
    draws[:, 0] = 0.5 + 3 * (draws[:, 0] - 0.5)  # a method whose seeds differ more than others'
    inside, agreeing = torch.zeros(5), []
    for methods in draws:
        found = example.prediction_intervals([seeds[:3].tolist() for seeds in methods])
        for place, (seeds, (low, high)) in enumerate(zip(methods, found)):
            inside[place] += bool(low <= seeds[3] <= high)
            if place and seeds[:3].std() < 0.005:
                agreeing.append(bool(low <= seeds[3] <= high))
    # 95 % and more, less four standard errors of 0.7 %
    assert (inside / 1000 > 0.95 - 0.028).all() and inside[0] < inside[1:].min()
    assert len(agreeing) > 100 and sum(agreeing) / len(agreeing) > 0.93
    # one seed has no interval, and neither has the base; of a single method the interval is its own
    alone = example.prediction_intervals([[0.5], [0.50, 0.54, 0.52], [0.3]])
    assert alone[0] is alone[2] is None
    assert alone[1] == pytest.approx((0.52 - 0.0994, 0.52 + 0.0994), abs=1e-4)
    assert example.prediction_intervals([[0.5], [0.4]]) == [None, None]
    assert example.prediction_intervals([[0.9, 1.0]])[0][1] == 1.0


def test_table_gives_means_over_seeds_and_the_spread(example, three, tmp_path):
    runs = example.list_runs(three, tmp_path, [])
    write_results(runs, {0: 0.5, 1: 0.54, 2: 0.52})
    rows = example.summarize(runs)
    bias = next(row for row in rows if row["method"] == "bias")

    assert bias["accuracy"] == pytest.approx(0.52)
    # t(.975, 2) = 4.303, standard deviation 0.02
    assert bias["next_seed"] == pytest.approx((0.52 - 0.0994, 0.52 + 0.0994), abs=1e-4)
    assert bias["accuracy_when_formatted"] == pytest.approx(0.52 / 0.8)
    lines = example.accuracy_table(rows).splitlines()
    assert lines[2].startswith("| base | – | – | 10.0% (0.0% to 100.0%) | – | – | 5.0% | 80.0% |")
    assert (
        "| bias vectors | 0.01 | 3 | 52.0% | 50.0%, 54.0%, 52.0% | 42.1% to 61.9% | 26.0% | 80.0% | 65.0% | 2.0 |"
        in lines
    )
    assert "| bias vectors | 1,000 | 8,000 | 4,000 | 1,024 | 2.0 | 0.5 |" in example.cost_table(rows)


def test_whole_page_is_written_and_a_new_seed_checked_against_it(example, three, monkeypatch, tmp_path, capsys):
    write_results(example.list_runs(three, tmp_path, []), {0: 0.5, 1: 0.54, 2: 0.52})
    arguments = ["compare_methods.py", "--preset", "three", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    example.main()
    folder = tmp_path / "SmolLM2-135M-Instruct"
    page = (folder / "three.md").read_text()
    reference = folder / "reference.json"
    (folder / "three.json").rename(reference)

    assert page.startswith(f"`python compare_methods.py --preset three --output_dir {tmp_path}`")
    assert (folder / "three_basic_arithmetic.png").stat().st_size > 10_000

    seeds = {3: 0.6, 4: 0.7}
    monkeypatch.setattr(three, "seeds", list(seeds))
    write_results([run for run in example.list_runs(three, tmp_path, []) if run.method], seeds)
    new = ["--methods", "bias", "--seeds", "3", "4", "--reference", str(reference)]
    monkeypatch.setattr(sys, "argv", [*arguments, *new])
    capsys.readouterr()
    example.main()

    lines = capsys.readouterr().out.splitlines()
    assert "bias vectors, seed 3: 60.0%, within 42.1% to 61.9%" in lines
    assert "bias vectors, seed 4: 70.0%, OUTSIDE 42.1% to 61.9%" in lines


def test_what_is_finished_is_put_together_without_running_anything(example, three, monkeypatch, tmp_path, capsys):
    arguments = ["compare_methods.py", "--preset", "three", "--output_dir", str(tmp_path), "--only_finished"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="--only_finished found no finished run of three in"):
        example.main()
    write_results(example.list_runs(three, tmp_path, [])[:4], {0: 0.5})
    example.main()

    assert "| bias vectors | 0.01 | 1 | 50.0% (0.0% to 100.0%) | 50.0% | – |" in capsys.readouterr().out


def test_the_league_measures_the_best_rate_on_seeds_that_did_not_choose_it(example, recorder, monkeypatch, tmp_path):
    preset = replace(example.PRESETS["league"], methods=["bias", "lora_8", "full"])
    monkeypatch.setitem(example.PRESETS, "league", preset)
    reached = {"bias": [0.2, 0.6, 0.6], "lora_8": [0.3, 0.3, 0.2], "full": [0.3, 0.9, 0.5, 0.1]}
    sweep = replace(preset, seeds=[0], base={})
    for run in example.list_runs(sweep, tmp_path, []):
        write_results([run], {0: reached[run.method][preset.rates[run.method].index(run.rate)]})
    best = {"bias": [1e-2], "lora_8": [1e-4], "full": [1e-5]}
    write_results(example.list_runs(replace(preset, rates=best), tmp_path, []), {1: 0.5, 2: 0.54, 3: 0.52})
    monkeypatch.setattr(sys, "argv", ["compare_methods.py", "--preset", "league", "--output_dir", str(tmp_path)])
    example.main()

    folder = tmp_path / "SmolLM2-135M-Instruct"
    page = (folder / "league.md").read_text()
    assert "| bias vectors | 0.01 | 3 | 52.0% | 50.0%, 54.0%, 52.0% |" in page
    assert "| bias vectors | 0.003: 20.0% | 0.01: 60.0% | 0.03: 60.0% |" in page
    assert "| full fine-tuning | 1e-05 | 3 | 52.0% |" in page
    assert [row["seeds"] for row in json.loads((folder / "league.json").read_text()) if row["method"]] == [
        [1, 2, 3]
    ] * 3
    assert (folder / "league_basic_arithmetic.png").stat().st_size > 10_000


def test_tasks_are_put_side_by_side_with_their_best_prompt(example, tmp_path):
    preset = replace(example.PRESETS["beyond_prompts"], tasks=["gcd", "aiw"], seeds=[0])
    runs = example.list_runs(preset, tmp_path, [])
    for run in runs:
        write_results([run], {0: 0.5}, base={"base, 4 examples": 0.3}.get(run.label, 0.1))
    lines = example.task_table(example.summarize(runs)).splitlines()

    assert lines[0] == "| task | most frequent answer | best prompt | its answers right | bias vectors |"
    assert lines[2:] == [
        f"| {task} | 20.0% | 4 examples | 30.0% (0.0% to 100.0%) | 50.0% (0.0% to 100.0%) |" for task in preset.tasks
    ]


def test_interval_of_the_mean_covers_it_at_its_rate(example):
    import torch

    draws = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inside = sum(abs(sum(seeds) / 3) <= example.mean_interval(seeds) for seeds in draws.tolist())

    assert abs(inside / 4000 - 0.95) < 0.014
    assert example.mean_interval([0.5]) == 0


@pytest.mark.slow
def test_base_and_vectors_are_compared_for_real(example, monkeypatch, tiny_language_model, tmp_path, capsys):
    arguments = ["compare_methods.py", "--preset", "out_of_reach", "--model", tiny_language_model, "--jobs", "2"]
    small = ["--max_steps", "1", "--eval_size", "4", "--prompts_per_step", "1", "--num_generations", "2"]
    arguments += ["--output_dir", str(tmp_path), "--", *small]
    monkeypatch.setattr(sys, "argv", arguments)
    example.main()

    rows = json.loads(next(tmp_path.glob("*/out_of_reach.json")).read_text())
    assert [row["label"] for row in rows] == ["base", "bias vectors"]
    assert rows[1]["trainable_parameters"] == 64
    assert len(rows[1]["rewards"][0]) == 1


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--seeds", "0", "0"], "every seed is one draw, got 0 more than once"),
        (["--preset", "paper", "--methods", "ia3"], "--preset paper has rates for bias, lora, full, got ia3"),
        (
            ["--reference", "no/such.json"],
            "--reference: expected the .json of an earlier comparison, got no/such.json",
        ),
        (["--", "--max_steps", "0"], "each run trains, in a folder of its own, got --max_steps 0"),
    ],
)
def test_bad_arguments_are_refused(example, monkeypatch, capsys, arguments, sentence):
    monkeypatch.setattr(sys, "argv", ["compare_methods.py", *arguments])
    with pytest.raises(SystemExit):
        example.main()

    assert sentence in capsys.readouterr().err
