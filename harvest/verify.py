"""Reading a whole store: is every byte as it was written, and one number for all of them."""

import hashlib
from pathlib import Path

from harvest.activation_store import SPLITS, ActivationStore
from harvest.files import UserError
from harvest.progress import Progress


def verify(path: Path) -> list[str]:
    """Read every shard of a store; one line for each that is bad.

    A bad shard loses its record, so that the next harvest makes it anew. Raises UserError when there is
    no store.
    """
    store = ActivationStore.open(path)
    shards = [(split, shard) for split in SPLITS for shard in range(store.geometry.shards(split))]
    bad = []
    with Progress("verify", len(shards), "shards") as progress:
        for split, shard in shards:
            try:
                store.verify_shard(split, shard)
            except UserError as error:
                bad.append(f"{split} shard {shard}: {error}")
                store.record_path(split, shard).unlink(missing_ok=True)
            progress.advance(1)
    return bad


def digest(path: Path) -> str:
    """sha256 of the relative names and contents of all files of a store.

    Raises UserError when there is none.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no activation store there; `make harvest` makes it")
    whole = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        with file.open("rb") as opened:
            content = hashlib.file_digest(opened, "sha256").hexdigest()
        whole.update(f"{file.relative_to(path)}\0{content}\n".encode())
    return whole.hexdigest()
