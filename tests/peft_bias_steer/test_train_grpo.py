"""The example as a user runs it: trained, interrupted, resumed, in two processes, and given what it cannot use."""

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from huggingface_hub import ModelCard
from peft import PeftConfig
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaForCausalLM, ProgressCallback

from tests.example_module import load_example


REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples" / "peft_bias_steer"
EXAMPLE = EXAMPLES / "train_grpo.py"
SMALL = ["--prompts_per_step", 1, "--num_generations", 2, "--eval_size", 2]


@pytest.fixture(scope="module")
def example():
    """The example as a module."""
    return load_example("peft_bias_steer/train_grpo.py")


@pytest.fixture
def train(example, monkeypatch, tiny_language_model, tmp_path):
    """Runs the example in this process on the tiny model; returns what it wrote to result.json."""

    def train(*arguments) -> dict:
        always = ["--model", tiny_language_model, "--output_dir", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", ["train_grpo.py", *map(str, [*always, *arguments])])
        example.main()
        return json.loads((tmp_path / "out" / "result.json").read_text())

    return train


def test_the_example_is_short_enough_to_copy():
    text = EXAMPLE.read_text()

    assert len(text.splitlines()) <= 250
    assert text.count("    add(") <= 15


@pytest.mark.parametrize(
    ("completion", "right"),
    [("8", True), ("3 + 5 = 8", True), ("8 + 1", False), ("18", False), ("-8", False), ("", False)],
)
def test_the_last_integer_is_the_answer(example, completion, right):
    assert example.is_right(completion, "8") is right


def test_held_out_questions_are_not_trained_on(example):
    args = types.SimpleNamespace(task="basic_arithmetic", task_options=None, eval_size=100)
    train, held_out = example.make_questions(args)

    assert len(held_out) == 100
    assert not {row["question"] for row in held_out} & {row["question"] for row in train}


def test_prompt_is_chatml_without_a_system_message(example, tiny_language_model):
    _, tokenizer = example.load(tiny_language_model)

    prompt = example.make_prompt(tokenizer, {"question": "1 + 1?"})
    assert prompt == "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"


def test_batched_answers_equal_single_ones(example, tiny_language_model):
    model, tokenizer = example.load(tiny_language_model)
    rows = [{"question": question} for question in ("a", "longer than a", "b c")]

    together = example.answer(model, tokenizer, rows, 8)
    assert together == [example.answer(model, tokenizer, [row], 8)[0] for row in rows]


@pytest.mark.slow
def test_bars_move_at_every_pass_of_the_model(train, monkeypatch):
    """A step may take longer than one likes to look at a bar that stands still; a pass does not."""
    shown, updates, passes = [], [], []
    assert sys.modules["progress"].SECONDS_BETWEEN == 1
    monkeypatch.setattr(sys.modules["progress"], "SECONDS_BETWEEN", 0)
    monkeypatch.setattr(tqdm, "set_postfix_str", lambda bar, text="", refresh=True: refresh and shown.append(text))
    monkeypatch.setattr(tqdm, "update", lambda bar, n=1: bar.desc and "answers" in bar.desc and updates.append(n))
    forward = LlamaForCausalLM.forward
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda *a, **k: passes.append(1) or forward(*a, **k))
    train(*SMALL, "--max_steps", 2)

    # Answers before and after; samples and learning, of two steps.
    assert len(shown) + len(updates) >= len(passes) > 2 * 3 and len(updates) >= 4 and len(shown) >= 2 * 3
    assert shown[-1] == f"{len(shown)} passes of the model"


def test_a_bar_is_drawn_once_a_second_however_fast_the_passes(example, monkeypatch):
    now, drawn = [100.0], []
    monkeypatch.setattr(sys.modules["progress"].time, "monotonic", lambda: now[0])
    bar = types.SimpleNamespace(set_postfix_str=drawn.append)
    callback = ProgressCallback()
    callback.training_bar = bar
    shown = example.PassesShown(types.SimpleNamespace(callback_handler=types.SimpleNamespace(callbacks=[callback])))
    for _ in range(9):
        shown.show()
        now[0] += 0.25

    assert drawn == ["1 passes of the model", "5 passes of the model", "9 passes of the model"]


