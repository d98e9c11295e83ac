"""A file of the user's that is read while its content is hashed, and vouched for until the reading ends.

A fingerprint names content by its sha256. So that nothing else is read under that name, a file is opened once, hashed
through that descriptor, and looked at again while and after it is used. Stamps (size, mtime, ctime, inode) tell that
nothing was written in between: the same content again is not enough, since rows may have been read before it was put
back. Where stamps cannot tell, because the file was changed at about the time of the hash and clocks of file systems
are coarse, it is hashed again.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from harvest.files import BLOCK, Stamp, UserError, stamp_of

RECENT_NS = 3_000_000_000  # clocks of file systems are coarse: FAT's counts in 2 seconds


class ChangedError(UserError):
    """A file is not, or not any more, the one whose hash is in the fingerprint."""


class OpenedFile:
    """A file open for reading; `sha256` is known once `blocks` has been read to its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        self.sha256 = ""
        self._stamp, self._hashed_ns = self._look(), 0

    def blocks(self) -> Iterator[bytes]:
        """All of the file, in pieces, hashed on the way.

        Raises ChangedError where it was written to since it was opened.
        """
        self._check_stamp()
        self._hashed_ns = time.time_ns()
        digest, offset = hashlib.sha256(), 0
        while block := os.pread(self._file.fileno(), BLOCK, offset):
            digest.update(block)
            offset += len(block)
            yield block
        if self.sha256 and digest.hexdigest() != self.sha256:
            raise self._changed()
        self.sha256 = digest.hexdigest()

    def hash(self) -> None:
        """Read it for its hash alone. Raises ChangedError as `blocks` does."""
        for _ in self.blocks():
            pass

    def stream(self) -> BinaryIO:
        """A buffered reader of its own, at the beginning."""
        return open(self.open_path, "rb")

    @property
    def open_path(self) -> str:
        """By which this process can open the same file again, whatever has taken its name since."""
        return f"/proc/self/fd/{self._file.fileno()}"

    def read(self, start: int, length: int) -> bytes:
        """Bytes of the file, from any thread.

        Raises ChangedError where it has become shorter.
        """
        data = os.pread(self._file.fileno(), length, start)
        while len(data) < length:  # of more than 2 GB at once, the kernel gives a part
            if not (more := os.pread(self._file.fileno(), length - len(data), start + len(data))):
                raise self._changed()
            data += more
        return data

    def check(self) -> None:
        """Raise ChangedError unless the file is, and was since it was opened, what was hashed."""
        self._check_stamp()
        if self._stamp.ctime_ns > self._hashed_ns - RECENT_NS:
            self.hash()

    def close(self) -> None:
        """Give the descriptor back."""
        self._file.close()

    def _look(self) -> Stamp:
        return stamp_of(os.fstat(self._file.fileno()))

    def _check_stamp(self) -> None:
        if self._look() != self._stamp:
            raise self._changed()

    def _changed(self) -> ChangedError:
        return ChangedError(f"{self.path}: changed while it was read; the same command again takes what is there then")


def content_name(hashes: Iterable[tuple[str, str]]) -> str:
    """What a fingerprint holds of files: `sha256:` and the hash of their names and hashes."""
    return "sha256:" + hashlib.sha256(json.dumps([list(pair) for pair in hashes]).encode()).hexdigest()
