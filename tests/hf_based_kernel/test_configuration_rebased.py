import pytest
from transformers import AutoConfig, GPT2Config

from hf_based_kernel import RebasedConfig


def test_defaults_are_the_papers_pile_model():
    config = RebasedConfig()
    assert config.layer_types == ["conv", "linear_attention"] * 9
    assert (config.intermediate_size, config.head_dim) == (1536, 64)
    assert config.use_qk_norm and config.use_gamma and config.use_beta


def test_taylor_kernel_learns_no_feature_map():
    config = RebasedConfig(kernel="taylor")
    assert not (config.use_qk_norm or config.use_gamma or config.use_beta)


def test_config_survives_saving(tmp_path):
    config = RebasedConfig(num_hidden_layers=2, layer_types=["conv", "sliding_attention"], use_beta=False)
    config.save_pretrained(tmp_path)
    assert RebasedConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "cubic"}, "kernel must be one of rebased, taylor, got 'cubic'"),
        ({"conv_type": "long"}, "conv_type must be one of gated, base, got 'long'"),
        ({"norm_type": "batch"}, "norm_type must be one of rms_norm, layer_norm, got 'batch'"),
        (
            {"num_hidden_layers": 1, "layer_types": ["chunked_attention"]},
            "layer_types may hold conv, linear_attention, sliding_attention, full_attention, got chunked_attention",
        ),
        ({"num_hidden_layers": 2, "layer_types": ["conv"]}, "must be equal to the number of `layer_types`"),
        ({"feature_dim": 0}, "feature_dim must be at least 1, got 0"),
        ({"conv_kernel_size": 1}, "conv_kernel_size must be at least 2, got 1"),
        ({"hidden_size": 8, "num_attention_heads": 12}, "head_dim must be at least 1, got 0"),
        ({"feature_dim": "16"}, "feature_dim"),
    ],
)
def test_bad_configuration_is_one_clear_sentence(options, message):
    with pytest.raises(Exception, match=message):
        RebasedConfig(**options)


def test_the_configuration_of_another_model_is_refused(tmp_path):
    GPT2Config().save_pretrained(tmp_path)

    assert AutoConfig.from_pretrained(tmp_path).model_type == "gpt2"
    with pytest.raises(ValueError, match="expected the configuration of a rebased model, got model_type='gpt2'"):
        RebasedConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "feature_dim", "sliding_window", "head_dim"])
@pytest.mark.parametrize("value", [True, 2.0, 2.5, float("nan"), "2", 0, -1])
def test_sizes_are_whole_numbers_and_positive(name, value):
    with pytest.raises(Exception, match=name):
        RebasedConfig(**{name: value})


@pytest.mark.parametrize("name", ["attention_eps", "norm_eps", "initializer_range"])
@pytest.mark.parametrize("value", [True, float("nan"), float("inf"), -1e-6, "1e-6"])
def test_small_numbers_are_finite_and_not_negative(name, value):
    with pytest.raises(Exception, match=name):
        RebasedConfig(**{name: value})
