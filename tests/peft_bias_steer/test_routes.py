"""
Which ways of serving are exact, for every architecture that can be steered; and `bias-steer routes`.

`python -m tests.peft_bias_steer.test_routes` writes the table of docs/guide_serving.md.
"""

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_bias_steer import BiasSteerConfig, set_steering_vectors, steering_vectors
from peft_bias_steer.architectures import VLLM_PLUGIN_CLASSES
from peft_bias_steer.cli import main as bias_steer
from peft_bias_steer.residual import find_layers
from peft_bias_steer.serving.routes import Route, serving_routes
from tests.peft_bias_steer.test_architectures import CANNOT_BUILD, CONFIGS, tiny_config


GUIDE = Path(__file__).parents[2] / "docs" / "guide_serving.md"
START, END = "<!-- routes: start -->\n", "<!-- routes: end -->\n"


def build(model_type: str, **changes):
    config = tiny_config(CONFIGS[model_type])
    for name, value in changes.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config)


def routes_of_all_types() -> dict[str, list[Route]]:
    routes = {}
    for model_type in CONFIGS.keys() - CANNOT_BUILD.keys():
        base = build(model_type)
        try:
            find_layers(base)
        except ValueError:
            continue
        routes[model_type] = serving_routes(base)
    return dict(sorted(routes.items()))


def table() -> str:
    """Types down, routes across; a number stands for the reason why a route is not exact."""
    routes = routes_of_all_types()
    reasons: dict[str, int] = {}
    rows = []
    for model_type, found in routes.items():
        cells = ["yes" if r.exact else f"no ({reasons.setdefault(r.reason, len(reasons) + 1)})" for r in found]
        rows.append(f"| {model_type} | {' | '.join(cells)} |")
    names = [route.name for route in next(iter(routes.values()))]
    header = [f"| type | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    return "\n".join([*header, *rows, "", *(f"{number}. {reason}" for reason, number in reasons.items())]) + "\n"


@pytest.mark.pinned
@pytest.mark.slow
def test_table_in_the_guide_says_what_the_code_says():
    _, start, rest = GUIDE.read_text().partition(START)
    written, end, _ = rest.partition(END)

    assert start and end
    assert written == table()


def exact(base, **options) -> dict[str, bool]:
    return {route.name: route.exact for route in serving_routes(base, **options)}


def reasons(base) -> dict[str, str]:
    return {route.name: route.reason for route in serving_routes(base)}


def test_a_llama_is_served_everywhere_but_for_layer_0_of_a_control_vector():
    everywhere = exact(build("llama"), first_layer_norm=0.0)
    assert len(everywhere) == 7 and all(everywhere.values())
    assert [name for name, is_exact in exact(build("llama")).items() if not is_exact] == ["llama.cpp, control vector"]


def test_a_type_that_no_stock_class_holds_has_the_plugin_and_says_why_not_the_rest():
    assert exact(build("qwen3"))["vLLM, plugin"] and not exact(build("qwen3"))["vLLM, stock checkpoint"]
    assert "normalises queries and keys" in reasons(build("qwen3"))["vLLM, stock checkpoint"]
    assert "a norm after the MLP" in reasons(build("gemma2"))["transformers, merged checkpoint"]
    assert "a router" in reasons(build("mixtral"))["vLLM, stock checkpoint"]
    sliding = build("mistral", sliding_window=16)
    assert "sliding window of 16 tokens" in reasons(sliding)["vLLM, stock checkpoint"]
    quantised = build("llama", quantization_config={"quant_method": "gptq"})
    assert "quantised" in reasons(quantised)["vLLM, stock checkpoint"]


def test_an_architecture_that_cannot_be_steered_has_no_routes():
    with pytest.raises(ValueError, match="several residual streams"):
        serving_routes(build("deepseek_v4"))


def test_every_class_of_the_plugin_is_one_of_transformers():
    types = {"gemma3_text" if name == "Gemma3ForCausalLM" else name for name in VLLM_PLUGIN_CLASSES}
    found = {type(build(name)).__name__ for name in ("gemma2", "llama", "mistral", "mixtral", "olmo2", "qwen2")}
    assert found <= types


def test_command_prints_the_routes_of_an_adapter(tiny_language_model, tmp_path, capsys):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_language_model), BiasSteerConfig(task_type="CAUSAL_LM")
    )
    set_steering_vectors(model, {1: torch.ones_like(steering_vectors(model)[1])})
    model.save_pretrained(tmp_path / "without_0")
    set_steering_vectors(model, {0: torch.ones_like(steering_vectors(model)[0])})
    model.save_pretrained(tmp_path / "with_0")

    for folder, control_vector in (("without_0", True), ("with_0", False)):
        bias_steer(["routes", str(tmp_path / folder), "--json"])
        printed = {route["name"]: route["exact"] for route in json.loads(capsys.readouterr().out)}
        assert printed["vLLM, stock checkpoint"] is True
        assert printed["llama.cpp, control vector"] is control_vector
    bias_steer(["routes", str(tmp_path / "with_0")])
    assert "--drop_first_layer" in capsys.readouterr().out.replace("\n", " ")


def main() -> None:
    before, _, rest = GUIDE.read_text().partition(START)
    _, _, after = rest.partition(END)
    GUIDE.write_text(before + START + table() + END + after)


if __name__ == "__main__":
    main()
