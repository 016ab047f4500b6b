"""The search over reasoning-gym's tasks as its user runs it."""

import json
import sys

import pytest

from tests.example_module import Killed, kill_while_writing, load_example


@pytest.fixture
def search(monkeypatch, tiny_language_model, tmp_path):
    """Runs the search on the tiny model; returns its lines, and the table that it printed."""
    load_example("studies/train_methods.py")
    example = load_example("studies/search_tasks.py")

    def search(capsys, *arguments):
        always = ["--model", tiny_language_model, "--output_dir", tmp_path]
        monkeypatch.setattr(sys, "argv", ["search_tasks.py", *map(str, [*always, *arguments])])
        example.main()
        lines = [json.loads(line) for line in (tmp_path / "tasks.jsonl").read_text().splitlines()]
        return {line.pop("task"): line for line in lines}, capsys.readouterr().out

    search.example = example
    return search


def test_what_prompts_begin_with_is_read_once_and_changes_nothing(search, tiny_language_model):
    study = search.example.study
    model, tokenizer = study.example.load(tiny_language_model)
    opening = "A sum: 3 + 4 = 7. Another sum: 2 + 9 = 11. And now: "
    for prompts in ([opening + "5 + 1 =", opening + "12 + 30 + 8 =", opening + "1"], ["One.", "Other, and longer."]):
        expected = [entry["text"] for entry in study.complete(model, tokenizer, prompts, max_new_tokens=12)]
        assert search.example.complete(model, tokenizer, prompts, max_new_tokens=12) == expected


def test_each_task_is_asked_once_or_left_out_with_a_reason(search, capsys, tmp_path, monkeypatch):
    asked = ["leg_counting", "family_relationships"]
    options = ("--questions", 2, "--longest_prompt", 1500, "--tasks")
    lines, table = search(capsys, *options, *asked, "arc_agi", "boxnet", "coin_flip")

    kinds = {"question, sampled", "step by step, sampled", "step by step", *search.example.PROMPTS}
    assert {task: set(lines[task]["right"]) for task in asked} == dict.fromkeys(asked, kinds)
    assert [lines[task]["integers"] for task in asked] == [True, False]
    assert lines["boxnet"]["left_out"] == "no answer is written down"
    assert lines["coin_flip"]["left_out"] == "its check takes 0 for every probability below 1"
    assert "arc_agi (answers of" in table and "2 tasks asked" in table
    assert (tmp_path / "tasks.png").stat().st_size > 1000

    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_while_writing("tasks.jsonl", patch)
        search(capsys, *options, "game_of_life_halting")
    again, longer_table = search(capsys, *options, *asked, "arc_agi", "spell_backward")
    assert set(again) == {*lines, "spell_backward"}
    assert longer_table.count("leg_counting") == 1
    with pytest.raises(SystemExit, match="holds results with longest_prompt 1500 and not 512, questions 2 and not 4"):
        search(capsys, "--questions", 4, "--tasks", *asked)


def test_checks_that_check_nothing_do_so(search):
    """Those that are left out for it: if reasoning-gym mends them, they can be asked."""
    for name, (right, wrong) in {"coin_flip": ("0.65625", "0"), "game_of_life_halting": ("True", "False")}.items():
        source, _ = search.example.DATASETS[name]
        assert source.score_answer(None, wrong, {"answer": right}) == 1.0
    assert set(search.example.NO_CHECKS) == {"coin_flip", "game_of_life_halting"}


def test_right_answers_are_counted(search, capsys, monkeypatch):
    """Who answers every question as it should be answered is right in each way of asking."""
    example = search.example
    load_task, answers = example.load_task, {}

    def load_and_tell(args, name):
        task = load_task(args, name)
        answers.update({row["question"]: row["answer"] for row in task.held_out})
        return task

    monkeypatch.setattr(example, "load_task", load_and_tell)

    def complete(model, tokenizer, prompts, **options):
        last = [prompt.rsplit("<|im_start|>user", 1)[-1] for prompt in prompts]
        return [next(f"**{answer}**\n" for q, answer in answers.items() if q.strip() in text) for text in last]

    monkeypatch.setattr(example, "complete", complete)
    lines, _ = search(
        capsys, "--questions", 3, "--longest_context", 10**6, "--tasks", "leg_counting", "spell_backward"
    )

    assert all(set(line["right"].values()) == {3} for line in lines.values())


def test_a_number_of_questions_that_cannot_be(search, capsys):
    with pytest.raises(SystemExit):
        search(capsys, "--questions", 0)
    assert "--questions must be at least 1, got 0" in capsys.readouterr().err
