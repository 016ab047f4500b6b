"""How much of a teacher is left in a model that was made of it."""

from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F


# Tokens of a random sequence that has to be repeated, and how many sequences.
COPIED, COPIES = 96, 16


@contextmanager
def window_only(model: torch.nn.Module) -> Generator[None]:
    """The model without the linear part of its replaced layers: what is left is softmax over their window."""
    gates = [module for name, module in model.named_modules() if name.endswith("window_gate")]
    kept = [(gate.weight.data, gate.bias.data) for gate in gates]
    for gate in gates:
        gate.weight.data, gate.bias.data = torch.zeros_like(gate.weight), torch.full_like(gate.bias, torch.inf)
    try:
        yield
    finally:
        for gate, (weight, bias) in zip(gates, kept):
            gate.weight.data, gate.bias.data = weight, bias


def recall_hits(row: torch.Tensor, window: int) -> torch.Tensor:
    """
    (seq) -> (seq - 1) bool: whether a token ends a pair of tokens that was in the row before, and last more than `window`
    tokens ago, so that it has to be recalled (the hits of associative recall of arXiv 2312.04927, beyond the window).
    """
    pairs = row[:-1] * 2**32 + row[1:]
    same = (pairs[:, None] == pairs).tril(-1)
    distance = torch.arange(len(pairs))[:, None] - torch.arange(len(pairs))
    return same.any(1) & ~(same & (distance <= window)).any(1)


@torch.no_grad()
def fidelity(
    model: torch.nn.Module, teacher: torch.nn.Module, texts: torch.Tensor, window: int
) -> dict[str, list[torch.Tensor]]:
    """
    texts: (texts, seq)

    Returns:
        For each text: `perplexity`, `kl` (of the teacher's next token from the model's, nats), `agreement` (share of tokens with
        the same most likely next token) and `recall` (share right of `recall_hits`; not a number without any); and for each
        of some random sequences, `copying`: the share right when it comes a second time. With a window, the same once more as
        `window only, …`.
    """
    device, found = next(teacher.parameters()).device, defaultdict(list)
    variants = {"": nullcontext, **({"window only, ": partial(window_only, model)} if window else {})}
    for row in texts.to(device):
        expected = log_probabilities(teacher, row)
        hits = recall_hits(row.cpu(), window).to(device)
        for name, variant in variants.items():
            with variant():
                logits = log_probabilities(model, row)
            best = logits.argmax(-1)
            found[f"{name}perplexity"].append(F.nll_loss(logits, row[1:]).exp())
            found[f"{name}kl"].append(divergence(logits, expected))
            found[f"{name}agreement"].append((best == expected.argmax(-1)).float().mean())
            found[f"{name}recall"].append((best == row[1:])[hits].float().mean())
    generator = torch.Generator().manual_seed(0)
    for _ in range(COPIES):
        tokens = torch.randint(model.config.vocab_size, (COPIED,), generator=generator).repeat(2).to(device)
        for name, variant in variants.items():
            with variant():
                best = model(tokens[None], use_cache=False, logits_to_keep=COPIED).logits[0, :-1].argmax(-1)
            found[f"{name}copying"].append((best == tokens[COPIED + 1 :]).float().mean())
    return dict(found)


def log_probabilities(model: torch.nn.Module, row: torch.Tensor) -> torch.Tensor:
    """(seq) -> (seq - 1, vocab_size), of the next tokens"""
    return model(row[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)


def divergence(log_probs: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """KL(expected ‖ model) in nats a token; both (tokens, vocab_size), log probabilities."""
    return F.kl_div(log_probs, expected, log_target=True, reduction="batchmean")


def spread(values: list[torch.Tensor]) -> tuple[float, float]:
    """Mean, and 1.96 standard errors of it, of the numbers among the values."""
    numbers = torch.stack(values).cpu().double()
    numbers = numbers[~numbers.isnan()]
    return numbers.mean().item(), 1.96 * numbers.std().item() / len(numbers) ** 0.5
