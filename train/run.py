"""The train stage: one SAE for each hook of a store, and several settings of a sweep from one reading.

A folder each, resumable to the byte. An SAE of a sweep is the one that its settings alone would give. Started by
torchrun or accelerate, the features are split over the processes; rank 0 writes.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from harvest.activation_store import ActivationStore, slug
from harvest.device import numerics, resolve_device, resolve_dtype, set_threads
from harvest.progress import Progress
from harvest.store_files import files_of
from train.config import TrainConfig
from train.dataloader import ActivationLoader, heldout_rows
from train.metrics import last_figures
from train.parallel import FeatureRanks
from train.training import Training, is_trained


class Task(NamedTuple):
    """Settings, the directory to fill, and what to call with the numerics before the first byte of it."""

    config: TrainConfig
    directory: Path
    begin: Callable[[dict[str, Any]], None]


def run(tasks: Sequence[Task], harvest_directory: Path) -> list[dict[str, Any]]:
    """Train every task's SAEs into `directory/<hook>` and return the summaries.

    Tasks differ in l1_coefficient, lr and d_sae alone, so that one stream of batches serves all. Raises
    UserError for an incomplete or damaged store, a loss that is no number, or a checkpoint that does not
    fit.
    """
    store = ActivationStore.open(files_of(harvest_directory))
    store.check_complete()
    config = tasks[0].config
    ranks = FeatureRanks.from_environment(resolve_device(config.runtime.device))
    device = ranks.device
    dtype = resolve_dtype(config.compute_dtype, device)
    threads = set_threads(config.runtime.threads, device)
    for task in tasks:
        if ranks.rank == 0:
            task.begin(numerics(device, dtype, threads=threads if device.type == "cpu" else None, ranks=ranks.size))
    for hook in store.geometry.hooks:
        todo = [task for task in tasks if not is_trained(task.directory / slug(hook))]
        if todo:
            _train_hook(todo, store, hook, device, dtype, ranks)
    ranks.close()
    return [{h: last_figures(task.directory / slug(h)) for h in store.geometry.hooks} for task in tasks]


def _train_hook(
    tasks: Sequence[Task],
    store: ActivationStore,
    hook: str,
    device: torch.device,
    dtype: torch.dtype,
    ranks: FeatureRanks,
) -> None:
    """Feed one stream of batches to the SAEs of one hook, each from where it was left."""
    config = tasks[0].config
    saes = [Training(task.config, store, hook, task.directory / slug(hook), device, dtype, ranks) for task in tasks]
    first = min(saes, key=lambda sae: sae.step)
    loader = ActivationLoader(
        store,
        hook,
        config.exclude,
        first.statistics.norm_limit,
        config.batch_size,
        config.window_shards,
        config.pool_rows,
        config.seed,
        pin_memory=device.type == "cuda",
    )
    held_out = heldout_rows(store, hook, config.exclude, first.statistics.norm_limit, config.validation_rows)
    held_out = held_out.to(device)
    title = f"train {hook}" + (f" ({len(saes)} SAEs)" if len(saes) > 1 else "")
    total, done = (sum(getattr(sae, name) for sae in saes) * config.batch_size for name in ("steps", "step"))
    with ExitStack() as stack:
        for sae in saes:
            stack.enter_context(closing(sae))
        path = tasks[0].directory / "progress.json"
        progress = stack.enter_context(Progress(title, total, "tokens", start=done, path=path, quiet=ranks.rank > 0))
        interrupted = stack.enter_context(deferred_interrupt())
        batches = stack.enter_context(closing(loader.batches(first.position)))
        step = first.step
        while any(not sae.done for sae in saes):
            batch = next(batches)
            for sae in saes:
                if sae.step == step and not sae.done:
                    sae.take(batch, loader, held_out)
                    progress.advance(config.batch_size, sae.note)
            step += 1
            if ranks.any(interrupted()):  # signals reach ranks at different steps
                for sae in saes:
                    if not sae.done:
                        sae.save_checkpoint()
                raise KeyboardInterrupt


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
