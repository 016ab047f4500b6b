"""
vLLM serves models of many kinds with the steered model's answers: a sample of what `walk_vllm.py` walks through.

All classes: `python -m tests.peft_bias_steer.serving.walk_vllm`, which writes vllm_walk.json beside this file; remove it
first, or name the classes, since what stands there is not compared again.
"""

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest


pytest.importorskip("vllm", reason="make test-serving runs it in an environment of its own")

from tests.peft_bias_steer.serving.walk_vllm import TABLE, compare  # noqa: E402


SAMPLE = [
    "CTRLLMHeadModel",  # which vLLM has no class for: transformers' own modules
    "DeepseekV2ForCausalLM",  # latent attention
    "FalconH1ForCausalLM",  # attention and state space side by side
    "GPTJForCausalLM",  # attention and MLP side by side
    "Gemma2ForCausalLM",  # norms behind attention and MLP
    "GptOssForCausalLM",  # routed experts with biases
    "GraniteForCausalLM",  # scaled residuals
    "Mamba2ForCausalLM",  # state space alone
    "Olmo3ForCausalLM",  # through vLLM's backend for transformers
]


@pytest.fixture(autouse=True)
def free_the_engine() -> Iterator[None]:
    yield
    gc.collect()


@pytest.mark.parametrize("name", SAMPLE)
def test_class_is_served_with_the_steered_answers(name: str, tmp_path: Path) -> None:
    seen, written = compare(name, str(tmp_path)), json.loads(TABLE.read_text())[name]

    assert seen.plugin == "exact"
    assert seen.stock == written["stock"]
    assert seen.rotary_in_torch == written["rotary_in_torch"]
