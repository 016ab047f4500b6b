"""vLLM on a CPU gives each request the answers of its own steered model. `make test-serving` runs this."""

import os


os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

import pytest


vllm = pytest.importorskip("vllm", reason="make test-serving runs it in an environment of its own")

import torch  # noqa: E402
from vllm.exceptions import VLLMValidationError  # noqa: E402

from peft_bias_steer import steering_vectors  # noqa: E402
from peft_bias_steer.serving.vllm import (  # noqa: E402
    adapter_vectors,
    list_adapters,
    load_adapter,
    remove_adapter,
)
from tests.peft_bias_steer.serving.served import MIXED, PROMPTS, Served, assert_same, reference  # noqa: E402


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return Served(tmp_path_factory.mktemp("served"))


def test_reference_is_what_peft_computes_for_mixed_rows(served):
    prompts = torch.tensor([PROMPTS[0]] * 3)
    with torch.no_grad():
        rows = served.model(input_ids=prompts, adapter_names=["first", "__base__", "third"]).logits.log_softmax(-1)

    for row, request in zip(rows, [("first",), (None,), ("third",)]):
        torch.testing.assert_close(row, reference(served.model, request, PROMPTS[0], len(PROMPTS[0])))


def test_reference_is_what_steer_tokens_computes(served):
    ids = torch.tensor([PROMPTS[0]] * 3)
    names = {"adapter_names": ["first", "second", "third"]}
    with torch.no_grad(), served.model.steer_tokens(["all", "prompt", "generated"], prompt_lengths=[20] * 3):
        rows = served.model(input_ids=ids, **names).logits.log_softmax(-1)

    for row, adapter, where in zip(rows, names["adapter_names"], ["all", "prompt", "generated"]):
        torch.testing.assert_close(row, reference(served.model, (adapter, 1.0, where), PROMPTS[0], 20))


def test_a_batch_mixes_adapters_scales_and_the_base_model(served):
    outputs = served.check(MIXED)

    assert len({tuple(output.outputs[0].token_ids) for output in served.ask(MIXED, [PROMPTS[0]] * 6)}) >= 4
    assert outputs[1].num_cached_tokens == 0


@pytest.mark.parametrize("where", ["prompt", "generated"])
def test_tokens_are_chosen_by_each_request(served, where):
    requests = [("first", 1.0, where), (None,), ("second", 0.5, where), ("third",), ("third", 1.0, where), ("first",)]

    served.check(requests)


def test_prefix_cache_serves_each_request_its_own_keys_and_values(served):
    prompts = [PROMPTS[0]] * len(MIXED)
    different = [*MIXED[:4], ("second",), ("third", 1.0, "prompt")]
    for request in different:
        (fresh,) = served.check([request], [PROMPTS[0]], logprobs=False)
        (again,) = served.check([request], [PROMPTS[0]], logprobs=False)
        assert again.num_cached_tokens == 32 * ((len(PROMPTS[0]) - 1) // 32) > 0, "one's own are used"
    served.check(different, prompts, logprobs=False)
    # a scale of 0 is the base model, and reads what that wrote
    assert served.check([("first", 0.0)], [PROMPTS[0]], logprobs=False)[0].num_cached_tokens == 32


def test_one_text_as_prompt_and_as_answer_is_two_texts_in_the_cache(served):
    prompt = [(11 * token) % 97 + 1 for token in range(40)]
    longer = ("first", 1.0, "generated")
    (output,) = served.check([longer], [prompt], logprobs=False, max_tokens=60)

    served.check([longer], [prompt + list(output.outputs[0].token_ids)], logprobs=False)


def test_adapter_that_is_replaced_leaves_nothing_in_the_cache(served):
    load_adapter(served.llm, "fourth", served.folders["first"])
    first, fourth = served.ask([("first",), ("fourth",)], [PROMPTS[1]] * 2, logprobs=False)
    assert first.outputs[0].token_ids == fourth.outputs[0].token_ids
    served.ask([("fourth",)], [PROMPTS[1]], logprobs=False)

    load_adapter(served.llm, "fourth", steering_vectors(served.model, "second"), replace=True)
    (fourth,) = served.ask([("fourth",)], [PROMPTS[1]], logprobs=False)
    assert_same(served.model, ("second",), PROMPTS[1], fourth)
    held = adapter_vectors(served.llm, "fourth")
    assert all(torch.equal(held[i], vector) for i, vector in steering_vectors(served.model, "second").items())
    remove_adapter(served.llm, "fourth")
    with pytest.raises(
        VLLMValidationError, match="no adapter named 'fourth' is loaded: loaded are first, second, third"
    ):
        served.ask([("fourth",)], [PROMPTS[1]])


def test_several_answers_to_one_prompt_are_steered(served):
    (output,) = served.ask([("first",)], [PROMPTS[2]], n=3, temperature=1.0, seed=0)
    completions = output.outputs
    assert len({tuple(completion.token_ids) for completion in completions}) == 3

    for completion in completions:
        output.outputs = [completion]
        assert_same(served.model, ("first",), PROMPTS[2], output, greedy=False)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"bias_steer": "nobody"}, "no adapter named 'nobody' is loaded: loaded are first"),
        ({"bias_steer": "first", "bias_steer_scale": "high"}, "bias_steer_scale must be a number, got 'high'"),
        ({"bias_steer": "first", "bias_steer_scale": float("nan")}, "must be a finite number"),
        ({"bias_steer": "first", "bias_steer_tokens": "some"}, "expected bias_steer_tokens to be one of all, prompt"),
        ({"bias_steer": 1}, "expected bias_steer to be the name of an adapter, got 1"),
        ({"bias_steer": "first", "bias_steer_scales": 2}, "expected some of bias_steer, .*, got bias_steer_scales"),
        ({"bias_steer": "first", "bias_steer_row": [2, 1.0, "all"]}, "got bias_steer_row"),
        ({"bias_steer_scale": 2.0}, "bias_steer_scale without bias_steer: name the adapter"),
    ],
)
def test_request_that_cannot_be_meant_is_refused(served, arguments, message):
    with pytest.raises(VLLMValidationError, match=message):
        served.llm.generate([{"prompt_token_ids": PROMPTS[0]}], vllm.SamplingParams(extra_args=arguments))


def test_adapters_that_do_not_fit_are_refused_and_change_nothing(served):
    before = list_adapters(served.llm)
    with pytest.raises(ValueError, match=r"shape \(64,\) for layer 1, got \(32,\)"):
        load_adapter(served.llm, "new", {1: torch.zeros(32)})
    with pytest.raises(ValueError, match="layers 0 to 2, got one for layer 3"):
        load_adapter(served.llm, "new", {3: torch.zeros(64)})
    with pytest.raises(ValueError, match="finite vectors"):
        load_adapter(served.llm, "new", {1: torch.full((64,), torch.nan)})
    with pytest.raises(ValueError, match="an adapter named 'first' is loaded: choose another name, or replace it"):
        load_adapter(served.llm, "first", {1: torch.zeros(64)})
    load_adapter(served.llm, "new", {1: torch.zeros(64)})
    with pytest.raises(ValueError, match="all 4 places are taken: .*max_adapters"):
        load_adapter(served.llm, "newer", {1: torch.zeros(64)})
    remove_adapter(served.llm, "new")
    with pytest.raises(ValueError, match="no adapter named 'new' is loaded"):
        remove_adapter(served.llm, "new")
    assert list_adapters(served.llm) == before
    served.check(MIXED)
