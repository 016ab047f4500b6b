"""
Does a server answer as the steered model? A server that does not know of the vectors drops them without a word; its
log-probabilities tell.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase


PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a",
    "Question: What is 12 times 11?\nAnswer:",
    "def add(a, b):\n    return",
    "I think that the weather today is",
    "Dear Sir or Madam,\n\nI am writing to",
    "The three most important things in life are",
    "She opened the door and saw",
    "To be, or not to be: that is the",
    "The experiment shows that",
    "My favourite food is",
    "In 1969, the first man",
)
# of the tokens of a server and of the model; the first is what OpenAI's interface gives at most
TOP_LOGPROBS, CANDIDATES = 5, 50
# fewer cannot be told from chance
LEAST_TOKENS = 10
# how far the share may be from 1, or from 0, and of what the adapter changes, how much may be off
TOLERANCE, LARGEST_DIFFERENCE = 0.25, 0.5


@dataclass
class ServerCheck:
    """
    How much of an adapter arrives in a server's answers.

    Args:
        share (`float`):
            How far the served log-probabilities lie on the way from the base model's to the steered model's: 1 where the
            server steers, 0 where it serves the base, about 2 where vectors are added twice.
        error (`float`): 1.96 standard errors of it.
        difference (`float`): Mean absolute difference from the steered model, in nats; what rounding and quantisation leave.
        base_difference (`float`): The same from the base model.
        effect (`float`): Mean absolute difference between the steered model and the base, in nats.
        tokens (`int`): Log-probabilities that were compared.
    """

    share: float
    error: float
    difference: float
    base_difference: float
    effect: float
    tokens: int

    @property
    def is_steered(self) -> bool:
        return abs(self.share - 1) <= TOLERANCE and self.difference <= LARGEST_DIFFERENCE * self.effect

    @property
    def is_base(self) -> bool:
        return abs(self.share) <= TOLERANCE and self.base_difference <= LARGEST_DIFFERENCE * self.effect

    def __str__(self) -> str:
        return (
            f"{self.share:.2f} ± {self.error:.2f} of the adapter arrives: {self.tokens} served log-probabilities differ by "
            f"{self.difference:.2g} nats from the steered model's and by {self.base_difference:.2g} from the base model's, which "
            f"the adapter moves by {self.effect:.2g}"
        )


def check_server(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    url: str,
    served_model: str | None = None,
    *,
    prompts: Sequence[str] = PROMPTS,
    timeout: float = 120.0,
) -> ServerCheck:
    """
    Compares what a server says of the tokens after some prompts with what the steered model says, and the base model.

    The server has to answer `/completions` of OpenAI's interface with log-probabilities, as those of vLLM and
    llama-cpp-python do. The variable `OPENAI_API_KEY` is sent along if it is set.

    Args:
        model (`PeftModel`): A causal language model with active, unmerged BiasSteer adapters. It is left as it was.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        url (`str`): Of the interface, such as `"http://localhost:8000/v1"`.
        served_model (`str`, *optional*): Name of the model, or of the adapter, there; not needed where there is one.
        prompts (`Sequence[str]`, *optional*): Texts whose next tokens are compared, by default a dozen short ones.
        timeout (`float`, *optional*, defaults to 120): Seconds to wait for an answer.

    Returns:
        [`ServerCheck`]

    Raises:
        ConnectionError: If there is no answer, or an error.
        ValueError: If the server gives no log-probabilities, or those of another vocabulary, or the adapter changes none.
    """
    served_model = served_model or _only_model(url, timeout)
    rows = []
    for prompt in prompts:
        body = {"model": served_model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": TOP_LOGPROBS}
        served = _top_logprobs(_ask(f"{url.rstrip('/')}/completions", timeout, body), url)
        steered, base = _next_logprobs(model, tokenizer, prompt)
        rows += [
            (logprob, steered[token], base[token]) for token, logprob in _matched(served, tokenizer, steered, base)
        ]
    if len(rows) < LEAST_TOKENS:
        raise ValueError(
            f"expected tokens that {model.get_base_model().name_or_path or 'the base model'} knows, got {len(rows)} of them "
            f"from {served_model} after {len(prompts)} prompts: is it made of this base model?"
        )
    return _compare(*torch.tensor(rows, dtype=torch.float64).T)


def _compare(served: torch.Tensor, steered: torch.Tensor, base: torch.Tensor) -> ServerCheck:
    way, went = steered - base, served - base
    effect = way.abs().mean().item()
    if effect == 0:
        raise ValueError(
            "the adapter changes none of the tokens that were asked for: give prompts that it was made for"
        )
    share = (way @ went / (way @ way)).item()
    left = went - share * way
    error = 1.96 * (left.square().sum() / max(1, len(way) - 1) / (way @ way)).sqrt().item()
    differences = (x.abs().mean().item() for x in (served - steered, went))
    return ServerCheck(share, error, *differences, effect, len(way))


def _ask(url: str, timeout: float, body: dict | None = None) -> Any:
    import httpx

    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.request("GET" if body is None else "POST", url, json=body, headers=headers, timeout=timeout)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConnectionError(
            f"no answer from {url} ({error}): is the server up, and does its url end in /v1?"
        ) from error
    if answer.status_code != 200:
        raise ConnectionError(f"{url} answers with status {answer.status_code}: {answer.text[:300]}")
    try:
        return answer.json()
    except ValueError as error:
        raise ConnectionError(f"expected JSON from {url}, got {answer.text[:80]!r}") from error


def _only_model(url: str, timeout: float) -> str:
    found = _ask(f"{url.rstrip('/')}/models", timeout)
    names = [str(model.get("id")) for model in found.get("data", [])] if isinstance(found, dict) else []
    if len(names) != 1:
        raise ValueError(f"{url} serves {', '.join(names) or 'no model that it names'}: say which, as --model")
    return names[0]


def _top_logprobs(answer: Any, url: str) -> dict[str, float]:
    """Log-probabilities of the first token by text; llama.cpp's server lists them, the others have a mapping."""
    try:
        found = answer["choices"][0]["logprobs"]
        if found.get("top_logprobs"):
            return {text: float(logprob) for text, logprob in found["top_logprobs"][0].items()}
        return {one["token"]: float(one["logprob"]) for one in found["content"][0]["top_logprobs"]}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"expected log-probabilities in what {url}/completions answers, got none: a server without them cannot be checked"
        ) from error


@torch.no_grad()
def _next_logprobs(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompt: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(vocabulary,) of the steered model and of the base."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    training = model.training
    model.eval()
    try:
        steered = model(input_ids=ids).logits[0, -1]
        with model.disable_adapter():
            base = model(input_ids=ids).logits[0, -1]
    finally:
        model.train(training)
    return steered.double().log_softmax(-1).cpu(), base.double().log_softmax(-1).cpu()


def _matched(
    served: dict[str, float], tokenizer: PreTrainedTokenizerBase, *logprobs: torch.Tensor
) -> Iterator[tuple[int, float]]:
    """Ids of the served tokens. Servers write spaces differently: a text that several tokens have is passed over."""
    candidates = torch.cat([each.topk(min(CANDIDATES, len(each))).indices for each in logprobs]).unique().tolist()
    texts = {token: tokenizer.decode([token]) for token in candidates}
    exact, bare = Counter(texts.values()), Counter(text.strip() for text in texts.values())
    for text, logprob in served.items():
        for token, own in texts.items():
            is_same = text == own and exact[own] == 1
            is_alike = exact[text] == 0 and text.strip() == own.strip() and bare[own.strip()] == 1
            if is_same or is_alike:
                yield token, logprob
