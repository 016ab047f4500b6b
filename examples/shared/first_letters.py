"""
First-letter absorption (arXiv 2409.14507) as SAEBench measures it, on a transformers model.

How often the latents for a word's first letter are silent where a probe finds the letter, and another latent along the
probe stands in. The judges are SAEBench's calculator and its k-sparse probes. They are given hidden states that were read
once for all dictionaries: the same examples stand before each word, where SAEBench draws them anew.
"""

import contextlib
import copy
import io
from collections.abc import Generator
from typing import Any

import torch
from dictionaries import language_model
from tqdm import tqdm

from hf_hierarchical_sae.sites import find_site, site_hook


# SAEBench's: letters whose probe has a lower F1 are not looked at, and a further latent is one of the letter's if it adds
# this much to the F1, of at most so many.
LEAST_F1, F1_RISE, MOST_MAIN_LATENTS = 0.6, 0.03, 10
STEPS_PER_EPOCH = 16
TEMPLATE = "{word} has the first letter:"
ABSORPTION = {
    "full": "full absorption",
    "fraction": "absorption fraction",
    "main_latents": "latents of a letter",
    "f1": "F1 of these",
}


@torch.no_grad()
def read_words(settings: dict) -> dict[str, Any]:
    """Words of the vocabulary, their prompts and letters, and the states (words, d_in) that SAEBench looks at."""
    from sae_bench.evals.absorption.prompting import create_icl_prompt
    from sae_bench.evals.absorption.vocab import LETTERS, get_alpha_tokens

    model, tokenizer = language_model(settings["model"], settings["dtype"])
    ids = {
        word: tokenizer(word, add_special_tokens=False)["input_ids"] for word in sorted(get_alpha_tokens(tokenizer))
    }
    words = [word for word, found in ids.items() if len(found) == 1]
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0)).tolist()
    words = [words[place] for place in order]
    examples, words = words[: settings["in_context"]], words[settings["in_context"] :]
    words = words[: settings["train_words"] + settings["test_words"]]
    prompts = [create_icl_prompt(word, examples, **prompt_form(settings["in_context"])) for word in words]
    start = prompts[0].base.removesuffix(TEMPLATE.format(word=words[0]))
    prefix = model(torch.tensor([tokenizer(start)["input_ids"]], device=model.device), use_cache=True).past_key_values
    states: list[torch.Tensor] = []
    # What follows a word does not reach it: the text before all of them is read once, then each word.
    with site_hook(find_site(model, settings["layer"]), lambda found: states.append(found[:, 0].float().cpu())):
        for part in tqdm(torch.tensor([ids[word] for word in words]).split(128), desc="words", unit="batch"):
            cache = copy.deepcopy(prefix)
            cache.batch_repeat_interleave(len(part))
            model(part.to(model.device), past_key_values=cache)
    return {
        "words": words,
        "examples": examples,
        "prompts": [prompt.base for prompt in prompts],
        "letters": torch.tensor([LETTERS.index(prompt.answer.strip().lower()) for prompt in prompts]),
        "states": torch.cat(states),
        "is_test": torch.arange(len(words)) >= settings["train_words"],
    }


def prompt_form(in_context: int) -> dict[str, Any]:
    """How SAEBench puts words into context, with the same examples each time."""
    return {
        "base_template": TEMPLATE,
        "max_icl_examples": in_context,
        "shuffle_examples": False,
        "prepend_separator_to_first_example": True,
    }


class WordStates:
    """What SAEBench's calculator asks of a language model: states that were read before, by prompt."""

    def __init__(self, words: dict):
        self.states = dict(zip(words["prompts"], words["states"]))

    def to_tokens(self, prompt: str) -> torch.Tensor:
        # Prompts differ in one word of one token.
        return torch.zeros(1, 1)

    def run_with_cache(self, prompts: list[str], names_filter: list[str]) -> tuple[None, dict[str, torch.Tensor]]:
        return None, {names_filter[0]: torch.stack([self.states[prompt] for prompt in prompts])[:, None]}


