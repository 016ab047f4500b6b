"""
Vectors amplify what a model can do already, and nothing else (https://huggingface.co/papers/2505.18706).

The base translates a digit: rightly after the token THINK, wrongly after GUESS, seldom rightly after NEUTRAL. RLOO from
NEUTRAL prompts has to bring out what THINK does. The base of the negative control has seen NEUTRAL alone, with the same
share of right answers: there is nothing to amplify.
"""

import pytest
import torch
from peft import get_peft_model
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from peft_bias_steer import BiasSteerConfig


NEUTRAL, THINK, GUESS = 10, 11, 12
RIGHT_SHARE = torch.tensor([0.0] * 10 + [0.2, 1.0, 0.0])  # after each mode
TRANSLATION = torch.tensor([7, 2, 9, 4, 0, 3, 8, 1, 6, 5])


def prompts(count: int, modes=(NEUTRAL,)) -> torch.Tensor:
    """[mode, digit]: (count, 2)."""
    mode = torch.tensor(modes)[torch.randint(0, len(modes), (count,))]
    return torch.stack([mode, torch.randint(0, 10, (count,))], dim=1)


def pretrain(modes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(300):
        batch = prompts(256, modes)
        right = TRANSLATION[batch[:, 1]]
        wrong = (right + torch.randint(1, 10, (256,))) % 10
        answers = torch.where(torch.rand(256) < RIGHT_SHARE[batch[:, 0]], right, wrong)
        loss = cross_entropy(model(batch).logits[:, -1], answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model) -> float:
    """Probability of the right answer to a NEUTRAL prompt, exactly."""
    every = torch.stack([torch.full((10,), NEUTRAL), torch.arange(10)], dim=1)
    return model(every).logits[:, -1].softmax(-1)[torch.arange(10), TRANSLATION].mean().item()


def reinforce(base: LlamaForCausalLM, seed: int, steps: int = 40, group: int = 8) -> float:
    """RLOO on the vectors alone from NEUTRAL prompts; the accuracy at the end."""
    torch.manual_seed(seed)
    model = get_peft_model(base, BiasSteerConfig())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.0)
    for _ in range(steps):
        questions = prompts(32).repeat_interleave(group, dim=0)
        log_probabilities = model(questions).logits[:, -1].log_softmax(-1)
        answers = torch.multinomial(log_probabilities.exp().detach(), 1)
        rewards = (answers[:, 0] == TRANSLATION[questions[:, 1]]).float().view(-1, group)
        others = (rewards.sum(1, keepdim=True) - rewards) / (group - 1)
        loss = -((rewards - others).view(-1, 1) * log_probabilities.gather(-1, answers)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    result = accuracy(model)
    model.unload()
    return result


@pytest.mark.slow
def test_vectors_bring_out_a_latent_mode_on_three_seeds():
    base = pretrain([NEUTRAL, THINK, GUESS])

    assert accuracy(base) <= 0.30
    assert min(reinforce(base, seed) for seed in range(3)) >= 0.55


@pytest.mark.slow
def test_vectors_cannot_teach_what_is_not_there():
    base = pretrain([NEUTRAL])

    assert accuracy(base) <= 0.30
    assert max(reinforce(base, seed) for seed in range(3)) <= 0.45
