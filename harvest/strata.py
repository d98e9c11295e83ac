"""Which rows of a source are taken (`where`), and into which parts they fall (`strata`)."""

from typing import Any

from harvest.config import Source
from harvest.files import UserError
from harvest.rows import Damaged
from harvest.sources import OpenedSource

MOST_STRATA = 255
ROWS_AT_ONCE = 4096
FIRST_ROWS, SHOWN_VALUES, SHOWN_CHARACTERS = 100, 5, 40  # of values that a message shows
Key = tuple[str, Any]


class Choice:
    """What a source's `where` and `strata` make of a row; `strata` are the values, in order."""

    def __init__(self, source: Source, strata: list[Any]) -> None:
        self._wanted = {
            column: {_key(value) for value in (values if isinstance(values, tuple) else (values,))}
            for column, values in (source.where or {}).items()
        }
        self._column, self.strata = source.strata, strata
        self._number = {_key(value): number for number, value in enumerate(strata)}

    def takes(self, row: dict[str, Any]) -> bool:
        """Whether a row's values are among the wanted ones."""
        return all(_key(row[column]) in wanted for column, wanted in self._wanted.items())

    def stratum(self, row: dict[str, Any]) -> int | None:
        """Number of the stratum that a row falls into, 0 where there are none; None for a row without a value."""
        return self._number.get(_key(row[self._column])) if self._column else 0


def find_strata(source: Source, opened: OpenedSource, setting: str) -> list[Any]:
    """The values of a source's `strata` among the rows that it takes, sorted; empty without the setting.

    Raises UserError where there are none, or too many.
    """
    if not source.strata:
        return []
    choice, found, taken = Choice(source, []), {}, 0
    columns = list(dict.fromkeys([source.strata, *(source.where or ())]))
    for first in range(0, len(opened.rows), ROWS_AT_ONCE):
        numbers = range(first, min(first + ROWS_AT_ONCE, len(opened.rows)))
        for row in opened.rows.take(numbers, columns):
            if not isinstance(row, Damaged) and choice.takes(row):
                taken += 1
                value = row[source.strata]
                found.setdefault(_key(value), value)
        found.pop(_NONE, None)
        if len(found) > MOST_STRATA:
            some = ", ".join(repr(value) for value in list(found.values())[:3])
            raise UserError(
                f"{setting}.strata: {source.strata!r} has more than {MOST_STRATA} values ({some}, ...); name a column "
                "of few values"
            )
    if source.where and not taken:
        raise none_taken(source, opened, setting)
    if not found:
        raise UserError(f"{setting}.strata: {source.strata!r}: no row that is taken has a value there")
    return [found[key] if key[0] != "text" else key[1] for key in sorted(found)]


def none_taken(source: Source, opened: OpenedSource, setting: str) -> UserError:
    """What to say where no row has the values of `where`: those that the first rows have."""
    columns = [*(source.where or ())]
    rows = [row for row in opened.rows.take(range(min(FIRST_ROWS, len(opened.rows))), columns) if isinstance(row, dict)]
    seen = {column: list(dict.fromkeys(repr(row[column])[:SHOWN_CHARACTERS] for row in rows)) for column in columns}
    there = "; ".join(f"{column} is {', '.join(values[:SHOWN_VALUES])}" for column, values in seen.items())
    return UserError(
        f"{setting}.where: none of the {len(opened.rows):,} rows has these values; in the first rows {there}"
    )


_NONE: Key = ("none", "")


def _key(value: Any) -> Key:
    """By what values are equal: text by its letters, numbers by size, whatever their type; dates are text."""
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, int | float):
        return ("number", value) if value == value else _NONE  # NaN
    if value is None or isinstance(value, list | dict):
        return _NONE
    return ("text", str(value))
