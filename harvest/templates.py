"""Documents as markers and content, and the chat templates that come with this program.

Content is untrusted text: a chat that contains the text `<|im_end|>` must not make the token.

    chatml             <|im_start|>role LF content <|im_end|> LF
    deepseek-r1        what R1 itself reads and writes: BOS, <think> LF reasoning LF </think> LF LF answer, end token
    deepseek-r1-paper  what the scripts of arXiv 2503.18878 wrote: no BOS, one LF after </think>, one end token
                       between two documents
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from harvest.conversations import Turn

BOS, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
OUTPUTS, OUTPUTS_END = "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"
OUTPUT, OUTPUT_END = "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"
THINK, THINK_END = "<think>", "</think>"
TOOL_MARKERS = (OUTPUTS, OUTPUTS_END, OUTPUT, OUTPUT_END)
# What each template cannot do without.
MARKERS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "deepseek-r1": (BOS, END, USER, ASSISTANT),
    "deepseek-r1-paper": (END, USER, ASSISTANT),
}
ALL_MARKERS = {marker for markers in MARKERS.values() for marker in markers} | {THINK, THINK_END, *TOOL_MARKERS}
# R1 goes on after a tool's output in the same turn.
_R1_TURN = (
    "{% set tool = loop.previtem is defined and loop.previtem.role == 'tool' %}"
    f"{{% if tool and m.role != 'tool' %}}{OUTPUTS_END}{{% endif %}}"
    "{% if m.role == 'system' %}{{ m.content }}"
    f"{{% elif m.role == 'user' %}}{USER}{{{{ m.content }}}}"
    f"{{% elif m.role == 'tool' %}}{{{{ '\\n' if tool else '{OUTPUTS}' }}}}{OUTPUT}{{{{ m.content }}}}{OUTPUT_END}"
    f"{{% else %}}{{% if not tool %}}{ASSISTANT}{{% endif %}}"
    f"{{% if m.reasoning_content is defined %}}{{{{ '{THINK}\\n' + m.reasoning_content + '\\n{THINK_END}' + gap }}}}"
    f"{{% endif %}}{{{{ m.content }}}}{END}{{% endif %}}"
    f"{{% if loop.last and m.role == 'tool' %}}{OUTPUTS_END}{{% endif %}}"
)
WRITTEN = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}",
    "deepseek-r1": f"{{% set gap = '\\n\\n' %}}{BOS}{{% for m in messages %}}{_R1_TURN}{{% endfor %}}",
    # The scripts put an end token after each assistant turn but the last, and one between two documents: after each
    # assistant turn, therefore, and where a document ends in another turn after that one.
    "deepseek-r1-paper": f"{{% set gap = '\\n' %}}{{% for m in messages %}}{_R1_TURN}"
    f"{{% if loop.last and m.role != 'assistant' %}}{END}{{% endif %}}{{% endfor %}}",
}


class Refused(ValueError):  # noqa: N818
    """A conversation that a template cannot write; the text is the reason."""


class Segment(NamedTuple):
    """A piece of a document: a marker that the template writes, or content."""

    text: str
    is_marker: bool


def spelling_of(names: Iterable[str]) -> re.Pattern[str]:
    """What finds any of these names, of several at one place the longest."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def with_gap(before: str) -> str:
    """What an assistant wrote before its reasoning, with the blank line that sets it off from what follows."""
    return before if not before or before[-1].isspace() else f"{before}\n\n"


def reasoning_segments(turn: Turn) -> list[Segment]:
    """Reasoning between its tags, and what was written before it."""
    return [
        Segment(with_gap(turn.before), False),
        Segment(f"{THINK}\n", True),
        Segment(turn.reasoning or "", False),
        Segment(f"\n{THINK_END}\n\n", True),
    ]
