"""Rows of a data set -> conversations: the turns of each row, whatever schema it has."""

import hashlib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from harvest.files import UserError

COLUMNS = {
    "conversation": ("conversation",),
    "conversations": ("conversations",),
    "reasoning": ("problem", "deepseek_reasoning", "deepseek_solution"),
    "text": ("text",),
}
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}

# OpenThoughts' default subset writes the reasoning into the answer, between these.
THOUGHT = re.compile(
    r"\s*<\|begin_of_thought\|>\s*(.*?)\s*<\|end_of_thought\|>\s*"
    r"(?:<\|begin_of_solution\|>\s*(.*?)\s*(?:<\|end_of_solution\|>)?\s*)?",
    re.DOTALL,
)


class Turn(NamedTuple):
    """What one side says."""

    role: str  # user, assistant or system; "" for plain text
    content: str
    reasoning: str | None = None
    before: str = ""  # what an assistant wrote before its reasoning


def check_columns(rows: str, columns: Iterable[str], source_name: str) -> None:
    """Raise UserError when a data set lacks the columns of its `rows` schema."""
    have = sorted(columns)
    missing = [name for name in COLUMNS[rows] if name not in have]
    if missing:
        fitting = [name for name, needed in COLUMNS.items() if set(needed) <= set(have)]
        hint = f"rows: {fitting[0]} would fit" if fitting else f"no known schema fits ({', '.join(COLUMNS)})"
        raise UserError(
            f"sample.sources ({source_name}).rows: {rows!r} needs the column{'s' * (len(missing) > 1)} "
            f"{', '.join(missing)}; the data set has {', '.join(have)}; {hint}"
        )


def turns(rows: str, row: dict[str, Any]) -> list[Turn] | None:
    """The turns of one row; None for a row with nothing in it to learn from.

    `rows` is the schema, as in `Source.rows`.
    """
    if rows == "text":
        return [Turn("", row["text"])] if _is_text(row["text"]) else None
    if rows == "reasoning":
        problem, reasoning, solution = (row[name] for name in COLUMNS["reasoning"])
        if not (_is_text(problem) and _is_text(reasoning)):
            return None
        return [Turn("user", problem), Turn("assistant", solution if _is_text(solution) else "", reasoning)]
    role_key, content_key = ("role", "content") if rows == "conversation" else ("from", "value")
    out = []
    if _is_text(row.get("system")) and rows == "conversations":
        out.append(Turn("system", row["system"]))
    items = row[rows]
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        return None
    for item in items:
        role, content = ROLES.get(str(item.get(role_key)).lower()), item.get(content_key)
        if role is None or not _is_text(content):
            return None
        thought = THOUGHT.fullmatch(content) if role == "assistant" else None
        out.append(Turn(role, thought[2] or "", thought[1]) if thought else Turn(role, content))
    return out if any(turn.role == "user" for turn in out) else None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def document_key(document: list[Turn]) -> str:
    """What decides on which side a document falls: its first user turn (a problem), or its text."""
    first = next((turn for turn in document if turn.role == "user"), document[0])
    return first.content.strip()


def is_held_out(key: str, seed: int, fraction: float) -> bool:
    """Whether documents of this key are held out: a pure function, so equal prompts share a side."""
    digest = hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
