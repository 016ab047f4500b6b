"""The card of a saved adapter loads it, and names a base model where the Hub takes the name; test_hub.py pushes it."""

import re

import pytest
from huggingface_hub import ModelCard, ModelCardData
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_bias_steer import BiasSteerConfig


def test_model_card_shows_how_to_load_the_adapter(tiny_language_model, tmp_path, monkeypatch):
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


def test_the_card_says_what_the_adapter_is_and_is_no_form(tiny_language_model, tmp_path):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_language_model, num_hidden_layers=12, ignore_mismatched_sizes=True),
        BiasSteerConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"]),
    )
    model.peft_config["default"].base_model_name_or_path = "user/base"
    model.save_pretrained(tmp_path)
    first = (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path)

    assert "Needed" not in first and "Model ID" not in first
    assert (tmp_path / "README.md").read_text().rstrip() == first.rstrip()
    assert "# Steering vectors for [user/base](https://huggingface.co/user/base)\n" in first
    assert "384 numbers: a vector of 32, added at every token to the output of each of 12 modules" in first
    assert ", `model.layers.0` to `model.layers.11`. Trained whole beside it: `lm_head`. All other" in first
    assert (
        first.index("arxiv.org/abs/2505.18706") < first.index("learning.\n\n### Framework") < first.index("## Usage")
    )
    # What somebody wrote stays, and so does the rest of a form that somebody began to fill in.
    form = ModelCard.from_template(ModelCardData()).text.replace("[More Information Needed]", "me", 1)
    (tmp_path / "README.md").write_text(f"---\nlibrary_name: peft\n---\n{form}")
    model.save_pretrained(tmp_path)
    assert form.strip() in (tmp_path / "README.md").read_text()


def test_the_card_of_one_vector_names_its_layer(llama, tmp_path):
    get_peft_model(llama(), BiasSteerConfig(layers_to_transform=1)).save_pretrained(tmp_path)

    card = (tmp_path / "README.md").read_text()
    assert "# Steering vectors for a language model\n" in card
    assert "a vector of 32, added at every token to the output of `model.layers.1`. All other weights" in card


def test_the_card_of_a_pickled_adapter_is_of_this_folder(llama, tmp_path):
    get_peft_model(llama(), BiasSteerConfig()).save_pretrained(tmp_path, safe_serialization=False)

    assert "Vectors that are added to the outputs of layers. All other" in (tmp_path / "README.md").read_text()


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
