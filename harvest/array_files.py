"""The arrays of a store as files: the one place that reads and writes their bytes.

A file holds one shard of rows of one array: chunks with an index where the array is two-dimensional, one
chunk where it is not. Uncompressed ones are read and written directly (harvest/direct_io.py). The zarr API
serves the compressed ones, and with `direct=False` all of them: the same bytes, more slowly.
"""

from typing import Any, NamedTuple, cast

import google_crc32c
import numpy as np
import zarr

from harvest.direct_io import CRC_BYTES, ChunkFile, Packed, Written, damaged, layout
from harvest.store_files import Files

ALL_CHUNKS: Any = {"write_empty_chunks": True}  # not kept in the metadata; without it a chunk of fill is no file


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
        index = 0 if self.columns is None else 16 * self.chunks + CRC_BYTES
        return self.chunks * (self.chunk_bytes + CRC_BYTES) + index

    def file(self, shard: int) -> str:
        """Path in the store of the file with a shard of rows."""
        return f"{self.name}/c/{shard}" + ("" if self.columns is None else "/0")


class ArrayFiles:
    """Files of a store's arrays."""

    def __init__(self, files: Files, direct: bool = True) -> None:
        self._files, self._direct = files, direct
        self._zarr_arrays: dict[str, zarr.Array] = {}

    def size(self, array: StoredArray, shard: int) -> int | None:
        """Bytes of a file; None where there is none."""
        return self._files.size(array.file(shard))

    def write(self, array: StoredArray, shard: int, rows: np.ndarray) -> Written:
        """Write a shard of rows durably.

        Raises ValueError or TypeError for rows of another shape or type, OSError when the disk is full.
        """
        if rows.shape != (array.shard_rows, *array.chunk_shape[1:]):
            raise ValueError(f"{array.name}: rows of shape {rows.shape} for a shard of {array.shard_rows}")
        rows = np.ascontiguousarray(rows.astype(np.dtype(array.dtype).newbyteorder("<"), casting="safe", copy=False))
        name = array.file(shard)
        if self._by_zarr(array):
            with self._files.named(name):
                self._zarr_array(array)[shard * array.shard_rows : (shard + 1) * array.shard_rows] = rows
            self._files.settle(name)
            return Written(self._files.size(name) or 0, self.verify(array, shard))
        return self._files.write_chunks(name, Packed(rows, array.chunk_rows, sharded=array.columns is not None))

    def read(self, array: StoredArray, shard: int, chunk: int, checksum: bytes, out: np.ndarray) -> None:
        """Read a chunk of a file, whose crc32c is `checksum`, into contiguous `out` of the chunk's shape.

        Raises UserError that names the file when it is damaged or absent.
        """
        name = array.file(shard)
        if self._by_zarr(array):
            first = shard * array.shard_rows + chunk * array.chunk_rows
            try:
                with self._files.named(name):
                    out[...] = self._zarr_array(array)[first : first + array.chunk_rows]
            except (ValueError, OSError, RuntimeError) as error:
                raise damaged(self._files.place(name), f"damaged ({error})") from None
            return
        with self._files.open_chunks(name) as file:
            file.read(chunk * (array.chunk_bytes + CRC_BYTES), out, checksum)

    def checksums(self, array: StoredArray, shard: int) -> bytes:
        """The crc32c after each chunk of a file, four bytes each, in order.

        Raises UserError that names the file when it is damaged or absent.
        """
        with self._files.open_chunks(array.file(shard)) as file:
            return file.checksums(self._index(array, file))

    def verify(self, array: StoredArray, shard: int) -> int:
        """Read every byte of a file and return the crc32c of its chunks' checksums.

        Not of the file's bytes: data followed by its crc32c has one and the same crc32c, whatever the data,
        so two shards could trade places unseen. Raises UserError as `read` does.
        """
        with self._files.open_chunks(array.file(shard)) as file:
            return google_crc32c.value(file.verify(self._index(array, file)))

    def _index(self, array: StoredArray, file: ChunkFile) -> np.ndarray:
        plain = layout(array.chunks, array.chunk_bytes)
        if array.columns is None:
            return plain
        found = file.index(array.chunks)
        if not array.compressed and not np.array_equal(found, plain):
            raise damaged(file.path, "its index is not that of chunks in order")
        return found

    def _by_zarr(self, array: StoredArray) -> bool:
        return array.compressed or not self._direct

    def _zarr_array(self, array: StoredArray) -> zarr.Array:
        if array.name not in self._zarr_arrays:
            store = self._files.zarr_store()
            found = cast(zarr.Array, zarr.open_array(store, path=array.name, mode="r+"))
            self._zarr_arrays[array.name] = found.with_config(ALL_CHUNKS)
        return self._zarr_arrays[array.name]
