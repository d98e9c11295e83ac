"""The train stage: one SAE for each hook of a store, and several settings of a sweep from one reading.

A folder each, resumable to the byte. An SAE of a sweep is the one that its settings alone would give. Started by
torchrun or accelerate, the features are split over the processes; rank 0 writes.
"""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from harvest.activation_store import ActivationStore, slug
from harvest.device import numerics, resolve_device, resolve_dtype, set_threads
from harvest.files import locked
from harvest.progress import Progress
from harvest.store_place import files_of
from harvest.stream import POLL_SECONDS, READER, Follower, Stream, finish, load_stream, wait_for_store
from train.config import TrainConfig
from train.dataloader import ActivationLoader, Position, heldout_rows
from train.metrics import last_figures
from train.parallel import FeatureRanks
from train.release import Release, next_epoch_file
from train.training import Training, is_trained


class Task(NamedTuple):
    """Settings, the directory to fill, and what to call with the numerics before the first byte of it."""

    config: TrainConfig
    directory: Path
    begin: Callable[[dict[str, Any]], None]


class Place(NamedTuple):
    """What all SAEs of a run share."""

    store: ActivationStore
    device: torch.device
    compute_dtype: torch.dtype
    ranks: FeatureRanks
    follower: Follower | None  # where the store is still being written


def run(tasks: Sequence[Task], harvest_directory: Path, follow: bool = False) -> list[dict[str, Any]]:
    """Train every task's SAEs into `directory/<hook>` and return the summaries.

    Tasks differ in l1_coefficient, lr and d_sae alone, so that one stream of batches serves all. With `follow` the
    store may still be being written: training waits for each window. What it has read of a stream (harvest/stream.py)
    it deletes. Raises UserError for an incomplete or damaged store, a loss that is no number, a checkpoint that does
    not fit, or a harvest that died.
    """
    config = tasks[0].config
    ranks = FeatureRanks.from_environment(resolve_device(config.runtime.device), config.runtime.peers_seconds)
    device = ranks.device
    dtype = resolve_dtype(config.compute_dtype, device)
    threads = set_threads(config.runtime.threads, device)
    stream = load_stream(harvest_directory)
    with ExitStack() as stack:
        if (follow or stream) and ranks.rank == 0:
            stack.enter_context(locked(harvest_directory, READER))
        if follow or stream:
            place = _followed(harvest_directory, stream, config.window_shards, device, dtype, ranks)
        else:
            place = Place(ActivationStore.open(files_of(harvest_directory)), device, dtype, ranks, None)
            place.store.check_complete()
        for task in tasks:
            if ranks.rank == 0:
                of_threads = threads if device.type == "cpu" else None
                task.begin(numerics(device, dtype, threads=of_threads, ranks=ranks.size))
        hooks = place.store.geometry.hooks
        # A window of a stream goes when all have read it: its hooks go side by side. Else one is in memory at a time.
        for together in [hooks] if stream else [(hook,) for hook in hooks]:
            _train(tasks, together, place, harvest_directory)
    ranks.close()
    waited = {"waited_for_harvest_seconds": round(place.follower.waited_seconds, 1)} if place.follower else {}
    return [{h: last_figures(task.directory / slug(h)) | waited for h in hooks} for task in tasks]


def _followed(
    directory: Path,
    stream: Stream | None,
    window_shards: int,
    device: torch.device,
    dtype: torch.dtype,
    ranks: FeatureRanks,
) -> Place:
    """The store of a harvest that goes on, once the held-out shards and the first window are there."""
    with Progress("train", 0, "tokens", quiet=ranks.rank > 0, closing_line=False) as waiting:
        store = wait_for_store(directory, waiting.say)
        follower = Follower(directory, store, stream, waiting.say)
        follower.wait_for_holdout()
        follower.wait_for(0, min(window_shards, store.geometry.train_shards))
        store.check_complete(("holdout",))
    return Place(store, device, dtype, ranks, follower)


