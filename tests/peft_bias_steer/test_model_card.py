"""The card of a saved adapter loads it, and names a base model where the Hub takes the name; test_hub.py pushes it."""

import re

import pytest
from huggingface_hub import ModelCard
from peft import get_peft_model

from peft_bias_steer import BiasSteerConfig


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


@pytest.mark.parametrize("named", [None, "user/base"])
def test_a_base_in_a_folder_is_named_in_the_card_by_its_id_or_not_at_all(tiny_language_model, tmp_path, named):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_language_model)
    model = get_peft_model(base, BiasSteerConfig(task_type="CAUSAL_LM"))
    if named:
        model.peft_config["default"].base_model_name_or_path = named
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")

    assert card.data.get("base_model") == named
    assert [tag for tag in card.data.tags if "base_model" in tag] == ([f"base_model:adapter:{named}"] if named else [])
    assert card.text.count("import peft_bias_steer") == 1


@pytest.mark.parametrize("names", [["math"], ["math", "verse"], ["default", "math"], ["math", "default"]], ids=str)
def test_the_card_beside_the_folders_of_named_adapters_loads_each(tiny_language_model, tmp_path, monkeypatch, names):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_language_model)
    model = get_peft_model(base, BiasSteerConfig(task_type="CAUSAL_LM"), adapter_name=names[0])
    for layer, name in enumerate(names[1:]):
        model.add_adapter(name, BiasSteerConfig(task_type="CAUSAL_LM", layers_to_transform=layer))
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    snippets = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)

    assert card.data.get("base_model") is None and not [tag for tag in card.data.tags if "base_model" in tag]
    monkeypatch.chdir(tmp_path)
    for snippet, name in zip(snippets, names, strict=True):
        loaded = {"base_model": AutoModelForCausalLM.from_pretrained(tiny_language_model)}
        exec(snippet, loaded)
        expected, got = model.peft_config[name], loaded["model"].peft_config["default"]
        assert got.target_modules == expected.target_modules


def test_a_card_of_something_else_above_the_folder_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("# My runs\n")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").touch()
    BiasSteerConfig().save_pretrained(tmp_path / "adapter")

    assert (tmp_path / "README.md").read_text() == "# My runs\n"


def test_a_config_alone_is_no_adapter_of_the_folder_above(tmp_path):
    card = "---\nlibrary_name: peft\n---\n# LoRA\n"
    (tmp_path / "README.md").write_text(card)
    BiasSteerConfig().save_pretrained(tmp_path / "settings")
    assert (tmp_path / "README.md").read_text() == card


def test_a_card_in_another_encoding_keeps_its_bytes(tmp_path):
    card = "---\nbase_model: /a/b\n---\nSchrödinger\n".encode("latin-1")
    (tmp_path / "README.md").write_bytes(card)
    BiasSteerConfig(base_model_name_or_path="/a/b").save_pretrained(tmp_path)

    assert (tmp_path / "README.md").read_bytes().startswith(card)
