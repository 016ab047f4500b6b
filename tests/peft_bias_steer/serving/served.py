"""What the tests of vLLM share: small steered models, an engine that serves them, and what it should say."""

import torch
import vllm
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from peft_bias_steer import BiasSteerConfig, set_steering_vectors, steering_vectors
from peft_bias_steer.serving.vllm import vllm_overrides


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
NAMES = ["first", "second", "third"]
PROMPTS = [[(7 * token) % 97 + 1 for token in range(3 + shift, 63 - 5 * shift)] for shift in range(6)]
NEW_TOKENS = 12
# float32 on both sides; differences of 1e-6 are seen
CLOSE = {"atol": 1e-4, "rtol": 0}


def make_base(model_type, path, **config) -> str:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SMALL, **config}))
    base.save_pretrained(path)
    return str(path)


def steer(base, names=("default",), std=0.5):
    """A steered model in evaluation mode, whose vectors are far from zero."""
    config = BiasSteerConfig(task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config, adapter_name=names[0]).eval()
    for name in names[1:]:
        model.add_adapter(name, config)
    for name in names:
        vectors = {i: std * torch.randn(v.shape) for i, v in steering_vectors(model, name).items()}
        set_steering_vectors(model, vectors, name)
    return model


def start(path, **options):
    defaults = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, "max_model_len": 128}
    return vllm.LLM(str(path), **{**defaults, "max_num_seqs": 8, "block_size": 32, **options})


class Served:
    """A base with three adapters, the PEFT model, and an engine that knows the three by name."""

    def __init__(self, folder, **options):
        self.base = make_base("qwen3", folder / "base")
        self.model = steer(self.base, NAMES)
        self.model.save_pretrained(folder / "adapters")
        self.folders = {name: str(folder / "adapters" / name) for name in NAMES}
        self.llm = start(self.base, hf_overrides=vllm_overrides(self.folders, max_adapters=4), **options)

    def ask(self, requests, prompts=PROMPTS, logprobs=True, **options):
        """
        One output of vLLM per request (adapter, scale, tokens).

        The engine reads no prefix cache for requests that want log-probabilities of their prompts.
        """
        fixed = {"temperature": 0, "max_tokens": NEW_TOKENS, "detokenize": False, "ignore_eos": True, "logprobs": 0}
        fixed |= {"prompt_logprobs": 0} if logprobs else {}
        params = [vllm.SamplingParams(**fixed | options, extra_args=arguments(*request)) for request in requests]
        return self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)

    def check(self, requests, prompts=PROMPTS, **options):
        outputs = self.ask(requests, prompts, **options)
        for request, prompt, output in zip(requests, prompts, outputs, strict=True):
            assert_same(self.model, request, prompt, output)
        return outputs


def arguments(adapter=None, scale=1.0, tokens="all") -> dict | None:
    if adapter is None:
        return None
    return {"bias_steer": adapter, "bias_steer_scale": scale, "bias_steer_tokens": tokens}


def reference(model, request, ids, prompt_length) -> torch.Tensor:
    """Log-probabilities after each token, (tokens, vocabulary), of the base with vectors added by plain hooks."""
    adapter, scale, where = (*request, *(1.0, "all")[len(request) - 1 :])
    position = torch.arange(len(ids))
    chosen = {"all": position >= 0, "prompt": position < prompt_length, "generated": position >= prompt_length}[where]
    layers, handles = model.get_base_model().model.layers, []
    vectors = steering_vectors(model, adapter) if adapter else {}
    for index, vector in vectors.items():
        move = scale * vector * chosen[:, None]
        handles.append(layers[index].register_forward_hook(lambda m, a, out, move=move: out + move))
    try:
        with torch.no_grad(), model.disable_adapter():
            return model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    finally:
        for handle in handles:
            handle.remove()


def assert_same(model, request, prompt, output, greedy=True) -> None:
    """All that vLLM says of a request is what the steered model says of the same tokens."""
    completion = output.outputs[0]
    ids = prompt + list(completion.token_ids)
    expected = reference(model, request, ids, len(prompt))
    sampled = torch.tensor([step[token].logprob for step, token in zip(completion.logprobs, completion.token_ids)])
    answers = expected[len(prompt) - 1 : -1]
    torch.testing.assert_close(sampled, answers.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0], **CLOSE)
    if greedy:
        assert answers.argmax(-1).tolist() == list(completion.token_ids)
    if output.prompt_logprobs:
        of_prompt = torch.tensor([s[t].logprob for t, s in zip(prompt[1:], output.prompt_logprobs[1:])])
        torch.testing.assert_close(of_prompt, expected[range(len(prompt) - 1), prompt[1:]], **CLOSE)


MIXED = [("first",), (None,), ("second", 0.8), ("third", -1.0), ("first", 0.0), ("second",)]
