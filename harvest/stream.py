"""Harvest and training side by side on one store: who waits for what, and when a shard may go.

    stream.json        for which training runs the shards are made, how many of them may be on the disk at once
    stream_done.json   training needs no more: the harvest stops where it is

Both lie in the harvest's run directory. The two sides exchange nothing else but the store: the harvest writes a
training shard only while it is among the first `capacity_shards` after the consumed ones, whichever worker makes it,
so no count is shared; the reader waits for records. Each knows from a lock whether the other one lives. With `turns`
they use one device: while the harvest may write, training rests.
"""

import socket
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from harvest.activation_store import ActivationStore
from harvest.files import UserError, is_locked, lock_host, read_json, write_json
from harvest.progress import duration
from harvest.store_place import files_of
from harvest.workers import ROLE, Shard

STREAM, DONE = "stream.json", "stream_done.json"
READER = "reader"  # the lock of the one training process that follows
POLL_SECONDS = 0.1
GRACE_SECONDS = 60.0  # for the other side to be started, or started again

Say = Callable[[str], None]


class Stream(NamedTuple):
    """What `stream.json` says."""

    readers: tuple[str, ...]  # fingerprints of the training runs that the shards are made for
    capacity_shards: int  # training shards on the disk at once, of all workers together
    turns: bool  # harvest and training share one device


def load_stream(directory: Path) -> Stream | None:
    """The stream of a harvest's run directory; None where its store is an ordinary one.

    Raises UserError when the file is damaged.
    """
    path = directory / STREAM
    if not path.exists():
        return None
    value = read_json(path)
    readers, capacity, turns = value.get("readers"), value.get("capacity_shards"), value.get("turns")
    named = isinstance(readers, list) and all(isinstance(reader, str) for reader in readers)
    if named and type(capacity) is int and capacity > 0 and isinstance(turns, bool):
        return Stream(tuple(map(str, readers or ())), capacity, turns)
    raise UserError(f"{path}: does not describe a stream; it was damaged. Delete it, and `make stream` writes it anew")


def save_stream(directory: Path, stream: Stream) -> None:
    """Write `stream.json`, while neither side runs."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / STREAM, stream._asdict())


def is_done(directory: Path) -> bool:
    """Whether training needs no more shards."""
    return (directory / DONE).exists()


def finish(directory: Path, store: ActivationStore) -> None:
    """Say that training needs no more, then delete the training rows that are left."""
    if not is_done(directory):
        write_json(directory / DONE, {})
    for shard in sorted(store.recorded_shards("train")):
        store.consume(shard)


def settled(store: ActivationStore) -> int:
    """Training shards that are consumed and whose rows have left the disk, from the first one on."""
    consumed = store.consumed()
    last = store.shard_files("train", consumed - 1)[-1] if consumed else ""
    return consumed - (consumed > 0 and store.files.size(last) is not None)


class OtherSide:
    """Tells whether the process on the other side lives, by its lock."""

    def __init__(self, directory: Path, role: str, gone: str) -> None:
        self._directory, self._role, self._gone = directory, role, gone
        self._seen = time.monotonic()

    def lives(self) -> bool:
        """Whether it holds its lock now."""
        return is_locked(self._directory, self._role)

    def check(self) -> None:
        """Raise UserError with the text `gone` when it has not been there for GRACE_SECONDS."""
        if self.lives():
            self._seen = time.monotonic()
        elif time.monotonic() - self._seen > GRACE_SECONDS:
            raise UserError(f"{self._directory}: {self._gone}")

    def waiting(self) -> None:
        """Start to wait: what happened before does not count."""
        self._seen = time.monotonic()


class Room:
    """The harvest's side: which shards may be made now."""

    def __init__(self, directory: Path, store: ActivationStore, stream: Stream, say: Say) -> None:
        self.directory, self.store, self.stream, self._say = directory, store, stream, say
        self.waited_seconds = 0.0
        self._reader = OtherSide(
            directory,
            READER,
            f"no training has followed for {duration(GRACE_SECONDS)}, and there is no room for more shards; start "
            "`make stream` again (or `python -m pipeline train --follow` beside this), nothing is lost",
        )

    def admitted(self, shards: Iterable[Shard]) -> Iterator[Shard | None]:
        """The shards of a worker, each when there is room for it; None before it waits. Ends where training is done.

        Raises UserError when there is no room and no training that makes some.
        """
        for shard in shards:
            if shard.split != "train" or self.store.is_recorded(*shard):
                yield shard
                continue
            if not self._has_room(shard) and not is_done(self.directory):
                yield None
                self._wait(shard)
            if is_done(self.directory):
                return
            yield shard

    def summary(self) -> dict[str, Any]:
        """What the harvest's manifest says of the stream."""
        return {
            "streamed_to": ", ".join(self.stream.readers),
            "waited_for_training_seconds": round(self.waited_seconds, 1),
        }

    def _has_room(self, shard: Shard) -> bool:
        return shard.number < settled(self.store) + self.stream.capacity_shards

    def _wait(self, shard: Shard) -> None:
        began = time.monotonic()
        self._reader.waiting()
        while not self._has_room(shard) and not is_done(self.directory):
            self._reader.check()
            self._say(f"{self.stream.capacity_shards} shards are on the disk; waits until training has read some")
            time.sleep(POLL_SECONDS)
        self.waited_seconds += time.monotonic() - began


