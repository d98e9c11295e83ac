"""Shape of a store: splits, hooks, shards and chunks, and all that follows from them.

The files without rows (Zarr's metadata, created.json) are a pure function of geometry and attributes, so a harvest
writes them at every start, and `verify` finds damage by comparison before it judges a shard by a damaged shape.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from harvest.array_files import StoredArray
from harvest.files import UserError, json_bytes, parse_json
from harvest.store_files import REDO, Files
from harvest.stored_forms import FORMS, row_arrays

SCHEMA = 1
ROOT, CREATED = "zarr.json", "created.json"
SPLITS: tuple[str, ...] = ("train", "holdout")
PROVENANCE = {"token_id": "uint32", "context": "uint32", "position": "uint16"}


class DamagedError(UserError):
    """Metadata that describe no store."""


class Geometry(NamedTuple):
    """Shapes of a store, fixed before the first row is written."""

    hooks: tuple[str, ...]
    d_in: int
    context_size: int  # tokens
    shard_contexts: int
    chunk_rows: int
    train_shards: int
    holdout_shards: int
    stored: str = "bf16"  # form of the rows (harvest/stored_forms.py)

    @property
    def shard_rows(self) -> int:
        """Rows of a shard."""
        return self.shard_contexts * self.context_size

    @property
    def chunks_per_shard(self) -> int:
        """Chunks of a shard."""
        return self.shard_rows // self.chunk_rows

    def shards(self, split: str) -> int:
        """Shards of a split, "train" or "holdout"."""
        return self.train_shards if split == "train" else self.holdout_shards


def slug(hook: str) -> str:
    """Folder name of a hook: its letters, digits, dots and dashes; never one that leaves its folder.

    Raises UserError for a hook of which no name is left, or one that the store needs itself.
    """
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in hook).strip(".")
    if not name or name.startswith("__") or name in ("row", "shards") or len(name) > 200:
        raise UserError(f"harvest.hooks: {hook!r} cannot be a folder's name")
    return name


def stored_arrays(g: Geometry, split: str) -> dict[str, StoredArray]:
    """All arrays of a split by their path in it, in the order in which a shard's files are written.

    Raises UserError for hooks that would share a folder.
    """
    rows = g.shards(split) * g.shard_rows
    out = {}

    def add(name: str, dtype: str, fill: float) -> None:
        out[name] = StoredArray(f"{split}/{name}", dtype, fill, rows, None, g.shard_rows, g.shard_rows)

    for hook in g.hooks:
        for name, form in row_arrays(g.stored, g.d_in).items():
            path = f"{slug(hook)}/{name}"
            if path in out:
                raise UserError(f"harvest.hooks: {hook!r}: another hook has the same folder, {slug(hook)}")
            shape = rows, form.columns, g.shard_rows, g.chunk_rows
            out[path] = StoredArray(f"{split}/{path}", form.dtype, form.fill, *shape, form.compressed)
        add(f"{slug(hook)}/norm", "float32", float("nan"))
    for name, dtype in PROVENANCE.items():
        add(f"row/{name}", dtype, 0)
    return out


def describe(geometry: Geometry, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a store's root group."""
    described = {"schema": SCHEMA, "logical_dtype": "bfloat16", **geometry._asdict(), **attributes}
    described["hooks"] = list(geometry.hooks)
    if geometry.stored == FORMS[0]:
        del described["stored"]  # as in the stores that were made before there were other forms
    return described


def metadata_files(arrays: Iterable[StoredArray], attributes: Mapping[str, Any]) -> dict[str, bytes]:
    """The files without rows by name; created.json comes last."""
    import zarr
    from zarr.abc.buffer import Buffer
    from zarr.codecs import BloscCodec, Crc32cCodec
    from zarr.storage import MemoryStore

    metadata: dict[str, Buffer] = {}
    root = zarr.open_group(MemoryStore(metadata), mode="w", attributes=dict(attributes))
    for array in arrays:
        compressor = [BloscCodec(cname="zstd", shuffle="shuffle")] if array.compressed else []
        root.create_array(
            array.name,
            shape=(array.rows, *array.chunk_shape[1:]),
            shards=None if array.columns is None else (array.shard_rows, array.columns),
            chunks=array.chunk_shape,
            dtype=array.dtype,
            fill_value=array.fill,
            compressors=[*compressor, Crc32cCodec()],
        )
    return {name: content.to_bytes() for name, content in metadata.items()} | {CREATED: json_bytes({"schema": SCHEMA})}


def is_same_metadata(name: str, found: bytes, expected: bytes) -> bool:
    """Whether a file without rows says what is expected; another release of zarr may say it in other words."""
    if found == expected or name == CREATED:
        return found == expected
    try:
        return _parsed(found) == _parsed(expected)
    except Exception:  # whatever zarr raises for what is no metadata of its own
        return False


def _parsed(content: bytes) -> str:
    import zarr
    from zarr.buffer import cpu
    from zarr.storage import MemoryStore

    metadata = zarr.open(MemoryStore({ROOT: cpu.Buffer.from_bytes(content)}), mode="r").metadata
    return json.dumps(metadata.to_dict(), sort_keys=True, default=str)  # as text, a NaN is itself


def read_geometry(files: Files) -> tuple[Geometry, dict[str, Any]]:
    """Shape and attributes of a store, as its root group has them.

    Raises DamagedError where it does not describe a store, UserError when there is none, or one of another schema.
    """
    if files.size(CREATED) is None:
        if any(files.entries(f"{split}/shards") for split in SPLITS):
            raise DamagedError(f"{files.place(CREATED)}: missing; {REDO}")
        raise UserError(f"{files.place()}: no activation store there")
    damaged = DamagedError(f"{files.place(ROOT)}: its attributes do not describe a store; it was damaged. {REDO}")
    try:
        attributes = parse_json(files.read(ROOT), files.place(ROOT)).get("attributes")
    except UserError as error:
        raise DamagedError(str(error)) from None
    if not isinstance(attributes, dict):
        raise damaged
    if attributes.get("schema") != SCHEMA:
        raise UserError(f"{files.place()}: store of schema {attributes.get('schema')}; this code reads {SCHEMA}")
    stored, hooks = attributes.get("stored", FORMS[0]), attributes.get("hooks")
    if stored not in FORMS:
        raise UserError(f"{files.place()}: its rows are stored as {stored!r}; this code reads {', '.join(FORMS)}")
    shape: dict[str, Any] = {name: attributes.get(name) for name in Geometry._fields if name not in ("hooks", "stored")}
    if not all(type(n) is int and n >= (0 if name.endswith("_shards") else 1) for name, n in shape.items()):
        raise damaged
    if not isinstance(hooks, list) or not hooks or not all(isinstance(hook, str) for hook in hooks):
        raise damaged
    geometry = Geometry(**shape, hooks=tuple(hooks), stored=stored)
    if geometry.shard_rows % geometry.chunk_rows:
        raise damaged
    return geometry, attributes