def letter_probes(words: dict) -> dict[str, Any]:
    """SAEBench's probe of each first letter from whole states, and the letters that it finds."""
    from sae_bench.evals.absorption.probing import train_multi_probe

    train, test = ~words["is_test"], words["is_test"]
    torch.manual_seed(0)
    targets = torch.nn.functional.one_hot(words["letters"], 26)
    with quiet():
        found = train_multi_probe(
            words["states"][train],
            targets[train],
            batch_size=-(-int(train.sum()) // STEPS_PER_EPOCH),
            device=torch.device("cpu"),
        )
    with torch.no_grad():
        scores = found(words["states"])
    f1 = [f1_score(scores[test, letter] > 0, words["letters"][test] == letter) for letter in range(26)]
    return {
        "directions": found.weights.detach(),
        "finds": scores > 0,
        "letters": [letter for letter in range(26) if f1[letter] > LEAST_F1],
    }


def f1_score(predicted: torch.Tensor, true: torch.Tensor) -> float:
    return (2 * (predicted & true).sum() / (predicted.sum() + true.sum()).clamp(min=1)).item()


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Without the progress bars of SAEBench, several for each dictionary and budget."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def main_latents(sparse: dict, latents: torch.Tensor, is_letter: torch.Tensor, letter: int) -> tuple[list[int], float]:
    """Latents of a letter by SAEBench's rule for split features, and the F1 of the probe on them."""
    chosen, best = [], -1.0
    for probe in (sparse[count][letter] for count in sorted(sparse)):
        f1 = f1_score(probe(latents) > 0, is_letter)
        if f1 <= best + F1_RISE:
            break
        chosen, best = probe.feature_ids.tolist(), f1
    return chosen, best


def absorption(reader: Any, words: dict, dense: dict) -> dict[str, float] | None:
    """
    First-letter absorption, mean over the letters that the probe from whole states finds (`None` if it finds none).

    Args:
        reader (`AtBudget`): the dictionary at a budget.
        words (`dict`): from `read_words`.
        dense (`dict`): from `letter_probes`.
    """
    from sae_bench.evals.absorption.feature_absorption_calculator import FeatureAbsorptionCalculator
    from sae_bench.evals.absorption.k_sparse_probing import train_k_sparse_probes

    if not dense["letters"]:
        return None
    model: Any = WordStates(words)
    calculator = FeatureAbsorptionCalculator(
        model=model,
        icl_word_list=words["examples"],
        word_token_pos=0,
        batch_size=512,
        **prompt_form(len(words["examples"])),
    )
    train, test = ~words["is_test"], words["is_test"]
    labels = [(word, letter) for word, letter in zip(words["words"], words["letters"].tolist())]
    labels = [label for label, is_trained in zip(labels, train) if is_trained]
    # SAEBench's batches of 4,096 are for a whole vocabulary; of fewer words they are too few steps to choose latents in.
    batches = {"batch_size": -(-len(labels) // STEPS_PER_EPOCH), "precalc_sae_acts": True}
    torch.manual_seed(0)
    with quiet():
        sparse = train_k_sparse_probes(
            reader, labels, words["states"][train], range(1, MOST_MAIN_LATENTS + 1), **batches
        )
    latents = reader.encode(words["states"][test])
    found = []
    for letter in dense["letters"]:
        chosen, f1 = main_latents(sparse, latents, words["letters"][test] == letter, letter)
        has_letter = test & (words["letters"] == letter) & dense["finds"][:, letter]
        asked = [words["words"][place] for place in has_letter.nonzero().flatten()]
        results = calculator.calculate_absorption(
            reader, asked, dense["directions"][letter], chosen, layer=0, show_progress=False
        ).word_results
        found.append(
            {
                "full": sum(one.is_full_absorption for one in results) / len(results),
                "fraction": float(sum(one.absorption_fraction for one in results)) / len(results),
                "main_latents": len(chosen),
                "f1": f1,
            }
        )
    return {name: sum(one[name] for one in found) / len(found) for name in ABSORPTION} | {"letters": len(found)}
