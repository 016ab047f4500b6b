"""vLLM's own ways to run a model, one engine after the other, on a CPU. Run by `make test-serving`."""

import gc
import os


os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

import pytest


vllm = pytest.importorskip("vllm", reason="make test-serving runs it in an environment of its own")

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from vllm.exceptions import VLLMValidationError  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402

from peft_bias_steer import export_stock_checkpoint, steering_vectors  # noqa: E402
from peft_bias_steer.serving.vllm import load_adapter, remove_adapter, vllm_overrides  # noqa: E402
from tests.conftest import byte_tokenizer  # noqa: E402
from tests.peft_bias_steer.serving.served import (  # noqa: E402
    CLOSE,
    NAMES,
    PROMPTS,
    Served,
    arguments,
    assert_same,
    make_base,
    reference,
    start,
    steer,
)


@pytest.fixture(autouse=True)
def free_the_engine():
    yield
    gc.collect()


def bits(output) -> list:
    """All log-probabilities of an output, for comparison without a tolerance."""
    steps = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    return [{token: value.logprob for token, value in step.items()} for step in steps]


def test_rows_without_an_adapter_are_bit_for_bit_those_of_an_engine_without_the_plugin(tmp_path):
    served = Served(tmp_path)
    alone = served.ask([(None,)] * 3, PROMPTS[:3])
    beside_steered = served.ask([(None,), ("first",), (None,)], PROMPTS[:3])
    del served.llm
    gc.collect()
    served.llm = start(served.base)
    expected = served.ask([(None,)] * 3, PROMPTS[:3])

    assert [bits(output) for output in alone] == [bits(output) for output in expected]
    assert bits(beside_steered[0]) == bits(expected[0]) and bits(beside_steered[2]) == bits(expected[2])
    assert bits(beside_steered[1]) != bits(expected[1])
    with pytest.raises(VLLMValidationError, match="this engine was started without adapters"):
        served.ask([("first",)], PROMPTS[:1])


@pytest.mark.parametrize(
    "options",
    [
        # prompts are read in pieces of 40 tokens, beside tokens that are generated
        {"max_num_batched_tokens": 40, "enable_chunked_prefill": True},
        # room for about two requests: the others are preempted, and begin again
        {"num_gpu_blocks_override": 8, "max_num_seqs": 6, "disable_log_stats": False},
        {"async_scheduling": True},
        # vLLM's default
        {"enforce_eager": False},
        {"tensor_parallel_size": 2},
        # on a CPU vLLM itself fails at this when it does not compile
        {"pipeline_parallel_size": 2, "enforce_eager": False},
    ],
    ids=[
        "chunked prefill",
        "preemption",
        "asynchronous scheduling",
        "torch.compile",
        "tensor",
        "pipeline",
    ],
)
def test_exact_however_vllm_runs_the_model(tmp_path, monkeypatch, options):
    if "tensor_parallel_size" in options or "pipeline_parallel_size" in options:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # a core for each worker
    served = check_whole_answers(tmp_path, **options)
    if "num_gpu_blocks_override" in options:
        assert any(m.name == "vllm:num_preemptions" and m.value > 0 for m in served.llm.get_metrics())


def check_whole_answers(tmp_path, **options) -> Served:
    served = Served(tmp_path, **options)
    requests = [("first",), (None,), ("second", 0.8), ("third", -1.0, "prompt"), ("first", 1.0, "generated"), (None,)]
    for logprobs in (True, False, False):
        served.check(requests, logprobs=logprobs, max_tokens=40)
    return served


def test_an_engine_without_adapters_is_the_base_model_until_one_is_loaded(tmp_path):
    base = make_base("qwen3", tmp_path / "base")
    model = steer(base, NAMES[:1])
    llm = start(base, hf_overrides=vllm_overrides(default=None))
    served = object.__new__(Served)
    served.model, served.llm = model, llm

    served.check([(None,)], PROMPTS[:1])
    with pytest.raises(VLLMValidationError, match="no adapter named 'first' is loaded: loaded are none"):
        served.ask([("first",)], PROMPTS[:1])
    load_adapter(llm, "first", steering_vectors(model, "first"))
    served.check([("first",), (None,)], PROMPTS[:2])


def test_default_adapter_is_that_of_requests_that_name_none(tmp_path):
    served = Served(tmp_path)
    del served.llm
    gc.collect()
    served.llm = start(served.base, hf_overrides=vllm_overrides(served.folders, default="second"))
    unnamed, base = served.ask([(None,), ("__base__",)], PROMPTS[:2])

    assert_same(served.model, ("second",), PROMPTS[0], unnamed)
    assert_same(served.model, (None,), PROMPTS[1], base)
    with pytest.raises(ValueError, match="replace it instead"):
        remove_adapter(served.llm, "second")


