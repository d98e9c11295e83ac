"""The problems of a task: read from its source or made, shuffled by seed, each with the whole user turn."""

import difflib
import re
import string
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaluate.arithmetic import questions
from evaluate.task_config import CHOICES, PROBLEM, Task
from harvest.files import UserError
from harvest.rows import Damaged
from harvest.sources import OpenedSource, open_rows

LETTERS = string.ascii_uppercase
MARK = "####"  # before the answer at the end of gsm8k's solutions


class Problem(NamedTuple):
    """One problem."""

    id: str  # its row in the source, from 0
    prompt: str  # the whole user turn
    answer: str  # the right one; of choices its letter
    choices: tuple[str, ...] = ()  # in the order of their letters


def load_problems(
    task: Task,
    seed: int,
    count: int | None,
    *,
    commit: str | None = None,
    offline: bool = False,
    scratch: Path | None = None,
    setting: str = "benchmark",
) -> list[Problem]:
    """`count` problems of a task, all if None, in an order by `seed`: a higher count begins with the same ones.

    `commit` pins a data set of the hub, the task's revision if None. `setting` is the section of errors. Raises
    UserError for a source that cannot be had, lacks a column, has fewer problems, or one without text or answer.
    """
    if task.source is None:
        asked = questions()
        order = _order(len(asked), seed, count, str(task.name), setting)
        return [Problem(str(n), _prompt(task, asked[n][0], ()), asked[n][1]) for n in order]
    source, where = task.source, f"{setting}.source"
    columns = {task.problem: "problem", task.answer: "answer", **dict.fromkeys(task.choices, "choices")}
    needed = partial(_needed, columns, where)
    opened = open_rows(source, where, [*columns], needed, commit or task.revision, offline, scratch)
    order = _order(len(opened.rows), seed, count, source.path, setting)
    return [_problem(task, _Row(opened, number, where), seed) for number in order]


def _order(there: int, seed: int, count: int | None, what: str, setting: str) -> list[int]:
    if count is not None and count > there:
        raise UserError(f"{setting}.problems: {count:,}: {what} has {there:,}; lower it, or set null for all")
    return np.random.default_rng(seed).permutation(there)[:count].tolist()


class _Row:
    """A row of the source, whose values are errors where they are of no use."""

    def __init__(self, opened: OpenedSource, number: int, where: str) -> None:
        self.number, self._opened, self._where = number, opened, where
        (found,) = opened.rows.take([number], opened.columns)
        if isinstance(found, Damaged):
            raise self.wrong("path", found.reason)
        self.values = found

    def wrong(self, name: str, reason: str) -> UserError:
        return UserError(f"{self._where}.{name}: {self._opened.rows.place(self.number)}: {reason}")

    def text(self, name: str, column: str) -> str:
        """The text of a column; `name` is the setting that chose it."""
        return self.checked(name, column, self.values[column])

    def checked(self, name: str, column: str, value: Any) -> str:
        """The text of a value of a column."""
        if value is None or (isinstance(value, str) and not value.strip()):
            raise self.wrong(name, f"column {column!r} is empty; take the row out, or choose another column")
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self.wrong(name, f"column {column!r} holds {value!r:.60}; text or a number is needed")
        text = str(value).strip()
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise self.wrong(name, f"column {column!r} is not UTF-8 text")
        return text


def _problem(task: Task, row: _Row, seed: int) -> Problem:
    text, name = row.text("problem", task.problem), str(row.number)
    if task.grade == "math":
        answer = row.text("answer", task.answer).rpartition(MARK)[2].strip()
        if not answer:
            raise row.wrong("answer", f"column {task.answer!r} has nothing behind {MARK}")
        return Problem(name, _prompt(task, text, ()), answer)
    choices, right = _choices(task, row)
    order = np.random.default_rng([seed, row.number]).permutation(len(choices)).tolist()
    shuffled = tuple(choices[number] for number in order)
    return Problem(name, _prompt(task, text, shuffled), LETTERS[order.index(right)], shuffled)


def _choices(task: Task, row: _Row) -> tuple[list[str], int]:
    """The choices as the row has them, and the number of the right one."""
    answer, first = row.text("answer", task.answer), row.values[task.choices[0]]
    if len(task.choices) == 1 and isinstance(first, list):
        choices = [row.checked("choices", task.choices[0], value) for value in first]
        names = [choices, LETTERS[: len(choices)], [str(number) for number in range(len(choices))]]
        right = next((list(each).index(answer) for each in names if answer in each), None)
        if right is None:
            raise row.wrong(
                "answer", f"{answer!r:.60} is none of the {len(choices)} choices, by text, letter or number"
            )
    else:
        choices, right = [answer, *(row.text("choices", column) for column in task.choices)], 0
    if len(set(choices)) < len(choices) or not 2 <= len(choices) <= len(LETTERS):
        raise row.wrong("choices", f"{len(choices)} choices; 2 to {len(LETTERS)} are needed, all different")
    return choices, right


def _prompt(task: Task, problem: str, choices: tuple[str, ...]) -> str:
    listed = "\n".join(f"{letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    parts = {PROBLEM: problem, CHOICES: listed}  # at once: a problem may hold one of these words
    return re.sub("|".join(map(re.escape, parts)), lambda found: parts[found[0]], task.prompt)


def _needed(columns: dict[str, str], where: str, names: set[str]) -> list[str]:
    """The columns to read of those that there are; `columns` has the setting that chose each."""
    for column, setting in columns.items():
        if column not in names:
            close = difflib.get_close_matches(column, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(sorted(names))}"
            raise UserError(f"{where}.{setting}: {column!r}: the data set has no such column; {hint}")
    return [*columns]
