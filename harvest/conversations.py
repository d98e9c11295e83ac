"""Rows of a data set -> conversations: the turns of each row, whatever form it has, or why there are none.

A list of turns may be a list of objects, an object of lists (what `datasets` makes of `Sequence`), or the JSON text of
one of them. Turns have `role` and `content`, or `from` and `value`; content is text, or a list of parts.

Reasoning is in a field of its own, or in the answer, in any form in which data sets write it:

    <think>reasoning</think>answer                        R1 and its kin
    reasoning</think>answer                               where the template wrote the opening tag into the prompt
    before<think>reasoning</think>answer                  text before it
    <|begin_of_thought|>reasoning<|end_of_thought|>       OpenThoughts' default subset, the answer bare or between
        <|begin_of_solution|>answer<|end_of_solution|>
    <think>one</think>answer<think>two</think>more        several thoughts: they are joined, and so is the rest

Tags that do not pair (one that is not closed, one within another, a closing one too many) leave the text as it is, and
so do tags between quotation marks, of which an answer speaks.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from harvest.files import UserError

# Of `tokens`, the first that a data set has.
COLUMNS = {
    "conversation": ("conversation",),
    "conversations": ("conversations",),
    "messages": ("messages",),
    "reasoning": ("problem", "deepseek_reasoning", "deepseek_solution"),
    "text": ("text",),
    "tokens": ("input_ids", "tokens"),
}
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot", "ai", "bard", "bing", "claude"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),  # ShareGPT's turns that call a function
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response", "function_response"), "tool"),
}
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
TEXT_PARTS = (None, "text", "input_text", "output_text")
THOUGHT_PARTS = ("thinking", "reasoning")
LARGEST_ID = 2**32 - 1  # token ids are stored as uint32
FORMS = {"<think>": "</think>", "<|begin_of_thought|>": "<|end_of_thought|>"}  # opening: closing
OPENINGS = {closing: opening for opening, closing in FORMS.items()}
TAG = re.compile("|".join(re.escape(tag) for tag in (*FORMS, *OPENINGS)))
QUOTES = tuple("`'\"“”‘’")
SOLUTION = re.compile(r"\s*<\|(?:begin|end)_of_solution\|>\s*")
SOLUTION_ALONE = re.compile(r"\s*<\|begin_of_solution\|>\s*(.*?)\s*(?:<\|end_of_solution\|>\s*)?", re.DOTALL)


class Turn(NamedTuple):
    """What one side says."""

    role: str  # user, assistant, system or tool; "" for plain text
    content: str
    reasoning: str | None = None
    before: str = ""  # what an assistant wrote before its reasoning


class Answer(NamedTuple):
    """An answer in its parts. Without reasoning, `after` is the whole text as it was."""

    before: str
    reasoning: str | None
    after: str
    malformed: bool = False  # it has tags that do not pair, and is left as it was


class Note(NamedTuple):
    """Why something was left out: a reason of few words, and what was found."""

    reason: str
    found: str = ""
    damaged: bool = False  # what is written there is not text at all


class Reading(NamedTuple):
    """What a row holds: turns, token ids, or neither and why."""

    turns: list[Turn]
    ids: np.ndarray | None = None  # uint32 (tokens,), of `rows: tokens`
    dropped: Note | None = None
    cut: Note | None = None  # why the conversation ends before its end
    malformed: bool = False  # an answer has thinking tags that do not pair, and stays text

    @property
    def key(self) -> str:
        """What decides on which side a document falls: its first user turn (a problem), its text, or its ids."""
        if self.ids is not None:
            return hashlib.sha256(self.ids.astype("<u4").tobytes()).hexdigest()
        return document_key(self.turns)


class _UnusableError(Exception):
    """A turn or a row that cannot be used; its argument is the note."""

    def __init__(self, reason: str, found: str = "") -> None:
        super().__init__(reason)
        self.note = Note(reason, found[:40].encode("utf-8", "replace").decode())


def needed_columns(rows: str, columns: Iterable[str], also: Iterable[str], source_name: str) -> list[str]:
    """The columns to read of a data set, for its `rows` schema and for settings that name some (`also`).

    Raises UserError when one of the schema's is missing.
    """
    have = set(columns)
    missing = [name for name in COLUMNS[rows] if name not in have]
    chosen = [*COLUMNS[rows], *(["system"] if rows == "conversations" and "system" in have else [])]
    if rows == "tokens" and len(missing) < len(COLUMNS[rows]):
        chosen, missing = [next(name for name in chosen if name in have)], []
    if missing:
        fitting = [name for name, needed in COLUMNS.items() if name != "tokens" and set(needed) <= have]
        fitting += ["tokens"] if have & set(COLUMNS["tokens"]) else []
        hint = f"rows: {fitting[0]} would fit" if fitting else f"no known schema fits ({', '.join(COLUMNS)})"
        one_of = " or " if rows == "tokens" else ", "
        raise UserError(
            f"sample.sources ({source_name}).rows: {rows!r} needs the column{'s' * (len(missing) > 1)} "
            f"{one_of.join(missing)}; the data set has {', '.join(sorted(have))}; {hint}"
        )
    return list(dict.fromkeys([*chosen, *also]))


def read_row(rows: str, row: dict[str, Any]) -> Reading:
    """What one row holds. `rows` is the schema, as in `Source.rows`; `row` has at least its columns."""
    try:
        if rows == "tokens":
            return Reading([], _ids(next((row[name] for name in COLUMNS[rows] if name in row), None)))
        reading = _text(row) if rows == "text" else _problem(row) if rows == "reasoning" else _conversation(rows, row)
        for turn in reading.turns:
            f"{turn.content}{turn.reasoning}{turn.before}".encode()
    except _UnusableError as error:
        return Reading([], dropped=error.note)
    except UnicodeEncodeError as error:
        # Bytes that are not UTF-8 were read as U+DC80 to U+DCFF.
        is_byte = "\udc80" <= error.object[error.start] <= "\udcff"
        reason = "not UTF-8 text" if is_byte else "half of a surrogate pair"
        return Reading([], dropped=Note(reason, damaged=True))
    return reading


def document_key(document: list[Turn]) -> str:
    """What decides on which side a document falls: its first user turn (a problem), or its text."""
    first = next((turn for turn in document if turn.role == "user"), document[0])
    return first.content.strip()


def is_held_out(key: str, seed: int, fraction: float) -> bool:
    """Whether documents of this key are held out: a pure function, so equal prompts share a side."""
    digest = hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


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


def _text(row: dict[str, Any]) -> Reading:
    return Reading([Turn("", _plain(row.get("text"), "text"))])


def _problem(row: dict[str, Any]) -> Reading:
    problem, reasoning, solution = (row.get(name) for name in COLUMNS["reasoning"])
    question = Turn("user", _plain(problem, "problem"))
    column = split_answer(_plain(reasoning, "deepseek_reasoning"))
    if column.reasoning is None:  # no tags, or tags that do not pair
        column = column._replace(reasoning=reasoning, after="")
    answer = split_answer(solution if isinstance(solution, str) and solution.strip() else "", column.reasoning)
    # Where the column holds the whole answer, what follows the reasoning is the solution.
    parts = [] if column.after == answer.after.strip() else [column.after]
    content = "\n\n".join(filter(None, [*parts, answer.after]))
    before = "\n\n".join(filter(None, [column.before, answer.before]))
    malformed = column.malformed or answer.malformed
    return Reading([question, Turn("assistant", content, answer.reasoning, before)], malformed=malformed)


def _conversation(rows: str, row: dict[str, Any]) -> Reading:
    system = row.get("system") if rows == "conversations" else None
    out = [Turn("system", system)] if isinstance(system, str) and system.strip() else []
    malformed, cut = False, None
    for item in _items(row.get(rows)):
        try:
            turn, unpaired = _turn(item)
        except _UnusableError as error:
            spoken = [turn.role for turn in out]
            if "user" not in spoken or "assistant" not in spoken[spoken.index("user") :]:
                raise
            cut = error.note
            break
        malformed |= unpaired
        out.append(turn)
    if not any(turn.role == "user" for turn in out):
        raise _UnusableError("no user turn")
    return Reading(out, cut=cut, malformed=malformed)


def _items(value: Any) -> list[Any]:
    """The turns as they are written."""
    value = _parsed(value)
    if isinstance(value, dict):
        lists = {name: each for name, each in value.items() if each is not None}
        lengths = {len(each) if isinstance(each, list) else -1 for each in lists.values()}
        if len(lengths) != 1 or -1 in lengths:
            raise _UnusableError("conversation is an object, not a list of turns")
        value = [dict(zip(lists, each, strict=True)) for each in zip(*lists.values(), strict=True)]
    if not isinstance(value, list):
        raise _UnusableError(f"conversation is {_kind(value)}, not a list of turns")
    if not value:
        raise _UnusableError("conversation is empty")
    return value


def _parsed(value: Any) -> Any:
    """The value of a JSON text of a list or an object; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _turn(item: Any) -> tuple[Turn, bool]:
    """A turn, and whether its thinking tags do not pair."""
    item = _parsed(item)
    if not isinstance(item, dict):
        raise _UnusableError(f"turn is {_kind(item)}, not an object")
    named = _first(item, "role", "from")
    role = ROLES.get(named.strip().lower()) if isinstance(named, str) else None
    if role is None:
        raise _UnusableError("role is unknown", str(named))
    content, thoughts = _content(_first(item, "content", "value"))
    if role != "assistant":
        return Turn(role, _plain(content, "content")), False
    fields = [item[name].strip() for name in REASONING_FIELDS if isinstance(item.get(name), str)]
    thoughts += [field for field in dict.fromkeys(fields) if field]
    # Without content, an answer was cut off while the model still thought.
    text = "" if content is None and thoughts else content if isinstance(content, str) else _plain(content, "content")
    answer = split_answer(text, "\n\n".join(thoughts) if thoughts else None)
    if not answer.after.strip() and not answer.reasoning:
        raise _UnusableError("content is empty")
    return Turn(role, answer.after, answer.reasoning, answer.before), answer.malformed


