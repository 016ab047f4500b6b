from peft import PeftConfig

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
