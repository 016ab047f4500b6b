"""vLLM's side of a trainer's sync, in transformers: an engine with weights of its own, behind TRL's client of a server."""

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_bias_steer import BiasSteerConfig, set_steering_vectors


class StandInEngine:
    """
    What TRL's `VLLMClient` offers. Weights that it does not know it drops without a word, as vLLM does.

    Args:
        path (`str`): The checkpoint that it serves; with places for vectors, if its config says so.
    """

    def __init__(self, path, **kwargs):
        self.model = AutoModelForCausalLM.from_pretrained(path).eval()
        self.parameters = dict(self.model.named_parameters())
        self.takes_vectors = hasattr(self.model.config, "bias_steer")
        if self.takes_vectors:
            self.model = get_peft_model(self.model, BiasSteerConfig()).eval()
        self.syncs: list[dict[str, torch.Tensor]] = []

    def init_communicator(self, device):
        pass

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def reset_prefix_cache(self):
        pass

    @torch.no_grad()
    def update_named_params(self, metadata, named_params):
        received = {}
        # vLLM makes room from what was announced, and reads that much
        for (name, dtype, shape), (sent, weight) in zip(metadata, named_params, strict=True):
            assert (name, dtype, shape) == (sent, str(weight.dtype).removeprefix("torch."), list(weight.shape))
            received[name] = weight.clone()
            if name.endswith(".steering_vector") and self.takes_vectors:
                set_steering_vectors(self.model, {int(name.split(".")[-2]): weight})
            elif name in self.parameters:
                self.parameters[name].copy_(weight)
        self.syncs.append(received)

    def generate(self, prompts, n=1, max_tokens=16, **kwargs):
        sampled = [self.sample(prompt, max_tokens) for prompt in prompts for _ in range(n)]
        return {
            "prompt_ids": prompts,
            "completion_ids": [tokens for tokens, _ in sampled],
            "logprobs": [[[logprob] for logprob in logprobs] for _, logprobs in sampled],
        }

    @torch.no_grad()
    def sample(self, prompt, max_tokens):
        """Tokens after the prompt at temperature 1, and their log-probabilities."""
        ids, logprobs = list(prompt), []
        for _ in range(max_tokens):
            distribution = self.model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            token = int(torch.multinomial(distribution.exp(), 1))
            ids.append(token)
            logprobs.append(float(distribution[token]))
        return ids[len(prompt) :], logprobs
