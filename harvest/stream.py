"""A stream: a window of training shards is made, trained on and deleted, so that little of the store is on the disk.

Rows are a pure function of the settings. So nothing is lost by a deletion: what a resume, a further epoch or another
training run reads is made again, and a kill at any moment costs at most the windows since the last checkpoint.
`stream.json` in the harvest's run directory says that training rows come and go; a whole harvest takes it away.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from harvest.activation_store import ActivationStore
from harvest.files import write_json
from harvest.workers import Shard

STREAM = "stream.json"
Make = Callable[[Sequence[Shard], Callable[[int], None] | None, Callable[[], bool]], None]


class Interrupted(KeyboardInterrupt):
    """The user has asked to stop while a window was being made."""


def is_streamed(directory: Path) -> bool:
    """Whether the store of a harvest's run directory is that of a stream."""
    return (directory / STREAM).exists()


def mark_streamed(directory: Path, readers: Sequence[str]) -> None:
    """Write stream.json: the fingerprints of the training runs that the shards are made for."""
    write_json(directory / STREAM, {"readers": list(readers)})


class Windows:
    """The training shards of a stream, `window_shards` at a time; every process of the training has one.

    `together` says whether a flag is set in any process, and waits for all of them.
    """

    def __init__(
        self, store: ActivationStore, window_shards: int, make: Make, together: Callable[[bool], bool], deletes: bool
    ) -> None:
        """`make`: makes this process's part of shards. `deletes`: true in one process, which deletes for all."""
        self.store, self._make, self._together, self._deletes = store, make, together, deletes
        self._window_shards = min(window_shards, store.geometry.train_shards)
        self._there = store.complete_shards("train")
        self._kept: Collection[int] = ()
        self.advance: Callable[[int], None] | None = None  # told of the tokens of every batch
        self.interrupted: Callable[[], bool] = lambda: False
        if deletes:  # what a kill left of shards that were being deleted
            for shard in store.consumed_shards():
                store.consume(shard)
        together(False)

    def shards_of(self, window: int) -> range:
        """Numbers of a window's shards."""
        first = window * self._window_shards
        return range(first, min(first + self._window_shards, self.store.geometry.train_shards))

    def missing(self, window: int) -> list[Shard]:
        """The shards of a window that are not on the disk."""
        return [Shard("train", shard) for shard in self.shards_of(window) if shard not in self._there]

    def need(self, window: int) -> None:
        """Make what is missing of a window. Collective.

        Raises Interrupted when the user asks to stop, after the shards in hand.
        """
        self.make(self.missing(window))
        self._there.update(self.shards_of(window))

    def make(self, shards: Sequence[Shard]) -> None:
        """Make shards of either split, each process its part. Collective; raises as `need` does."""
        if shards:
            self._make(shards, self.advance, self.interrupted)
            if self._together(self.interrupted()):
                raise Interrupted

    def keep(self, windows: Collection[int]) -> None:
        """Delete the shards of all other windows."""
        if windows == self._kept:
            return
        self._kept = windows
        kept = {shard for window in windows for shard in self.shards_of(window)}
        for shard in sorted(self._there - kept):
            if self._deletes:
                self.store.consume(shard)
            self._there.discard(shard)
