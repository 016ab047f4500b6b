"""Reading an adapter with one command: every part measured once, written down, and right where it can be known."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from peft_bias_steer import BiasSteerConfig
from tests.example_module import Killed, kill_while_writing, load_example


STUDIES = Path(__file__).parents[2] / "examples" / "studies"


@pytest.fixture(scope="module")
def example():
    """The example as a module; it imports the training script beside it."""
    sys.path.insert(0, str(STUDIES))
    module = load_example("studies/read_vectors.py")
    yield module
    sys.path.remove(str(STUDIES))


@pytest.fixture
def save_adapter(tiny_language_model, tmp_path):
    """Saves an adapter of the tiny model, with vectors of random numbers if it is BiasSteer; returns its folder."""

    def save(config=None) -> Path:
        base = AutoModelForCausalLM.from_pretrained(tiny_language_model)
        model = get_peft_model(base, config or BiasSteerConfig(task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if ".bias_steer_vector." in name:
                torch.nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return save


@pytest.fixture
def read(example, monkeypatch, tmp_path):
    def read(*arguments) -> dict:
        monkeypatch.setattr(sys, "argv", ["read_vectors.py", *map(str, arguments)])
        example.main()
        return json.loads((tmp_path / "reading" / "reading.json").read_text())

    return read


def test_every_part_is_measured_once_and_written_down(example, read, save_adapter, tmp_path, monkeypatch, capsys):
    # questions are right by chance, so that every number below is known
    monkeypatch.setattr(example.train_methods.Task, "grade", grade_by_first_letter)
    small = ["--eval_size", 5, "--max_completion_length", 3, "--scales", 0, 1, "--group_size", 1, "--transfer"]
    tasks = ["basic_arithmetic", "gcd"]
    arguments = [save_adapter(), "--output_dir", tmp_path / "reading", *small, *tasks]
    reading = read(*arguments)

    off, on = reading["scales"]
    ablation = reading["ablation"]
    assert [off["scale"], on["scale"]] == [0, 1]
    assert off["accuracy"] == ablation["none"] != ablation["all"] == on["accuracy"]
    assert ablation["groups"] == [[0], [1]]
    # with two layers, each alone is the other left out
    assert ablation["kept"] == ablation["left_out"][::-1]
    assert [lens["layer"] for lens in reading["lens"]] == reading["vectors"]["layers"] == [0, 1]
    assert all(ratio > 0 for ratio in reading["vectors"]["ratios"])
    own, other = reading["transfer"]
    assert [own["task"], other["task"]] == tasks
    # the task of the scales itself: the base model is scale 0
    assert [own["before"], own["after"]] == [{k: v for k, v in r.items() if k != "scale"} for r in (off, on)]
    assert other["before"]["questions"] == 5
    page = (tmp_path / "reading" / "reading.md").read_text()
    assert page in capsys.readouterr().out + "\n"
    assert f"| none | {ablation['none']:.1%} | {ablation['all']:.1%} |" in page
    for picture in ("vectors.png", "behaviour.png"):
        assert (tmp_path / "reading" / picture).stat().st_size > 10_000

    monkeypatch.setattr(example.Reader, "evaluate", None)
    rest = {part: numbers for part, numbers in reading.items() if part != "lens"}
    (tmp_path / "reading" / "reading.json").write_text(json.dumps(rest))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_while_writing("reading.json", patch)
        read(*arguments)
    assert read(*arguments) == reading
    with pytest.raises(SystemExit, match="holds results with eval_size '5' and not '6': give another --output_dir"):
        read(*arguments, "--eval_size", 6)
    torch.manual_seed(1)
    save_adapter()
    with pytest.raises(SystemExit, match="holds results with vectors '.*' and not '.*': give another --output_dir"):
        read(*arguments)


def grade_by_first_letter(self, completion: str, row: dict) -> dict[str, bool]:
    right = bool(completion) and ord(completion[0]) % 2 == 0
    return {"right": right, "formatted": True, "unparsable": False, "exact_string": False}


def test_other_adapters_are_refused(read, save_adapter, tmp_path):
    folder = save_adapter(LoraConfig(target_modules=["down_proj"]))
    with pytest.raises(SystemExit, match="expected a BiasSteer adapter, got a PeftType.LORA adapter in"):
        read(folder, "--output_dir", tmp_path / "reading")


def test_a_folder_without_adapter_is_refused(read, tmp_path):
    with pytest.raises(SystemExit, match="expected the folder or hub id of an adapter, got"):
        read(tmp_path / "nothing")


def test_groups_need_at_least_one_layer(read, tmp_path):
    with pytest.raises(SystemExit, match="--group_size must be at least 1, got 0"):
        read(tmp_path, "--group_size", 0)