class Follower:
    """The reader's side: waits for the shards that it needs and, with turns, for the device."""

    def __init__(self, directory: Path, store: ActivationStore, stream: Stream | None, say: Say) -> None:
        """`stream` None: the store is an ordinary one that is still being written, and nothing is deleted."""
        self.directory, self.store, self.stream, self.say = directory, store, stream, say
        self.may_have_turn = True  # the harvest; whoever makes room sets it
        self._stopped = False
        self._present = 0  # training shards, from the first one on, that are known to be recorded
        self.waited_seconds = 0.0
        self._harvest = OtherSide(
            directory,
            ROLE,
            f"the harvest has not run for {duration(GRACE_SECONDS)} and shards are missing; start it again, and this "
            "again goes on where it is",
        )

    def stop(self) -> None:
        """Give up waiting, in whichever thread."""
        self._stopped = True

    def wait_for(self, first: int, last: int) -> None:
        """Wait until training shards `first` to `last` − 1 are written.

        Raises UserError when the harvest has died.
        """
        self._harvest.waiting()
        while not self._stopped and not self._are_recorded(last):
            self._check_harvest()
            self.say(f"waits for training shards {first} to {last - 1}; {self._present} are written")
            time.sleep(POLL_SECONDS)

    def wait_for_holdout(self) -> None:
        """Wait until all held-out shards are written, which are made first."""
        count = self.store.geometry.holdout_shards
        self._harvest.waiting()
        while len(self.store.recorded_shards("holdout")) < count:
            self._check_harvest()
            self.say("waits for the held-out shards")
            time.sleep(POLL_SECONDS)

    def _are_recorded(self, last: int) -> bool:
        while self._present < last and self.store.is_recorded("train", self._present):
            self._present += 1
        return self._present >= last

    def _check_harvest(self) -> None:
        """A harvest on another machine may hold a lock that is not seen here: then only the user can tell."""
        if lock_host(self.directory, f"{ROLE}-worker-0") in ("", socket.gethostname()):
            self._harvest.check()

    def harvest_has_turn(self) -> bool:
        """Whether the harvest lives, shares the device and may write a shard."""
        if self.stream is None or not self.stream.turns or not self.may_have_turn:
            return False
        last = min(self.store.geometry.train_shards, settled(self.store) + self.stream.capacity_shards)
        self.may_have_turn = not self._are_recorded(last) and self._harvest.lives()
        if self.may_have_turn:
            self.say(f"rests while the harvest writes: {self._present} training shards of {last}")
        return self.may_have_turn


def wait_for_store(directory: Path, say: Say) -> ActivationStore:
    """The store of a run directory, once the harvest has begun it.

    Raises UserError when no harvest comes.
    """
    gone = f"holds no store, and no harvest has run for {duration(GRACE_SECONDS)}; start `make harvest` beside this"
    harvest = OtherSide(directory, ROLE, gone)
    while True:
        files = files_of(directory)
        if files.size("created.json") is not None:
            return ActivationStore.open(files)
        harvest.check()
        say("waits for the harvest to begin")
        time.sleep(POLL_SECONDS)
