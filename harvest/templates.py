"""Conversations -> documents: what a template writes, with markers and content kept apart.

Content is untrusted text: a chat that contains the text `<|im_end|>` must not make the token.

The three templates here are written out; harvest/chat_template.py renders a model's own.

    chatml             <|im_start|>role LF content <|im_end|> LF
    deepseek-r1        what R1 itself reads and writes: BOS, <think> LF reasoning LF </think> LF LF answer, end token
    deepseek-r1-paper  what the scripts of arXiv 2503.18878 wrote: no BOS, one LF after </think>, one end token
                       between two documents
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from harvest.conversations import Turn

BOS, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
OUTPUTS, OUTPUTS_END = "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"
OUTPUT, OUTPUT_END = "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"
THINK, THINK_END = "<think>", "</think>"
TOOL_MARKERS = (OUTPUTS, OUTPUTS_END, OUTPUT, OUTPUT_END)
# What each template cannot do without.
MARKERS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "deepseek-r1": (BOS, END, "<｜User｜>", "<｜Assistant｜>"),
    "deepseek-r1-paper": (END, "<｜User｜>", "<｜Assistant｜>"),
}
ALL_MARKERS = {marker for markers in MARKERS.values() for marker in markers} | {THINK, THINK_END, *TOOL_MARKERS}


class Refused(ValueError):  # noqa: N818
    """A conversation that a template cannot write; the text is the reason."""


class Segment(NamedTuple):
    """A piece of a document: a marker that the template writes, or content."""

    text: str
    is_marker: bool


def spelling_of(names: Iterable[str]) -> re.Pattern[str]:
    """What finds any of these names, of several at one place the longest."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def compose(template: str | None, document: Sequence[Turn], eos: str) -> list[Segment]:
    """The text of a document as marker and content segments. `eos` ends plain text, which takes no template."""
    if document[0].role == "":
        return [Segment(document[0].content, False), *([Segment(eos, True)] if eos else [])]
    if template == "chatml":
        return _chatml(document)
    if template == "deepseek-r1":
        return [Segment(BOS, True), *_r1_turns(document, "\n\n")]
    # The paper's scripts put an end token after each assistant turn but the last, and one between two documents: after
    # each assistant turn, therefore, and where a document ends in another turn after that one.
    last = [Segment(END, True)] if document[-1].role != "assistant" else []
    return [*_r1_turns(document, "\n"), *last]


def with_gap(before: str) -> str:
    """What an assistant wrote before its reasoning, with the blank line that sets it off from what follows."""
    return before if not before or before[-1].isspace() else f"{before}\n\n"


def _chatml(document: Sequence[Turn]) -> list[Segment]:
    out = []
    for turn in document:
        text = turn.content if not turn.reasoning else f"{turn.reasoning}\n\n{turn.content}".rstrip()
        start, end = Segment(f"<|im_start|>{turn.role}\n", True), Segment("<|im_end|>\n", True)
        out += [start, Segment(with_gap(turn.before) + text, False), end]
    return out


def _r1_turns(document: Sequence[Turn], after_reasoning: str) -> list[Segment]:
    out: list[Segment] = []
    previous = ""
    for turn in document:
        if previous == "tool" != turn.role:
            out.append(Segment(OUTPUTS_END, True))
        if turn.role == "system":
            out.append(Segment(turn.content, False))
        elif turn.role == "user":
            out += [Segment("<｜User｜>", True), Segment(turn.content, False)]
        elif turn.role == "tool":
            begin = f"\n{OUTPUT}" if previous == "tool" else OUTPUTS + OUTPUT
            out += [Segment(begin, True), Segment(turn.content, False), Segment(OUTPUT_END, True)]
        else:
            # R1 goes on after a tool's output in the same turn.
            out += [] if previous == "tool" else [Segment("<｜Assistant｜>", True)]
            if turn.reasoning is None:
                out.append(Segment(with_gap(turn.before), False))
            else:
                out += reasoning_segments(turn, after_reasoning)
            out += [Segment(turn.content, False), Segment(END, True)]
        previous = turn.role
    return [*out, Segment(OUTPUTS_END, True)] if previous == "tool" else out


def reasoning_segments(turn: Turn, after: str = "\n\n") -> list[Segment]:
    """Reasoning between its tags, and what was written before it; `after` separates it from the answer."""
    return [
        Segment(with_gap(turn.before), False),
        Segment(f"{THINK}\n", True),
        Segment(turn.reasoning or "", False),
        Segment(f"\n{THINK_END}{after}", True),
    ]
