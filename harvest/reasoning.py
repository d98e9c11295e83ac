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
OPENINGS = {closing: opening for opening, closing in FORMS.items()}
TAG = re.compile("|".join(re.escape(tag) for tag in (*FORMS, *OPENINGS)))
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
    """The parts of an answer; `given` is reasoning from a field of its own, and comes first.

    Parts that tags set apart lose the white space around them.
    """
    tags = list(TAG.finditer(text))
    if not tags:
        bare = SOLUTION_ALONE.fullmatch(text) if given is not None else None
        return Answer("", given, bare[1] if bare else text, malformed=not bare and bool(SOLUTION.search(text)))
    spans = [(tag[0], tag.span()) for tag in tags]
    if spans[0][0] in OPENINGS:
        spans.insert(0, (OPENINGS[spans[0][0]], (0, 0)))
    pairs = list(zip(spans[::2], spans[1::2], strict=False))
    unpaired = len(spans) % 2 or any(FORMS.get(opening) != closing for (opening, _), (closing, _) in pairs)
    if unpaired or any(text[: tag.start()].endswith(QUOTES) and text[tag.end() :].startswith(QUOTES) for tag in tags):
        return Answer("", given, text, malformed=True)
    thoughts, outside, end = [] if given is None else [given], [], 0
    for (_, opening), (_, closing) in pairs:
        outside.append(text[end : opening[0]])
        thoughts.append(text[opening[1] : closing[0]])
        end = closing[1]
    before, *rest = [*outside, text[end:]]
    # Some sets write the same thought into a field and into the answer.
    once = dict.fromkeys(thought.strip() for thought in thoughts)
    return Answer(before.strip(), _joined(once), _joined(SOLUTION.sub("\n\n", part) for part in rest))


def _joined(parts: Iterable[str]) -> str:
    """Parts of a text with a blank line between them."""
    return "\n\n".join(part for part in map(str.strip, parts) if part)
