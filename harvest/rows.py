"""Rows of a source by number, whatever holds them: files of several kinds, or a data set of the hub."""

import bisect
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from harvest.files import BLOCK
from harvest.opened_file import OpenedFile

if TYPE_CHECKING:
    from datasets import Dataset


class Damaged(NamedTuple):
    """A row that cannot be read, and why."""

    reason: str


Row = dict[str, Any] | Damaged


class Rows(Protocol):
    """Rows by number, and what is known of their columns."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def column_names(self) -> set[str]:
        """Columns that there are, as far as the first rows tell."""
        ...

    def has_column(self, name: str) -> bool:
        """Whether any row has a column, however far down."""
        ...

    def take(self, numbers: Sequence[int], columns: Sequence[str]) -> list[Row]:
        """Rows, with these columns alone; a row that lacks one has None there."""
        ...

    def place(self, number: int) -> str:
        """Where a row stands, for people."""
        ...


class FileRows:
    """Rows of several files, one after another."""

    def __init__(self, files: Sequence[OpenedFile], parts: Sequence[Rows]) -> None:
        self.files, self._parts = files, parts
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def column_names(self) -> set[str]:
        """Columns of any file."""
        return set().union(*(part.column_names() for part in self._parts))

    def has_column(self, name: str) -> bool:
        """Whether any row of any file has a column."""
        return any(part.has_column(name) for part in self._parts)

    def take(self, numbers: Sequence[int], columns: Sequence[str]) -> list[Row]:
        """Rows by number."""
        return [row for part, at in map(self._at, numbers) for row in part.take([at], columns)]

    def place(self, number: int) -> str:
        """File, and line or row."""
        part, at = self._at(number)
        return part.place(at)

    def _at(self, number: int) -> tuple[Rows, int]:
        index = bisect.bisect_right(self._ends, number)
        return self._parts[index], number - (self._ends[index - 1] if index else 0)


class HubRows:
    """Rows of what `datasets` opened."""

    files: Sequence[OpenedFile] = ()  # the commit vouches for them

    def __init__(self, data: "Dataset") -> None:
        self._data, self._chosen = data, data

    def __len__(self) -> int:
        return len(self._data)

    def column_names(self) -> set[str]:
        """Its columns."""
        return set(self._data.column_names)

    def has_column(self, name: str) -> bool:
        """Whether it has a column."""
        return name in self._data.column_names

    def take(self, numbers: Sequence[int], columns: Sequence[str]) -> list[Row]:
        """Rows by number."""
        if self._chosen.column_names != [*columns]:  # others are not even decoded
            self._chosen = self._data.select_columns([*columns])
        try:
            found: Any = self._chosen[list(numbers)]
        except UnicodeDecodeError:
            if len(numbers) == 1:
                return [Damaged("not UTF-8 text")]
            return [row for number in numbers for row in self.take([number], columns)]
        return [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]

    def place(self, number: int) -> str:
        """Row."""
        return f"row {number}"


class Unpacked:
    """A file without a name in the scratch folder, for what can be read by number only once it is unpacked.

    It is gone with the process: nothing stays under a name that could outlive the content that it was made of.
    """

    def __init__(self, scratch: Path | None) -> None:
        self.file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 (as long as the rows are)

    def blocks(self) -> Iterator[bytes]:
        """All of it, in pieces."""
        with self.stream() as stream:
            while block := stream.read(BLOCK):
                yield block

    def read(self, start: int, length: int) -> bytes:
        """A part of it."""
        self.file.seek(start)
        return self.file.read(length)

    def stream(self) -> BinaryIO:
        """A reader of its own, at the beginning."""
        self.file.flush()
        return open(self.path, "rb")

    @property
    def path(self) -> str:
        """By which this process can open it again."""
        return f"/proc/self/fd/{self.file.fileno()}"
