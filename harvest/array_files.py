"""The arrays of a store as files: what the zarr library would write and read, without it on the way.

A file holds one shard of rows of one array:

    chunk 0, its crc32c, chunk 1, its crc32c, ...      and, where the array has two axes (the sharding codec),
    index (offset and length of each chunk, u64), crc32c of the index

An uncompressed chunk has a fixed size, so it is read from a known offset into memory that the caller owns.
tests/zarr_twin.py writes and reads the same bytes with the zarr API.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import google_crc32c
import numpy as np
from numcodecs.blosc import Blosc

from harvest.store_files import Files, damaged

CRC_BYTES = 4


class StoredArray(NamedTuple):
    """A Zarr array of a store; `columns` is None for one value a row."""

    name: str  # path in the store
    dtype: str
    fill: float
    rows: int
    columns: int | None
    shard_rows: int
    chunk_rows: int
    compressed: bool = False

    @property
    def chunks(self) -> int:
        """Chunks of a file."""
        return self.shard_rows // self.chunk_rows

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """(chunk_rows, columns), or (chunk_rows,) for one value a row."""
        return (self.chunk_rows,) if self.columns is None else (self.chunk_rows, self.columns)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk's rows, uncompressed."""
        return int(np.prod(self.chunk_shape)) * np.dtype(self.dtype).itemsize

    @property
    def file_bytes(self) -> int:
        """Bytes of a file, uncompressed."""
        return self.chunks * (self.chunk_bytes + CRC_BYTES) + self.index_bytes

    @property
    def index_bytes(self) -> int:
        """Bytes of the index at the end of a file, with its crc32c."""
        return 0 if self.columns is None else 16 * self.chunks + CRC_BYTES

    def file(self, shard: int) -> str:
        """Path in the store of the file with a shard of rows."""
        return f"{self.name}/c/{shard}" + ("" if self.columns is None else "/0")


class Written(NamedTuple):
    """What the shard's record keeps of a file."""

    bytes: int
    crc32c: int  # of the checksums of its chunks, one after another: see `verify`


class Chunks(NamedTuple):
    """Where the chunks of a file are, and what they have to be."""

    places: np.ndarray  # offset and length with the crc32c, u64 (chunks, 2)
    checksums: bytes  # crc32c after each chunk, four bytes each


def write(files: Files, array: StoredArray, shard: int, rows: np.ndarray) -> Written:
    """Write a shard of rows, (shard_rows, ...), durably.

    Raises ValueError or TypeError for rows of another shape or type, OSError when the disk is full; an old file is
    then still there.
    """
    if rows.shape != (array.shard_rows, *array.chunk_shape[1:]):
        raise ValueError(f"{array.name}: rows of shape {rows.shape} for a shard of {array.shard_rows}")
    rows = np.ascontiguousarray(rows.astype(np.dtype(array.dtype).newbyteorder("<"), casting="safe", copy=False))
    chunks = np.split(rows, array.chunks)
    if array.compressed:
        chunks = [np.frombuffer(_codec(array).encode(chunk), np.uint8) for chunk in chunks]
    sizes = np.array([chunk.nbytes + CRC_BYTES for chunk in chunks])
    tail = b""
    if array.columns is not None:
        index = np.stack([np.cumsum(sizes) - sizes, sizes], 1).astype("<u8").tobytes()
        tail = index + _crc32c(index)
    checksums: list[bytes] = []

    def parts() -> Iterator[memoryview | bytes]:
        for chunk in chunks:
            checksums.append(_crc32c(chunk))  # just before the chunk is taken, which is then in the cache
            yield chunk.data
            yield checksums[-1]
        yield tail

    size = int(sizes.sum()) + len(tail)
    files.write(array.file(shard), parts(), size)
    return Written(size, google_crc32c.value(b"".join(checksums)))


