"""The arrays of a store through the zarr API: the plain twin of harvest/array_files.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest import mock

import numpy as np
import zarr
from zarr.storage import ObjectStore

from harvest import array_files
from harvest.array_files import Chunks, StoredArray, Written, verify
from harvest.files import fsync_path
from harvest.store_files import Files, LocalFiles, RemoteFiles


def zarr_array(files: Files, name: str) -> zarr.Array:
    store: Any = ObjectStore(files._store) if isinstance(files, RemoteFiles) else str(files.place())
    found = cast(zarr.Array, zarr.open_array(store, path=name, mode="r+"))
    return found.with_config(cast(Any, {"write_empty_chunks": True}))  # without it a chunk of fill is no file


def _write(files: Files, array: StoredArray, shard: int, rows: np.ndarray) -> Written:
    zarr_array(files, array.name)[shard * array.shard_rows : (shard + 1) * array.shard_rows] = rows
    if isinstance(files, LocalFiles):  # durable, as ours
        path = files.place(array.file(shard))
        for written in (path, path.parent, path.parent.parent):
            fsync_path(written)
    return Written(files.size(array.file(shard)) or 0, verify(files, array, shard))


def _read(files: Files, array: StoredArray, shard: int, chunk: int, _chunks: Chunks, out: np.ndarray) -> None:
    first = shard * array.shard_rows + chunk * array.chunk_rows
    out[...] = zarr_array(files, array.name)[first : first + array.chunk_rows]


@contextmanager
def through_zarr(yes: bool = True) -> Iterator[None]:
    """Within this, stores write and read their arrays with the zarr API."""
    if not yes:
        yield
        return
    with mock.patch.object(array_files, "write", _write), mock.patch.object(array_files, "read", _read):
        yield
