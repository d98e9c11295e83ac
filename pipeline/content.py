"""Content of local files, as sha256; what is known of a file is remembered while nothing about it has changed.

A file is taken for the same while its size, mtime, ctime and inode are. mtime alone says little: unzip, `cp -p` and
rsync set it back. ctime is the kernel's, and only as fine as its tick, so a file that was changed just before it was
hashed is hashed again the next time.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

from harvest.files import UserError, file_stamp, read_json, write_sealed
from harvest.opened_file import RECENT_NS, content_name
from harvest.progress import Progress
from harvest.store_files import LocalFiles

SLOW_BYTES = 10 << 30  # hashing more shows its progress
BLOCK_BYTES = 1 << 18  # stays in a core's cache
TRIES = 3  # for a file that is being written


class ContentHashes:
    """sha256 of files, and other texts that take long to find, remembered in a file; without one, nothing is."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.changed = path, False
        self._stop = Event()
        self.known: dict[str, Any] = _remembered(path) if path else {}

    def save(self) -> None:
        """Write what is known, where anything new is."""
        if self.path and self.changed:
            with suppress(OSError):  # a folder of runs may be looked at where it cannot be written
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_sealed(self.path, self.known)

    def get(self, key: str, make: Callable[[], str]) -> str:
        """The text of a key, made where it is not known."""
        if not isinstance(self.known.get(key), str):
            self.known[key], self.changed = make(), True
        return self.known[key]

    def file_hash(self, path: Path) -> str:
        """sha256 of a file, hexadecimal.

        Raises UserError for one that changes while it is read.
        """
        key = str(path.resolve())
        for _ in range(TRIES):
            stamp, now = file_stamp(path), time.time_ns()
            known = self.known.get(key)
            if (
                isinstance(known, dict)
                and known["stamp"] == [*stamp]
                and stamp.ctime_ns < known["hashed_ns"] - RECENT_NS
            ):
                return known["sha256"]
            found = self._read(path)
            if file_stamp(path) == stamp and not self._stop.is_set():
                self.known[key], self.changed = {"stamp": [*stamp], "hashed_ns": now, "sha256": found}, True
                return found
        raise UserError(f"{path}: changes while it is read; wait until it is written, then run the same command again")

    def files_hash(self, files: Sequence[Path], root: Path | None = None) -> str:
        """`sha256:` and the hash of the files' names (relative to `root`) and contents."""
        size = sum(path.stat().st_size for path in files)
        names = [path.relative_to(root).as_posix() if root else path.name for path in files]
        with (
            Progress("content of files", size, "bytes", quiet=size < SLOW_BYTES) as progress,
            ThreadPoolExecutor(LocalFiles.readers, "hash") as pool,
        ):
            hashes = [pool.submit(self.file_hash, path) for path in files]
            try:
                for path, found in zip(files, hashes, strict=True):
                    found.result()
                    progress.advance(path.stat().st_size)
            except BaseException:
                self._stop.set()  # terabytes take hours; what is known stays known
                pool.shutdown(cancel_futures=True)
                self._stop.clear()
                self.save()
                raise
        return content_name((name, found.result()) for name, found in zip(names, hashes, strict=True))

    def _read(self, path: Path) -> str:
        """sha256 of a file, from any thread; in vain once `_stop` is set."""
        digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK_BYTES))
        with path.open("rb", buffering=0) as file:
            while not self._stop.is_set() and (length := file.readinto(block)):
                digest.update(block[:length])
        return digest.hexdigest()


def _remembered(path: Path) -> dict[str, Any]:
    """What such a file holds; what is lost or damaged is found again. Of a file of earlier versions, without a seal,
    just the texts: its hashes went by size and mtime."""
    with suppress(UserError):
        return read_json(path, sealed=True)
    with suppress(UserError):
        return {key: text for key, text in read_json(path).items() if isinstance(text, str) and "|" not in key}
    return {}