def find_chunks(files: Files, array: StoredArray, shard: int) -> Chunks:
    """The chunks of a file.

    Raises UserError that names the file when it is damaged or missing.
    """
    index = _read_index(files, array, shard) if array.compressed else _plain_index(array.chunks, array.chunk_bytes)
    ends = (index.sum(1) - CRC_BYTES).tolist()
    return Chunks(index, files.read_parts(array.file(shard), ends, CRC_BYTES))


def read(files: Files, array: StoredArray, shard: int, chunk: int, chunks: Chunks, out: np.ndarray) -> None:
    """Read a chunk of a file into contiguous `out` of the chunk's shape, and compare its crc32c.

    Raises UserError that names the file when it is damaged or missing.
    """
    offset, size = chunks.places[chunk].tolist()
    data = np.empty(size - CRC_BYTES, np.uint8) if array.compressed else out
    files.read_into(array.file(shard), offset, data.data.cast("B"))
    if _crc32c(data) != chunks.checksums[CRC_BYTES * chunk : CRC_BYTES * (chunk + 1)]:
        raise _changed_chunk(files, array, shard, offset)
    if array.compressed:
        _codec(array).decode(data, out)


def verify(files: Files, array: StoredArray, shard: int) -> int:
    """Read every byte of a file and return the crc32c of its chunks' checksums.

    Not of the file's bytes: data followed by its crc32c has one and the same crc32c, whatever the data, so two
    shards could trade places unseen. Raises UserError as `read` does.
    """
    plain = _plain_index(array.chunks, array.chunk_bytes)
    index = plain if array.columns is None else _read_index(files, array, shard)
    if not array.compressed and not np.array_equal(index, plain):
        raise damaged(files.place(array.file(shard)), "its index is not that of chunks in order")
    checksums = []
    for offset, size in index.tolist():
        chunk = np.empty(size, np.uint8)
        files.read_into(array.file(shard), offset, chunk.data)
        checksums.append(chunk[-CRC_BYTES:].tobytes())
        if _crc32c(chunk[:-CRC_BYTES]) != checksums[-1]:
            raise _changed_chunk(files, array, shard, offset)
    return google_crc32c.value(b"".join(checksums))


def _read_index(files: Files, array: StoredArray, shard: int) -> np.ndarray:
    name, size = array.file(shard), array.index_bytes
    length = files.size(name)
    if length is None or length < size:
        raise damaged(files.place(name), "missing" if length is None else "truncated")
    data = files.read_parts(name, [length - size], size)
    found = np.frombuffer(data[:-CRC_BYTES], "<u8").reshape(array.chunks, 2)
    outside = (found > length).any() or (found[:, 1] <= CRC_BYTES).any() or (found.sum(1) > length - size).any()
    if _crc32c(data[:-CRC_BYTES]) != data[-CRC_BYTES:] or outside:
        raise damaged(files.place(name), "its index is damaged (crc32c)")
    return found


@cache
def _plain_index(chunks: int, chunk_bytes: int) -> np.ndarray:
    """Index of a file of uncompressed chunks, u64 (chunks, 2)."""
    size = chunk_bytes + CRC_BYTES
    return np.stack([np.arange(chunks) * size, np.full(chunks, size)], 1).astype("<u8")


def _codec(array: StoredArray) -> Blosc:
    return Blosc(cname="zstd", clevel=5, shuffle=Blosc.SHUFFLE, typesize=np.dtype(array.dtype).itemsize)


def _crc32c(data: bytes | np.ndarray) -> bytes:
    """The four bytes that follow `data`, which is contiguous and of any shape, in a file."""
    return google_crc32c.value(data).to_bytes(CRC_BYTES, "little")  # pyright: ignore[reportArgumentType]


def _changed_chunk(files: Files, array: StoredArray, shard: int, offset: int) -> Exception:
    return damaged(files.place(array.file(shard)), f"damaged: the chunk at byte {offset:,} does not match its crc32c")
