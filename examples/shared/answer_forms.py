"""How answers are read from completions, and from the solutions of data sets."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from reasoning_gym.utils import extract_answer


# an equation, a sentence that names a result, or nothing but the number
STATES_A_RESULT = re.compile(r"(=|\b(is|are|equals|makes|gives|get))\s*:?\s*-?\d+|^\W*\d+\W*$")


@dataclass
class AnswerForm:
    """How an answer is read from a completion, and whether the completion has the form that was asked for."""

    read: Callable[[str], str | None]
    is_formatted: Callable[[str], bool]


def last_integer(text: str) -> str | None:
    integers = re.findall(r"-?\d+", text)
    return integers[-1] if integers else None


def last_boxed(text: str) -> str | None:
    """What stands in the last `\\boxed{...}`, braces inside it included."""
    start = text.rfind("\\boxed{")
    depth = 0
    for position in range(start + 6, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + 7 : position]
    return None


def first_line(text: str) -> str | None:
    """The first line, without marks around it."""
    return text.strip().split("\n")[0].strip(" .*`\"'") or None


# as a sentence names it: "Answer: 12", "The final answer is: Tuesday"
STATES_THE_ANSWER = re.compile(r"\banswer\s*(?:is\b\s*:?|:)[\s*]*(?=\S)", re.IGNORECASE)


def stated_answer(text: str) -> str | None:
    """What the last "answer:" or "answer is" says, to the end of its line; the last line where nothing does."""
    stated = list(STATES_THE_ANSWER.finditer(text))
    return first_line(text[stated[-1].end() :] if stated else text.strip().rsplit("\n", 1)[-1])


ANSWER_FORMS = {
    "integer": AnswerForm(last_integer, lambda text: bool(STATES_A_RESULT.search(text))),
    "boxed": AnswerForm(last_boxed, lambda text: last_boxed(text) is not None),
    "tag": AnswerForm(extract_answer, lambda text: extract_answer(text) is not None),
    "line": AnswerForm(first_line, lambda text: len(text.strip().split("\n")) == 1),
    "stated": AnswerForm(stated_answer, lambda text: bool(STATES_THE_ANSWER.search(text))),
}


def gold_answer(text: str) -> str:
    """The answer in a solution as GSM8K (after ####) or MATH (in a box) writes it, otherwise all of it."""
    if "####" in text:
        return text.rsplit("####", 1)[1].strip().replace(",", "")
    return last_boxed(text) or text.strip()
