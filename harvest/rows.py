"""Rows of a source by number, whatever holds them: lines of files, batches of tables, a data set of the hub."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from harvest.opened_file import OpenedFile


class Damaged(NamedTuple):
    """A row that cannot be read, and why."""

    reason: str


Row = dict[str, Any] | Damaged


class Block:
    """Rows that lie together: those of a JSON file, or a batch of a table."""

    def __len__(self) -> int:
        raise NotImplementedError

    def columns(self) -> set[str]:
        """Names of the columns, as far as the first rows tell."""
        raise NotImplementedError

    def has(self, name: str) -> bool:
        """Whether any row has a column."""
        return name in self.columns()

    def row(self, number: int, columns: Sequence[str]) -> Row:
        """A row with these columns alone; one that it lacks is None."""
        raise NotImplementedError

    def place(self, number: int) -> str:
        """Where a row is, for people."""
        raise NotImplementedError


class Rows:
    """Rows of blocks, one after another, and the `files` that they are read from."""

    def __init__(self, blocks: Iterable[Block], files: Sequence[OpenedFile] = ()) -> None:
        self.files, self._blocks = files, [block for block in blocks if len(block)]
        self._ends = np.cumsum([len(block) for block in self._blocks], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def columns(self, wanted: Iterable[str] = ()) -> set[str]:
        """Names of the columns, as far as the first rows tell; `wanted` ones are looked for in all rows."""
        names = set().union(*(block.columns() for block in self._blocks))
        return names | {name for name in wanted if name not in names and any(b.has(name) for b in self._blocks)}

    def take(self, numbers: Iterable[int], columns: Sequence[str]) -> list[Row]:
        """Rows by number, with these columns alone."""
        return [block.row(at, columns) for block, at in map(self._at, numbers)]

    def place(self, number: int) -> str:
        """File, and line or row."""
        block, at = self._at(number)
        return block.place(at)

    def check(self) -> None:
        """Raise ChangedError unless the files are still what was read."""
        for file in self.files:
            file.check()

    def _at(self, number: int) -> tuple[Block, int]:
        index = int(np.searchsorted(self._ends, number, "right"))
        return self._blocks[index], number - (int(self._ends[index]) - len(self._blocks[index]))
