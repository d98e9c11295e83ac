"""Reading a whole store: is every byte as it was written, and one number for all of them."""

import hashlib
import sys
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from harvest.activation_store import CONSUMED, SPLITS, ActivationStore
from harvest.files import UnreachableError, UserError
from harvest.progress import Progress
from harvest.store_files import Files, local_or
from harvest.store_metadata import CREATED, CREATED_FILE, damaged_files, read_geometry


class Bad(NamedTuple):
    """A line for each thing that is not as it was written."""

    metadata: list[str]  # then no shard was judged: by a damaged shape, every one would be bad
    shards: list[str]


def verify(place: Path | Files, changed: Collection[str] = ()) -> Bad:
    """Read every byte of a store. What is bad is taken away, and the next harvest makes just that anew.

    `changed`: names of files without rows that are not as the manifest has them. Of a bad shard the record is taken
    away. Raises UserError when there is no store, or it cannot be reached.
    """
    files = local_or(place)
    if not files.names():
        if not changed:
            read_geometry(files)  # raises: there is none
        return Bad([f"{files.place()}: no activation store there"], [])
    metadata = [_taken(files, name, "missing, or changed since the harvest ended") for name in changed]
    if damaged_files(files, CREATED_FILE):
        metadata.append(_taken(files, CREATED, "missing or damaged"))
    if metadata:
        return Bad(metadata, [])
    try:
        store = ActivationStore.open(files)
    except UnreachableError:
        raise
    except UserError as error:
        return Bad([str(error)], [])
    if damaged := store.damaged_metadata():
        return Bad([f"{files.place(name)}: does not describe the store that zarr.json does" for name in damaged], [])
    return Bad([], _bad_shards(store))


def _taken(files: Files, name: str, why: str) -> str:
    files.delete(name)
    return f"{files.place(name)}: {why}"


def _bad_shards(store: ActivationStore) -> list[str]:
    shards = [(split, shard) for split in SPLITS for shard in range(store.geometry.shards(split))]
    consumed = {shard for shard in shards if store.is_consumed(*shard)}
    if consumed:
        print(f"{store.path}: {len(consumed)} training shards are not read: {CONSUMED}", file=sys.stderr)
        shards = [(split, shard) for split, shard in shards if split == "holdout" or store.is_recorded(split, shard)]
    bad = []
    with Progress("verify", len(shards) - len(consumed), "shards") as progress:
        for split, shard in shards:
            if (split, shard) in consumed:
                continue
            try:
                store.verify_shard(split, shard)
            except UnreachableError:
                raise
            except UserError as error:
                bad.append(f"{split} shard {shard}: {error}")
                store.forget(split, shard)
            progress.advance(1)
    return bad


def digest(place: Path | Files) -> str:
    """sha256 of the relative names and contents of all files of a store.

    Raises UserError when there is none.
    """
    files = local_or(place)
    names = sorted(files.names(), key=lambda name: name.split("/"))
    if not names:
        raise UserError(f"{files.place()}: no activation store there; `make harvest` makes it")
    whole = hashlib.sha256()
    for name in names:
        whole.update(f"{name}\0{hashlib.sha256(files.read(name)).hexdigest()}\n".encode())
    return whole.hexdigest()
