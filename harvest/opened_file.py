"""A user's file that is read while its content is hashed, and vouched for until the reading ends.

A fingerprint names content by its sha256. A file is therefore opened once, hashed through that descriptor, and looked
at again during and after its use. Its stamp (size, mtime, ctime, inode) shows whether it was written to in between.
Where the file changed at about the time of the hash, the stamp cannot tell, and it is hashed again.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from harvest.files import BLOCK, Stamp, UserError, stamp_of

RECENT_NS = 3_000_000_000  # clocks of file systems are coarse: FAT's counts in 2 seconds


class ChangedError(UserError):
    """A file is not, or no longer, the one whose hash is in the fingerprint."""


class Bytes:
    """Bytes behind a descriptor: they stay these, whatever takes their name."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    @property
    def open_path(self) -> str:
        """The path by which this process can open the same file again."""
        return f"/proc/self/fd/{self.file.fileno()}"

    def stream(self) -> BinaryIO:
        """A buffered reader of its own, at the beginning."""
        self.file.flush()
        return open(self.open_path, "rb")

    def blocks(self) -> Iterator[bytes]:
        """All of the bytes, in pieces."""
        with self.stream() as stream:
            while block := stream.read(BLOCK):
                yield block

    def read(self, start: int, length: int) -> bytes:
        """Part of the bytes, from any thread."""
        return os.pread(self.file.fileno(), length, start)


class Unpacked(Bytes):
    """A nameless file in the scratch folder, for what can be read by number only once it is unpacked.

    It is gone with the process: nothing is left under a name that could outlive the content it was made of.
    """

    def __init__(self, scratch: Path | None) -> None:
        super().__init__(tempfile.TemporaryFile(dir=scratch))  # noqa: SIM115 (open as long as the rows are)


class OpenedFile(Bytes):
    """A file open for reading; `sha256` is known once `blocks` has been read to its end."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.open("rb", buffering=0))  # pyright: ignore[reportArgumentType]
        self.path, self.sha256 = path, ""
        self._stamp, self._hashed_ns = self._look(), 0

    def blocks(self) -> Iterator[bytes]:
        """All of the file, in pieces, hashed on the way.

        Raises ChangedError if the file was written to since it was opened.
        """
        self._check_stamp()
        self._hashed_ns = time.time_ns()
        digest, offset = hashlib.sha256(), 0
        while block := os.pread(self.file.fileno(), BLOCK, offset):
            digest.update(block)
            offset += len(block)
            yield block
        if self.sha256 not in ("", digest.hexdigest()):
            raise self._changed()
        self.sha256 = digest.hexdigest()

    def hash(self) -> None:
        """Read the file for its hash alone. Raises ChangedError as `blocks` does."""
        for _ in self.blocks():
            pass

    def read(self, start: int, length: int) -> bytes:
        """Part of the bytes, from any thread. Raises ChangedError if the file has become shorter."""
        data = super().read(start, length)
        while len(data) < length:  # of more than 2 GB at once, the kernel gives a part
            if not (more := super().read(start + len(data), length - len(data))):
                raise self._changed()
            data += more
        return data

    def check(self) -> None:
        """Raise ChangedError unless the file is, and was since it was opened, what was hashed."""
        self._check_stamp()
        if self._stamp.ctime_ns > self._hashed_ns - RECENT_NS:
            self.hash()

    def _look(self) -> Stamp:
        return stamp_of(os.fstat(self.file.fileno()))

    def _check_stamp(self) -> None:
        if self._look() != self._stamp:
            raise self._changed()

    def _changed(self) -> ChangedError:
        return ChangedError(f"{self.path}: changed while it was read; the same command again takes what is there then")


def content_name(hashes: Iterable[tuple[str, str]]) -> str:
    """What a fingerprint holds of files: `sha256:` and the hash of their names and hashes."""
    return "sha256:" + hashlib.sha256(json.dumps([list(pair) for pair in hashes]).encode()).hexdigest()