def _first(item: dict[str, Any], *names: str) -> Any:
    return next((item[name] for name in names if item.get(name) is not None), None)


def _content(value: Any) -> tuple[Any, list[str]]:
    """Content, its text parts joined, and the parts that are thoughts."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return value, []
    text, thoughts = [], []
    for part in value:
        part = {"text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind in THOUGHT_PARTS and isinstance(found := _first(part, *THOUGHT_PARTS, "text"), str):
            thoughts.append(found.strip())
        elif kind in TEXT_PARTS and isinstance(part.get("text"), str):
            text.append(part["text"])
        else:
            raise _UnusableError("content has a part that is not text", str(kind))
    return "".join(text), thoughts


def _plain(value: Any, name: str) -> str:
    """A text that says something."""
    if not isinstance(value, str):
        raise _UnusableError(f"{name} is {_kind(value)}")
    if not value.strip():
        raise _UnusableError(f"{name} is empty")
    return value


def _kind(value: Any) -> str:
    kinds = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return kinds.get(type(value), "an object" if isinstance(value, dict) else f"a {type(value).__name__}")


def _ids(value: Any) -> np.ndarray:
    if value is None or isinstance(value, str):
        raise _UnusableError(f"ids are {_kind(value)}")
    try:
        ids = np.asarray(value)
    except (ValueError, OverflowError):
        raise _UnusableError("ids are no list of whole numbers") from None
    if not ids.size:
        raise _UnusableError("ids are empty")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise _UnusableError("ids are no list of whole numbers")
    if ids.min() < 0 or ids.max() > LARGEST_ID:
        wrong = ids[(ids < 0) | (ids > LARGEST_ID)][0]
        raise _UnusableError("ids below 0 or above 4,294,967,295", str(wrong))
    return ids.astype(np.uint32)
