"""vLLM on a CPU gives the steered model's answers. `make test-serving` runs this in an environment of its own."""

import gc
import os


os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

import pytest


vllm = pytest.importorskip("vllm", reason="make test-serving runs it in an environment of its own")

import torch  # noqa: E402
from peft import get_peft_model  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from peft_bias_steer import (  # noqa: E402
    BiasSteerConfig,
    export_stock_checkpoint,
    set_steering_vectors,
    steering_vectors,
)
from peft_bias_steer.architectures import VLLM_PLUGIN_CLASSES  # noqa: E402
from peft_bias_steer.serving import vllm as engine  # noqa: E402
from peft_bias_steer.serving.vllm import SteeringWorker, set_steering_scale, vllm_overrides  # noqa: E402


# vLLM's attention on CPUs wants heads of 32 or more
SMALL = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
STOCK = [
    ("llama", {}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"hidden_size": 128}),
]
PLUGIN = [
    ("gemma2", {}),
    ("gemma3_text", {}),
    ("llama", {}),
    ("mistral", {"sliding_window": None}),
    ("mixtral", {**MOE, "sliding_window": None}),
    ("olmo2", {}),
    ("qwen2", {"hidden_size": 128}),
    ("qwen3", {}),
    ("qwen3_moe", {**MOE, "decoder_sparse_step": 1}),
]
PROMPT = [(7 * token) % 97 + 1 for token in range(3, 63)]


@pytest.fixture(autouse=True)
def free_the_engine():
    yield
    gc.collect()


def make_base(model_type, path, **config) -> str:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SMALL, **config}))
    base.save_pretrained(path)
    return str(path)


def steer(base, std=0.5):
    """A steered model in evaluation mode, whose vectors are far from zero."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), BiasSteerConfig(task_type="CAUSAL_LM")).eval()
    set_steering_vectors(model, {i: std * torch.randn(v.shape) for i, v in steering_vectors(model).items()})
    return model


def start(path, **options):
    return vllm.LLM(
        str(path),
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=4,
        **options,
    )


def prompt_logprobs(model) -> torch.Tensor:
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([PROMPT])).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]


def greedy_tokens(model) -> list[int]:
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    return model.generate(input_ids=torch.tensor([PROMPT]), **options)[0, len(PROMPT) :].tolist()


def ask(llm) -> tuple[torch.Tensor, list[int]]:
    """Log-probabilities of the prompt's tokens, and the greedy tokens that follow."""
    params = vllm.SamplingParams(temperature=0, max_tokens=12, prompt_logprobs=0, detokenize=False, ignore_eos=True)
    output = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)[0]
    logprobs = [step[token].logprob for token, step in zip(PROMPT[1:], output.prompt_logprobs[1:])]
    return torch.tensor(logprobs), list(output.outputs[0].token_ids)


def answers(model) -> tuple[torch.Tensor, list[int]]:
    """What `ask` should return. To be computed before an engine starts that borrows, and changes, transformers' class."""
    return prompt_logprobs(model), greedy_tokens(model)


def assert_answers(llm, expected) -> None:
    logprobs, tokens = ask(llm)
    # float32 on both sides; the issue asks for 1e-4, and differences of 1e-6 are seen
    torch.testing.assert_close(logprobs, expected[0], atol=1e-4, rtol=0)
    assert tokens == expected[1]


def assert_steering_matters(model) -> None:
    with model.disable_adapter():
        unsteered = prompt_logprobs(model)
    assert (prompt_logprobs(model) - unsteered).abs().max() > 0.05


@pytest.mark.parametrize("model_type, config", STOCK, ids=[name for name, _ in STOCK])
def test_stock_checkpoint_is_served_with_the_steered_logprobs(model_type, config, tmp_path):
    model = steer(make_base(model_type, tmp_path / "base", **config))
    assert_steering_matters(model)
    export_stock_checkpoint(model, tmp_path / "stock")
    expected = answers(model)

    assert_answers(start(tmp_path / "stock"), expected)


def test_every_architecture_of_the_plugin_is_tested():
    tested = {type(AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SMALL, **config}))).__name__
              for name, config in PLUGIN}  # fmt: skip
    assert tested == set(VLLM_PLUGIN_CLASSES)


