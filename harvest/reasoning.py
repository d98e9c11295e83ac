"""Where the reasoning of an answer is: one rule for every form in which data sets write it.

    <think>reasoning</think>answer                        R1 and its kin
    reasoning</think>answer                               where the template wrote the opening tag into the prompt
    before<think>reasoning</think>answer                  text before it
    <|begin_of_thought|>reasoning<|end_of_thought|>       OpenThoughts' default subset, the answer bare or between
        <|begin_of_solution|>answer<|end_of_solution|>
    <think>one</think>answer<think>two</think>more        several thoughts: they are joined, and so is the rest

Tags that do not pair (one that is not closed, one within another, a closing one too many) leave the text as it is, and
so do tags between quotation marks, of which an answer speaks.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

FORMS = {"<think>": "</think>", "<|begin_of_thought|>": "<|end_of_thought|>"}  # opening: closing
TAG = re.compile("|".join(re.escape(tag) for pair in FORMS.items() for tag in pair))
QUOTES = tuple("`'\"“”‘’")
SOLUTION = re.compile(r"\s*<\|(?:begin|end)_of_solution\|>\s*")


SOLUTION_ALONE = re.compile(r"\s*<\|begin_of_solution\|>\s*(.*?)\s*(?:<\|end_of_solution\|>\s*)?", re.DOTALL)


class Answer(NamedTuple):
    """An answer in its parts. Without reasoning, `after` is the whole text as it was."""

    before: str
    reasoning: str | None
    after: str
    malformed: bool = False  # it has tags that do not pair, and is left as it was


def split_answer(text: str, given: str | None = None) -> Answer:
    """The parts of an answer; `given` is reasoning that stands in a field of its own, and comes first.

    Parts that tags set apart lose the white space around them.
    """
    tags = list(TAG.finditer(text))
    if not tags:
        bare = SOLUTION_ALONE.fullmatch(text) if given is not None else None
        if bare:
            return Answer("", given, bare[1])
        return Answer("", given, text, malformed=bool(SOLUTION.search(text)))
    paired = _pairs(tags)
    if paired is None or any(_is_quoted(text, tag) for tag in tags):
        return Answer("", given, text, malformed=True)
    thoughts, outside, end = [] if given is None else [given], [], 0
    for opening, closing in paired:
        outside.append(text[end : opening[0]])
        thoughts.append(text[opening[1] : closing[0]])
        end = closing[1]
    before, *rest = [*outside, text[end:]]
    # Some sets write the same thought into a field and into the answer.
    once = dict.fromkeys(thought.strip() for thought in thoughts)
    return Answer(before.strip(), _joined(once), _joined(SOLUTION.sub("\n\n", part) for part in rest))


def _is_quoted(text: str, tag: re.Match[str]) -> bool:
    """Whether an answer speaks of a tag, as in `<think>`."""
    return text[: tag.start()][-1:] in QUOTES and text[tag.end() :][:1] in QUOTES


def _pairs(tags: list[re.Match[str]]) -> list[tuple[tuple[int, int], tuple[int, int]]] | None:
    """Spans of opening and closing tags; the first opening one may be missing. None where they do not pair."""
    closing = set(FORMS.values())
    spans: list[tuple[str, tuple[int, int]]] = [(tag[0], tag.span()) for tag in tags]
    if spans[0][0] in closing:
        opening = next(name for name, end in FORMS.items() if end == spans[0][0])
        spans.insert(0, (opening, (0, 0)))
    pairs = list(zip(spans[::2], spans[1::2], strict=False))
    if len(spans) % 2 or any(FORMS.get(first) != second for (first, _), (second, _) in pairs):
        return None
    return [(first, second) for (_, first), (_, second) in pairs]


def _joined(parts: Iterable[str]) -> str:
    """Parts of a text with a blank line between them."""
    return "\n\n".join(part for part in map(str.strip, parts) if part)
