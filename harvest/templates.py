"""Conversations -> documents: what a template writes, with markers and content kept apart.

Content is untrusted text: a chat that contains the text `<|im_end|>` must not make the token.

The templates are written out because DeepSeek-R1's own chat template deletes everything before
`</think>` from assistant turns, which is the reasoning that we are after, and adds BOS by itself.
"""

from typing import NamedTuple

from harvest.conversations import Turn


class Segment(NamedTuple):
    """A piece of a document: a marker that the template writes, or content."""

    text: str
    is_marker: bool


def compose(template: str | None, document: list[Turn], eos: str) -> list[Segment]:
    """The text of a document as marker and content segments. `eos` ends plain text, which takes no template."""
    if document[0].role == "":
        end = [Segment(eos, True)] if eos else []
        return [Segment(document[0].content, False), *end]
    return _chatml(document) if template == "chatml" else _deepseek_r1(document)


def _chatml(document: list[Turn]) -> list[Segment]:
    out = []
    for turn in document:
        text = turn.content if turn.reasoning is None else f"{turn.reasoning}\n\n{turn.content}".rstrip()
        out += [
            Segment(f"<|im_start|>{turn.role}\n", True),
            Segment(text, False),
            Segment("<|im_end|>\n", True),
        ]
    return out


def _deepseek_r1(document: list[Turn]) -> list[Segment]:
    out = [Segment("<｜begin▁of▁sentence｜>", True)]
    for turn in document:
        if turn.role == "system":
            out.append(Segment(turn.content, False))
        elif turn.role == "user":
            out += [Segment("<｜User｜>", True), Segment(turn.content, False)]
        else:
            out.append(Segment("<｜Assistant｜>", True))
            if turn.reasoning is not None:
                out += [
                    Segment("<think>\n", True),
                    Segment(turn.reasoning, False),
                    Segment("\n</think>\n", True),
                ]
            out += [Segment(turn.content, False), Segment("<｜end▁of▁sentence｜>", True)]
    return out
