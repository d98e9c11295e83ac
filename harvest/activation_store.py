"""The activation store: a Zarr v3 group that any Zarr reader opens, written shard by shard, verified when read.

    zarr.json                                    attributes: schema, hooks, d_in, geometry, model, seed, numerics
    <split>/<hook>/acts   uint16 (rows, d_in)    bits of bfloat16; sharded, crc32c in every chunk
    <split>/<hook>/norm   float32 (rows,)        norms of the stored rows
    <split>/row/{token_id u4, context u4, position u2}   where each row comes from
    <split>/shards/00042.json                    written last: rows, bytes and checksum of each file, norm sums

zarr 3.1 refuses bfloat16, hence the bits. A missing chunk reads as fill value without an error, so the
shard records decide which shards exist, sizes are checked when a store is opened, crc32c on every read,
and the fill value, a NaN, is the last guard: harvest never writes one.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from harvest.files import UserError, fsync_path, read_json, write_json

SCHEMA = 1
FILL = 0x7FC0  # bfloat16 NaN
REDO = "`make verify` finds and marks what is bad, `make harvest` then redoes just that"
SPLITS: tuple[str, ...] = ("train", "holdout")
PROVENANCE = {"token_id": "uint32", "context": "uint32", "position": "uint16"}


class Geometry(NamedTuple):
    """Shapes of a store, fixed before the first row is written."""

    hooks: tuple[str, ...]
    d_in: int
    context_size: int  # tokens
    shard_contexts: int
    chunk_rows: int
    train_shards: int
    holdout_shards: int

    @property
    def shard_rows(self) -> int:
        return self.shard_contexts * self.context_size

    @property
    def chunks_per_shard(self) -> int:
        return self.shard_rows // self.chunk_rows

    def shards(self, split: str) -> int:
        return self.train_shards if split == "train" else self.holdout_shards


class ShardRows(NamedTuple):
    """All rows of one shard in the order they are stored."""

    acts: Mapping[str, np.ndarray]  # hook -> uint16 (rows, d_in)
    norms: Mapping[str, np.ndarray]  # hook -> float32 (rows,)
    token_id: np.ndarray
    context: np.ndarray  # number of the context within the split
    position: np.ndarray  # position within the context


def slug(hook: str) -> str:
    """Folder name of a hook: its letters, digits, dots and dashes; never one that leaves its folder."""
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in hook).strip(".")
    if not name or name.startswith("__") or name in ("row", "shards") or len(name) > 200:
        raise UserError(f"harvest.hooks: {hook!r} cannot be a folder's name")
    return name


class ActivationStore:
    """A store on disk. `create` makes or checks its metadata, `open` finds it; shards come and go by number."""

    def __init__(self, path: Path, geometry: Geometry, attributes: Mapping[str, Any]) -> None:
        self.path, self.geometry, self.attributes = path, geometry, attributes
        self._root = zarr.open_group(str(path), mode="r+" if os.access(path, os.W_OK) else "r")
        self._arrays: dict[str, zarr.Array] = {}

    @classmethod
    def create(cls, path: Path, geometry: Geometry, attributes: Mapping[str, Any]) -> "ActivationStore":
        """Write the metadata of a new store, or find the equal one that is there.

        Raises UserError when the folder holds a store of another shape.
        """
        described = {"schema": SCHEMA, "logical_dtype": "bfloat16", **geometry._asdict(), **attributes}
        described["hooks"] = list(geometry.hooks)
        if (path / "created.json").exists():
            store = cls.open(path)
            if dict(store.attributes) != described:
                raise UserError(f"{path}: holds a store of another shape or model; delete it or use another --runs")
            return store
        root = zarr.open_group(str(path), mode="w", attributes=described)
        for split in SPLITS:
            rows = geometry.shards(split) * geometry.shard_rows
            group = root.create_group(split)
            one_chunk: dict[str, Any] = {
                "shape": (rows,),
                "chunks": (geometry.shard_rows,),
                "compressors": [Crc32cCodec()],
                "config": {"write_empty_chunks": True},
            }
            for hook in geometry.hooks:
                hook_group = group.create_group(slug(hook))
                hook_group.create_array(
                    "acts",
                    shape=(rows, geometry.d_in),
                    shards=(geometry.shard_rows, geometry.d_in),
                    chunks=(geometry.chunk_rows, geometry.d_in),
                    dtype="uint16",
                    fill_value=FILL,
                    compressors=[Crc32cCodec()],
                    config={"write_empty_chunks": True},
                )
                hook_group.create_array("norm", dtype="float32", fill_value=float("nan"), **one_chunk)
            row_group = group.create_group("row")
            for name, dtype in PROVENANCE.items():
                row_group.create_array(name, dtype=dtype, **one_chunk)
            (path / split / "shards").mkdir()
        write_json(path / "created.json", {"schema": SCHEMA})
        return cls(path, geometry, described)

    @classmethod
    def open(cls, path: Path) -> "ActivationStore":
        """A store whose metadata is complete.

        Raises UserError when there is none, or it is of a newer schema.
        """
        if not (path / "created.json").exists():
            raise UserError(f"{path}: no activation store there, or one that was never begun properly")
        attributes = read_json(path / "zarr.json").get("attributes", {})
        if attributes.get("schema") != SCHEMA:
            raise UserError(f"{path}: store of schema {attributes.get('schema')}; this code reads {SCHEMA}")
        try:
            values = {name: attributes[name] for name in Geometry._fields}
            geometry = Geometry(**{**values, "hooks": tuple(values["hooks"])})
        except (KeyError, TypeError):
            raise UserError(f"{path / 'zarr.json'}: its attributes do not describe a store; it was damaged") from None
        return cls(path, geometry, attributes)

    def _array(self, name: str) -> zarr.Array:
        if name not in self._arrays:
            # Not kept in zarr.json: without it, a chunk of fill values alone would not be written.
            self._arrays[name] = cast(zarr.Array, self._root[name]).with_config({"write_empty_chunks": True})
        return self._arrays[name]

    def _files(self, split: str, shard: int) -> list[str]:
        g = self.geometry
        acts = [f"{split}/{slug(hook)}/acts/c/{shard}/0" for hook in g.hooks]
        norms = [f"{split}/{slug(hook)}/norm/c/{shard}" for hook in g.hooks]
        return [*acts, *norms, *(f"{split}/row/{name}/c/{shard}" for name in PROVENANCE)]

    def record_path(self, split: str, shard: int) -> Path:
        return self.path / split / "shards" / f"{shard:05d}.json"

    def record(self, split: str, shard: int) -> dict[str, Any]:
        """What was written about a shard when it was complete."""
        return read_json(self.record_path(split, shard))

    def complete_shards(self, split: str) -> set[int]:
        """Shards that are wholly written."""
        names = {p.name for p in (self.path / split / "shards").glob("[0-9]*.json")}
        return {s for s in range(self.geometry.shards(split)) if f"{s:05d}.json" in names}

    def write_shard(self, split: str, shard: int, rows: ShardRows) -> None:
        """Write a shard's rows durably, then its record."""
        g = self.geometry
        where = slice(shard * g.shard_rows, (shard + 1) * g.shard_rows)
        norm_sums = {}
        for hook in g.hooks:
            self._array(f"{split}/{slug(hook)}/acts")[where] = rows.acts[hook]
            self._array(f"{split}/{slug(hook)}/norm")[where] = rows.norms[hook]
            norms = rows.norms[hook].astype(np.float64)
            norm_sums[hook] = {
                "mean_norm": float(norms.mean()),
                "sum": float(norms.sum()),
                "sum_of_squares": float(np.square(norms).sum()),
            }
        for name in PROVENANCE:
            self._array(f"{split}/row/{name}")[where] = getattr(rows, name)
        files = {}
        for name in self._files(split, shard):
            path = self.path / name
            fsync_path(path)
            fsync_path(path.parent)
            files[name] = {
                "bytes": path.stat().st_size,
                "crc32c": self._checked_crc32c(name, path.read_bytes()),
            }
        write_json(self.record_path(split, shard), {"rows": g.shard_rows, "files": files, "norms": norm_sums})

    def check_complete(self, splits: Sequence[str] = SPLITS) -> None:
        """Raise UserError unless every shard has its record and files of the recorded sizes."""
        for split in splits:
            missing = sorted(set(range(self.geometry.shards(split))) - self.complete_shards(split))
            if missing:
                raise UserError(
                    f"{self.path}: incomplete: {len(missing)} of {self.geometry.shards(split)} {split} shards are "
                    f"missing, first {missing[0]}; {REDO}"
                )
            for shard in range(self.geometry.shards(split)):
                self._check_sizes(split, shard)

    def _check_sizes(self, split: str, shard: int) -> dict[str, Any]:
        record = self.record(split, shard)
        expected = record.get("files")
        names = self._files(split, shard)
        if not isinstance(expected, dict) or sorted(expected) != sorted(names):
            raise UserError(f"{self.record_path(split, shard)}: damaged: it does not list the shard's files")
        for name in names:
            path = self.path / name
            size = path.stat().st_size if path.exists() else None
            if size != expected[name].get("bytes"):
                found = "missing" if size is None else f"{size:,} bytes"
                raise UserError(f"{path}: {found}, {expected[name].get('bytes'):,} bytes expected; {REDO}")
        return record

    def sweep(self) -> None:
        """Remove what killed writers left half written; only under the harvest's lock."""
        for path in self.path.rglob("*.partial"):
            path.unlink()

    def verify_shard(self, split: str, shard: int) -> None:
        """Read every byte of a shard and raise UserError for the first that is not as it was written."""
        record = self._check_sizes(split, shard)
        for name, expected in record["files"].items():
            if self._checked_crc32c(name, (self.path / name).read_bytes()) != expected["crc32c"]:
                raise UserError(f"{self.path / name}: its bytes have changed since they were written (crc32c); {REDO}")

    def _checked_crc32c(self, name: str, data: bytes) -> int | None:
        """crc32c of the crc32c's of a file's chunks; None when a chunk does not match its own.

        Not of the file's bytes: data followed by its crc32c has one and the same crc32c, whatever the
        data, so two shards could trade places unseen.
        """
        if "/acts/" in name:
            index = data[-(16 * self.geometry.chunks_per_shard + 4) :]
            if google_crc32c.value(index[:-4]).to_bytes(4, "little") != index[-4:]:
                return None
            chunks = [
                data[start : start + size] for start, size in np.frombuffer(index[:-4], "<u8").reshape(-1, 2).tolist()
            ]
        else:
            chunks = [data]
        if any(google_crc32c.value(chunk[:-4]).to_bytes(4, "little") != chunk[-4:] for chunk in chunks):
            return None
        return google_crc32c.value(b"".join(chunk[-4:] for chunk in chunks))

    def read_chunk(self, split: str, hook: str, chunk: int) -> np.ndarray:
        """Rows of one chunk, uint16 (chunk_rows, d_in), verified; chunks count through the whole split.

        Raises UserError that names the file when its bytes are damaged or absent.
        """
        g = self.geometry
        where = slice(chunk * g.chunk_rows, (chunk + 1) * g.chunk_rows)
        rows = self._read(f"{split}/{slug(hook)}/acts", where, f"c/{chunk // g.chunks_per_shard}/0")
        if (rows[:, 0] == FILL).any():
            file = self.path / split / slug(hook) / "acts" / f"c/{chunk // g.chunks_per_shard}/0"
            raise UserError(f"{file}: rows are missing from it; {REDO}")
        return rows

    def read_norms(self, split: str, hook: str, shard: int) -> np.ndarray:
        """Norms of a shard's stored rows, float32 (shard_rows,)."""
        return self._read_shard(f"{split}/{slug(hook)}/norm", shard)

    def read_provenance(self, split: str, name: str, shard: int) -> np.ndarray:
        """`token_id`, `context` or `position` of a shard's rows, (shard_rows,)."""
        return self._read_shard(f"{split}/row/{name}", shard)

    def _read_shard(self, name: str, shard: int) -> np.ndarray:
        rows = self.geometry.shard_rows
        file = self.path / name / f"c/{shard}"
        if not file.exists():
            raise UserError(f"{file}: missing; {REDO}")
        return self._read(name, slice(shard * rows, (shard + 1) * rows), f"c/{shard}")

    def _read(self, name: str, where: slice, key: str) -> np.ndarray:
        try:
            return np.asarray(self._array(name)[where])
        except (ValueError, OSError, RuntimeError) as error:
            raise UserError(f"{self.path / name / key}: damaged ({error}); {REDO}") from None
