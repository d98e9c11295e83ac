"""Reading a whole store: is every byte as it was written, and one number for all of them."""

import hashlib
import sys
from pathlib import Path

from harvest.activation_store import CONSUMED, SPLITS, ActivationStore
from harvest.files import UnreachableError, UserError
from harvest.progress import Progress
from harvest.store_files import Files, local_or


def verify(place: Path | Files) -> list[str]:
    """Read every shard of a store; one line for each that is bad.

    A bad shard loses its record, so that the next harvest makes it anew. Raises UserError when there is
    no store, or it cannot be reached.
    """
    store = ActivationStore.open(place)
    shards = [(split, shard) for split in SPLITS for shard in range(store.geometry.shards(split))]
    if store.consumed():
        present = store.complete_shards("train")
        print(f"{store.path}: {len(present)} training shards are there; the others: {CONSUMED}", file=sys.stderr)
        shards = [(split, shard) for split, shard in shards if split == "holdout" or shard in present]
    bad = []
    with Progress("verify", len(shards), "shards") as progress:
        for split, shard in shards:
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
