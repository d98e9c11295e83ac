"""Which rows of a source are taken (`where`), and into which parts they fall (`strata`)."""

from typing import Any

from harvest.config import Source
from harvest.files import UserError
from harvest.rows import Damaged, Rows

MOST_STRATA = 255
FIRST_ROWS, SHOWN_VALUES, SHOWN_CHARACTERS = 100, 5, 40  # of values that a message shows


class Choice:
    """What a source's `where` and `strata` make of a row; `strata` are the values of its column, sorted."""

    def __init__(self, source: Source, rows: Rows, setting: str) -> None:
        """Raises UserError where the column has no values, or too many; `setting` is the source's place."""
        self._source, self._rows, self._setting = source, rows, setting
        where = (source.where or {}).items()
        self._wanted = {name: set(map(_key, each if isinstance(each, tuple) else (each,))) for name, each in where}
        self.strata: list[Any] = self._found() if source.strata else []
        self._number = {_key(value): number for number, value in enumerate(self.strata)}

    def takes(self, row: dict[str, Any]) -> bool:
        """Whether a row's values are among the wanted ones."""
        return all(_key(row[column]) in wanted for column, wanted in self._wanted.items())

    def stratum(self, row: dict[str, Any]) -> int | None:
        """Number of the stratum that a row falls into, 0 where there are none; None for a row without a value."""
        return self._number.get(_key(row[self._source.strata])) if self._source.strata else 0

    def none_taken(self) -> UserError:
        """What to say where no row has the values of `where`: those that the first rows have."""
        some = self._rows.take(range(min(FIRST_ROWS, len(self._rows))), [*self._wanted])
        rows = [row for row in some if isinstance(row, dict)]
        seen = {name: dict.fromkeys(repr(row[name])[:SHOWN_CHARACTERS] for row in rows) for name in self._wanted}
        there = "; ".join(f"{name} is {', '.join([*values][:SHOWN_VALUES])}" for name, values in seen.items())
        return UserError(
            f"{self._setting}.where: none of the {len(self._rows):,} rows has these values; in the first rows {there}"
        )

    def _found(self) -> list[Any]:
        column, found, taken = str(self._source.strata), {}, 0
        for number in range(len(self._rows)):
            (row,) = self._rows.take([number], [column, *self._wanted])
            if isinstance(row, Damaged) or not self.takes(row):
                continue
            taken += 1
            if (key := _key(row[column])) != _NONE:
                found.setdefault(key, row[column])
            if len(found) > MOST_STRATA:
                some = ", ".join(repr(value) for value in list(found.values())[:3])
                raise UserError(
                    f"{self._setting}.strata: {column!r} has more than {MOST_STRATA} values ({some}, ...); name a "
                    "column of few values"
                )
        if self._wanted and not taken:
            raise self.none_taken()
        if not found:
            raise UserError(f"{self._setting}.strata: {column!r}: no row that is taken has a value there")
        return [found[key] if key[0] != "text" else key[1] for key in sorted(found)]


_NONE = ("none", "")


def _key(value: Any) -> tuple[str, Any]:
    """By what values are equal: text by its letters, numbers by size, whatever their type; dates are text."""
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, int | float):
        return ("number", value) if value == value else _NONE  # NaN
    return _NONE if value is None or isinstance(value, list | dict) else ("text", str(value))
