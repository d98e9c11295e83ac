"""When a window of a streamed store may be deleted: every SAE has a checkpoint, on the disk, past its last row.

The order, so that a kill at any moment loses no row that is needed: the checkpoint; older checkpoints are marked, as no
resume from them is possible any more; the shard's record; the shard's files. Left-out rows make an epoch a little
short, and training then reads on in the first window: these rows are copied before the first deletion.
"""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from harvest.activation_store import ActivationStore, slug
from harvest.files import UserError
from harvest.stream import finish
from train.checkpoint import retire_checkpoints
from train.config import ExcludeConfig
from train.dataloader import FINISHED, ActivationLoader, Position

EXCESS = 4  # times the left-out rows that the first window lets expect; contexts are shuffled, so windows are alike


def next_epoch_file(directory: Path, hook: str) -> Path:
    """Rows of a hook that are read a second time, in a harvest's run directory."""
    return directory / "next_epoch" / f"{slug(hook)}.safetensors"


def has_exclusions(exclude: ExcludeConfig) -> bool:
    """Whether training may leave rows out."""
    return bool(exclude.token_ids or exclude.positions or exclude.norm_above_median)


def rows_to_keep(loader: ActivationLoader, rows_needed: int) -> int:
    """Rows of the first window to keep for the next epoch, with a margin; 0 where one epoch is enough for certain.

    Raises UserError when one epoch and the first window once more would not be enough.
    """
    g, order = loader.store.geometry, loader.order
    rows = g.train_shards * g.shard_rows
    if rows_needed > rows:
        raise UserError(f"training needs {rows_needed:,} rows and a stream gives {rows:,}, each once")
    if not has_exclusions(loader.exclude):
        return 0
    kept = loader.kept_of_window(0)
    left_out = len(order.chunks_of_window(0)) * g.chunk_rows - kept
    expected = round(left_out * g.train_shards / min(order.window_shards, g.train_shards)) - (rows - rows_needed)
    if expected > kept:
        raise UserError(
            f"train.exclude: leaves out {left_out:,} of the {kept + left_out:,} rows of the first window, so that one "
            f"epoch has about {rows_needed - expected:,} rows and training needs {rows_needed:,}; a stream gives each "
            "row once: lower train.training_tokens (or train.epochs), or train from a whole store"
        )
    spare = rows - rows_needed
    return min(kept, max(0, EXCESS * (expected + spare) + loader.batch_size - spare))


class Release:
    """Deletes windows that every reader is past; `reader` gives each of them what it calls after a checkpoint."""

    def __init__(
        self, directory: Path, store: ActivationStore, loaders: Mapping[str, ActivationLoader], rows_needed: int
    ) -> None:
        """`loaders`: of each hook, with the exclusions of its SAEs; used from the thread that writes checkpoints."""
        self._directory, self._store, self._loaders, self._rows_needed = directory, store, loaders, rows_needed
        self._lock = threading.Lock()
        self._durable: dict[Path, Position] = {}
        self.freed = False  # set when shards went; whoever looks at it clears it

    def reader(self, folder: Path, position: Position) -> Callable[[Position], None]:
        """Take up an SAE's folder, whose last durable position is this; the result is told of later ones."""
        self._durable[folder] = position

        def durable(position: Position) -> None:
            with self._lock:
                self._durable[folder] = position
                self._release()

        return durable

    def start(self) -> None:
        """Copy what is read a second time, and finish what a kill interrupted; call it when all readers are taken up.

        Raises UserError when one epoch and the first window once more would not be enough.
        """
        with self._lock:
            if not self._store.consumed():
                self._keep_for_next_epoch()
            self._release()

    def _release(self) -> None:
        slowest = min(self._durable.values())
        order = next(iter(self._loaders.values())).order
        last = order.shards if slowest.epoch else order.shards_of_window(slowest.window)[0]
        consumed = self._store.consumed()
        if slowest == FINISHED:
            finish(self._directory, self._store)
        elif consumed:
            self._store.consume(consumed - 1)  # what a kill left of it
        if slowest == FINISHED or last <= consumed:
            return
        for folder in self._durable:
            retire_checkpoints(folder / "checkpoints", slowest)
        for shard in range(consumed, last):
            self._store.consume(shard)
        self.freed = True

    def _keep_for_next_epoch(self) -> None:
        for hook, loader in self._loaders.items():
            path, count = next_epoch_file(self._directory, hook), rows_to_keep(loader, self._rows_needed)
            if count and not path.exists():
                path.parent.mkdir(exist_ok=True)
                loader.save_rows(Position(epoch=1), count, path)