@pytest.mark.parametrize("model_type, config", PLUGIN, ids=[name for name, _ in PLUGIN])
def test_base_checkpoint_and_adapter_are_served_by_the_plugin(model_type, config, tmp_path):
    base = make_base(model_type, tmp_path / "base", **config)
    model = steer(base)
    assert_steering_matters(model)
    model.save_pretrained(tmp_path / "adapter")
    architecture = type(model.get_base_model()).__name__
    expected = answers(model)

    assert_answers(start(base, hf_overrides=vllm_overrides(str(tmp_path / "adapter"), architecture)), expected)


def test_scale_and_vectors_of_a_running_engine_are_changed_in_place(tmp_path):
    base = make_base("qwen3", tmp_path / "base")
    model = steer(base)
    model.save_pretrained(tmp_path / "adapter")
    llm = start(base, hf_overrides=vllm_overrides(str(tmp_path / "adapter"), "Qwen3ForCausalLM", scale=0.5))
    model.set_scale("default", 0.5)
    assert_answers(llm, answers(model))

    set_steering_scale(llm, -1.0)
    model.set_scale("default", -1.0)
    assert_answers(llm, answers(model))

    new = {index: torch.randn(64) for index in range(3)}
    engine.set_steering_vectors(llm, new)
    set_steering_vectors(model, new)
    assert_answers(llm, answers(model))
    assert all(torch.equal(vector, new[index]) for index, vector in engine.steering_vectors(llm).items())

    with pytest.raises(ValueError, match=r"layers 0 to 2, got one for layer 3"):
        engine.set_steering_vectors(llm, {1: torch.zeros(64), 3: torch.zeros(64)})
    with pytest.raises(ValueError, match=r"shape \(64,\) for layer 1, got \(32,\)"):
        engine.set_steering_vectors(llm, {1: torch.zeros(32)})
    with pytest.raises(ValueError, match="finite vectors"):
        engine.set_steering_vectors(llm, {1: torch.full((64,), torch.nan)})
    assert_answers(llm, answers(model))


def test_a_change_of_vectors_empties_the_prefix_cache(tmp_path):
    base = make_base("qwen3", tmp_path / "base")
    llm = start(base, hf_overrides={"architectures": ["BiasSteerQwen3ForCausalLM"]}, block_size=32)
    model = steer(base, std=2.0)

    def next_logprob() -> float:
        """Log-probability of the likeliest next token. That of prompt tokens would bypass the cache."""
        params = vllm.SamplingParams(temperature=0, max_tokens=1, logprobs=1, detokenize=False)
        output = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)[0].outputs[0]
        return output.logprobs[0][output.token_ids[0]].logprob

    with torch.no_grad():
        expected = model(input_ids=torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1).max().item()
    next_logprob()
    vectors = {index: vector.tolist() for index, vector in steering_vectors(model).items()}
    llm.collective_rpc(SteeringWorker.set_steering_vectors, args=(vectors,))
    assert abs(next_logprob() - expected) > 1e-4, "without emptying the cache, stale keys and values are used"

    engine.set_steering_vectors(llm, steering_vectors(model))
    assert abs(next_logprob() - expected) < 1e-5  # float32; 5e-7 is seen


def test_adapter_of_another_base_is_refused_when_the_engine_starts(tmp_path):
    steer(make_base("qwen3", tmp_path / "wide", hidden_size=128)).save_pretrained(tmp_path / "adapter")
    base = make_base("qwen3", tmp_path / "base")

    with pytest.raises(ValueError, match=r"shape \(64,\) for layer 0, got \(128,\)"):
        start(base, hf_overrides=vllm_overrides(str(tmp_path / "adapter"), "Qwen3ForCausalLM"))


def test_vectors_for_an_engine_that_has_no_place_for_them_are_refused(tmp_path):
    llm = start(make_base("qwen3", tmp_path / "base"))

    with pytest.raises(ValueError, match="BiasSteerQwen3ForCausalLM"):
        engine.set_steering_vectors(llm, {0: torch.zeros(64)})
