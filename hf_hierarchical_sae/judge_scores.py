"""How well single latents can be understood in the judgement of a language model."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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
        texts = "\n".join(f"{number}. {_marked(tokenizer, *example)}" for number, example in enumerate(shown, start=1))
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
                do_sample=False,
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
    the others are contexts in which it does not.

    Args:
        activations ([`LatentActivations`]): from [`read_latents`].
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer that they were made with.
        explanations (`Mapping[int, str]`): by latent, from [`explain_latents`] or written by hand.
        judge (`PreTrainedModel`): any causal language model.
        judge_tokenizer (`PreTrainedTokenizerBase`): its tokenizer; its chat template is used if it has one.
        k (`int`, *optional*): budget; by default the largest.
        examples (`int`, defaults to 10): texts of each kind, fewer where a latent fires rarely or nearly everywhere.
        window (`int`, defaults to 24): tokens of each text.
        seed (`int`, defaults to 0): of the contexts in which it does not fire.
        show_progress (`bool`, defaults to `True`): progress bar.

    Returns:
        `dict[int, JudgeScore]`: by latent; without those that leave no text of one kind.
    """
    examples, window = integer("examples", examples, 1), integer("window", window, 1)
    question = "Text: {text}\n\nIs there anything in this text that fits the description?"

    def pairs(latent: int, k: int, generator: torch.Generator) -> list[list[str]]:
        firing = _spread(_windows(activations, latent, k, window)[1::2], examples)
        silent = _silent_windows(activations, latent, k, window, count=len(firing), generator=generator)
        return [[decoded(tokenizer, *example[0]) for example in kind] for kind in (firing[: len(silent)], silent)]

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
    text comes twice: with the tokens marked on which it fires at this budget, and with as many others. Takes and
    returns what [`detection_scores`] does.
    """
    examples, window = integer("examples", examples, 1), integer("window", window, 1)
    question = "Text: {text}\n\nDo the words between << and >> fit the description?"

    def pairs(latent: int, k: int, generator: torch.Generator) -> list[list[str]]:
        firing = _spread(_windows(activations, latent, k, window)[1::2], examples)
        firing = [(ids, fires) for ids, fires in firing if 2 * int(fires.sum()) <= len(ids)]
        moved = []
        for ids, fires in firing:
            others = (~fires).nonzero().flatten()
            chosen = others[torch.randperm(len(others), generator=generator)[: int(fires.sum())]]
            moved.append((ids, torch.zeros_like(fires).index_fill(0, chosen, True)))
        return [[_marked(tokenizer, *example) for example in kind] for kind in (firing, moved)]

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
    pairs: Callable[[int, int, torch.Generator], list[list[str]]],
    seed: int,
    show_progress: bool,
) -> dict[int, JudgeScore]:
    k = activations.check_budgets(None if k is None else [k])[-1]
    generator, found = torch.Generator().manual_seed(integer("seed", seed)), {}
    for latent, explanation in logging.tqdm(
        explanations.items(), desc="judge", unit="latent", disable=not show_progress
    ):
        yes, no = pairs(latent, k, generator)
        if not yes or not no:
            continue
        prompts = [
            f"Description: {explanation}\n\n{question.format(text=text)} Answer with Yes or No."
            for text in (*yes, *no)
        ]
        margins = torch.tensor([_margin(judge, judge_tokenizer, prompt) for prompt in prompts])
        yes, no = margins[: len(yes)], margins[len(yes) :]
        above = (yes.unsqueeze(1) > no).double() + 0.5 * (yes.unsqueeze(1) == no).double()
        accuracy = ((yes > 0).double().mean() + (no <= 0).double().mean()) / 2
        found[latent] = JudgeScore(
            auroc=float(above.mean()), balanced_accuracy=float(accuracy), examples=min(len(yes), len(no))
        )
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


def _windows(activations: LatentActivations, latent: int, k: int, size: int) -> list[tuple[list[int], torch.Tensor]]:
    """Token ids and which of them fire, (n,) each, around the peak of each context that fires, the strongest first."""
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
            found.append((activations.token_ids[window].tolist(), fires[window]))
    return found


def _silent_windows(
    activations: LatentActivations, latent: int, k: int, size: int, *, count: int, generator: torch.Generator
) -> list[tuple[list[int], torch.Tensor]]:
    """The same from contexts in which the latent does not fire at this budget, at random places."""
    positions, _, ranks = activations.latent(latent)
    # A text that is shorter than the others would give itself away.
    is_silent = activations.context_starts.diff() >= min(size, int(activations.context_starts.diff().max()))
    is_silent[activations.position_contexts[positions[ranks <= k].long()]] = False
    contexts = is_silent.nonzero().flatten()
    found = []
    for context in contexts[torch.randperm(len(contexts), generator=generator)[:count]].tolist():
        start, end = activations.context_starts[context : context + 2].tolist()
        middle = int(torch.randint(start, end, (1,), generator=generator))
        ids = activations.token_ids[_around(activations, context, middle, size)].tolist()
        found.append((ids, torch.zeros(len(ids), dtype=torch.bool)))
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
