"""The train stage: one SAE for each hook of a store, a folder each, resumable to the byte."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from harvest.activation_store import ActivationStore, slug
from harvest.device import numerics, resolve_device, resolve_dtype, set_threads
from harvest.files import UserError
from harvest.progress import Progress
from train.checkpoint import ABOUT, Checkpoint, newest_checkpoint, save_checkpoint, save_sae
from train.config import TrainConfig
from train.dataloader import ActivationLoader, Position, heldout_rows
from train.exclusion import input_statistics
from train.sae import initial_sae
from train.trainer import Stepped, Trainer, Validation


def run(
    config: TrainConfig, harvest_directory: Path, directory: Path, begin: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Train an SAE for every hook into `directory/<hook>` and return the summary.

    Raises UserError for an incomplete or damaged store, a loss that is no number, or a checkpoint that
    does not fit.
    """
    store = ActivationStore.open(harvest_directory / "store")
    store.check_complete()
    device = resolve_device(config.runtime.device)
    dtype = resolve_dtype(config.compute_dtype, device)
    threads = set_threads(config.runtime.threads, device)
    begin(numerics(device, dtype, threads=threads if device.type == "cpu" else None))
    summary: dict[str, Any] = {}
    for hook in store.geometry.hooks:
        folder = directory / slug(hook)
        if not (folder / ABOUT).exists():
            _train_hook(config, store, hook, folder, device, dtype, directory / "progress.json")
        summary[hook] = _last_figures(folder / "metrics.jsonl")
    return summary


def total_steps(config: TrainConfig, rows: int) -> int:
    """Steps of a run over a store of so many training rows."""
    tokens = config.training_tokens or int((config.epochs or 0) * rows)
    return max(1, tokens // config.batch_size)


def _train_hook(
    config: TrainConfig,
    store: ActivationStore,
    hook: str,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    progress_file: Path,
) -> None:
    g = store.geometry
    rows = g.train_shards * g.shard_rows
    steps = total_steps(config, rows)
    found = newest_checkpoint(folder / "checkpoints")
    statistics = found[0].statistics if found else input_statistics(store, hook, config.exclude, config.window_shards)
    sae = initial_sae(g.d_in, config.sae.width(g.d_in), config.seed, device)
    trainer = Trainer(sae, statistics.scale, config, steps, rows, dtype)
    position, best_loss, metrics_bytes = Position(), None, 0
    if found:
        checkpoint, tensors = found
        if tensors["W_enc"].shape != sae.W_enc.shape:
            raise UserError(f"{folder}: its checkpoint is of an SAE of shape {tuple(tensors['W_enc'].shape)}")
        trainer.restore(tensors, checkpoint.step, checkpoint.kernel)
        position, best_loss, metrics_bytes = checkpoint.position, checkpoint.best_loss, checkpoint.metrics_bytes
    loader = ActivationLoader(
        store,
        hook,
        config.exclude,
        statistics.norm_limit,
        config.batch_size,
        config.window_shards,
        config.pool_rows,
        config.seed,
    )
    validation_rows = heldout_rows(store, hook, config.exclude, statistics.norm_limit, config.validation_rows).to(
        device
    )
    about = {
        "architecture": "standard",
        "model": store.attributes.get("model"),
        "context_size": g.context_size,
    }
    warmup = round(steps * config.l1_warmup_fraction)
    with (
        _Metrics(folder / "metrics.jsonl", metrics_bytes) as metrics,
        Progress(
            f"train {hook}",
            steps * config.batch_size,
            "tokens",
            start=trainer.step_number * config.batch_size,
            path=progress_file,
        ) as progress,
        deferred_interrupt() as interrupted,
    ):
        note = ""
        batches = loader.batches(position)
        while trainer.step_number < steps:
            batch = next(batches)
            stepped = trainer.step(batch.rows_BD)
            position, step = batch.next, trainer.step_number
            if step % config.runtime.log_every == 0 or step == steps:
                note = metrics.log_step(step, step * config.batch_size, stepped, trainer.dead_features())
            if step % config.validate_every == 0 or step == steps:
                validation = trainer.validate(validation_rows)
                metrics.log_validation(step, validation)
                if step >= warmup and (best_loss is None or validation.loss < best_loss):
                    best_loss = validation.loss
                    save_sae(folder / "best", sae, hook, statistics, about | {"step": step})
            if step % config.runtime.checkpoint_every == 0 or interrupted():
                checkpoint = Checkpoint(step, position, best_loss, metrics.bytes(), trainer.kernel.state(), statistics)
                save_checkpoint(folder / "checkpoints", checkpoint, trainer.tensors(), config.runtime.keep_last)
                if interrupted():
                    raise KeyboardInterrupt
            progress.advance(config.batch_size, note)
    save_sae(folder, sae, hook, statistics, about | {"step": steps})


class _Metrics:
    """metrics.jsonl: a line every few steps; cut at a resume to what the checkpoint had seen."""

    def __init__(self, path: Path, keep_bytes: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        if path.stat().st_size < keep_bytes:
            raise UserError(f"{path}: shorter than when the checkpoint was written; it was damaged")
        self._file = path.open("r+b")
        self._file.truncate(keep_bytes)
        self._file.seek(keep_bytes)
        self._path = path
        self._last: tuple[float, int] | None = None

    def __enter__(self) -> "_Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def bytes(self) -> int:
        return self._file.tell()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write((json.dumps(line) + "\n").encode())
        self._file.flush()

    def log_step(self, step: int, tokens: int, stepped: Stepped, dead: int) -> str:
        """Write a step's figures and return the note for the progress bar.

        Raises UserError when the loss or the gradient is no number.
        """
        now = time.monotonic()
        figures = {
            name: float(value)
            for name, value in stepped.result._asdict().items()
            if name not in ("gradients", "fired_F")
        }
        figures["grad_norm"] = float(stepped.grad_norm)
        if not all(map(_finite, figures.values())):
            raise UserError(
                f"{self._path.parent}: the loss is no number at step {step} ({figures}); lower train.lr or "
                "train.clip_norm. The last checkpoint is kept"
            )
        rate = (tokens - self._last[1]) / (now - self._last[0]) if self._last else None
        self._last = (now, tokens)
        schedule = {"lr": stepped.lr, "l1_coefficient": stepped.l1_coefficient, "dead_features": dead}
        head = {"kind": "train", "step": step, "tokens": tokens, "kernel": stepped.kernel}
        self._write(head | figures | schedule | {"tokens_per_second": rate and round(rate)})
        return f"L0 {figures['l0']:.1f}  explained variance {figures['explained_variance']:.3f}"

    def log_validation(self, step: int, validation: Validation) -> None:
        self._write({"kind": "validation", "step": step, **validation._asdict()})


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _last_figures(path: Path) -> dict[str, Any]:
    """The last training and validation figures of a run, for the summary."""
    last = {line["kind"]: line for line in map(json.loads, path.read_text().splitlines())}
    train, validation = last.get("train", {}), last.get("validation", {})
    out = {f"heldout {name}": validation[name] for name in Validation._fields if name in validation}
    return {"steps": train.get("step"), "dead_features": train.get("dead_features"), **out}


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
