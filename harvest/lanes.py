"""Contexts of one source while they fill: where each token goes, and the scratch files where they wait.

Documents of a lane (a split, and a stratum of the source) are laid end to end and cut into contexts. A row of token ids
that fills whole contexts keeps them to itself, so that text which was packed elsewhere stays as it was packed.
"""

import os
from pathlib import Path

import numpy as np


class Lane:
    """The contexts of a split and a stratum, `width` tokens each, in the order in which they fill.

    `base` is the place of the first in the split's scratch files; `begun` is what a record holds of a lane.
    """

    def __init__(self, split: str, base: int, contexts: int, width: int, begun: list[int] | None = None) -> None:
        self.split, self.base, self.width, self.room = split, base, width, contexts * width
        # Tokens of contexts that are begun, and where the next token of a document goes: past the end of a whole
        # context, that is at a multiple of the width, a new one is begun.
        self.taken, self.at = begun or (0, 0)

    @property
    def filled(self) -> int:
        """Tokens that are in place."""
        return self.taken - (-self.at % self.width)

    @property
    def is_full(self) -> bool:
        """Whether there is no room left."""
        return self.filled == self.room

    def place(self, count: int, *, whole: bool) -> list[slice]:
        """Where so many tokens of a document go; fewer, once the lane is full. `whole` ones begin a context."""
        free = self.room - self.taken
        if whole and count % self.width == 0 and free:
            start, self.taken = self.taken, self.taken + min(count, free)
            return [slice(self.base + start, self.base + self.taken)]
        begun = min(count, -self.at % self.width)
        places = [slice(self.base + self.at, self.base + self.at + begun)] if begun else []
        self.at += begun
        if rest := min(count - begun, free):
            self.at = self.taken + rest
            places.append(slice(self.base + self.taken, self.base + self.at))
            self.taken += -(-rest // self.width) * self.width
        return places


def lanes(split: str, contexts: int, strata: int, width: int, begun: list[list[int]] | None) -> list[Lane]:
    """The lanes of a split: one, or equal parts of its contexts for each stratum, the first ones one more."""
    parts = [contexts // strata + (number < contexts % strata) for number in range(strata)]
    bases = np.cumsum([0, *parts[:-1]]) * width
    return [Lane(split, int(bases[i]), parts[i], width, begun[i] if begun else None) for i in range(strata)]


def scratch_file(path: Path, size: int) -> np.memmap:
    """A file of so many uint32 as an array (size,). Allocated now: a full disk would kill a sparse one with SIGBUS."""
    with path.open("ab") as file:
        before = file.tell()
        try:
            os.posix_fallocate(file.fileno(), 0, 4 * size)
        except OSError as error:
            file.truncate(before)  # some file systems keep what they could give
            error.filename = str(path)
            raise
    return np.memmap(path, np.uint32, "r+", shape=(size,))
