"""Lines of JSON that outlive a kill: each is appended the moment it is known, and found again at the next start."""

import json
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from harvest.files import UserError


class Journal:
    """A file to append to. A last line that a kill cut short is taken off first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)  # what a full disk does not take must not wait for another try
        with path.open("rb") as file:
            whole = sum(len(line) for line in file if line.endswith(b"\n"))
        if whole < path.stat().st_size:
            self._file.truncate(whole)
        self.is_new = not whole

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()

    def add(self, value: dict[str, Any]) -> None:
        """Append a line; a kill from here on does not lose it. Raises OSError, with the file, on a full disk."""
        left = memoryview(json.dumps(value).encode() + b"\n")
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            error.filename = str(self.path)
            raise


def read_lines(path: Path, fields: Collection[str], again: str) -> Iterator[dict[str, Any]]:
    """The whole lines of a journal, of which each has these fields; of a file that is not there, none.

    Raises UserError for a damaged line; `again` says what is done anew once it is deleted.
    """
    with suppress(FileNotFoundError), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):  # a kill cut it short
                return
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if not isinstance(value, dict) or not value.keys() >= set(fields):
                raise UserError(f"{path}: line {number} is damaged; delete it, and {again}")
            yield value
