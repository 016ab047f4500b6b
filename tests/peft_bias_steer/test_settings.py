"""What an engine of vLLM is started with, and what a request asks for."""

import types

import pytest

from peft_bias_steer import vllm_overrides
from peft_bias_steer.serving.vllm.settings import Choice, EngineSettings, read_choice


def engine(**fields):
    return types.SimpleNamespace(model_config=types.SimpleNamespace(hf_config=types.SimpleNamespace(**fields)))


def test_overrides_become_the_settings_of_the_engine():
    overrides = vllm_overrides({"math": "folder"}, max_adapters=3, default="math", folder="adapters")

    assert EngineSettings.of(engine(**overrides)) == EngineSettings({"math": "folder"}, 3, "math", "adapters")
    assert EngineSettings.of(engine(**vllm_overrides())) == EngineSettings()
    assert EngineSettings.of(engine()) is None


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"adapters": {"a": "x", "b": "y"}, "max_adapters": 1}, ValueError, "max_adapters of 2 or more, got 1"),
        ({"max_adapters": 0}, ValueError, "max_adapters of 1 or more, got 0"),
        ({"max_adapters": 1.5}, TypeError, "max_adapters must be an integer, got 1.5"),
        ({"adapters": {"__base__": "x"}}, ValueError, "a string other than '__base__', got '__base__'"),
        ({"adapters": {"": "x"}}, ValueError, "a string other than '__base__', got ''"),
        ({"adapters": ["a"]}, TypeError, r"expected adapters to be a dictionary of folders by name, got \['a'\]"),
        ({"adapters": {"a": 3}}, TypeError, "expected a path or a Hub id for a, got 3"),
        ({"folder": 3}, TypeError, "expected a path or a Hub id for folder, got 3"),
        ({"default": "math"}, ValueError, r"the default to be one of \[\], got 'math'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        vllm_overrides(**options)


def test_misspelt_settings_are_refused():
    with pytest.raises(ValueError, match="adapters, max_adapters, default, folder, got {'adapter': 'x'}"):
        EngineSettings.of(engine(bias_steer={"adapter": "x"}))
    with pytest.raises(ValueError, match="to be a dictionary .* got 'x'"):
        EngineSettings.of(engine(bias_steer="x"))


def test_a_request_names_an_adapter_or_gets_the_default():
    assert read_choice(None, None) is None
    assert read_choice({"top_k": 1}, None) is None
    assert read_choice({}, "math") == Choice("math")
    assert read_choice({"bias_steer": "__base__"}, "math") is None
    asked = {"bias_steer": "code", "bias_steer_scale": 2, "bias_steer_tokens": "prompt"}
    assert read_choice(asked, "math") == Choice("code", 2.0, "prompt")
    assert read_choice({"bias_steer_scale": 0.5}, "math") == Choice("math", 0.5)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"bias_steer_scale": 2.0}, ValueError, "bias_steer_scale without bias_steer: name the adapter"),
        ({"bias_steer": "a", "bias_steer_scale": True}, TypeError, "bias_steer_scale must be a number, got True"),
        ({"bias_steer": "a", "bias_steer_scale": float("inf")}, ValueError, "must be a finite number, got inf"),
        ({"bias_steer": "a", "bias_steer_scale": -1e39}, ValueError, r"got -1e\+39: float32 ends at 3.4028e\+38"),
        ({"bias_steer": "a", "bias_steer_scale": 10**400}, ValueError, "must be a finite number, got 1000"),
        ({"bias_steer": "a", "bias_steer_tokens": "last"}, ValueError, "all, prompt, generated, got 'last'"),
        ({"bias_steer": ["a"]}, TypeError, r"the name of an adapter, got \['a'\]"),
        ({"bias_steer": None}, TypeError, "expected bias_steer to be the name of an adapter, got None"),
        ({"bias_stear": "a"}, ValueError, "expected some of bias_steer, .*, got bias_stear"),
        ({"bias-steer": "a"}, ValueError, "got bias-steer"),
        ({"BIAS_STEER": "a"}, ValueError, "got BIAS_STEER"),
        ({"bias_steer": "a", "steer_scale": 0}, ValueError, "got steer_scale"),
        ({"bias_steer_vector": "a"}, ValueError, "expected some of bias_steer, .*, got bias_steer_vector"),
    ],
)
def test_request_that_cannot_be_meant_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        read_choice(arguments, None)
