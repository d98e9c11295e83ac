"""Where the files of a store lie: in a folder, or below a prefix of a bucket (harvest/remote_files.py).

Everything of a store goes through `Files`: zarr's metadata, arrays, records, created.json. Names are relative,
with slashes. A file is there whole or not at all, and durable once a method that writes it returns.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from harvest.direct_io import ChunkFile, Packed, Written, make_folder, open_chunks, write_file
from harvest.files import UserError, fsync_path, json_bytes, parse_json, replacing


class Files(Protocol):
    """Files of one store. Methods raise UserError, or OSError, which names the file."""

    readers: int  # threads that read at once

    def place(self, name: str = "") -> Path | str:
        """How errors call a file: path or URL; without a name, of the whole store."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        ...

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole."""
        ...

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        ...

    def names(self, folder: str = "") -> list[str]:
        """All files below a folder; none where there is no such folder."""
        ...

    def open_chunks(self, name: str) -> AbstractContextManager[ChunkFile]:
        """A file of chunks, to be read in parts."""
        ...

    def write_chunks(self, name: str, packed: Packed) -> Written:
        """Write a file of chunks whole."""
        ...

    def zarr_store(self) -> Any:
        """What the zarr API takes as a store."""
        ...

    def named(self, name: str) -> AbstractContextManager[None]:
        """Errors inside, of the zarr API, name the file."""
        ...

    def settle(self, name: str) -> None:
        """Make durable what the zarr API has written to a file."""
        ...

    def sweep(self, is_abandoned: Callable[[Path], bool]) -> None:
        """Remove what killed writers left half written."""
        ...

    def delete_all(self) -> None:
        """Delete the whole store, first what says that it is one."""
        ...


class LocalFiles(Files):
    """Files in a folder."""

    readers = min(4, max(2, os.cpu_count() or 1))  # one alone does not fill a disk's queue; each checks what it reads

    def __init__(self, path: Path) -> None:
        self.path = path

    def place(self, name: str = "") -> Path:
        return self.path / name

    def size(self, name: str) -> int | None:
        path = self.place(name)
        return path.stat().st_size if path.exists() else None

    def read(self, name: str) -> bytes:
        try:
            return self.place(name).read_bytes()
        except OSError as error:
            raise UserError(f"{self.place(name)}: cannot be read: {error.strerror}") from None

    def write(self, name: str, data: bytes) -> None:
        path = self._free(name)
        make_folder(path.parent)
        with replacing(path) as partial:
            partial.write_bytes(data)

    def delete(self, name: str) -> None:
        self._free(name).unlink(missing_ok=True)

    def _free(self, name: str) -> Path:
        """A file's path, without the folder that may stand there: we make none of that name."""
        path = self.place(name)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        return path

    def names(self, folder: str = "") -> list[str]:
        return [p.relative_to(self.path).as_posix() for p in self.place(folder).rglob("*") if p.is_file()]

    def open_chunks(self, name: str) -> AbstractContextManager[ChunkFile]:
        return open_chunks(self.place(name))

    def write_chunks(self, name: str, packed: Packed) -> Written:
        return write_file(self._free(name), packed)

    def zarr_store(self) -> str:
        return str(self.path)

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = str(self.place(name))
            raise

    def settle(self, name: str) -> None:
        path = self.place(name)
        for written in (path, path.parent, path.parent.parent):
            fsync_path(written)

    def sweep(self, is_abandoned: Callable[[Path], bool]) -> None:
        for path in self.path.rglob("*.partial"):
            if is_abandoned(path):
                path.unlink(missing_ok=True)

    def delete_all(self) -> None:
        if self.path.exists():
            self.delete("created.json")
            shutil.rmtree(self.path)


def write_store_json(files: Files, name: str, value: Any) -> None:
    """Write a JSON file as `harvest.files.write_json` does."""
    files.write(name, json_bytes(value))


def read_store_json(files: Files, name: str) -> dict[str, Any]:
    """A JSON object. Raises UserError as `harvest.files.read_json` does."""
    return parse_json(files.read(name), files.place(name))


def local_or(place: Path | Files) -> Files:
    """Files of a store, of which a folder may be given."""
    return LocalFiles(place) if isinstance(place, Path) else place
