import re

import pytest
from peft import PeftConfig, get_peft_model

from peft_bias_steer import BiasSteerConfig


def test_config_survives_saving_and_loading(tmp_path):
    config = BiasSteerConfig(
        target_modules=["down_proj"],
        exclude_modules=["layers.0"],
        layers_to_transform=range(1, 3),
        task_type="CAUSAL_LM",
    )

    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)

    assert type(loaded) is BiasSteerConfig
    assert loaded == config
    assert loaded.target_modules == {"down_proj"} and loaded.layers_to_transform == [1, 2]


def test_model_card_shows_how_to_load_the_adapter(tiny_language_model, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_language_model)
    model = get_peft_model(base, BiasSteerConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)

    assert "- bias-steer\n" in card
    assert len(snippets) == 1 and "import peft_bias_steer" in snippets[0]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(snippets[0], names)
    assert "default" in names["model"].peft_config


@pytest.mark.parametrize("task_type", [None, "SEQ_2_SEQ_LM", "SEQ_CLS"])
def test_model_card_names_a_class_that_exists(llama, tmp_path, task_type):
    import peft

    config = BiasSteerConfig(task_type=task_type)
    (tmp_path / "README.md").write_text("# A card\n")
    config.save_pretrained(tmp_path)
    (auto_class,) = re.findall(r"from peft import (\w+)", (tmp_path / "README.md").read_text())

    assert hasattr(peft, auto_class)