class HookTraining:
    """The SAEs of one hook that are not trained yet, each from where it was left; one stream of batches feeds them."""

    def __init__(self, tasks: Sequence[Task], hook: str, place: Place, next_epoch: Path | None) -> None:
        config, store = tasks[0].config, place.store
        self.saes = [
            Training(t.config, store, hook, t.directory / slug(hook), place.device, place.compute_dtype, place.ranks)
            for t in tasks
        ]
        first = min(self.saes, key=lambda sae: sae.step)
        self._step = first.step
        self.loader = ActivationLoader(
            store,
            hook,
            config.exclude,
            first.statistics.norm_limit,
            config.batch_size,
            config.window_shards,
            config.pool_rows,
            config.seed,
            pin_memory=place.device.type == "cuda",
            wait_for=place.follower.wait_for if place.follower else None,
            next_epoch=next_epoch,
        )
        held_out = heldout_rows(store, hook, config.exclude, first.statistics.norm_limit, config.validation_rows)
        self._held_out = held_out.to(place.device)
        self.batches = self.loader.batches(first.position)

    @property
    def done(self) -> bool:
        """Whether all SAEs of the hook have ended."""
        return all(sae.done for sae in self.saes)

    @property
    def window(self) -> tuple[int, int]:
        """Epoch and window of the next batch."""
        return min(sae.position for sae in self.saes if not sae.done)[:2]

    def advance(self, progress: Progress) -> None:
        """Give the next batch to each SAE that has not seen it."""
        batch = next(self.batches)
        for sae in self.saes:
            if sae.step == self._step and not sae.done:
                sae.take(batch, self.loader, self._held_out)
                progress.advance(len(batch.rows_BD), sae.note)
        self._step += 1


def _train(tasks: Sequence[Task], hooks: Sequence[str], place: Place, harvest_directory: Path) -> None:
    """Train what is left of these hooks' SAEs, window by window."""
    todo = {h: [task for task in tasks if not is_trained(task.directory / slug(h))] for h in hooks}
    stream = place.follower is not None and place.follower.stream is not None
    trainings = {
        hook: HookTraining(left, hook, place, next_epoch_file(harvest_directory, hook) if stream else None)
        for hook, left in todo.items()
        if left
    }
    if not trainings:
        if stream and place.ranks.rank == 0:
            finish(harvest_directory, place.store)
        return
    saes = [sae for training in trainings.values() for sae in training.saes]
    batch_size = tasks[0].config.batch_size
    total, done = (sum(getattr(sae, name) for sae in saes) * batch_size for name in ("steps", "step"))
    several = f" {', '.join(trainings)}" if len(place.store.geometry.hooks) > 1 else ""
    title = f"train{several}" + (f" ({len(saes)} SAEs)" if len(saes) > 1 else "")
    with ExitStack() as stack:
        for sae in saes:
            stack.enter_context(closing(sae))
        path, quiet = tasks[0].directory / "progress.json", place.ranks.rank > 0
        progress = stack.enter_context(Progress(title, total, "tokens", start=done, path=path, quiet=quiet))
        interrupted = stack.enter_context(deferred_interrupt())
        for training in trainings.values():
            stack.enter_context(closing(training.batches))
        release = None
        if place.follower:
            stack.callback(place.follower.stop)  # before the batches are closed, which waits for their reader
            place.follower.say = progress.say
        if stream:
            loaders = {hook: training.loader for hook, training in trainings.items()}
            release = Release(harvest_directory, place.store, loaders, saes[0].steps * batch_size)
            for sae in saes:
                durable = release.reader(sae.folder, sae.position)
                sae.on_durable = durable if place.ranks.rank == 0 else _nothing
            if place.ranks.rank == 0:
                release.start()
        while left := [training for training in trainings.values() if not training.done]:
            training = min(left, key=lambda training: training.window)
            stopped = place.follower is not None and _rest(training.loader, place, release, interrupted)
            if not stopped:
                training.advance(progress)
            if place.ranks.any(interrupted()):  # signals reach ranks at different steps
                for sae in saes:
                    if not sae.done:
                        sae.save_checkpoint()
                raise KeyboardInterrupt(f"after step {saes[0].step:,} of {saes[0].steps:,}")


def _nothing(_position: Position) -> None:
    """What another rank than 0 does with a durable position; it saves at the same steps."""


def _rest(loader: ActivationLoader, place: Place, release: Release | None, interrupted: Callable[[], bool]) -> bool:
    """Wait for rows, and while it is the harvest's turn; whether it was interrupted meanwhile. Collective."""
    follower, began = place.follower, time.monotonic()
    assert follower is not None
    if release is not None and release.freed:
        release.freed, follower.may_have_turn = False, True
    waited = False
    while place.ranks.any(not loader.is_ready() or follower.harvest_has_turn()):
        if place.ranks.any(interrupted()):
            return True
        waited = True
        time.sleep(POLL_SECONDS)
    if waited:
        loader.note_stall(time.monotonic() - began)
        follower.waited_seconds += time.monotonic() - began
    return False


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Let the step in hand finish after Ctrl-C or SIGTERM; a second signal does not wait."""
    requested = False

    def handle(_number: int, _frame: object) -> None:
        nonlocal requested
        if requested:
            raise KeyboardInterrupt
        requested = True

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
