"""The train stage: one SAE for each hook of a store, and several settings of a sweep from one reading.

A folder each, resumable to the byte. An SAE of a sweep is the one that its settings alone would give. Started by
torchrun or accelerate, the features are split over the processes; rank 0 writes.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from harvest.activation_store import ActivationStore, slug
from harvest.device import numerics, resolve_device, resolve_dtype, set_threads
from harvest.progress import Progress
from harvest.store_files import files_of
from harvest.stream import Interrupted, Windows
from harvest.workers import Shard
from train.checkpoint import MARKER
from train.config import TrainConfig
from train.dataloader import ActivationLoader, heldout_rows
from train.metrics import last_figures
from train.parallel import FeatureRanks
from train.start import check_start
from train.training import Training, is_trained

if TYPE_CHECKING:
    from harvest.run import Harvest  # loads a language model's libraries


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
    windows: Windows | None  # of a stream


def run(tasks: Sequence[Task], harvest_directory: Path, harvest: "Harvest | None" = None) -> list[dict[str, Any]]:
    """Train every task's SAEs into `directory/<hook>` and return the summaries.

    Tasks differ in l1_coefficient, lr and d_sae alone, so that one stream of batches serves all. `harvest` makes the
    rows, a window at a time; else the store has to be complete. Raises UserError for an incomplete or damaged store, a
    NaN or infinite loss, or a checkpoint or a train.start_from that does not fit.
    """
    config = tasks[0].config
    ranks = FeatureRanks.from_environment(resolve_device(config.runtime.device), config.runtime.peers_seconds)
    device = ranks.device
    dtype = resolve_dtype(config.compute_dtype, device)
    threads = set_threads(config.runtime.threads, device)
    store = harvest.store if harvest else ActivationStore.open(files_of(harvest_directory))
    windows = _begun(harvest, config.window_shards, ranks) if harvest else None
    store.check_complete(("holdout",) if windows else ("train", "holdout"))
    place = Place(store, device, dtype, ranks, windows)
    for task in tasks:
        _check_start(task, store)
        if ranks.rank == 0:
            of_threads = threads if device.type == "cpu" else None
            task.begin(numerics(device, dtype, threads=of_threads, ranks=ranks.size))
    hooks = store.geometry.hooks
    # A stream's window goes when all hooks have read it, so they are trained together. Else one is in memory at a time.
    for together in [hooks] if windows else [(hook,) for hook in hooks]:
        _train(tasks, together, place)
    if windows:
        windows.keep(())
    ranks.close()
    return [{h: last_figures(task.directory / slug(h)) for h in hooks} for task in tasks]


def _check_start(task: Task, store: ActivationStore) -> None:
    """Raise UserError for a train.start_from that cannot start what is not begun yet."""
    folders = {hook: task.directory / slug(hook) for hook in store.geometry.hooks}
    begun = {hook for hook, folder in folders.items() if is_trained(folder) or any(folder.glob(f"*/*/{MARKER}"))}
    if task.config.start_from:
        check_start(task.config, [hook for hook in folders if hook not in begun], store.geometry.d_in)


def _begun(harvest: "Harvest", window_shards: int, ranks: FeatureRanks) -> Windows:
    """The windows of a stream, once the held-out shards are there.

    Raises UserError when the disk has no room.
    """
    store, there = harvest.store, harvest.store.complete_shards("holdout")
    held_out = [Shard("holdout", n) for n in range(store.geometry.holdout_shards) if n not in there]
    if ranks.rank == 0:
        if not harvest.workers.others_run(harvest.directory, "harvest"):
            store.delete_unrecorded("train")  # what a kill left, which no window counts
        harvest.check_room(len(held_out) + min(2 * window_shards, store.geometry.train_shards))
    windows = Windows(store, window_shards, harvest.make_share, ranks.any, deletes=ranks.rank == 0)
    windows.make(held_out)
    return windows


class HookTraining:
    """The SAEs of one hook that are not trained yet, each from where it was left; one stream of batches feeds them."""

    def __init__(self, tasks: Sequence[Task], hook: str, place: Place) -> None:
        config, store = tasks[0].config, place.store
        folders = [task.directory / slug(hook) for task in tasks]
        if place.windows and not all(any(folder.glob(f"checkpoints/*/{MARKER}")) for folder in folders):
            place.windows.need(0)  # for the statistics of its rows
        self.saes = [
            Training(task.config, store, hook, folder, place.device, place.compute_dtype, place.ranks)
            for task, folder in zip(tasks, folders, strict=True)
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
            need=place.windows.need if place.windows else None,
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


def _train(tasks: Sequence[Task], hooks: Sequence[str], place: Place) -> None:
    """Train what is left of these hooks' SAEs, window by window."""
    todo = {h: [task for task in tasks if not is_trained(task.directory / slug(h))] for h in hooks}
    trainings = {hook: HookTraining(left, hook, place) for hook, left in todo.items() if left}
    if not trainings:
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
        if place.windows:
            place.windows.interrupted = interrupted
            place.windows.advance = lambda _tokens: progress.say("harvests the next window")
        while left := [training for training in trainings.values() if not training.done]:
            if place.windows:
                place.windows.keep({training.window[1] for training in left})
            with suppress(Interrupted):
                min(left, key=lambda training: training.window).advance(progress)
            if place.ranks.any(interrupted()):  # signals reach ranks at different steps
                for sae in saes:
                    if not sae.done:
                        sae.save_checkpoint()
                raise KeyboardInterrupt(f"after step {saes[0].step:,} of {saes[0].steps:,}")


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
