"""The processes that share one harvest, or one benchmark.

They exchange nothing: worker w of `world` makes shards w, w + world, ..., and a shard's bytes depend on the settings
alone. Whoever finds every record written ends the harvest; nobody waits for shards of others. Problems of a benchmark
are shared likewise.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from harvest.files import LOCK, UserError, is_locked, locked
from harvest.progress import duration

POLL_SECONDS = 1.0
SHARED = ("harvest", "benchmark")  # stages that several workers may share


class Shard(NamedTuple):
    """A shard by split and number."""

    split: str
    number: int


class Workers(NamedTuple):
    """This process among the workers of a stage; without arguments, the only one."""

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

    def others_run(self, directory: Path, stage: str) -> bool:
        """Whether a worker runs whose number is none of these `world`."""
        role = f"{stage}-worker-"
        numbers = (int(path.name.removeprefix(LOCK + role)) for path in directory.glob(f"{LOCK}{role}*"))
        return any(is_locked(directory, f"{role}{number}") for number in numbers if number >= self.world)

    @contextmanager
    def locked(self, directory: Path, stage: str) -> Iterator[None]:
        """Hold this worker's lock of a stage, and share the one that keeps `verify` and `--force` out.

        Raises UserError when the same worker runs already, or one of those two does.
        """
        with locked(directory, stage, shared=True), locked(directory, f"{stage}-worker-{self.rank}"):
            yield


def wait_until(found: Callable[[], bool], seconds: float, otherwise: str, stage: str) -> None:
    """Wait for what worker 0 writes.

    Raises UserError with the text `otherwise` when that takes too long.
    """
    began = time.monotonic()
    while not found():
        if time.monotonic() - began > seconds:
            raise UserError(f"{otherwise} for {duration(seconds)} ({stage}.runtime.wait_seconds)")
        time.sleep(POLL_SECONDS)


def missing_text(missing: Sequence[Shard], total: int, bound: str = "") -> str:
    """What a worker says that has made its share while those of others are missing."""
    first = ", ".join(f"{split} {number}" for split, number in sorted(missing)[:5])
    more = ", ..." if len(missing) > 5 else ""
    return (
        f"harvest: this worker's shards are written; {bound}{len(missing)} of {total} are missing ({first}{more}), "
        "which other workers make. The last of them ends the harvest. If none runs any more, start the harvest again, "
        "with any number of workers, to make just these"
    )
