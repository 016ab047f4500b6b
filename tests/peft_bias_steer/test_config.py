"""A config holds plain values that can be saved, whatever library they came from, or is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftConfig, get_peft_model

from peft_bias_steer import BiasSteerConfig
from peft_bias_steer.config import as_index


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


@pytest.mark.parametrize(
    ("indices", "plain"),
    [
        (np.arange(1, 3), [1, 2]),
        (np.int64(2), 2),
        (np.array(2), 2),
        (torch.arange(1, 3), [1, 2]),
        (torch.tensor(-1), -1),
        ([np.int32(0), torch.tensor(2)], [0, 2]),
        ((0, 2), [0, 2]),
        ({1}, [1]),
    ],
)
def test_layer_indices_of_any_library_become_plain_integers(llama, tmp_path, indices, plain):
    config = BiasSteerConfig(layers_to_transform=indices)
    assert config.layers_to_transform == plain
    assert all(type(index) is int for index in np.atleast_1d(np.array(config.layers_to_transform, dtype=object)))

    get_peft_model(llama(), config).save_pretrained(tmp_path)
    layers = json.loads((tmp_path / "adapter_config.json").read_text())["layers_to_transform"]
    assert layers == sorted(index % 3 for index in (plain if isinstance(plain, list) else [plain]))


@pytest.mark.parametrize(
    "indices",
    [
        True,
        [False],
        1.0,
        [0.5],
        "1",
        ["0"],
        {0: 1},
        np.array([1.0]),
        np.array([True]),
        np.float64(1),
        torch.tensor(True),
        torch.tensor([1.0]),
        [None],
        [[1]],
    ],
)
def test_layer_indices_that_are_no_integers_are_refused(indices):
    with pytest.raises(TypeError, match="layers_to_transform.* must be an integer, got"):
        BiasSteerConfig(layers_to_transform=indices)


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("target_modules", [1], TypeError, "target_modules must be a list of names"),
        ("target_modules", 3, TypeError, "target_modules must be a list of names"),
        ("target_modules", {"down_proj": 1}, TypeError, "target_modules must be a list of names"),
        ("target_modules", "layers.(", ValueError, "target_modules must be a list of names or a regular expression"),
        ("exclude_modules", "[", ValueError, "exclude_modules must be .* a regular expression"),
        ("modules_to_save", "lm_head", TypeError, r"modules_to_save must be a list of names such as \[\"lm_head\"\]"),
        ("modules_to_save", [None], TypeError, "modules_to_save must be a list of names"),
        ("layers_pattern", 1, TypeError, "layers_pattern must be a list of names"),
        ("init_weights", "False", TypeError, "init_weights must be True or False, got 'False'"),
        ("init_weights", 0, TypeError, "init_weights must be True or False"),
        ("inference_mode", None, TypeError, "inference_mode must be True or False"),
        ("revision", torch.zeros(1), TypeError, "revision must be a value that JSON can hold"),
    ],
)
def test_values_that_cannot_be_meant_or_saved_are_refused(field, value, error, message):
    with pytest.raises(error, match=message):
        BiasSteerConfig(**{field: value})


def test_strings_booleans_and_paths_of_other_libraries_become_plain(tmp_path):
    config = BiasSteerConfig(
        target_modules=np.array(["down_proj"]),
        modules_to_save=("lm_head",),
        init_weights=np.bool_(False),
        base_model_name_or_path=Path("base"),
    )
    config.save_pretrained(tmp_path)

    assert config.init_weights is False and config.modules_to_save == ["lm_head"]
    assert PeftConfig.from_pretrained(tmp_path) == config


def test_a_value_that_was_set_later_is_looked_at_before_the_model_is_changed(llama, tmp_path):
    config = BiasSteerConfig()
    config.layers_to_transform = np.arange(2)
    get_peft_model(llama(), config).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).layers_to_transform == [0, 1]

    config.revision = object()
    base = llama()
    with pytest.raises(TypeError, match="revision must be a value that JSON can hold"):
        get_peft_model(base, config)
    assert not any("bias_steer" in name for name, _ in base.named_modules())


def test_a_config_file_with_a_boolean_for_a_layer_is_refused(tmp_path):
    BiasSteerConfig(layers_to_transform=[1]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "layers_to_transform": [True]}))

    with pytest.raises(TypeError, match="layers_to_transform must be an integer, got True"):
        PeftConfig.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_old_config_whole(tmp_path):
    config = BiasSteerConfig(layers_to_transform=[1])
    config.save_pretrained(tmp_path)
    before = (tmp_path / "adapter_config.json").read_bytes()
    config.revision = object()

    with pytest.raises(TypeError):
        config.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["adapter_config.json"]


def test_a_card_in_another_encoding_keeps_its_bytes(tmp_path):
    (tmp_path / "README.md").write_bytes("# Für Elise\n".encode("latin-1"))
    BiasSteerConfig().save_pretrained(tmp_path)

    card = (tmp_path / "README.md").read_bytes()
    assert card.startswith("# Für Elise\n".encode("latin-1")) and b"import peft_bias_steer" in card


def test_one_config_serves_models_with_other_layers(llama):
    config = BiasSteerConfig(layers_to_transform=-1)
    for depth in (3, 5, 3):
        model = get_peft_model(llama(num_hidden_layers=depth), config)
        assert list(model.base_model.steering_layers) == [f"model.layers.{depth - 1}"]
        assert model.peft_config["default"] is config and config.layers_to_transform == [depth - 1]


def test_a_refused_config_stays_as_it_was(llama):
    settings = {"layers_to_transform": -1, "modules_to_save": ["lm_head", "self_attn.layers", "model"]}
    config = BiasSteerConfig(**settings)
    with pytest.raises(ValueError):
        get_peft_model(llama(), config)

    assert config == BiasSteerConfig(**settings)


@pytest.mark.parametrize(
    "value", [True, np.True_, torch.tensor(True), 1.0, np.float32(1), torch.tensor(1.0), "1", None]
)
def test_an_index_is_an_integer(value):
    assert [as_index(one, "k") for one in (1, np.uint8(1), torch.tensor(1))] == [1, 1, 1]
    with pytest.raises(TypeError, match="k must be an integer, got"):
        as_index(value, "k")
