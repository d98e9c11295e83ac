"""Whether an answer is right: as mathematics by math-verify, of choices by the letter.

What is read is, in this order: the last box that is closed; of mathematics what follows "the answer is", else the last
number or formula; of choices the letter behind the last "answer is", "I choose" and the like, the only letter written
as one, `(B)`, `B.`, `B)`, alone on a line or before "is correct", or the text of a choice alone. More letters than one
are none.
"""

import re
from functools import cache
from typing import NamedTuple

from evaluate.math_answers import MathReader, last_box
from evaluate.task_config import Task
from evaluate.tasks import LETTERS, Problem

MARKUP = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*(?=\{)|\\[()\[\]]|[*_`${}]")


class Grade(NamedTuple):
    """What an answer says, and whether that is right."""

    parsed: str | None  # equal answers are written alike, the right one as the problem has it; None: none could be read
    correct: bool


def grade(task: Task, problem: Problem, text: str) -> Grade:
    """The grade of an answer; of a model that thinks, `text` is what follows `</think>`, all where there is none."""
    if task.grade == "math":
        return Grade(*_reader().grade(problem.answer, text))
    letter = chosen(text, problem.choices)
    return Grade(letter, letter == problem.answer)


def chosen(text: str, choices: tuple[str, ...]) -> str | None:
    """The letter that an answer chooses; None where it chooses none, or several."""
    known = LETTERS[: len(choices)]
    anchor, alone, further = _patterns(known)
    box = last_box(text)
    plain = MARKUP.sub("", text if box is None else box).strip()
    named = {MARKUP.sub("", choice).strip().casefold(): letter for letter, choice in zip(known, choices, strict=True)}
    if found := named.get(plain.rstrip(".").casefold()):
        return found
    if box is not None:
        found = re.fullmatch(rf"\(?([{known}{known.lower()}])(?:\)|[.:,)]\s*.*|\s*)", plain, re.DOTALL)
        return found[1].upper() if found else None
    if anchors := list(anchor.finditer(plain)):
        return None if further.match(plain, anchors[-1].end()) else anchors[-1][1].upper()
    letters = {next(filter(None, found.groups())).upper() for found in alone.finditer(plain)}
    return letters.pop() if len(letters) == 1 else None


@cache
def _patterns(known: str) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """A letter behind words that announce it, one that stands as a letter, and a second one behind a first."""
    lower, word = known.lower(), r"(?:\s+(?:the|option|choice|letter|answer))*"
    says = r"(?:(?:answer|choice|option)(?:\s+(?:is|would be|must be|should be))?|choose|chose|pick|select)"
    # "a" is an article more often than a letter, unless the sentence ends there.
    letter = rf"\(?([{known}](?![\w'])|[{lower}](?=\)|\s*(?:[.,;:!]|\n|$)))\)?"
    return (
        re.compile(rf"(?i:\b{says}{word}\s*[:=]?{word}\s*){letter}"),
        re.compile(
            rf"\(([{known}{lower}])\)|(?<![\w(])([{known}])[.):](?!\w)|^\s*([{known}{lower}])\s*$"
            rf"|(?<!\w)([{known}])(?=\s+is\s+(?:the\s+)?(?:correct|right|answer)\b)",
            re.MULTILINE,
        ),
        re.compile(rf"\s*(?:,|/|&|or\b|and\b)+\s*\(?[{known}](?![\w'])"),
    )


@cache
def _reader() -> MathReader:
    return MathReader()
