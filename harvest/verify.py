"""Reading a whole store: is every byte as it was written, and one number for all of them."""

import hashlib
import random
import sys
import time
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from harvest.activation_store import CONSUMED, ActivationStore
from harvest.files import UserError, read_json, write_sealed
from harvest.progress import Progress
from harvest.store_files import Files
from harvest.store_layout import SPLITS, DamagedError
from harvest.workers import Shard

MEMORY_SECONDS = 10.0  # between notes of how far it is


class Bad(NamedTuple):
    """A line for each thing that is not as it was written."""

    metadata: list[str]  # then no shard was judged: by a damaged shape, every one would be bad
    shards: list[str]


def verify(
    files: Files,
    changed: Collection[str] = (),
    *,
    complete: bool = False,
    memory: Path | None = None,
    sample: int | None = None,
) -> Bad:
    """Read every byte of a store, or of `sample` shards drawn at random. A bad shard loses its record, so that the next
    harvest makes just it anew.

    `changed`: names of files without rows that are not as the manifest has them. `complete`: whether there has to be a
    store. `memory`: where an interrupted call leaves how far it came, and the next one goes on. Raises UserError when
    there is no store, UnreachableError when a bucket does not answer.
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
    shards = _shards(store)
    if sample is not None:
        drawn = sorted(random.sample(range(len(shards)), min(sample, len(shards))))
        print(f"verify: {len(drawn):,} of {len(shards):,} shards, drawn at random", flush=True)
        return Bad([], _bad_shards(store, [shards[n] for n in drawn], None))
    return Bad([], _bad_shards(store, shards, memory))


def _shards(store: ActivationStore) -> list[Shard]:
    """What there has to be."""
    consumed = store.consumed_shards()
    wanted = {split: set(range(store.geometry.shards(split))) for split in SPLITS}
    if consumed:  # a stream deletes what it has read, and may end before the last shard is made
        wanted["train"] = store.recorded_shards("train") - consumed
        print(f"{store.path}: {len(consumed)} training shards are not there: {CONSUMED}", file=sys.stderr)
    return [Shard(split, number) for split in SPLITS for number in sorted(wanted[split])]


def _bad_shards(store: ActivationStore, shards: list[Shard], memory: Path | None) -> list[str]:
    """A line for each bad shard, several being read at once; `memory` is there until all of them were."""

    def look(shard: Shard) -> str | None:
        try:
            store.verify_shard(*shard)
        except UserError as error:
            return f"{shard.split} shard {shard.number}: {error}"
        return None

    first, lines = _remembered(memory, shards)
    bad = {shard: line for shard, line in lines.items() if look(shard)}  # it may have been restored since
    number, written = first, time.monotonic()
    with Progress("verify", len(shards), "shards", first) as progress, ThreadPoolExecutor(store.files.readers) as pool:
        try:
            for number, found in enumerate(pool.map(look, shards[first:]), first + 1):
                if found:
                    bad[shards[number - 1]] = found
                    store.forget(*shards[number - 1])
                progress.advance(1)
                if memory and time.monotonic() - written > MEMORY_SECONDS:
                    _remember(memory, shards, number, bad)
                    written = time.monotonic()
        except BaseException:
            if memory and number:
                _remember(memory, shards, number, bad)
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # or Ctrl-C would wait for thousands
    if memory:
        memory.unlink(missing_ok=True)
    return list(bad.values())


def _remember(memory: Path, shards: list[Shard], number: int, bad: Mapping[Shard, str]) -> None:
    """Note that so many shards were read, and what was bad: its record is gone."""
    lines = [[*shard, line] for shard, line in bad.items()]
    write_sealed(memory, {"last": list(shards[number - 1]), "read": number, "bad": lines})


def _remembered(memory: Path | None, shards: list[Shard]) -> tuple[int, dict[Shard, str]]:
    """How many of the shards an interrupted call has read, and what it found; what is damaged is read again."""
    if memory is None or not memory.exists():
        return 0, {}
    try:
        found = read_json(memory, sealed=True)
        number = shards.index(Shard(*found["last"])) + 1
        bad = {Shard(split, shard): line for split, shard, line in found["bad"]}
    except (UserError, KeyError, TypeError, ValueError):
        return 0, {}
    when = datetime.fromtimestamp(memory.stat().st_mtime).isoformat(" ", "minutes")
    print(f"verify: {number:,} shards were read by {when}; it goes on behind them ({memory}; delete it to read all)")
    return number, bad


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