@pytest.mark.slow
def test_chosen_layers_are_trained_and_saved_under_the_name_of_their_base(train, tiny_language_model, tmp_path):
    result = train(*SMALL, "--max_steps", 2, "--layers", 1, "--num_generations", 4)

    assert result["steps"] == len(result["rewards"]) == 2
    assert len(load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")) == 1
    assert PeftConfig.from_pretrained(tmp_path / "out" / "adapter").base_model_name_or_path == tiny_language_model
    (metric,) = ModelCard.load(tmp_path / "out" / "adapter" / "README.md").data.eval_results
    assert (metric.metric_type, metric.metric_value) == ("accuracy", result["after"])
    assert load_example("studies/demo_page.py").steer(tmp_path / "out")["rows"] == result["answers"]


@pytest.mark.slow
def test_interrupted_run_is_resumed_and_finished(train, tiny_language_model, tmp_path, capsys):
    folder = tmp_path / "out"
    command = [sys.executable, EXAMPLE, "--model", tiny_language_model, "--output_dir", folder, *SMALL]
    command += ["--max_steps", 5000]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.STDOUT, stdout=subprocess.PIPE)
    progress = b""
    while b"'reward':" not in progress:  # logged once the first step is done
        chunk = os.read(process.stdout.fileno(), 4096)
        assert chunk, progress.decode()
        progress += chunk
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 130, output
    step = max(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))
    checkpoint = folder / f"checkpoint-{step}"
    assert 1 <= step < 5000
    assert f"Stopped after step {step}. Go on with: --resume_from_checkpoint {checkpoint}" in output

    result = train(*SMALL, "--max_steps", step + 2, "--resume_from_checkpoint", checkpoint)

    printed = capsys.readouterr().out
    assert "Held out:" in printed and f"{folder}/reward.png" in printed
    assert result["steps"] == len(result["rewards"]) == step + 2
    assert (folder / "reward.png").stat().st_size > 10_000
    vectors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(vectors) == 2 and all(torch.isfinite(vector).all() for vector in vectors.values())

    with pytest.raises(SystemExit):
        train(*SMALL, "--max_steps", step + 2, "--seed", 7, "--resume_from_checkpoint")
    assert "was trained with seed 0 and not 7; give its options to go on from it" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_share_samples_and_held_out_questions(tiny_language_model, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 29613, EXAMPLE]
    command += ["--model", tiny_language_model, "--output_dir", tmp_path, *SMALL, "--eval_size", 5, "--max_steps", 2]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Held out:") == 1
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 2


@pytest.mark.slow
def test_vllm_gets_a_base_with_room_for_the_vectors_and_is_checked(train, example, monkeypatch, tmp_path):
    calls, trainers = [], []

    class Trainer(example.GRPOTrainer):
        def __init__(self, *given, args, **kwargs):
            args.use_vllm = False  # there is none here
            super().__init__(*given, args=args, **kwargs)
            trainers.append(self)

    found = types.SimpleNamespace(util=types.SimpleNamespace(find_spec=lambda name: object()))
    monkeypatch.setattr(example, "importlib", found)
    monkeypatch.setattr(example, "GRPOTrainer", Trainer)
    monkeypatch.setattr(example, "sync_vectors_only", lambda trainer: calls.append("sync"))
    monkeypatch.setattr(example, "check_vllm_sync", lambda trainer: calls.append("check"))
    result = train(*SMALL, "--max_steps", 1, "--use_vllm")

    assert calls == ["sync", "check"] and result["steps"] == 1
    base = trainers[0].model.get_base_model()
    assert base.name_or_path == str(tmp_path / "out" / "base")
    assert not AutoModelForCausalLM.from_pretrained(base.name_or_path).model.layers[0].mlp.down_proj.bias.any()


@pytest.mark.parametrize("path", sorted((EXAMPLES / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_configurations_are_read_by_accelerate(path):
    config = load_config_from_file(str(path))

    assert config.num_processes == 8
    assert config.distributed_type in ("MULTI_GPU", "FSDP", "DEEPSPEED")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "no/such"], "--model must be a folder with a checkpoint or a hub id, got 'no/such'"),
        (["--eval_size", 0], "--eval_size must be in [1, 359] so that some are left, got 0"),
        (["--eval_size", 360], "--eval_size must be in [1, 359] so that some are left, got 360"),
        (["--task_options", '{"terms": 3}'], "--task and --task_options must name a task of reasoning-gym"),
        (["--task", "no/such"], "--task and --task_options must name a task of reasoning-gym"),
        (["--task", "word_sorting"], "--task must be one whose answers are integers, got word_sorting"),
        (["--use_vllm"], "--use_vllm needs vLLM, which is not installed"),
    ],
    ids=lambda value: "_".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_arguments_end_in_one_sentence(train, arguments, sentence):
    with pytest.raises(SystemExit) as error:
        train("--max_steps", 1, *arguments)

    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--max_steps", 0], "--max_steps must be at least 1, got 0"),
        (["--learning_rate", -1], "--learning_rate must be positive, got -1.0"),
        (["--num_generations", 1], "--num_generations must be at least 2, got 1"),
        (["--prompts_per_step", 0], "--prompts_per_step must be at least 1, got 0"),
        (["--seed", -1], "--seed must be at least 0, got -1"),
        (["--layers", 1, 9], "--layers must be in [0, 1], the layers of "),
        (["--resume_from_checkpoint"], "out holds no checkpoint that was written to its end"),
    ],
)
def test_bad_numbers_and_checkpoints_are_refused_before_anything_is_loaded(train, capsys, arguments, sentence):
    with pytest.raises(SystemExit):
        train(*arguments)

    assert sentence in capsys.readouterr().err
