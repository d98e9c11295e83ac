"""The files of a store that hold no rows: Zarr's metadata, and created.json, written after all of it.

They are a pure function of geometry and attributes. So what is damaged is found by comparison and written anew, and a
shard is never judged by a damaged shape.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import zarr
from zarr.abc.buffer import Buffer
from zarr.buffer import cpu
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

from harvest.array_files import ALL_CHUNKS, StoredArray
from harvest.direct_io import REDO
from harvest.files import UnreachableError, UserError, json_bytes
from harvest.store_files import Files, read_store_json
from harvest.store_layout import SPLITS, Geometry
from harvest.stored_forms import FORMS

SCHEMA = 1
ROOT, CREATED = "zarr.json", "created.json"
CREATED_FILE = {CREATED: json_bytes({"schema": SCHEMA})}


class DamagedError(UserError):
    """Metadata that describe no store."""


def describe(geometry: Geometry, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a store's root group."""
    described = {"schema": SCHEMA, "logical_dtype": "bfloat16", **geometry._asdict(), **attributes}
    described["hooks"] = list(geometry.hooks)
    if geometry.stored == FORMS[0]:
        del described["stored"]  # as in the stores that were made before there were other forms
    return described


def metadata_files(arrays: Iterable[StoredArray], attributes: Mapping[str, Any]) -> dict[str, bytes]:
    """Every such file of a store by name, in the order in which they are written."""
    metadata: dict[str, Buffer] = {}  # zarr would write a parent's file twice, which not every bucket can undo
    groups = {"": zarr.open_group(MemoryStore(metadata), mode="w", attributes=dict(attributes))}
    for array in arrays:
        *parents, name = array.name.split("/")
        for depth, parent in enumerate(parents):
            above, here = "/".join(parents[:depth]), "/".join(parents[: depth + 1])
            if here not in groups:
                groups[here] = groups[above].create_group(parent)
        one, compressor = array.columns is None, BloscCodec(cname="zstd", shuffle="shuffle")
        groups["/".join(parents)].create_array(
            name,
            shape=(array.rows, *array.chunk_shape[1:]),
            shards=None if one else (array.shard_rows, *array.chunk_shape[1:]),
            chunks=array.chunk_shape,
            dtype=array.dtype,
            fill_value=array.fill,
            compressors=[compressor, Crc32cCodec()] if array.compressed else [Crc32cCodec()],
            config=ALL_CHUNKS,
        )
    return {name: content.to_bytes() for name, content in metadata.items()} | CREATED_FILE


def read_geometry(files: Files) -> tuple[Geometry, dict[str, Any]]:
    """Shape and attributes of a store, as its root group has them.

    Raises DamagedError where it does not describe a store, UserError when there is none, or one of another schema.
    """
    if files.size(CREATED) is None:
        if is_begun(files):
            raise DamagedError(f"{files.place(CREATED)}: missing; {REDO}")
        raise UserError(f"{files.place()}: no activation store there, or one that was never begun properly")
    damaged = DamagedError(f"{files.place(ROOT)}: its attributes do not describe a store; it was damaged. {REDO}")
    try:
        attributes = read_store_json(files, ROOT).get("attributes")
    except UnreachableError:
        raise
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
    least = {name: 0 if name.endswith("_shards") else 1 for name in shape}
    if not all(type(shape[name]) is int and shape[name] >= least[name] for name in shape):
        raise damaged
    if not isinstance(hooks, list) or not hooks or not all(isinstance(hook, str) for hook in hooks):
        raise damaged
    geometry = Geometry(**shape, hooks=tuple(hooks), stored=stored)
    if geometry.shard_rows % geometry.chunk_rows:
        raise damaged
    return geometry, attributes


def is_begun(files: Files) -> bool:
    """Whether a place holds a store, if only what is left of a damaged one: shards are not deleted for that."""
    return files.size(CREATED) is not None or any(files.names(f"{split}/shards") for split in SPLITS)


def damaged_files(files: Files, expected: Mapping[str, bytes]) -> list[str]:
    """Those that are missing or do not say what is expected; other spellings of the same are right."""
    return [name for name, content in expected.items() if not _is_there(files, name, content)]


def check_same(files: Files, described: Mapping[str, Any], damaged: Iterable[str]) -> None:
    """Raise UserError for a store of another shape or model than `described`, rather than a damaged one.

    Arrays pin the shape. So where all but the root group are those of this shape, a root group of another is damaged.
    """
    try:
        found = read_store_json(files, ROOT)["attributes"]
        differ = {key for key in {*found, *described} if found.get(key) != described.get(key)}
    except (UserError, KeyError, TypeError, AttributeError):
        return
    if differ and (not differ <= {*Geometry._fields} or set(damaged) - {ROOT, CREATED}):
        raise UserError(
            f"{files.place()}: holds a store of another shape or model ({', '.join(sorted(differ))}); delete it or use "
            f"another --runs. If its {ROOT} alone was damaged, delete that file, and the harvest writes it anew"
        )


def _is_there(files: Files, name: str, expected: bytes) -> bool:
    if files.size(name) is None:
        return False
    try:
        found = files.read(name)
    except UnreachableError:
        raise
    except UserError:
        return False
    if found == expected or name == CREATED:
        return found == expected
    try:
        return _parsed(found) == _parsed(expected)  # another release of zarr may write it in other words
    except Exception:  # whatever zarr raises for what is no metadata of its own
        return False


def _parsed(content: bytes) -> str:
    metadata = zarr.open(MemoryStore({ROOT: cpu.Buffer.from_bytes(content)}), mode="r").metadata
    return json.dumps(metadata.to_dict(), sort_keys=True, default=str)  # as text, a NaN is itself
