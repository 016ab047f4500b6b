"""How well single latents can be understood: against labels of the text, and by a language model's judgement."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .language_model import evaluation_mode
from .latent_activations import LatentActivations, decoded


MEASURES = ("purity", "information", "auroc")


@dataclass(kw_only=True)
class LabelScores:
    """
    What [`label_scores`] found. Tensors of latents hold NaN where a latent fires on fewer than `min_fires` labelled
    tokens at that budget. Printing it gives a table of means over the other latents.

    Args:
        budgets (`list[int]`): numbers of latents per token.
        label_names (`list[str]`): the labels.
        tokens (`int`): labelled tokens.
        best_label (`torch.Tensor`): (budgets, d_sae), the label of most of the tokens that a latent fires on.
        purity (`torch.Tensor`): (budgets, d_sae), the share of these tokens that carry it.
        information (`torch.Tensor`): (budgets, d_sae), I(fires; label) / H(fires), the share of the entropy of firing
            that the label explains.
        auroc (`torch.Tensor`): (budgets, d_sae), largest area under the ROC curve of the activation, 0 where it does
            not fire, for any label against all others.
        purity_by_chance, information_by_chance, auroc_by_chance (`torch.Tensor`): (budgets, d_sae), means of the same
            over permuted labels. All three numbers are above their ideal of chance for latents that fire rarely.
        above_chance (`torch.Tensor`): (budgets, d_sae), whether information is above that of every permutation, which
            happens by chance once in `permutations + 1` times.
        probe_auroc (`torch.Tensor`): (budgets, labels), of the single latent that tells a label best from the others:
            chosen on the contexts of even number, measured on the others (sparse probing, arXiv 2305.01610, with k = 1).
        permutations (`int`): how many.
    """

    budgets: list[int]
    label_names: list[str]
    tokens: int
    best_label: torch.Tensor
    purity: torch.Tensor
    information: torch.Tensor
    auroc: torch.Tensor
    purity_by_chance: torch.Tensor
    information_by_chance: torch.Tensor
    auroc_by_chance: torch.Tensor
    above_chance: torch.Tensor
    probe_auroc: torch.Tensor
    permutations: int

    def to_dict(self) -> dict:
        """Means over the latents that were scored, one number per budget, ready for JSON."""
        scored = ~self.purity.isnan()
        means = {
            name: getattr(self, name).nanmean(dim=1).tolist()
            for measure in MEASURES
            for name in (measure, f"{measure}_by_chance")
        }
        return {
            "budgets": self.budgets,
            "labels": len(self.label_names),
            "tokens": self.tokens,
            "scored_latents": scored.sum(dim=1).tolist(),
            **means,
            "above_chance": [float(row[keep].float().mean()) for row, keep in zip(self.above_chance, scored)],
            "probe_auroc": self.probe_auroc.nanmean(dim=1).tolist(),
        }

    def __str__(self) -> str:
        found = self.to_dict()
        titles = {
            "scored_latents": "latents",
            "purity": "purity",
            "purity_by_chance": "(chance)",
            "information": "inform.",
            "information_by_chance": "(chance)",
            "auroc": "AUROC",
            "auroc_by_chance": "(chance)",
            "above_chance": "above",
            "probe_auroc": "probe",
        }
        lines = [f"{'budget':>6}" + "".join(f" {title:>9}" for title in titles.values())]
        for place, budget in enumerate(self.budgets):
            lines.append(f"{budget:>6}" + "".join(f" {found[name][place]:>9.4g}" for name in titles))
        return "\n".join([*lines, f"{self.tokens} tokens, {len(self.label_names)} labels"])


def label_scores(
    activations: LatentActivations,
    labels: torch.Tensor | None = None,
    label_names: Sequence[str] | None = None,
    budgets: Sequence[int] | None = None,
    *,
    min_fires: int = 20,
    permutations: int = 20,
    seed: int = 0,
    show_progress: bool = True,
) -> LabelScores:
    """
    How far each latent goes with one label of the text, at each budget, with the same for permuted labels.

    Labels of contexts are permuted among contexts: in a random order of these, each label gets as many tokens as it
    had, so that only contexts where one label ends and the next begins are divided. Labels of tokens are shifted
    along the text by a random distance, which keeps the runs that they come in.

    Args:
        activations ([`LatentActivations`]): from [`latent_activations`].
        labels (`torch.Tensor`, *optional*): (positions,) or (contexts,), places in `label_names`, -1 where there is
            none; by default those of the mapping that the texts came in.
        label_names (`Sequence[str]`, *optional*): needed if `labels` is given.
        budgets (`Sequence[int]`, *optional*): by default 1, 2, 4, … and the largest.
        min_fires (`int`, defaults to 20): leave out latents that fire on fewer labelled tokens.
        permutations (`int`, defaults to 20): number of permutations, at least 1.
        seed (`int`, defaults to 0): of the permutations.
        show_progress (`bool`, defaults to `True`): progress bar.

    Returns:
        [`LabelScores`]

    Raises:
        `ValueError`: no labels or fewer than two of them in use, labels of another length, budgets out of range.
    """
    names, labels = _check_labels(activations, labels, label_names)
    budgets = activations.check_budgets(budgets)
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    is_by_context = len(labels) == len(activations.context_starts) - 1
    contexts = activations.position_contexts
    per_token = labels[contexts] if is_by_context else labels
    used = (activations.is_read & (per_token >= 0)).nonzero().flatten()
    per_token, contexts = per_token[used], contexts[used]
    if len(per_token.unique()) < 2:
        raise ValueError(f"expected tokens of at least 2 labels, got {len(per_token.unique())} on {len(used)} tokens")
    generator = torch.Generator().manual_seed(seed)
    if is_by_context:
        shuffled = [_permuted(per_token, contexts, generator) for _ in range(permutations)]
    else:
        shifts = torch.randint(1, len(used), (permutations,), generator=generator).tolist()
        shuffled = [per_token.roll(shift) for shift in shifts]

    found = []
    total = len(budgets) * (1 + permutations)
    with logging.tqdm(total=total, desc="score", unit="labelling", disable=not show_progress) as progress:
        for budget in budgets:
            firing = _Firing(activations, budget, used)
            too_few = firing.fires < min_fires
            counts = []
            for labelling in (per_token, *shuffled):
                counts.append(firing.scores(labelling, len(names)))
                progress.update()
            own, *others = counts
            by_chance = {name: torch.stack([other[name] for other in others]) for name in MEASURES}
            at_budget = {
                **own,
                **{f"{name}_by_chance": values.mean(dim=0) for name, values in by_chance.items()},
            }
            at_budget = {name: values.masked_fill(too_few, torch.nan) for name, values in at_budget.items()}
            at_budget["best_label"] = firing.best_label(per_token, len(names))
            at_budget["above_chance"] = (own["information"] > by_chance["information"].amax(dim=0)) & ~too_few
            halves = [contexts % 2 == half for half in (0, 1)]
            choosing, measuring = (
                _Firing(activations, budget, used[half]).auroc(per_token[half], len(names)) for half in halves
            )
            chosen = choosing.nan_to_num(-1).argmax(dim=0)
            at_budget["probe_auroc"] = measuring.gather(0, chosen.unsqueeze(0))[0]
            found.append(at_budget)
    return LabelScores(
        budgets=budgets,
        label_names=names,
        tokens=len(used),
        permutations=permutations,
        **{name: torch.stack([at_budget[name] for at_budget in found]) for name in found[0]},
    )


class _Firing:
    """Where latents fire at a budget on the tokens `used`, (n,) positions, sorted by latent and activation."""

    def __init__(self, activations: LatentActivations, budget: int, used: torch.Tensor):
        self.tokens, self.d_sae = len(used), len(activations.latent_starts) - 1
        place = torch.full((len(activations.token_ids),), -1)
        place[used] = torch.arange(len(used))
        places = place[activations.positions.long()]
        kept = (activations.ranks <= budget) & (places >= 0)
        values, latents, places = activations.values[kept], activations.entry_latents[kept], places[kept]
        order = values.argsort(stable=True)
        order = order[latents[order].argsort(stable=True)]
        values, self.latents, self.places = values[order], latents[order], places[order]
        self.fires = torch.bincount(latents, minlength=self.d_sae)
        # Equal activations share the mean of their ranks; tokens without one come before all of them.
        is_new = torch.ones(len(values), dtype=torch.bool)
        is_new[1:] = (values[1:] != values[:-1]) | (self.latents[1:] != self.latents[:-1])
        group = is_new.cumsum(0) - 1
        firsts, sizes = is_new.nonzero().flatten(), torch.bincount(group)
        start = (self.fires.cumsum(0) - self.fires)[self.latents]
        self.silent = (self.tokens - self.fires).double()
        self.ranks = self.silent[self.latents] + (firsts + (sizes - 1) / 2)[group].double() - start + 1

    def counts(self, labels, number, weights=None):
        """(d_sae, labels): tokens of each label that a latent fires on, or the sums of their weights."""
        cells = self.latents * number + labels[self.places]
        return torch.bincount(cells, weights, minlength=self.d_sae * number).view(-1, number).double()

    def best_label(self, labels, number):
        return self.counts(labels, number).argmax(dim=1)

    def auroc(self, labels, number):
        """(d_sae, labels): of the activation, for a label against all others; NaN for a label without tokens."""
        counts, of_label = self.counts(labels, number), torch.bincount(labels, minlength=number).double()
        ranks = self.counts(labels, number, self.ranks) + (of_label - counts) * (self.silent.unsqueeze(1) + 1) / 2
        return (ranks - of_label * (of_label + 1) / 2) / (of_label * (self.tokens - of_label))

    def scores(self, labels, number):
        counts, of_label = self.counts(labels, number), torch.bincount(labels, minlength=number).double()
        fires = self.fires.double()
        cells = torch.stack([counts, of_label - counts]) / self.tokens
        expected = torch.stack([fires, self.silent]).unsqueeze(2) * of_label / self.tokens**2
        information = torch.where(cells > 0, cells * (cells / expected).log(), 0).sum(dim=(0, 2))
        shares = torch.stack([fires, self.silent]) / self.tokens
        return {
            "purity": counts.amax(dim=1) / fires,
            "information": information / torch.special.entr(shares).sum(dim=0),
            "auroc": self.auroc(labels, number).nan_to_num(0).amax(dim=1),
        }


def _permuted(per_token, contexts, generator):
    """Labels of tokens in `contexts`, (n,) each, dealt anew in a random order of the contexts: as often as before."""
    present, inverse = contexts.unique(return_inverse=True)
    places = torch.randperm(len(present), generator=generator)[inverse]
    dealt = torch.empty_like(per_token)
    dealt[places.argsort(stable=True)] = per_token.sort().values
    return dealt


def _check_labels(activations, labels, label_names):
    if labels is None:
        labels, label_names = activations.context_labels, activations.label_names
    if labels is None or label_names is None:
        raise ValueError(
            "no labels: give `labels` and `label_names`, or texts as a mapping from label to texts to latent_activations"
        )
    contexts, positions = len(activations.context_starts) - 1, len(activations.token_ids)
    if labels.shape not in ((contexts,), (positions,)):
        raise ValueError(
            f"labels must have one entry per token ({positions}) or per context ({contexts}), got {tuple(labels.shape)}"
        )
    if len(labels) and not -1 <= int(labels.min()) <= int(labels.max()) < len(label_names):
        raise ValueError(
            f"labels must be in [-1, {len(label_names)}), places in label_names, "
            f"got {int(labels.min())}…{int(labels.max())}"
        )
    return list(label_names), labels.long().cpu()


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
    judge_tokenizer: PreTrainedTokenizerBase,
    k: int | None = None,
    *,
    examples: int = 8,
    window: int = 24,
    max_new_tokens: int = 24,
    show_progress: bool = True,
) -> dict[int, str]:
    """
    Let a language model say what the tokens have in common that each latent fires on (after arXiv 2410.13928). It
    sees every second of the strongest contexts, the tokens between << and >>; the others are left for the scores.

    Args:
        activations ([`LatentActivations`]): from [`latent_activations`].
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer that they were made with.
        latents (`Sequence[int]`): latents to explain.
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
    explanations = {}
    for latent in logging.tqdm(latents, desc="explain", unit="latent", disable=not show_progress):
        shown = _windows(activations, latent, k, window)[::2][:examples]
        if not shown:
            continue
        texts = "\n".join(f"{number}. {_marked(tokenizer, *example)}" for number, example in enumerate(shown, start=1))
        prompt = (
            f"In these texts some words stand between << and >>.\n\n{texts}\n\n"
            "What do the words between << and >> have in common? Answer with one short phrase."
        )
        inputs = judge_tokenizer(_as_chat(judge_tokenizer, prompt), return_tensors="pt", add_special_tokens=False)
        with torch.no_grad(), evaluation_mode(judge):
            answer = judge.generate(  # ty: ignore[not-callable]
                **inputs.to(judge.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=judge_tokenizer.pad_token_id or judge_tokenizer.eos_token_id or 0,
            )
        text = judge_tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        explanations[latent] = next(iter(text.strip().splitlines()), "")
    return explanations


def detection_scores(
    activations: LatentActivations,
    tokenizer: PreTrainedTokenizerBase,
    explanations: Mapping[int, str],
    judge: PreTrainedModel,
    judge_tokenizer: PreTrainedTokenizerBase,
    k: int | None = None,
    *,
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
        activations ([`LatentActivations`]): from [`latent_activations`].
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
    question = "Text: {text}\n\nIs there anything in this text that fits the description?"

    def pairs(latent, k, generator):
        firing = _spread(_windows(activations, latent, k, window)[1::2], examples)
        silent = _silent_windows(activations, latent, k, window, len(firing), generator)
        return [[decoded(tokenizer, *example[0]) for example in kind] for kind in (firing[: len(silent)], silent)]

    return _judged(activations, explanations, judge, judge_tokenizer, k, question, pairs, seed, show_progress)


def fuzzing_scores(
    activations: LatentActivations,
    tokenizer: PreTrainedTokenizerBase,
    explanations: Mapping[int, str],
    judge: PreTrainedModel,
    judge_tokenizer: PreTrainedTokenizerBase,
    k: int | None = None,
    *,
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
    question = "Text: {text}\n\nDo the words between << and >> fit the description?"

    def pairs(latent, k, generator):
        firing = _spread(_windows(activations, latent, k, window)[1::2], examples)
        firing = [(ids, fires) for ids, fires in firing if 2 * int(fires.sum()) <= len(ids)]
        moved = []
        for ids, fires in firing:
            others = (~fires).nonzero().flatten()
            chosen = others[torch.randperm(len(others), generator=generator)[: int(fires.sum())]]
            moved.append((ids, torch.zeros_like(fires).index_fill(0, chosen, True)))
        return [[_marked(tokenizer, *example) for example in kind] for kind in (firing, moved)]

    return _judged(activations, explanations, judge, judge_tokenizer, k, question, pairs, seed, show_progress)


def _judged(activations, explanations, judge, judge_tokenizer, k, question, pairs, seed, show_progress):
    k = activations.check_budgets(None if k is None else [k])[-1]
    generator, found = torch.Generator().manual_seed(seed), {}
    for latent, explanation in logging.tqdm(
        explanations.items(), desc="judge", unit="latent", disable=not show_progress
    ):
        yes, no = pairs(latent, k, generator)
        if not yes or not no:
            continue
        prompts = [
            _as_chat(
                judge_tokenizer,
                f"Description: {explanation}\n\n{question.format(text=text)} Answer with Yes or No.",
            )
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
def _margin(judge, tokenizer, prompt):
    """log p(Yes) − log p(No) after the prompt, in nats, at the first token in which the answers differ."""
    yes, no = (tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in ("Yes", "No"))
    place = next(place for place, (one, other) in enumerate(zip(yes, no)) if one != other)
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    with evaluation_mode(judge):
        ids = torch.tensor([start + yes[:place]], device=judge.device)
        logits = judge(input_ids=ids, logits_to_keep=1).logits[0, -1].float()
    return (logits[yes[place]] - logits[no[place]]).item()


def _as_chat(tokenizer, prompt):
    if tokenizer.chat_template is None:
        return f"{prompt}\n\nAnswer: "
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


def _windows(activations, latent, k, size):
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


def _silent_windows(activations, latent, k, size, count, generator):
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


def _around(activations, context, middle, size):
    start, end = activations.context_starts[context : context + 2].tolist()
    first = max(start, min(middle - size // 2, end - size))
    return slice(first, min(end, first + size))


def _spread(examples, count):
    """`count` of them at equal distances, all if there are fewer."""
    if len(examples) <= count:
        return examples
    return [examples[place * len(examples) // count] for place in range(count)]


def _marked(tokenizer, ids, fires):
    """The text with << and >> around the tokens that fire."""
    runs, start = [], 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or fires[end] != fires[start]:
            text = decoded(tokenizer, *ids[start:end])
            runs.append(f"<<{text}>>" if fires[start] else text)
            start = end
    return "".join(runs)
