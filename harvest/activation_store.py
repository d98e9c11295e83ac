"""The activation store: a Zarr v3 group that any Zarr reader opens, written shard by shard, verified when read.

    zarr.json                                    attributes: schema, hooks, d_in, geometry, model, seed, numerics
    <split>/<hook>/acts   uint16 (rows, d_in)    bits of bfloat16; sharded, crc32c in every chunk; other forms
                                                 have other arrays here (harvest/stored_forms.py)
    <split>/<hook>/norm   float32 (rows,)        norms of the stored rows
    <split>/row/{token_id u4, context u4, position u2}   where each row comes from
    <split>/shards/00042.json                    written last: rows, bytes and checksum of each file, norm sums

zarr 3.1 refuses bfloat16, hence the bits. A missing chunk reads as fill value without an error, so the
shard records decide which shards exist, sizes are checked when a store is opened, crc32c on every read,
and the fill value, a NaN, is the last guard: harvest never writes one. Chunks are compared with the
checksums of the shard's record, so files that traded places are found as well.

A stream (harvest/stream.py) deletes training shards that were read. Their records stay, with `consumed`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from harvest import array_files
from harvest.array_files import Chunks, StoredArray, Written
from harvest.files import UserError, json_bytes, parse_json
from harvest.store_files import REDO, Files, LocalFiles, damaged
from harvest.store_layout import (
    PROVENANCE,
    ROOT,
    SPLITS,
    Geometry,
    describe,
    is_same_metadata,
    metadata_files,
    read_geometry,
    slug,
    stored_arrays,
)
from harvest.stored_forms import FILL, as_stored, from_stored, room, row_arrays

NORM_SUMS = ("mean_norm", "sum", "sum_of_squares")  # of a shard's norms, in its record
CONSUMED = (
    "a stream (`make stream`) has deleted training rows that it had read; `make stream` makes them again as it trains, "
    "`python -m pipeline harvest --force` makes the whole store"
)


class ShardRows(NamedTuple):
    """All rows of one shard in the order they are stored."""

    acts: Mapping[str, np.ndarray]  # hook -> uint16 (rows, d_in)
    norms: Mapping[str, np.ndarray]  # hook -> float32 (rows,)
    token_id: np.ndarray
    context: np.ndarray  # number of the context within the split
    position: np.ndarray  # position within the context


class ActivationStore:
    """A store in a folder or a bucket.

    `create` writes its metadata, `open` finds it; shards come and go by number.
    """

    def __init__(self, place: Path | Files, geometry: Geometry, attributes: Mapping[str, Any]) -> None:
        self.geometry, self.attributes = geometry, attributes
        self.files = LocalFiles(place) if isinstance(place, Path) else place
        self.path = self.files.place()  # or its URL
        self._arrays = {split: stored_arrays(geometry, split) for split in SPLITS}
        self._chunks: dict[str, Chunks] = {}  # of files that were found to be those of the records
        self._visited: SimpleQueue[np.ndarray] = SimpleQueue()  # memory of chunks, to be read into again

    @classmethod
    def create(cls, place: Path | Files, geometry: Geometry, attributes: Mapping[str, Any]) -> "ActivationStore":
        """A store whose metadata are written, whatever was there before; its shards are kept."""
        store = cls(place, geometry, describe(geometry, attributes))
        for name, content in store._metadata().items():
            store.files.write(name, [content], len(content))
        return store

    @classmethod
    def open(cls, place: Path | Files) -> "ActivationStore":
        """A store that is there.

        Raises UserError when there is none, or its root group does not describe one that this code reads.
        """
        files = LocalFiles(place) if isinstance(place, Path) else place
        return cls(files, *read_geometry(files))

    def _metadata(self) -> dict[str, bytes]:
        return metadata_files([array for split in SPLITS for array in self._arrays[split].values()], self.attributes)

    def damaged_metadata(self, there: Iterable[str] = ()) -> list[str]:
        """Names of the files without rows that are missing, or do not fit this store's geometry and attributes.

        Of the files that are `there`, also metadata that have no place in this store.
        """
        expected, found = self._metadata(), []
        for name, content in expected.items():
            try:
                if is_same_metadata(name, self.files.read(name), content):
                    continue
            except UserError:
                pass
            found.append(name)
        return found + [name for name in there if name.split("/")[-1] == ROOT and name not in expected]

    def record_path(self, split: str, shard: int) -> Path | str:
        """Place of a shard's record: path or URL."""
        return self.files.place(_record_name(split, shard))

    def record(self, split: str, shard: int) -> dict[str, Any]:
        """What was written about a shard when it was complete.

        Raises UserError when it is damaged.
        """
        record: Any = parse_json(self.files.read(_record_name(split, shard)), self.record_path(split, shard))
        try:
            numbers = [record["files"][name][key] for name in self.shard_files(split, shard) for key in Written._fields]
            norms = [record["norms"][hook][key] for hook in self.geometry.hooks for key in NORM_SUMS]
            is_sound = record["rows"] == self.geometry.shard_rows and {*map(type, numbers)} == {int}
            is_sound &= {*map(type, norms)} == {float} and len(record["files"]) == len(self.shard_files(split, shard))
        except (KeyError, TypeError, AttributeError):
            is_sound = False
        if not is_sound:
            raise damaged(self.record_path(split, shard), "damaged: it does not describe a shard")
        return record

    def records(self, split: str) -> list[dict[str, Any]]:
        """Those of all shards of a split that were written, in order."""
        return self._each(partial(self.record, split), sorted(self.recorded_shards(split)))

    def forget(self, split: str, shard: int) -> None:
        """Delete a shard's record, so that the shard does not count and is made anew."""
        self.files.delete(_record_name(split, shard))

    def recorded_shards(self, split: str) -> set[int]:
        """Shards that were wholly written, by a listing alone; some may be consumed since."""
        shards = _shards_by_file(self.geometry.shards(split))
        return {shards[name] for name in self.files.entries(f"{split}/shards") if name in shards}

    def complete_shards(self, split: str) -> set[int]:
        """Shards that are wholly written and still there, as sound records say."""
        return self._shards_where(split, consumed=False)

    def consumed_shards(self) -> set[int]:
        """Training shards that a stream has read and deleted."""
        return self._shards_where("train", consumed=True)

    def _shards_where(self, split: str, consumed: bool) -> set[int]:
        def fits(shard: int) -> bool:
            try:
                return self.record(split, shard).get("consumed", False) is consumed
            except UserError:
                return False

        shards = sorted(self.recorded_shards(split))
        return {shard for shard, found in zip(shards, self._each(fits, shards), strict=True) if found}

    def shard_files(self, split: str, shard: int) -> list[str]:
        """Names of the files with a shard's rows, in the order in which they are written."""
        return [array.file(shard) for array in self._arrays[split].values()]

    def consume(self, shard: int) -> None:
        """Note that a training shard was read, then delete its rows; done already, delete what a kill left of them."""
        record = self.record("train", shard)
        if not record.get("consumed"):
            self._write_record("train", shard, {**record, "consumed": True})
        self.files.delete(*self.shard_files("train", shard))
        for name in self.shard_files("train", shard):
            self._chunks.pop(name, None)

    def delete_unrecorded(self, split: str) -> None:
        """Delete rows of shards without a record, which a kill left; nobody may be writing."""
        recorded, there = self.recorded_shards(split), set(self.files.names(split))
        unrecorded = (shard for shard in range(self.geometry.shards(split)) if shard not in recorded)
        self.files.delete(*(name for shard in unrecorded for name in self.shard_files(split, shard) if name in there))

    def write_shard(self, split: str, shard: int, rows: ShardRows) -> None:
        """Write a shard's rows durably, then its record.

        Raises ValueError or TypeError for rows of another shape or type, OSError when the disk is full.
        """
        arrays = self._arrays[split]
        files = {}
        for name, values in self._as_stored(rows):
            file = arrays[name].file(shard)
            files[file] = array_files.write(self.files, arrays[name], shard, values)._asdict()
            self._chunks.pop(file, None)
        norms = {hook: _norm_sums(rows.norms[hook]) for hook in self.geometry.hooks}
        self._write_record(split, shard, {"rows": self.geometry.shard_rows, "files": files, "norms": norms})

    def _write_record(self, split: str, shard: int, record: dict[str, Any]) -> None:
        data = json_bytes(record)
        self.files.write(_record_name(split, shard), [data], len(data))

    def _as_stored(self, rows: ShardRows) -> Iterator[tuple[str, np.ndarray]]:
        """The values of each array of a split, one after another."""
        for hook in self.geometry.hooks:
            parts = as_stored(self.geometry.stored, rows.acts[hook])
            for name, part in zip(row_arrays(self.geometry.stored, self.geometry.d_in), parts, strict=True):
                yield f"{slug(hook)}/{name}", part
            yield f"{slug(hook)}/norm", rows.norms[hook]
        for name in PROVENANCE:
            yield f"row/{name}", getattr(rows, name)

    def check_complete(self, splits: Sequence[str] = SPLITS) -> None:
        """Raise UserError unless the metadata are whole and every shard has its record and files of recorded sizes."""
        for name in self.damaged_metadata():
            raise damaged(self.files.place(name), "damaged or missing")
        for split in splits:
            sizes = self.files.sizes(split)
            shards = [n for n in range(self.geometry.shards(split)) if _record_name(split, n) in sizes]
            records = self._each(partial(self._record_or_error, split), shards)
            if any(not isinstance(record, UserError) and record.get("consumed") for record in records):
                raise UserError(f"{self.path}: {CONSUMED}")
            if missing := sorted(set(range(self.geometry.shards(split))).difference(shards)):
                raise UserError(
                    f"{self.path}: incomplete: {len(missing)} of {self.geometry.shards(split)} {split} shards are "
                    f"missing, first {missing[0]}; {REDO}"
                )
            for record in records:
                if isinstance(record, UserError):
                    raise record
                self._check_sizes(record, sizes.get)

    def _record_or_error(self, split: str, shard: int) -> dict[str, Any] | UserError:
        try:
            return self.record(split, shard)
        except UserError as error:
            return error

    def _check_sizes(self, record: Mapping[str, Any], size_of: Callable[[str], int | None]) -> None:
        for name, file in record["files"].items():
            size, expected = size_of(name), file["bytes"]
            if size != expected:
                found = "missing" if size is None else f"{size:,} bytes"
                raise damaged(self.files.place(name), f"{found}, {expected:,} bytes expected")

    def verify_shard(self, split: str, shard: int) -> None:
        """Read every byte of a shard and raise UserError for the first that is not as it was written."""
        record = self.record(split, shard)
        self._check_sizes(record, self.files.size)
        for array in self._arrays[split].values():
            if array_files.verify(self.files, array, shard) != record["files"][array.file(shard)]["crc32c"]:
                raise self._changed(array, shard)
        norms = {hook: _norm_sums(self.read_norms(split, hook, shard)) for hook in self.geometry.hooks}
        if norms != record["norms"]:
            raise damaged(self.record_path(split, shard), "its sums of norms are not those of the shard")

    def _changed(self, array: StoredArray, shard: int) -> UserError:
        return damaged(self.files.place(array.file(shard)), "its bytes have changed since they were written (crc32c)")

    def read_chunk(self, split: str, hook: str, chunk: int) -> np.ndarray:
        """Rows of one chunk, bits of bfloat16, uint16 (chunk_rows, d_in), verified.

        Chunks count through the whole split. Raises UserError that names the file when its bytes are
        damaged or absent, or not those of this shard.
        """
        out = np.empty((self.geometry.chunk_rows, self.geometry.d_in), np.uint16)
        self._read_rows(split, hook, chunk, out)
        return out

    def read_chunks(self, split: str, hook: str, chunks: Sequence[int], out: np.ndarray) -> None:
        """Rows of chunks as `read_chunk` gives them, one chunk after another, into contiguous `out`, (rows, d_in)."""
        rows = self.geometry.chunk_rows
        places = range(len(chunks))
        self._each(lambda n: self._read_rows(split, hook, chunks[n], out[n * rows : (n + 1) * rows]), places)

    def visit_chunks(
        self, split: str, hook: str, chunks: Sequence[int], visit: Callable[[int, np.ndarray], None]
    ) -> None:
        """Call `visit(place, rows)` for the chunk at each place of `chunks`, several at once, in the threads that read.

        rows are as `read_chunk` gives them, in memory that the next chunk is read into: small enough to stay in the
        cache from the reading to the end of the visit.
        """

        def read(place: int) -> None:
            try:
                rows = self._visited.get_nowait()
            except Empty:
                rows = np.empty((self.geometry.chunk_rows, self.geometry.d_in), np.uint16)
            self._read_rows(split, hook, chunks[place], rows)
            visit(place, rows)
            self._visited.put(rows)

        self._each(read, range(len(chunks)))

    def _each(self, function: Callable[[int], Any], numbers: Iterable[int]) -> list[Any]:
        """Results of a function that reads, in order, several at once."""
        with ThreadPoolExecutor(self.files.readers, "store-reader") as readers:
            return list(readers.map(function, numbers))

    def _read_rows(self, split: str, hook: str, chunk: int, out: np.ndarray) -> None:
        g = self.geometry
        shard, inside = divmod(chunk, g.chunks_per_shard)
        arrays = [self._arrays[split][f"{slug(hook)}/{name}"] for name in row_arrays(g.stored, g.d_in)]
        parts = room(g.stored, out)
        for array, part in zip(arrays, parts, strict=True):
            self._read(array, split, shard, inside, part)
        from_stored(g.stored, parts, out)
        if (out[:, 0] == FILL).any():
            raise damaged(self.files.place(arrays[-1].file(shard)), "rows are missing from it")

    def read_norms(self, split: str, hook: str, shard: int) -> np.ndarray:
        """Norms of a shard's rows, float32 (shard_rows,)."""
        return self._read_shard(split, f"{slug(hook)}/norm", shard)

    def read_provenance(self, split: str, name: str, shard: int) -> np.ndarray:
        """`token_id`, `context` or `position` of a shard's rows, (shard_rows,)."""
        return self._read_shard(split, f"row/{name}", shard)

    def _read_shard(self, split: str, name: str, shard: int) -> np.ndarray:
        array = self._arrays[split][name]
        out = np.empty(array.chunk_shape, array.dtype)
        self._read(array, split, shard, 0, out)
        return out

    def _read(self, array: StoredArray, split: str, shard: int, chunk: int, out: np.ndarray) -> None:
        file = array.file(shard)
        if file not in self._chunks:
            chunks = array_files.find_chunks(self.files, array, shard)
            if google_crc32c.value(chunks.checksums) != self.record(split, shard)["files"][file]["crc32c"]:
                raise self._changed(array, shard)
            self._chunks[file] = chunks
        array_files.read(self.files, array, shard, chunk, self._chunks[file], out)


def _record_name(split: str, shard: int) -> str:
    return f"{split}/shards/{_record_file(shard)}"


def _record_file(shard: int) -> str:
    return f"{shard:05d}.json"


@cache
def _shards_by_file(shards: int) -> dict[str, int]:
    return {_record_file(shard): shard for shard in range(shards)}


def _norm_sums(norms: np.ndarray) -> dict[str, float]:
    norms = norms.astype(np.float64)
    return dict(zip(NORM_SUMS, map(float, (norms.mean(), norms.sum(), np.square(norms).sum())), strict=True))
