"""The study of methods as its user runs it: every method, every kind of task, interrupted, resumed, and given what it cannot use."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.example_module import load_example


REPOSITORY = Path(__file__).parents[2]
STUDIES = REPOSITORY / "examples" / "studies"
EXAMPLE = STUDIES / "train_methods.py"
SMALL = ["--prompts_per_step", 1, "--num_generations", 2, "--eval_size", 2, "--save_steps", 1000]


@pytest.fixture(scope="module")
def example():
    """The example as a module."""
    return load_example("studies/train_methods.py")


@pytest.fixture
def parse(example, monkeypatch):
    """Arguments as the example reads them from a command line."""

    def parse(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_methods.py", *map(str, arguments)])
        return example.parse_arguments()

    return parse


@pytest.fixture
def train(example, monkeypatch, tiny_language_model, tmp_path):
    """Runs the example in this process on the tiny model; returns what it wrote to result.json."""

    def train(*arguments) -> dict:
        always = ["--model", tiny_language_model, "--output_dir", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", ["train_methods.py", *map(str, [*always, *arguments])])
        example.main()
        return json.loads((tmp_path / "out" / "result.json").read_text())

    return train


@pytest.fixture
def dataset_folder(tmp_path):
    """A folder with a dataset of questions with answers in the manner of GSM8K."""

    def write(name="data", count=12, **columns) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        columns = columns or {"question": "What is half of {}?", "answer": "We halve it.\n#### {}/2"}
        lines = [json.dumps({key: text.format(number) for key, text in columns.items()}) for number in range(count)]
        (folder / "train.jsonl").write_text("".join(line + "\n" for line in lines))
        return folder

    return write


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so it is \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{1} or rather \\boxed{2}", "2"),
        ("\\boxed{3", None),
        ("no box", None),
    ],
)
def test_answer_is_read_from_the_last_complete_box(example, text, answer):
    assert example.ANSWER_FORMS["boxed"].read(text) == answer


@pytest.mark.parametrize(
    ("text", "answer", "formatted"),
    [
        ("First, 3 + 4 = 7.\nThen 7 - 2 = 5.\n\nAnswer: **5**.\nSo much for that.", "5", True),
        ("The answer is 4? No.\nThe final answer is: Tuesday", "Tuesday", True),
        ("ANSWER :\n  12", "12", True),
        ("We think.\nIt is `red`.\n", "It is `red", False),
        ("Every answer counts", "Every answer counts", False),
        ("My answer:", "My answer:", False),
        (" \n", None, False),
    ],
)
def test_what_an_answer_after_steps_says(example, text, answer, formatted):
    form = example.ANSWER_FORMS["stated"]
    assert (form.read(text), form.is_formatted(text)) == (answer, formatted)


@pytest.mark.parametrize(
    ("text", "formatted"),
    [
        ("3 + 4 = 7", True),
        ("The answer is -7.", True),
        ("7", True),
        ("-7.", True),
        ("To calculate 3 + 4, we need to", False),
        ("3 + 4", False),
        ("", False),
    ],
)
def test_a_completion_that_states_no_result_is_not_in_form(example, text, formatted):
    assert example.ANSWER_FORMS["integer"].is_formatted(text) is formatted


@pytest.mark.parametrize(
    ("solution", "gold"),
    [("20 + 1,000 = 1,020\n#### 1,020", "1020"), ("Hence $x = \\boxed{\\frac12}$.", "\\frac12"), (" 42 ", "42")],
)
def test_gold_answer_is_found_in_solutions_of_gsm8k_and_math(example, solution, gold):
    assert example.gold_answer(solution) == gold


def test_wilson_interval_matches_published_values(example):
    # Newcombe 1998, table I, method 3: 81/263, 15/148, 0/20
    for right, total, expected in [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0, 0.1611))]:
        assert example.wilson_interval(right, total) == pytest.approx(expected, abs=5e-5)


def test_wrong_unparsable_and_unformatted_answers_are_counted_apart(example, parse):
    task = example.reasoning_gym_task(parse())
    row = next(row for row in task.train if row["answer"] == "8")
    # "18" has a part of a point in reasoning-gym
    texts = ["It is 8.", "8", "8 plus", "18", "no idea"]
    completions = [{"text": text, "tokens": 3, "finished": text == "8"} for text in texts]

    score = example.score(completions, [row] * 5, task)

    assert (score["right"], score["accuracy"], score["unparsable"]) == (3, 0.6, 1)
    assert (score["format_rate"], score["exact_string"], score["finished"]) == (0.6, 0.2, 0.2)
    assert score["accuracy_when_formatted"] == pytest.approx(2 / 3)


def test_held_out_questions_are_not_trained_on(example, parse):
    task = example.reasoning_gym_task(parse("--eval_size", 100))
    other_seed = example.reasoning_gym_task(parse("--eval_size", 100, "--seed", 7))

    assert len(task.held_out) == 100
    assert not {row["question"] for row in task.held_out} & {row["question"] for row in task.train}
    assert [row["question"] for row in task.held_out] == [row["question"] for row in other_seed.held_out]


def test_other_tasks_of_reasoning_gym_take_their_options(example, parse):
    options = json.dumps({"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1})
    few = ["--num_questions", 20, "--eval_size", 4]
    sums = example.reasoning_gym_task(parse("--task", "chain_sum", "--task_options", options, *few))
    words = example.reasoning_gym_task(parse("--task", "word_sorting", *few))
    row = words.held_out[0]

    assert all(len(re.findall(r"\d", row["question"])) == 3 for row in sums.train + sums.held_out)
    assert "<answer>" in words.system_prompt
    assert words.grade(f"<answer>{row['answer']}</answer>", row)["right"]
    assert words.grade(row["answer"], row)["unparsable"]


def test_an_answer_at_which_the_check_raises_is_wrong(example, parse):
    few = ["--num_questions", 20, "--eval_size", 4, "--answer_form", "line"]
    task = example.reasoning_gym_task(parse("--task", "prime_factorization", *few))
    row = task.held_out[0]

    assert task.grade(row["answer"], row)["right"]
    assert not task.grade("To find the prime factors, we divide", row)["right"]


def test_datasets_are_checked_by_mathematical_value(example, parse, dataset_folder):
    task = example.dataset_task(parse("--task", dataset_folder(), "--eval_size", 3))
    row = next(row for row in task.train if row["answer"] == "1/2")

    assert len(task.train) == 9
    assert task.grade("It is \\boxed{0.5}", row)["right"]
    assert task.grade("It is \\boxed{\\frac{1}{2}}", row)["right"]
    assert not task.grade("It is \\boxed{2}", row)["right"]
    assert task.grade("It is 0.5", row)["unparsable"]


def test_prompt_holds_the_system_prompt_and_solved_examples(example, parse, tiny_language_model, dataset_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_language_model)
    boxed = parse("--task", dataset_folder(), "--eval_size", 3)
    shots = parse("--few_shot", 2, "--few_shot_answer", "{expression} = {answer}")
    task = example.reasoning_gym_task(shots)
    row = {"question": "What is half of 9?", "answer": "9/2"}

    system = f"system\n{example.BOXED_PROMPT}<|im_end|>\n<|im_start|>user\n{row['question']}"
    assert system in example.prompt_maker(tokenizer, example.dataset_task(boxed), boxed)(row)
    prompt = example.prompt_maker(tokenizer, task, shots)(row)
    first = task.train[0]
    assert f"{first['question']}<|im_end|>\n<|im_start|>assistant\n{first['expression']} = {first['answer']}" in prompt
    assert prompt.count("assistant") == 3


def test_default_prompt_is_chatml_without_a_system_message(example, parse, tiny_language_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_language_model)
    args = parse()
    prompt = example.prompt_maker(tokenizer, example.reasoning_gym_task(args), args)({"question": "1 + 1?"})

    assert prompt == "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"


def test_presets_name_their_dataset_unless_told_otherwise(parse):
    gsm8k, other = parse("--task", "gsm8k"), parse("--task", "math", "--answer_column", "short")

    assert (gsm8k.task, gsm8k.question_column, gsm8k.eval_split) == ("openai/gsm8k", "question", "test")
    assert (other.question_column, other.answer_column) == ("problem", "short")
    assert (gsm8k.learning_rate, parse("--method", "lora").learning_rate) == (1e-2, 1e-3)


def test_the_comparison_passes_arguments_that_exist(example, parse, tmp_path):
    comparison = load_example("studies/compare_methods.py")
    runs = [run for preset in comparison.PRESETS.values() for run in comparison.list_runs(preset, tmp_path, [])]

    methods = [parse(*run.arguments).method for run in runs if run.method]
    steps = {parse(*run.arguments).max_steps for run in runs if not run.method}
    assert set(methods) == set(example.METHODS)
    assert steps == {0}


def test_batched_completions_equal_single_ones_and_end_at_eos(example, tiny_language_model):
    model, tokenizer = example.example.load(tiny_language_model)
    # random weights repeat one token: this makes the end of the text likely after some of the prompts
    model.get_output_embeddings().weight.data[tokenizer.eos_token_id] *= 3
    prompts = ["a", "longer than a", "b c", "how long is this one?"]

    together = example.complete(model, tokenizer, prompts, max_new_tokens=8)
    alone = [example.complete(model, tokenizer, [p], max_new_tokens=8)[0] for p in prompts]

    assert together == alone and len({entry["text"] for entry in together}) > 1
    assert {entry["finished"] for entry in together} == {True, False}
    assert all(entry["tokens"] == 8 for entry in together if not entry["finished"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "trainable"),
    # two layers of width 32, inner width 64; LoRA of rank 4 on down_proj; coefficients and vectors of rank 4
    [
        (["bias"], 2 * 32),
        (["bias", "--layers", 1, "--bf16"], 32),
        (["bias_middle"], 32),
        (["bias_shared"], 32),
        (["bias_low_rank"], 4 * (2 + 32)),
        (["tinylora"], 13),
        (["beft"], 2 * 32),
        (["lora"], 2 * 4 * (32 + 64)),
        (["full"], None),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_every_method_is_trained_measured_and_evaluated(train, tmp_path, method, trainable):
    options = [
        "--method",
        *method,
        "--max_steps",
        2,
        "--eval_steps",
        1,
        "--eval_samples",
        2,
        "--gradient_checkpointing",
    ]
    result = train(*SMALL, *options, "--report_to", "tensorboard", "--num_generations", 4)

    trainable = trainable or result["total_parameters"]
    assert result["steps"] == len(result["rewards"]) == 2
    assert result["trainable_parameters"] == trainable
    # AdamW: two float32 moments per parameter, and a step counter for each tensor
    assert 8 * trainable <= result["optimizer_bytes"] <= 8 * trainable + 4 * 100
    # PEFT stores TinyLoRA's frozen matrices, (in + out) × 2, beside the 13 numbers
    stored = trainable + 2 * 2 * (3 * 96 + 2 * 48 + 2 * 64) * (method == ["tinylora"])
    assert 4 * stored <= result["file_bytes"] <= 4 * stored + 8192
    assert result["peak_memory_bytes"] > 0 and result["cpu_seconds_per_step"] > 0
    assert [entry["step"] for entry in result["during"]] == [1]
    for when in ("before", "after"):
        assert result[when]["greedy"]["questions"] == 2
        assert result[when]["sampled"]["questions"] == 4
    completions = (tmp_path / "out" / "completions_after.jsonl").read_text().splitlines()
    assert [json.loads(line)["question"].startswith("Calculate") for line in completions] == [True, True]
    assert any((tmp_path / "out").rglob("events.out.tfevents*"))


@pytest.mark.slow
def test_a_constant_reward_is_reported_and_can_stop_the_run(train, capsys):
    # nothing that this model says holds a box
    options = ["--answer_form", "boxed", "--signal_patience", 2, "--eval_size", 2, "--num_generations", 2]
    result = train("--prompts_per_step", 1, "--max_steps", 6, *options, "--stop_without_signal")

    assert result["steps"] == result["steps_without_signal"] == 2
    assert "all samples of each question had the same reward for 2 steps (mean 0.00)" in result["no_signal_warning"]
    output = capsys.readouterr()
    assert result["no_signal_warning"] in output.err and result["no_signal_warning"] in output.out


def test_evaluation_of_the_base_alone_trains_nothing(train, tmp_path):
    result = train("--max_steps", 0, "--eval_size", 3, "--few_shot", 1)

    assert result["before"]["greedy"]["questions"] == 3
    assert "after" not in result
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.slow
def test_interrupted_run_is_resumed_and_finished(train, tiny_language_model, tmp_path, capsys):
    folder = tmp_path / "out"
    command = [sys.executable, EXAMPLE, "--model", tiny_language_model, "--output_dir", folder, *SMALL]
    command += ["--max_steps", 5000]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    progress = b""
    while b"reward=" not in progress:  # the bar shows a reward once the first step is done
        chunk = os.read(process.stderr.fileno(), 4096)
        assert chunk, progress.decode()
        progress += chunk
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0].decode()
    (checkpoint,) = folder.glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))

    assert process.returncode == 0
    assert 1 <= step < 5000
    assert f"Stopped after step {step}. Go on with: --resume_from_checkpoint {checkpoint}" in output

    result = train(*SMALL, "--max_steps", step + 2, "--resume_from_checkpoint", checkpoint)

    printed = capsys.readouterr().out
    assert "Held out:" in printed and f"{folder}/reward.png" in printed
    assert result["steps"] == len(result["rewards"]) == step + 2
    assert result["trainable_parameters"] == 2 * 32
    assert (folder / "reward.png").stat().st_size > 10_000
    vectors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(vectors) == 2 and all(torch.isfinite(vector).all() for vector in vectors.values())

    # killed after its last step, and before it had answered
    (folder / "result.json").unlink()
    again = train(*SMALL, "--max_steps", step + 2, "--resume_from_checkpoint")

    assert again["steps"] == step + 2 and again["cpu_seconds_per_step"] is None
    for measured in ("rewards", "after", "steps_without_signal", "no_signal_warning"):
        assert again[measured] == result[measured]


@pytest.mark.slow
def test_two_processes_share_samples_and_held_out_questions(tiny_language_model, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 29611, EXAMPLE]
    command += ["--model", tiny_language_model, "--output_dir", tmp_path, *SMALL, "--eval_size", 5, "--max_steps", 2]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Held out:") == 1
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["after"]["greedy"]["questions"] == 5
    assert len((tmp_path / "completions_after.jsonl").read_text().splitlines()) == 5
    assert result["steps"] == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "no/such"], "--model must be a folder with a checkpoint or a hub id, got 'no/such'"),
        (["--eval_size", 0], "--eval_size must be in [1, 359] so that questions are left to train on, got 0"),
        (["--eval_size", 360], "--eval_size must be in [1, 359] so that questions are left to train on, got 360"),
        (["--task_options", '{"terms": 3}'], "--task_options do not fit the task basic_arithmetic"),
        (
            ["--task", "no/such"],
            "--task must be a reasoning-gym task, a preset, or a dataset on the hub or in a folder",
        ),
        (
            ["--method", "full", "--layers", 0],
            "--layers is for methods that can leave some out: --method full trains every",
        ),
        (["--chat_template", "jinjo"], "--chat_template must be chatml, plain or a Jinja file, got 'jinjo'"),
        (
            ["--prompts_per_step", 3, "--num_generations", 3, "--gradient_accumulation_steps", 2],
            "= 9 must be a multiple",
        ),
        (["--use_vllm", "--eval_size", 1], "--use_vllm needs vLLM, which is not installed"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_arguments_end_in_one_sentence(train, arguments, sentence):
    with pytest.raises(SystemExit) as error:
        train("--max_steps", 1, *arguments)

    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_base_for_rollouts_has_room_for_the_vectors_or_is_refused(example, tiny_language_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_language_model)
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    bases = {
        t: AutoModelForCausalLM.from_config(AutoConfig.for_model(t, **sizes, **heads)) for t in ("llama", "bloom")
    }

    for _ in range(2):  # written, then read
        ready = example.example.with_room_for_vectors(bases["llama"], tokenizer, tmp_path / "base")
        assert not ready.model.layers[0].mlp.down_proj.bias.any()
    with pytest.raises(SystemExit, match="--use_vllm: vLLM cannot hold steering vectors of BloomForCausalLM"):
        example.example.with_room_for_vectors(bases["bloom"], tokenizer, tmp_path / "other")


@pytest.mark.parametrize(("method", "what"), [("beft", "BEFT"), ("bias_shared", "vectors that share parameters")])
def test_what_does_not_merge_is_not_sampled_with_vllm(train, example, monkeypatch, method, what):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(SystemExit, match=f"--use_vllm cannot sample with {what}"):
        train("--use_vllm", "--method", method, "--eval_size", 1)


def test_missing_columns_are_named(train, dataset_folder):
    with pytest.raises(SystemExit, match="has no column answer, but question, solution: name them in"):
        train("--task", dataset_folder(question="{}?", solution="{}"))


@pytest.mark.parametrize("name", ["train.parquet", "train.csv"])
def test_an_empty_dataset_is_refused(train, tmp_path, name):
    folder = tmp_path / "empty"
    folder.mkdir()
    empty = Dataset.from_dict({"question": [], "answer": []})
    empty.to_parquet(folder / name) if name.endswith("parquet") else empty.to_csv(folder / name)
    with pytest.raises(SystemExit, match="with questions in split 'train', got .*empty"):
        train("--task", folder)


def test_a_model_without_chat_template_is_refused(train, tiny_language_model, dataset_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_language_model)
    tokenizer.chat_template = None
    AutoModelForCausalLM.from_pretrained(tiny_language_model).save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(SystemExit, match="has no chat template: choose --chat_template plain, chatml or a file"):
        train("--model", tmp_path / "bare", "--task", dataset_folder(), "--eval_size", 2)


@pytest.mark.parametrize("method", ["bias_shared", "bias_low_rank"])
def test_vectors_that_share_parameters_are_saved_as_one_for_each_layer(example, tiny_language_model, tmp_path, method):
    model, tokenizer = example.example.load(tiny_language_model)
    batch = tokenizer("What is 1 + 1?", return_tensors="pt")
    adapted = example.adapt(model, method, None)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    with torch.no_grad():
        expected = adapted(**batch).logits
    example.untie(adapted)
    adapted.save_pretrained(tmp_path)
    again = example.PeftModel.from_pretrained(example.example.load(tiny_language_model)[0], tmp_path)
    with torch.no_grad():
        found = again(**batch).logits
    vectors = torch.stack(list(load_file(tmp_path / "adapter_model.safetensors").values()))

    assert torch.equal(found, expected)
    assert vectors.shape == (2, 32) and vectors.any()
    assert torch.equal(vectors[0], vectors[1]) == (method == "bias_shared")
