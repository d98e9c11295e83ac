"""The files of a store's rows and of contexts, looked at without zarr and torch: which are missing or not whole.

Each is vouched for by a file that the stage's manifest lists: rows by their shard's record, chunks of contexts by
checksums.json.
"""

import json
import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import google_crc32c

from harvest.files import UserError, read_json

SPLITS = ("train", "holdout")
MANY = 1000  # shards; of more, the sizes of their files are left to `make verify`
CRC_BYTES = 4  # at the end of a chunk of contexts
ITEM_BYTES = {"uint32": 4, "uint16": 2, "uint8": 1}
OF_CONTEXTS = ("source", "stratum")  # arrays with one value a context; those of tokens have two axes


def missing_rows(directory: Path) -> list[str]:
    """Files of a harvest's recorded shards that are not there or of another size, relative to its directory.

    A stream's are left out, as it deletes them; a store in a bucket has none here.
    """
    store = directory / "store"
    if (directory / "stream.json").exists():
        return []
    return [f"store/{name}" for split in SPLITS for name in _missing_rows(store, split)]


def _missing_rows(store: Path, split: str) -> Iterator[str]:
    folder = store / split / "shards"
    records = sorted(folder.iterdir()) if folder.is_dir() else []
    if len(records) > MANY:
        for chunks in (store / split).glob("*/*/c"):
            there = set(os.listdir(chunks))
            shards = (str(int(record.stem)) for record in records if record.stem.isdigit())
            yield from (f"{chunks.relative_to(store)}/{shard}" for shard in shards if shard not in there)
        return
    for record in records:
        try:
            files: Any = read_json(record).get("files")
        except UserError:
            continue  # the manifest says so
        for name, file in files.items() if isinstance(files, dict) else ():
            path = store / name
            if not path.is_file() or path.stat().st_size != file.get("bytes"):
                yield name


def missing_chunks(directory: Path) -> list[str]:
    """Chunks of a sample's contexts that are not there or of another size, relative to its directory."""
    out = []
    for array, sums in _checksums(directory).items():
        size = _chunk_bytes(directory / "contexts" / array / "zarr.json")
        for name in _chunk_names(array, len(sums)):
            path = directory / name
            if not path.is_file() or size not in (None, path.stat().st_size):
                out.append(name)
    return out


def damaged_chunks(directory: Path) -> list[str]:
    """Chunks of a sample's contexts whose bytes are not those that were written, relative to its directory."""
    out = []
    for array, sums in _checksums(directory).items():
        for name, recorded in zip(_chunk_names(array, len(sums)), sums, strict=True):
            path = directory / name
            data = path.read_bytes() if path.is_file() else b""
            found = int.from_bytes(data[-CRC_BYTES:], "little")
            if found != recorded or google_crc32c.value(data[:-CRC_BYTES]) != recorded:
                out.append(name)
    return out


def _checksums(directory: Path) -> dict[str, list[int]]:
    """By array; empty where they are damaged, which the manifest says, or of an earlier version."""
    try:
        return read_json(directory / "checksums.json")
    except UserError:
        return {}


def _chunk_names(array: str, count: int) -> list[str]:
    inner = "" if array.split("/")[-1] in OF_CONTEXTS else "/0"
    return [f"contexts/{array}/c/{number}{inner}" for number in range(count)]


def _chunk_bytes(metadata: Path) -> int | None:
    try:
        about: Any = json.loads(metadata.read_bytes())
        return prod(about["chunk_grid"]["configuration"]["chunk_shape"]) * ITEM_BYTES[about["data_type"]] + CRC_BYTES
    except (OSError, ValueError, KeyError, TypeError):
        return None  # the manifest says so
