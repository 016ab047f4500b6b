"""How well single latents can be understood in the judgement of a language model."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .configuration_hierarchical_sae import integer
from .language_model import check_vocabulary, evaluation_mode
from .latent_activations import LatentActivations, decoded


@dataclass(kw_only=True)
class JudgeScore:
    """
    A language model's answers about one latent, see [`detection_scores`] and [`fuzzing_scores`].

    Args:
        auroc (`float`): area under the ROC curve of log p(Yes) − log p(No): 1 if every text that should get a yes is
            above every other, 0.5 by chance, whatever the judge's bias towards yes.
        balanced_accuracy (`float`): mean of the shares of right answers among the two kinds of text.
        examples (`int`): texts of each kind.
    """

    auroc: float
    balanced_accuracy: float
    examples: int


def explain_latents(
    activations: LatentActivations,
    tokenizer: PreTrainedTokenizerBase,
    latents: Sequence[int],
    judge: PreTrainedModel,
    *,
    judge_tokenizer: PreTrainedTokenizerBase,
    k: int | None = None,
    examples: int = 8,
    window: int = 24,
    max_new_tokens: int = 24,
    show_progress: bool = True,
) -> dict[int, str]:
    """
    Let a language model say what the tokens have in common that each latent fires on (after arXiv 2410.13928). It
    sees every second of the strongest contexts, the tokens between << and >>; the others are left for the scores.

    Args:
        activations ([`LatentActivations`]): from [`read_latents`].
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer that they were made with.
        latents (`Sequence[int]`): latents to explain, a tensor or an array too.
        judge (`PreTrainedModel`): any causal language model.
        judge_tokenizer (`PreTrainedTokenizerBase`): its tokenizer; its chat template is used if it has one.
        k (`int`, *optional*): budget; by default the largest.
        examples (`int`, defaults to 8): contexts that the judge sees.
        window (`int`, defaults to 24): tokens of each, around the strongest.
        max_new_tokens (`int`, defaults to 24): longest explanation.
        show_progress (`bool`, defaults to `True`): progress bar.

    Returns:
        `dict[int, str]`: first line of the greedy answer, by latent. Latents that do not fire at this budget are left
        out.
    """
    k = activations.check_budgets(None if k is None else [k])[-1]
    examples, window = integer("examples", examples, 1), integer("window", window, 1)
    max_new_tokens = integer("max_new_tokens", max_new_tokens, 1)
    explanations = {}
    for latent in logging.tqdm(latents, desc="explain", unit="latent", disable=not show_progress):
        latent = integer("latent", latent)
        shown = _windows(activations, latent, k, window)[::2][:examples]
        if not shown:
            continue
        texts = "\n".join(
            f"{number}. {_marked(tokenizer, text.ids, text.fires)}" for number, text in enumerate(shown, start=1)
        )
        prompt = (
            f"In these texts some words stand between << and >>.\n\n{texts}\n\n"
            "What do the words between << and >> have in common? Answer with one short phrase."
        )
        ids = torch.tensor([_asked(judge_tokenizer, prompt)], device=judge.device)
        with torch.no_grad(), evaluation_mode(judge), _prompt(judge, ids):
            answer = judge.generate(  # ty: ignore[not-callable]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                # What a checkpoint asks for otherwise would not be its greedy answer.
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                pad_token_id=judge_tokenizer.pad_token_id or judge_tokenizer.eos_token_id or 0,
            )
        text = judge_tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
        explanations[latent] = next(iter(text.strip().splitlines()), "")
    return explanations


def detection_scores(
    activations: LatentActivations,
    tokenizer: PreTrainedTokenizerBase,
    explanations: Mapping[int, str],
    judge: PreTrainedModel,
    *,
    judge_tokenizer: PreTrainedTokenizerBase,
    k: int | None = None,
    examples: int = 10,
    window: int = 24,
    seed: int = 0,
    show_progress: bool = True,
) -> dict[int, JudgeScore]:
    """
    Does a language model tell from an explanation where a latent fires (detection, arXiv 2410.13928)? Half of the
    texts are contexts in which it fires at this budget, from strong to weak and none that [`explain_latents`] shows;
    the others, as long as these, are contexts in which it does not.

    Args:
        activations ([`LatentActivations`]): from [`read_latents`].
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer that they were made with.
        explanations (`Mapping[int, str]`): by latent, from [`explain_latents`] or written by hand.
        judge (`PreTrainedModel`): any causal language model.
        judge_tokenizer (`PreTrainedTokenizerBase`): its tokenizer; its chat template is used if it has one.
        k (`int`, *optional*): budget; by default the largest.
        examples (`int`, defaults to 10): texts of each kind, fewer where a latent fires rarely or nearly everywhere.
        window (`int`, defaults to 24): tokens of each text.
        seed (`int`, defaults to 0): of the contexts in which it does not fire, whatever other latents are asked for.
        show_progress (`bool`, defaults to `True`): progress bar.

    Returns:
        `dict[int, JudgeScore]`: by latent; without those that leave no text of one kind.

    Raises:
        `ValueError`: If the judge's logits are NaN or infinite, or it cannot read the prompts.
    """
    examples, window = integer("examples", examples, 1), integer("window", window, 1)
    question = "Text: {text}\n\nIs there anything in this text that fits the description?"

    def pairs(latent: int, k: int, generator: torch.Generator) -> list[tuple[str, str]]:
        found = _beside_silent(activations, latent, k, window, examples=examples, generator=generator)
        return [(decoded(tokenizer, *firing), decoded(tokenizer, *silent)) for firing, silent in found]

    return _judged(
        activations,
        explanations,
        judge,
        judge_tokenizer,
        k=k,
        question=question,
        pairs=pairs,
        seed=seed,
        show_progress=show_progress,
    )


def fuzzing_scores(
    activations: LatentActivations,
    tokenizer: PreTrainedTokenizerBase,
    explanations: Mapping[int, str],
    judge: PreTrainedModel,
    *,
    judge_tokenizer: PreTrainedTokenizerBase,
    k: int | None = None,
    examples: int = 10,
    window: int = 24,
    seed: int = 0,
    show_progress: bool = True,
) -> dict[int, JudgeScore]:
    """
    Does a language model tell from an explanation on which tokens a latent fires (fuzzing, arXiv 2410.13928)? Every
    text comes twice: with the tokens marked on which it fires at this budget, and with as many others that were read.
    Takes, returns and raises what [`detection_scores`] does.
    """
    examples, window = integer("examples", examples, 1), integer("window", window, 1)
    question = "Text: {text}\n\nDo the words between << and >> fit the description?"

    def pairs(latent: int, k: int, generator: torch.Generator) -> list[tuple[str, str]]:
        found = []
        for text in _spread(_windows(activations, latent, k, window)[1::2], examples):
            others = (text.is_read & ~text.fires).nonzero().flatten()
            number = int(text.fires.sum())
            if number <= len(others):
                chosen = others[torch.randperm(len(others), generator=generator)[:number]]
                moved = torch.zeros_like(text.fires).index_fill(0, chosen, True)
                found.append((_marked(tokenizer, text.ids, text.fires), _marked(tokenizer, text.ids, moved)))
        return found

    return _judged(
        activations,
        explanations,
        judge,
        judge_tokenizer,
        k=k,
        question=question,
        pairs=pairs,
        seed=seed,
        show_progress=show_progress,
    )


def _judged(
    activations: LatentActivations,
    explanations: Mapping[int, str],
    judge: PreTrainedModel,
    judge_tokenizer: PreTrainedTokenizerBase,
    *,
    k: int | None,
    question: str,
    pairs: Callable[[int, int, torch.Generator], list[tuple[str, str]]],
    seed: int,
    show_progress: bool,
) -> dict[int, JudgeScore]:
    k = activations.check_budgets(None if k is None else [k])[-1]
    seed, found = integer("seed", seed), {}
    for latent, explanation in logging.tqdm(
        explanations.items(), desc="judge", unit="latent", disable=not show_progress
    ):
        texts = pairs(latent, k, torch.Generator().manual_seed(seed + integer("latent", latent)))
        if not texts:
            continue
        asked = [
            [f"Description: {explanation}\n\n{question.format(text=text)} Answer with Yes or No." for text in pair]
            for pair in texts
        ]
        margins = torch.tensor([[_margin(judge, judge_tokenizer, prompt) for prompt in pair] for pair in asked])
        if not margins.isfinite().all():
            raise ValueError(
                "expected finite log p(Yes) − log p(No), got NaN or infinity: load the judge in bfloat16 or float32"
            )
        yes, no = margins.unbind(dim=1)
        above = (yes.unsqueeze(1) > no).double() + 0.5 * (yes.unsqueeze(1) == no).double()
        accuracy = ((yes > 0).double().mean() + (no <= 0).double().mean()) / 2
        found[latent] = JudgeScore(auroc=float(above.mean()), balanced_accuracy=float(accuracy), examples=len(texts))
    return found


@torch.no_grad()
def _margin(judge: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> float:
    """log p(Yes) − log p(No) after the prompt, in nats, at the first token in which the answers differ."""
    yes, no = (_asked(tokenizer, prompt, answer) for answer in ("Yes", "No"))
    place = next((place for place, (one, other) in enumerate(zip(yes, no)) if one != other), None)
    if place is None:
        raise ValueError("the judge's tokenizer gives 'Yes' and 'No' the same tokens: give another judge")
    with evaluation_mode(judge):
        ids = torch.tensor([yes[:place]], device=judge.device)
        with _prompt(judge, ids):
            logits = judge(input_ids=ids, logits_to_keep=1).logits[0, -1].float()
    return (logits[yes[place]] - logits[no[place]]).item()


@contextmanager
def _prompt(judge: Any, ids: torch.Tensor) -> Generator[None, None, None]:
    """Says of a prompt what torch says in other words: that a language model cannot read it."""
    if isinstance(judge, PreTrainedModel):
        check_vocabulary(judge, ids)
    try:
        yield
    except IndexError as error:
        raise ValueError(
            f"the judge has too few positions for a prompt of {ids.shape[1]} tokens and its answer ({error}): give "
            "fewer examples, a smaller window, or another judge"
        ) from error


def _asked(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str = "") -> list[int]:
    """Ids of a prompt and an answer: a chat, or else plain text that begins as the tokenizer begins one."""
    if tokenizer.chat_template is None:
        text = f"{prompt}\n\nAnswer: {answer}".rstrip()
        ids = tokenizer(text)["input_ids"]
        return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
    message = [{"role": "user", "content": prompt}]
    asked = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    return [i for text in (asked, answer) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]


class _Text(NamedTuple):
    """Token ids, (n,), which of them the latent fires on, and which of them were read at all."""

    ids: list[int]
    fires: torch.Tensor
    is_read: torch.Tensor


def _windows(activations: LatentActivations, latent: int, k: int, size: int) -> list[_Text]:
    """Around the peak of each context in which the latent fires, the strongest first."""
    positions, values, ranks = activations.latent(latent)
    positions, values = positions[ranks <= k].long(), values[ranks <= k]
    fires = torch.zeros(len(activations.token_ids), dtype=torch.bool)
    fires[positions] = True
    contexts, found, seen = activations.position_contexts[positions], [], set()
    for entry in values.argsort(descending=True, stable=True).tolist():
        context = int(contexts[entry])
        if context not in seen:
            seen.add(context)
            window = _around(activations, context, int(positions[entry]), size)
            found.append(_Text(activations.token_ids[window].tolist(), fires[window], activations.is_read[window]))
    return found


def _beside_silent(
    activations: LatentActivations, latent: int, k: int, size: int, *, examples: int, generator: torch.Generator
) -> list[tuple[list[int], list[int]]]:
    """
    Token ids around the peaks of contexts in which the latent fires, each beside as many from a random place of a context
    of its own in which it does not: a text that is shorter than the others would give itself away.
    """
    positions, _, ranks = activations.latent(latent)
    is_silent = torch.ones(len(activations.context_starts) - 1, dtype=torch.bool)
    is_silent[activations.position_contexts[positions[ranks <= k].long()]] = False
    silent = is_silent.nonzero().flatten()
    silent = silent[torch.randperm(len(silent), generator=generator)]
    widths = activations.context_starts.diff()[silent].clamp(max=size)
    firing = [text.ids for text in _windows(activations, latent, k, size)[1::2]]
    firing = [ids for ids in firing if bool((widths >= len(ids)).any())]
    found = []
    # The longest choose first, and none takes what is longer than it needs.
    for ids in sorted(_spread(firing, min(examples, len(silent))), key=len, reverse=True):
        enough = (widths >= len(ids)).nonzero().flatten()
        if len(enough) == 0:
            continue
        place = enough[widths[enough].argmin()]
        start, end = activations.context_starts[silent[place] : silent[place] + 2].tolist()
        first = int(torch.randint(start, end - len(ids) + 1, (1,), generator=generator))
        found.append((ids, activations.token_ids[first : first + len(ids)].tolist()))
        widths[place] = 0
    return found


def _around(activations: LatentActivations, context: int, middle: int, size: int) -> slice:
    start, end = activations.context_starts[context : context + 2].tolist()
    first = max(start, min(middle - size // 2, end - size))
    return slice(first, min(end, first + size))


def _spread(examples: list, count: int) -> list:
    """`count` of them at equal distances, all if there are fewer."""
    if len(examples) <= count:
        return examples
    return [examples[place * len(examples) // count] for place in range(count)]


def _marked(tokenizer: PreTrainedTokenizerBase, ids: list[int], fires: torch.Tensor) -> str:
    """The text with << and >> around the tokens that fire."""
    runs, start = [], 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or fires[end] != fires[start]:
            text = decoded(tokenizer, *ids[start:end])
            runs.append(f"<<{text}>>" if fires[start] else text)
            start = end
    return "".join(runs)
