"""Chunks of rows as plain files: what the zarr library would write and read, without it on the way.

An uncompressed chunk has a fixed size, so a file of Zarr v3 is plain bytes at known offsets:

    chunk 0, its crc32c, chunk 1, its crc32c, ...      and, in a file of the sharding codec,
    index (offset and length of each chunk, u64), crc32c of the index

Written under a partial name, fsynced, renamed; read into memory that the caller owns. The zarr API makes and
reads the same bytes (harvest/activation_store.py with `direct=False`) and is the way of compressed chunks.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np

from harvest.files import UserError, fsync_path, replacing

CRC_BYTES = 4
REDO = "`make verify` finds and marks what is bad, `make harvest` then redoes just that"


class Written(NamedTuple):
    """What the shard's record keeps of a file."""

    bytes: int
    crc32c: int  # of the checksums of its chunks, one after another


def crc32c(data: bytes | np.ndarray) -> bytes:
    """The four bytes that follow `data`, which is contiguous and of any shape, in a file."""
    return google_crc32c.value(data).to_bytes(CRC_BYTES, "little")  # pyright: ignore[reportArgumentType]


def damaged(path: Path | str, what: str) -> UserError:
    """The error of a file that is not as it was written, with the way out."""
    return UserError(f"{path}: {what}; {REDO}")


def layout(chunks: int, chunk_bytes: int) -> np.ndarray:
    """Index of a file of uncompressed chunks: offset and length of each with its crc32c, u64 (chunks, 2)."""
    size = chunk_bytes + CRC_BYTES
    return np.stack([np.arange(chunks) * size, np.full(chunks, size)], 1).astype("<u8")


class Packed:
    """Rows, (rows, ...), as chunks of `chunk_rows`, with an index where the file is of the sharding codec."""

    def __init__(self, rows: np.ndarray, chunk_rows: int, sharded: bool) -> None:
        self._chunks = [rows[start : start + chunk_rows] for start in range(0, len(rows), chunk_rows)]
        self._checksums: list[bytes] = []
        self._tail = b""
        if sharded:
            index = layout(len(self._chunks), self._chunks[0].nbytes).tobytes()
            self._tail = index + crc32c(index)
        self.size = rows.nbytes + CRC_BYTES * len(self._chunks) + len(self._tail)

    def parts(self) -> Iterator[memoryview | bytes]:
        """The file's bytes, one part after another; a chunk's checksum is computed just before it is taken."""
        for chunk in self._chunks:
            self._checksums.append(crc32c(chunk))
            yield chunk.data
            yield self._checksums[-1]
        yield self._tail

    def written(self) -> Written:
        """What the record keeps, once all parts were taken."""
        return Written(self.size, google_crc32c.value(b"".join(self._checksums)))


def write_file(path: Path, packed: Packed) -> Written:
    """Write rows durably.

    Raises OSError, which names the file, when the disk is full; the old file, if any, is then still there.
    """
    make_folder(path.parent)
    with replacing(path) as partial, partial.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, packed.size)  # a full disk is known at once; and half again as fast
        for part in packed.parts():
            file.write(part)
    return packed.written()


def make_folder(path: Path) -> None:
    """Make a folder and those above it, each entry durable."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        fsync_path(path.parent)


class ChunkFile:
    """A file of chunks, open for reading.

    Its methods raise UserError, which names the file, where bytes are missing or not what they were.
    """

    def __init__(self, path: Path | str, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor

    def length(self) -> int:
        """Bytes of the file."""
        return os.fstat(self._descriptor).st_size

    def _fill(self, out: memoryview, offset: int) -> None:
        while out:
            count = os.preadv(self._descriptor, [out], offset)
            if not count:
                raise damaged(self.path, "truncated")
            out, offset = out[count:], offset + count

    def _read(self, offset: int, size: int) -> bytearray:
        data = bytearray(size)
        self._fill(memoryview(data), offset)
        return data

    def index(self, chunks: int) -> np.ndarray:
        """Index at the end of a file of the sharding codec, u64 (chunks, 2)."""
        size = 16 * chunks + CRC_BYTES
        length = self.length()
        if length < size:
            raise damaged(self.path, "truncated")
        data = bytes(self._read(length - size, size))
        found = np.frombuffer(data[:-CRC_BYTES], "<u8").reshape(chunks, 2)
        outside = (found > length).any() or (found[:, 1] <= CRC_BYTES).any() or (found.sum(1) > length - size).any()
        if crc32c(data[:-CRC_BYTES]) != data[-CRC_BYTES:] or outside:
            raise damaged(self.path, "its index is damaged (crc32c)")
        return found

    def checksums(self, index: np.ndarray) -> bytes:
        """The crc32c after each chunk of an index (chunks, 2), as the file has it, one after another."""
        return b"".join(self._read(end - CRC_BYTES, CRC_BYTES) for end in index.sum(1).tolist())

    def read(self, offset: int, out: np.ndarray, checksum: bytes) -> None:
        """Read the chunk at `offset` into `out`, contiguous and of the chunk's shape, and compare its crc32c."""
        self._fill(out.data.cast("B"), offset)
        if crc32c(out) != checksum:
            raise damaged(self.path, f"damaged: the chunk at byte {offset:,} does not match its crc32c")

    def verify(self, index: np.ndarray) -> bytes:
        """Read every chunk of an index (chunks, 2), compare it with the crc32c after it, and return those in order."""
        checksums = []
        for offset, size in index.tolist():
            chunk = self._read(offset, size)
            data, checksum = np.frombuffer(chunk, np.uint8)[:-CRC_BYTES], bytes(chunk[-CRC_BYTES:])
            if crc32c(data) != checksum:
                raise damaged(self.path, f"damaged: the chunk at byte {offset:,} does not match its crc32c")
            checksums.append(checksum)
        return b"".join(checksums)


@contextmanager
def open_chunks(path: Path) -> Iterator[ChunkFile]:
    """A file of chunks.

    Raises UserError when it is missing or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise damaged(path, "missing") from None
    try:
        yield ChunkFile(path, descriptor)
    except OSError as error:
        raise damaged(path, f"cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)
