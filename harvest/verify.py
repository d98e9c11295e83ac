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
from harvest.store_metadata import CREATED, CREATED_FILE, DamagedError, damaged_files


class Bad(NamedTuple):
    """A line for each thing that is not as it was written."""

    metadata: list[str]  # then no shard was judged: by a damaged shape, every one would be bad
    shards: list[str]


def verify(place: Path | Files, changed: Collection[str] = (), *, complete: bool = False) -> Bad:
    """Read every byte of a store. What is bad is taken away, and the next harvest makes just that anew.

    `changed`: names of files without rows that are not as the manifest has them. `complete`: whether there has to be a
    store. Of a bad shard the record is taken away. Raises UserError when there is none, or it cannot be reached.
    """
    files = local_or(place)
    names = files.names()
    if not names and complete:
        return Bad([f"{files.place()}: no activation store there"], [])
    metadata = [_taken(files, name, "missing, or changed since the harvest ended") for name in changed]
    if names and damaged_files(files, CREATED_FILE):
        metadata.append(_taken(files, CREATED, "missing or damaged"))
    if metadata:
        return Bad(metadata, [])
    try:
        store = ActivationStore.open(files)
    except DamagedError as error:
        return Bad([str(error)], [])
    if damaged := store.damaged_metadata(names):
        return Bad([f"{files.place(name)}: not that of the store that zarr.json describes" for name in damaged], [])
    return Bad([], _bad_shards(store))


def _taken(files: Files, name: str, why: str) -> str:
    files.delete(name)
    return f"{files.place(name)}: {why}"


def _bad_shards(store: ActivationStore) -> list[str]:
    shards = [(split, shard) for split in SPLITS for shard in range(store.geometry.shards(split))]
    bad, consumed = [], 0
    with Progress("verify", len(shards), "shards") as progress:
        for split, shard in shards:
            # The first ones of a stream are consumed; behind its last there may be some that were never made.
            if split == "train" and (
                store.is_consumed(split, shard) or (consumed and not store.is_recorded(split, shard))
            ):
                consumed += 1
            else:
                try:
                    store.verify_shard(split, shard)
                except UnreachableError:
                    raise
                except UserError as error:
                    bad.append(f"{split} shard {shard}: {error}")
                    store.forget(split, shard)
            progress.advance(1)
    if consumed:
        print(f"{store.path}: {consumed} training shards are not there: {CONSUMED}", file=sys.stderr)
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
