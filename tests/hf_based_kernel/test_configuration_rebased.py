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


def test_no_rotary_positions_unless_asked_for():
    assert RebasedConfig().rope_parameters is None
    assert RebasedConfig(rope_theta=None).rope_parameters is None
    assert RebasedConfig(rope_theta=50.0).rope_parameters == {"rope_type": "default", "rope_theta": 50.0}
    rope_parameters = RebasedConfig(rope_parameters={"rope_type": "linear", "factor": 2.0}).rope_parameters
    assert rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}


def test_heads_and_biases_follow_one_another():
    config = RebasedConfig()
    assert (config.num_key_value_heads, config.attention_out_bias) == (12, False)
    assert RebasedConfig(attention_bias=True).attention_out_bias
    assert not RebasedConfig(attention_bias=True, attention_out_bias=False).attention_out_bias


LLAMA = {
    "layer_types": ["full_attention", "linear_attention"],
    "num_key_value_heads": 4,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0},
    "attention_bias": True,
    "attention_out_bias": False,
    "attention_dropout": 0.1,
}


@pytest.mark.parametrize("options", [{"layer_types": ["conv", "sliding_attention"], "use_beta": False}, LLAMA])
def test_config_survives_saving(tmp_path, options):
    config = RebasedConfig(num_hidden_layers=2, **options)
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
        ({"num_hidden_layers": 2, "layer_types": ["conv", "mamba"]}, "layer_types may hold .*, got mamba$"),
        ({"num_hidden_layers": 2, "layer_types": ["conv"]}, "must be equal to the number of `layer_types`"),
        ({"feature_dim": 0}, "feature_dim must be at least 1, got 0"),
        ({"conv_kernel_size": 1}, "conv_kernel_size must be at least 2, got 1"),
        ({"hidden_size": 8, "num_attention_heads": 12}, "head_dim must be at least 1, got 0"),
        ({"feature_dim": "16"}, "feature_dim"),
        ({"num_key_value_heads": 5}, r"num_attention_heads \(12\) must be a multiple of num_key_value_heads \(5\)"),
        ({"attention_dropout": 1.0}, r"attention_dropout must be in \[0, 1\), got 1.0"),
        ({"rope_parameters": {"rope_type": "cubic"}}, "rope_type must be one of default, linear, .* got 'cubic'"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "a dict, one rotation for all layers, got",
        ),
        ({"rope_parameters": "linear"}, "rope_parameters' expected a dict, got str"),
        (
            {"rope_parameters": {"rope_theta": 1.0}},
            r"rope_parameters\['rope_theta'\] must be a number above 1 and below 1e12, .*1.0",
        ),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, r"\['factor'\] must be a number above 0"),
        ({"rope_parameters": {"rope_theta": 100.0}, "head_dim": 5}, "rope_parameters need an even head_dim, got 5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1 or left out, .* 0.5"),
        ({"rope_theta": 100.0, "partial_rotary_factor": 0.25}, "partial_rotary_factor must be 1 or left out, .* 0.25"),
        ({"attention_eps": 0.0}, "attention_eps must be a finite number above 0, got 0.0"),
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
