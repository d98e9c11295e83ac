"""The processes that share one harvest: which shards each makes, and how they wait for each other.

They exchange nothing: worker w of `world` makes shards w, w + world, ..., and a shard's bytes depend on the
settings alone. What joins them is the folder. Worker 0 writes all metadata first, and the manifest when every
shard has its record; waiting is measured by the waiter's own clock, from the last change that it saw in the
folder, so that neither clocks nor times of files have to agree.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from harvest.files import UserError, forget_holder, is_locked, lock_host, locked
from harvest.progress import duration

POLL_SECONDS = 1.0
LOOK_SECONDS = 5.0  # between looks at the other workers while this one is busy
ROLE = "harvest"


class Shard(NamedTuple):
    """A shard by split and number."""

    split: str
    number: int


class Workers(NamedTuple):
    """This process among the workers of a harvest; without arguments, the only one."""

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls) -> "Workers":
        """RANK and WORLD_SIZE, as accelerate launch and torchrun set them, or a job array's script.

        Raises UserError for values that cannot be.
        """
        rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
            raise UserError(f"RANK={rank}, WORLD_SIZE={world}: RANK counts from 0; set both or none")
        return cls(int(rank), int(world))

    def share(self, every: Sequence[Shard]) -> Sequence[Shard]:
        """The shards of this worker."""
        return every[self.rank :: self.world]

    def role(self, rank: int) -> str:
        """Name of a worker's lock."""
        return f"{ROLE}-worker-{rank}"

    @contextmanager
    def locked(self, directory: Path) -> Iterator[None]:
        """Hold this worker's lock, and share the one that keeps `verify` and `--force` out.

        Raises UserError when the same worker runs already, or one of those two does.
        """
        with locked(directory, ROLE, shared=True), locked(directory, self.role(self.rank)):
            if self.rank == 0:
                for rank in range(1, self.world):
                    forget_holder(directory, self.role(rank))  # of an earlier start
            yield

    def alone(self, directory: Path) -> bool:
        """Whether no other worker runs, as far as locks reach: some network file systems keep them to a machine."""
        roles = {path.name.removeprefix(".lock-") for path in directory.glob(f".lock-{ROLE}-worker-*")}
        return not any(is_locked(directory, role) for role in roles - {self.role(self.rank)})


def wait_until(found: Callable[[], bool], seconds: float, otherwise: str) -> None:
    """Wait for what worker 0 writes.

    Raises UserError with the text `otherwise` when that takes too long.
    """
    began = time.monotonic()
    while not found():
        if time.monotonic() - began > seconds:
            raise UserError(f"{otherwise} for {duration(seconds)} (harvest.runtime.wait_seconds)")
        time.sleep(POLL_SECONDS)


class Others:
    """What worker 0 sees of the other workers: how many of their shards are complete, and who stopped.

    A worker that took its lock on this host and has let go of it has ended. Of other hosts nothing is concluded
    from locks, as some network file systems keep them to a machine: there, only silence tells.
    """

    def __init__(
        self, workers: Workers, directory: Path, every: Sequence[Shard], complete: Callable[[], set[Shard]]
    ) -> None:
        self.workers, self.directory, self._complete = workers, directory, complete
        self._owner = {shard: i % workers.world for i, shard in enumerate(every)}
        self._mine = set(workers.share(every))
        self._ended: set[int] = set()
        self._count, self._looked = len(complete() - self._mine), time.monotonic()

    def look(self) -> set[Shard]:
        """The shards that are missing now."""
        roles = {rank: self.workers.role(rank) for rank in range(self.workers.world) if rank != self.workers.rank}
        free = {rank for rank, role in roles.items() if not is_locked(self.directory, role)}
        self._ended = {rank for rank in free if lock_host(self.directory, roles[rank]) == socket.gethostname()}
        return self._owner.keys() - self._complete()  # after the locks: a worker that ended had written its last record

    def newly_complete(self) -> int:
        """Shards of others that were completed since the last call; looks every few seconds only."""
        if self.workers.world == 1 or time.monotonic() - self._looked < LOOK_SECONDS:
            return 0
        return self._counted(self.look())

    def _counted(self, missing: set[Shard]) -> int:
        self._looked = time.monotonic()
        before, self._count = self._count, len(self._owner.keys() - missing - self._mine)
        return self._count - before

    def wait(self, seconds: float, advance: Callable[[int], None]) -> None:
        """Wait until every shard is complete; `advance` is called with the number of those that came.

        Raises UserError that names the missing ones when their workers have ended, or when none came for so
        many seconds.
        """
        changed = time.monotonic()
        while missing := self.look():
            came = self._counted(missing)
            if came:
                changed = time.monotonic()
                advance(came)
            owners = {self._owner[shard] for shard in missing}
            if owners <= self._ended | {self.workers.rank}:
                raise UserError(self._missing(missing, f"{_named(owners)} stopped"))
            if time.monotonic() - changed > seconds:
                silence = f"nothing came from {_named(owners)} for {duration(seconds)} (harvest.runtime.wait_seconds)"
                raise UserError(self._missing(missing, silence))
            time.sleep(POLL_SECONDS)
        advance(self._counted(missing))

    def _missing(self, missing: set[Shard], why: str) -> str:
        first = ", ".join(f"{split} {number}" for split, number in sorted(missing)[:5])
        more = ", ..." if len(missing) > 5 else ""
        return (
            f"{self.directory}: {len(missing)} of {len(self._owner)} shards are missing ({first}{more}): {why}; start "
            "the harvest again, with any number of workers, to make just these"
        )


def _named(ranks: set[int]) -> str:
    return ("worker " if len(ranks) == 1 else "workers ") + ", ".join(map(str, sorted(ranks)))
