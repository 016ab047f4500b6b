"""
Which ways of serving are exact, for every architecture that can be steered; and `bias-steer routes`.

`python -m tests.peft_bias_steer.test_routes` writes the table of docs/guide_serving.md.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_bias_steer import BiasSteerConfig, set_steering_vectors, steering_vectors
from peft_bias_steer.architectures import (
    VLLM_DROPS_BIASES,
    VLLM_PLUGIN_CLASSES,
    VLLM_STOCK_CLASSES,
    WHY_NOT_IN_VLLM,
)
from peft_bias_steer.cli import main as bias_steer
from peft_bias_steer.residual import find_layers
from peft_bias_steer.serving.routes import Route, serving_routes
from tests.peft_bias_steer.test_architectures import CANNOT_BUILD, CONFIGS, OTHERS, tiny_config


GUIDE = Path(__file__).parents[2] / "docs" / "guide_serving.md"
# what tests/peft_bias_steer/serving/walk_vllm.py saw
WALK = json.loads((Path(__file__).parent / "serving" / "vllm_walk.json").read_text())
ROTARY = (
    "On a CPU vLLM 0.32 rotates queries wrongly, steered or not, in {}: there, start it with "
    '`compilation_config={{"custom_ops": ["all", "-rotary_embedding"]}}`, with which they were compared.'
)
START, END = "<!-- routes: start -->\n", "<!-- routes: end -->\n"


def build(model_type: str, **changes):
    config = tiny_config(CONFIGS[model_type])
    for name, value in changes.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config)


def steerable_models() -> Iterator[tuple[str, PreTrainedModel]]:
    for model_type in sorted(CONFIGS.keys() - CANNOT_BUILD.keys()):
        yield model_type, build(model_type)
    media = {**OTHERS["AutoModelForImageTextToText"], **OTHERS["AutoModelForMultimodalLM"]}
    for model_class, config_class in sorted(media.items(), key=lambda item: item[1].model_type):
        if not {model_class.__name__, config_class.model_type} & CANNOT_BUILD.keys():
            yield f"{config_class.model_type} (`{model_class.__name__}`)", model_class(tiny_config(config_class))


def routes_of_all_types() -> dict[str, list[Route]]:
    routes = {}
    for name, base in steerable_models():
        with contextlib.suppress(ValueError):  # no layers that can be steered
            find_layers(base)
            # a control vector has no place for layer 0, whatever the type: the head of its column says so
            routes[name] = serving_routes(base, first_layer_norm=0.0)
    return routes


def table() -> str:
    """Types down, routes across; a number stands for the reason why a route is not exact."""
    routes = routes_of_all_types()
    reasons: dict[str, int] = {}
    rows = []
    for name, found in routes.items():
        cells = ["yes" if r.exact else f"no ({reasons.setdefault(r.reason, len(reasons) + 1)})" for r in found]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    names = [route.name for route in next(iter(routes.values()))]
    names[names.index("llama.cpp, control vector")] += ", but layer 0"
    header = [f"| type | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    numbered = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([*header, *rows, "", *numbered, "", ROTARY.format(", ".join(rotated_otherwise()))]) + "\n"


def rotated_otherwise() -> list[str]:
    return [f"`{name}`" for name, seen in WALK.items() if seen["rotary_in_torch"] and seen["plugin"] == "exact"]


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


def test_llama_cpp_serves_no_model_whose_sliding_window_it_ignores():
    for model_type in ("mistral", "phi3"):
        assert exact(build(model_type, sliding_window=64), first_layer_norm=0.0)["llama.cpp, control vector"]
        ignored = build(model_type, sliding_window=16)
        assert "ignores its sliding window of 16 tokens" in reasons(ignored)["llama.cpp, control vector"]
    assert not exact(build("mistral", sliding_window=16))["llama.cpp, biases in the GGUF file"]
    assert exact(build("gemma2", sliding_window=16), first_layer_norm=0.0)["llama.cpp, control vector"]


def test_an_architecture_that_cannot_be_steered_has_no_routes():
    with pytest.raises(ValueError, match="several residual streams"):
        serving_routes(build("deepseek_v4"))


def test_what_is_said_of_vllm_is_what_was_seen_there():
    exact_classes = {name for name, seen in WALK.items() if seen["plugin"] == "exact"}
    stock = {seen["stock_class"]: set() for seen in WALK.values() if seen["stock_class"]}
    for seen in WALK.values():
        if seen["stock"]:
            stock[seen["stock_class"]].add(seen["stock"])

    assert set(VLLM_PLUGIN_CLASSES) == exact_classes
    assert set(VLLM_STOCK_CLASSES) == {name for name, found in stock.items() if found == {"exact"}}
    assert set(VLLM_DROPS_BIASES) == {
        name for name, found in stock.items() if "vLLM does not apply its biases" in found
    }
    reasons = {name: reason for reason, names in WHY_NOT_IN_VLLM.items() for name in names}
    not_exact = {name: seen["plugin"] for name, seen in WALK.items() if name not in exact_classes}
    assert reasons == {name: reason for name, reason in not_exact.items() if reason != "not built here"}
    for names in (VLLM_PLUGIN_CLASSES, VLLM_STOCK_CLASSES, VLLM_DROPS_BIASES, *WHY_NOT_IN_VLLM.values()):
        assert list(names) == sorted(set(names))


def test_a_class_that_vllm_does_not_serve_exactly_comes_with_what_was_seen():
    assert reasons(build("bloom"))["vLLM, plugin"] == "vLLM's own base model differs from the one of transformers"
    assert "does not apply the biases of a MiniCPM3ForCausalLM" in reasons(build("minicpm3"))["vLLM, stock checkpoint"]
    assert exact(build("minicpm3"))["vLLM, plugin"]
    assert reasons(build("bert"))["vLLM, stock checkpoint"] == reasons(build("bert"))["vLLM, plugin"]


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