def test_embeddings_are_steered(tmp_path):
    base = make_base("qwen3", tmp_path / "base")
    model = steer(base, NAMES[:2])
    model.save_pretrained(tmp_path / "adapters")
    folders = {name: str(tmp_path / "adapters" / name) for name in NAMES[:2]}
    byte_tokenizer().save_pretrained(base)
    options = {"runner": "pooling", "convert": "embed", "skip_tokenizer_init": False}
    llm = start(base, hf_overrides=vllm_overrides(folders), **options)
    prompts = [{"prompt_token_ids": PROMPTS[0]}] * 3
    params = [vllm.PoolingParams(extra_kwargs=arguments(name)) for name in ("first", "second", None)]
    outputs = llm.embed(prompts, pooling_params=params, use_tqdm=False)

    ids = torch.tensor([PROMPTS[0]] * 3)
    with torch.no_grad():
        hidden = model(input_ids=ids, adapter_names=["first", "second", "__base__"], output_hidden_states=True)
    expected = torch.nn.functional.normalize(hidden.hidden_states[-1][:, -1], dim=-1)
    torch.testing.assert_close(torch.tensor([output.outputs.embedding for output in outputs]), expected, **CLOSE)


STOCK = [("llama", {}), ("mistral", {"sliding_window": None}), ("qwen2", {"hidden_size": 128})]


@pytest.mark.parametrize("model_type, config", STOCK, ids=[name for name, _ in STOCK])
def test_stock_checkpoint_is_served_with_the_steered_logprobs(model_type, config, tmp_path):
    served = object.__new__(Served)
    served.model = steer(make_base(model_type, tmp_path / "base", **config))
    assert (reference(served.model, ("default",), PROMPTS[0], 60) - reference(served.model, (None,), PROMPTS[0], 60)
            ).abs().max() > 0.05  # fmt: skip
    export_stock_checkpoint(served.model, tmp_path / "stock")
    served.llm = start(tmp_path / "stock")

    for output, prompt in zip(served.ask([(None,)] * 6), PROMPTS):
        assert_same(served.model, ("default",), prompt, output)


def test_adapter_of_another_base_is_refused_when_the_engine_starts(tmp_path):
    steer(make_base("qwen3", tmp_path / "wide", hidden_size=128)).save_pretrained(tmp_path / "adapter")
    base = make_base("qwen3", tmp_path / "base")

    with pytest.raises(ValueError, match=r"shape \(64,\) for layer 0, got \(128,\)"):
        start(base, hf_overrides=vllm_overrides({"wide": str(tmp_path / "adapter")}))


def test_architecture_that_was_not_proven_is_refused_when_the_engine_starts(tmp_path, monkeypatch):
    from peft_bias_steer.serving.vllm import layers

    monkeypatch.setattr(layers, "VLLM_PLUGIN_CLASSES", ())
    with pytest.raises(ValueError, match="it was not verified that vLLM's Qwen3ForCausalLM is steered exactly"):
        start(make_base("qwen3", tmp_path / "base"), hf_overrides=vllm_overrides())


def test_lora_and_an_adapter_in_one_request(tmp_path):
    served = Served(tmp_path)
    del served.llm
    gc.collect()
    low_rank = get_peft_model(
        AutoModelForCausalLM.from_pretrained(served.base), LoraConfig(target_modules=["q_proj", "down_proj"])
    )
    for name, weight in low_rank.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    low_rank.save_pretrained(tmp_path / "lora")
    served.llm = start(served.base, enable_lora=True, hf_overrides=vllm_overrides(served.folders))
    lora = LoRARequest("lora", 1, str(tmp_path / "lora"))
    params = [
        vllm.SamplingParams(temperature=0, max_tokens=8, logprobs=0, ignore_eos=True, extra_args=arguments(*request))
        for request in [("first",), (None,)]
    ]
    # every request has the LoRA: on a CPU vLLM itself gives rows without one wrong answers beside them
    prompts = [{"prompt_token_ids": PROMPTS[0]}] * 2
    outputs = served.llm.generate(prompts, params, lora_request=[lora] * 2, use_tqdm=False)

    served.model.base_model.model.load_state_dict(with_lora(served.model, low_rank.merge_and_unload()))
    assert_same(served.model, ("first",), PROMPTS[0], outputs[0])
    assert_same(served.model, (None,), PROMPTS[0], outputs[1])


def with_lora(model, merged) -> dict[str, torch.Tensor]:
    """The weights of the steered model, with those of its base replaced."""
    return {**model.base_model.model.state_dict(), **merged.state_dict()}


# the last of all: it imports numba, which vLLM does not survive when it starts another engine in this process
def test_exact_when_vllm_guesses_tokens_ahead(tmp_path):
    guesses = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    check_whole_answers(tmp_path, speculative_config=guesses)
