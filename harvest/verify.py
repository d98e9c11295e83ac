"""Reading a whole store: is every byte as it was written, and one number for all of them."""

import hashlib
import sys
from collections.abc import Collection
from typing import NamedTuple

from harvest.activation_store import CONSUMED, ActivationStore
from harvest.files import UserError
from harvest.progress import Progress
from harvest.store_files import Files
from harvest.store_layout import SPLITS, DamagedError


class Bad(NamedTuple):
    """A line for each thing that is not as it was written."""

    metadata: list[str]  # then no shard was judged: by a damaged shape, every one would be bad
    shards: list[str]


def verify(files: Files, changed: Collection[str] = (), *, complete: bool = False) -> Bad:
    """Read every byte of a store. A bad shard loses its record, so that the next harvest makes just it anew.

    `changed`: names of files without rows that are not as the manifest has them. `complete`: whether there has to be a
    store. Raises UserError when there is none, UnreachableError when a bucket does not answer.
    """
    names = files.names()
    if not names and complete:
        return Bad([f"{files.place()}: no activation store there"], [])
    if changed:
        return Bad([f"{files.place(name)}: missing, or changed since the harvest ended" for name in changed], [])
    try:
        store = ActivationStore.open(files)
    except DamagedError as error:
        return Bad([str(error)], [])
    if damaged := store.damaged_metadata(names):
        return Bad([f"{files.place(name)}: not that of the store that zarr.json describes" for name in damaged], [])
    return Bad([], _bad_shards(store))


def _bad_shards(store: ActivationStore) -> list[str]:
    consumed = store.consumed_shards()
    wanted = {split: set(range(store.geometry.shards(split))) for split in SPLITS}
    if consumed:  # a stream deletes what it has read, and may end before the last shard is made
        wanted["train"] = store.recorded_shards("train") - consumed
        print(f"{store.path}: {len(consumed)} training shards are not there: {CONSUMED}", file=sys.stderr)
    shards = [(split, shard) for split in SPLITS for shard in sorted(wanted[split])]
    bad = []
    with Progress("verify", len(shards), "shards") as progress:
        for split, shard in shards:
            try:
                store.verify_shard(split, shard)
            except UserError as error:
                bad.append(f"{split} shard {shard}: {error}")
                store.forget(split, shard)
            progress.advance(1)
    return bad


def digest(files: Files) -> str:
    """sha256 of the relative names and contents of all files of a store.

    Raises UserError when there is none.
    """
    names = sorted(files.names(), key=lambda name: name.split("/"))
    if not names:
        raise UserError(f"{files.place()}: no activation store there; `make harvest` makes it")
    whole = hashlib.sha256()
    for name in names:
        whole.update(f"{name}\0{hashlib.sha256(files.read(name)).hexdigest()}\n".encode())
    return whole.hexdigest()
