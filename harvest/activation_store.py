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

Training beside the harvest deletes shards that it has read (harvest/stream.py), from the first one on: their
records stay, with `consumed`, so that they are done for the harvest and absent for who reads.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from harvest.array_files import ArrayFiles, StoredArray
from harvest.direct_io import CRC_BYTES, REDO, damaged
from harvest.files import UnreachableError, UserError
from harvest.store_files import Files, local_or, read_store_json, write_store_json
from harvest.store_layout import PROVENANCE, SPLITS, Geometry, slug, stored_arrays
from harvest.store_metadata import ROOT, check_same, damaged_files, describe, is_begun, metadata_files, read_geometry
from harvest.stored_forms import FILL, as_stored, from_stored, room, row_arrays

CONSUMED = (
    "training beside the harvest (`make stream`) has read its training rows and deleted them, so nothing else can "
    "train on them; `python -m pipeline harvest --force` makes the whole store"
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

    `create` makes or checks its metadata, `open` finds it; shards come and go by number.
    """

    def __init__(
        self, place: Path | Files, geometry: Geometry, attributes: Mapping[str, Any], direct: bool = True
    ) -> None:
        """`direct=False` reads and writes every file with the zarr API: the plain twin."""
        self.geometry, self.attributes = geometry, attributes
        self.files = local_or(place)
        self.path = self.files.place()  # or its URL
        self._array_files = ArrayFiles(self.files, direct)
        self._arrays = {split: stored_arrays(geometry, split) for split in SPLITS}
        self._checksums: dict[str, bytes] = {}  # of files that were found to be those of the records
        self._visited: SimpleQueue[np.ndarray] = SimpleQueue()  # memory of chunks, to be read into again
        self._consumed = 0  # training shards that were found to be consumed; there may be more by now

    @classmethod
    def create(
        cls, place: Path | Files, geometry: Geometry, attributes: Mapping[str, Any], direct: bool = True
    ) -> "ActivationStore":
        """Write the metadata of a new store, or find the equal one that is there and write anew what is damaged of it.

        Raises UserError when the folder holds a store of another shape.
        """
        store = cls(place, geometry, describe(geometry, attributes), direct)
        expected = store._metadata()
        if is_begun(store.files):
            damaged = damaged_files(store.files, expected)
            check_same(store.files, store.attributes, damaged)
        else:
            store.files.delete_all()
            damaged = list(expected)
        for name in damaged:
            store.files.write(name, expected[name])
        return store

    def _metadata(self) -> dict[str, bytes]:
        return metadata_files([array for split in SPLITS for array in self._arrays[split].values()], self.attributes)

    def damaged_metadata(self, there: Iterable[str] = ()) -> list[str]:
        """Names of the files without rows that are missing, or do not fit this store's geometry and attributes.

        Or have no place in it, of the names of files that are `there`.
        """
        expected = self._metadata()
        strange = [name for name in there if name.split("/")[-1] == ROOT and name not in expected]
        return damaged_files(self.files, expected) + strange

    @classmethod
    def open(cls, place: Path | Files, direct: bool = True) -> "ActivationStore":
        """A store whose metadata is complete.

        Raises UserError when there is none, or its root group does not describe one that this code reads.
        """
        files = local_or(place)
        return cls(files, *read_geometry(files), direct)

    def record_path(self, split: str, shard: int) -> Path | str:
        """Place of a shard's record: path or URL."""
        return self.files.place(_record_name(split, shard))

    def record(self, split: str, shard: int) -> dict[str, Any]:
        """What was written about a shard when it was complete.

        Raises UserError when it is damaged.
        """
        record = read_store_json(self.files, _record_name(split, shard))
        files, norms = record.get("files"), record.get("norms")
        figures = [norms.get(hook) for hook in self.geometry.hooks] if isinstance(norms, dict) else [None]
        if (
            not isinstance(files, dict)
            or not all(_has(file, ("bytes", "crc32c"), int) for file in files.values())
            or record.get("rows") != self.geometry.shard_rows
            or not all(_has(norm, ("mean_norm", "sum", "sum_of_squares"), float) for norm in figures)
        ):
            raise damaged(self.record_path(split, shard), "damaged: it does not describe a shard")
        return record

    def records(self, split: str) -> list[dict[str, Any]]:
        """Those of all shards of a split that were written, in order."""
        with ThreadPoolExecutor(self.files.readers, "store-reader") as readers:
            return list(readers.map(partial(self.record, split), sorted(self.recorded_shards(split))))

    def is_recorded(self, split: str, shard: int) -> bool:
        """Whether a shard was wholly written; it may be consumed since."""
        return self.files.size(_record_name(split, shard)) is not None

    def forget(self, split: str, shard: int) -> None:
        """Delete a shard's record, so that the shard does not count and is made anew."""
        self.files.delete(_record_name(split, shard))

    def recorded_shards(self, split: str) -> set[int]:
        """Shards that were wholly written; some may be consumed since."""
        names = set(self.files.names(f"{split}/shards"))
        return {s for s in range(self.geometry.shards(split)) if _record_name(split, s) in names}

    def complete_shards(self, split: str) -> set[int]:
        """Shards that are wholly written and still there."""
        recorded = self.recorded_shards(split)
        if split != "train" or not self.consumed():
            return recorded
        return {
            shard for shard in recorded if shard >= self._consumed and not self.record(split, shard).get("consumed")
        }

    def consumed(self) -> int:
        """Training shards, from the first on, that were read and deleted."""
        while self._consumed < self.geometry.train_shards and self.is_recorded("train", self._consumed):
            if not self.record("train", self._consumed).get("consumed"):
                break
            self._consumed += 1
        return self._consumed

    def is_consumed(self, split: str, shard: int) -> bool:
        """Whether a shard was read and deleted, as its record says; not where that cannot be read."""
        if not self.is_recorded(split, shard):
            return False
        try:
            return bool(self.record(split, shard).get("consumed"))
        except UnreachableError:
            raise
        except UserError:
            return False

    def shard_files(self, split: str, shard: int) -> list[str]:
        """Names of the files with a shard's rows, in the order in which they are written, and deleted."""
        return [array.file(shard) for array in self._arrays[split].values()]

    def consume(self, shard: int) -> None:
        """Note that a training shard was read, then delete its rows; done already, look for leftovers of a kill."""
        record = self.record("train", shard)
        if not record.get("consumed"):
            write_store_json(self.files, _record_name("train", shard), {**record, "consumed": True})
        for name in self.shard_files("train", shard):
            self.files.delete(name)

    def write_shard(self, split: str, shard: int, rows: ShardRows) -> None:
        """Write a shard's rows durably, then its record.

        Raises ValueError or TypeError for rows of another shape or type, OSError when the disk is full.
        """
        arrays = self._arrays[split]
        files = {}
        for name, values in self._as_stored(rows):
            written = self._array_files.write(arrays[name], shard, values)
            files[arrays[name].file(shard)] = written._asdict()
            self._checksums.pop(arrays[name].file(shard), None)
        norms = {hook: _norm_sums(rows.norms[hook]) for hook in self.geometry.hooks}
        record = {"rows": self.geometry.shard_rows, "files": files, "norms": norms}
        write_store_json(self.files, _record_name(split, shard), record)

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
        if "train" in splits and self.consumed():
            raise UserError(f"{self.path}: {CONSUMED}")
        for split in splits:
            missing = sorted(set(range(self.geometry.shards(split))) - self.recorded_shards(split))
            if missing:
                raise UserError(
                    f"{self.path}: incomplete: {len(missing)} of {self.geometry.shards(split)} {split} shards are "
                    f"missing, first {missing[0]}; {REDO}"
                )
            with ThreadPoolExecutor(self.files.readers, "store-reader") as readers:
                for _ in readers.map(partial(self._check_sizes, split), range(self.geometry.shards(split))):
                    pass

    def _recorded(self, split: str, shard: int) -> dict[str, dict[str, int]]:
        """Bytes and crc32c of each file of a shard by path, from its record."""
        recorded = self.record(split, shard)["files"]
        wanted = sorted(array.file(shard) for array in self._arrays[split].values())
        if sorted(recorded) != wanted:
            raise UserError(f"{self.record_path(split, shard)}: damaged: it does not list the shard's files")
        return recorded

    def _check_sizes(self, split: str, shard: int) -> None:
        recorded = self._recorded(split, shard)
        for array in self._arrays[split].values():
            size, expected = self._array_files.size(array, shard), recorded[array.file(shard)]["bytes"]
            if size != expected:
                found = "missing" if size is None else f"{size:,} bytes"
                raise damaged(self.files.place(array.file(shard)), f"{found}, {expected:,} bytes expected")

    def sweep(self, is_abandoned: Callable[[Path], bool]) -> None:
        """Remove what killed writers left half written."""
        self.files.sweep(is_abandoned)

    def verify_shard(self, split: str, shard: int) -> None:
        """Read every byte of a shard and raise UserError for the first that is not as it was written."""
        self._check_sizes(split, shard)
        recorded = self._recorded(split, shard)
        for array in self._arrays[split].values():
            if self._array_files.verify(array, shard) != recorded[array.file(shard)]["crc32c"]:
                raise self._changed(array, shard)
        norms = {hook: _norm_sums(self.read_norms(split, hook, shard)) for hook in self.geometry.hooks}
        if norms != self.record(split, shard).get("norms"):
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
        places = [out[place * rows : (place + 1) * rows] for place in range(len(chunks))]
        with ThreadPoolExecutor(self.files.readers, "store-reader") as readers:
            for _ in readers.map(partial(self._read_rows, split, hook), chunks, places):
                pass

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

        with ThreadPoolExecutor(self.files.readers, "store-reader") as readers:
            for _ in readers.map(read, range(len(chunks))):
                pass

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
        if file not in self._checksums:
            checksums = self._array_files.checksums(array, shard)
            if google_crc32c.value(checksums) != self._recorded(split, shard)[file]["crc32c"]:
                raise self._changed(array, shard)
            self._checksums[file] = checksums
        checksum = self._checksums[file][CRC_BYTES * chunk : CRC_BYTES * (chunk + 1)]
        self._array_files.read(array, shard, chunk, checksum, out)


def _has(value: Any, names: Sequence[str], kind: type) -> bool:
    """Whether a value of a record is an object that has numbers of a kind under these names."""
    return isinstance(value, dict) and all(type(value.get(name)) is kind for name in names)


def _record_name(split: str, shard: int) -> str:
    return f"{split}/shards/{shard:05d}.json"


def _norm_sums(norms: np.ndarray) -> dict[str, float]:
    norms = norms.astype(np.float64)
    return {
        "mean_norm": float(norms.mean()),
        "sum": float(norms.sum()),
        "sum_of_squares": float(np.square(norms).sum()),
    }
