"""One SAE on its way: its trainer, its folder of checkpoints and figures, and its place in the stream of batches.

Several of them can be fed from one reading of a store: each takes the batches that it has not seen yet.
"""

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harvest.activation_store import ActivationStore
from harvest.files import UserError
from train.checkpoint import ABOUT, Checkpoint, newest_checkpoint, save_checkpoint, save_sae
from train.config import TrainConfig
from train.dataloader import Batch, Position, Reading
from train.exclusion import InputStatistics, input_statistics
from train.parallel import FeatureRanks
from train.sae import initial_sae
from train.trainer import Stepped, Trainer, Validation


def total_steps(config: TrainConfig, rows: int) -> int:
    """Steps of a run over a store of so many training rows."""
    tokens = config.training_tokens or int((config.epochs or 0) * rows)
    return max(1, tokens // config.batch_size)


def is_trained(folder: Path) -> bool:
    """Whether a folder holds an SAE after its last step."""
    return (folder / ABOUT).exists()


class Training:
    """An SAE being trained into `folder`, from its newest checkpoint on.

    Raises UserError for a checkpoint that is damaged or does not fit.
    """

    def __init__(
        self,
        config: TrainConfig,
        store: ActivationStore,
        hook: str,
        folder: Path,
        device: torch.device,
        compute_dtype: torch.dtype,
        ranks: FeatureRanks,
    ) -> None:
        g = store.geometry
        rows = g.train_shards * g.shard_rows
        self.config, self.hook, self.folder = config, hook, folder
        self.steps = total_steps(config, rows)
        found = newest_checkpoint(folder / "checkpoints")
        self.statistics: InputStatistics = (
            found[0].statistics if found else input_statistics(store, hook, config.exclude, config.window_shards)
        )
        shape = (g.d_in, config.sae.width(g.d_in))
        sae = initial_sae(*shape, config.seed, device)
        self.trainer = Trainer(sae, self.statistics.scale, config, self.steps, rows, compute_dtype, ranks)
        self._writes = ranks.rank == 0
        self.position = Position()
        self.best_loss: float | None = None
        metrics_bytes = 0
        if found:
            checkpoint, tensors = found
            if tensors["W_enc"].shape != shape:
                raise UserError(f"{folder}: its checkpoint is of an SAE of shape {tuple(tensors['W_enc'].shape)}")
            self.trainer.restore(tensors, checkpoint.step, checkpoint.kernel)
            self.position, self.best_loss = checkpoint.position, checkpoint.best_loss
            metrics_bytes = checkpoint.metrics_bytes
        self.metrics = Metrics(folder / "metrics.jsonl" if self._writes else Path(os.devnull), metrics_bytes)
        self.note = ""
        self._about = {
            "architecture": "standard",
            "model": store.attributes.get("model"),
            "context_size": g.context_size,
        }

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.trainer.step_number

    @property
    def done(self) -> bool:
        return self.step >= self.steps

    def take(self, batch: Batch, reading: Reading, validation_rows: Tensor) -> None:
        """Train on the next batch, and log, validate and save when it is time to.

        Raises UserError when the loss is no number.
        """
        config, stepped = self.config, self.trainer.step(batch.rows_BD)
        self.position, step = batch.next, self.step
        if step % config.runtime.log_every == 0 or self.done:
            try:
                self.note = self.metrics.log_step(
                    step, config.batch_size, stepped, self.trainer.dead_features(), reading
                )
            except FloatingPointError as error:
                at = ", ".join(f"{name} {value}" for name, value in batch.next._asdict().items())
                raise UserError(
                    f"{self.folder}: the loss is no number at step {step} ({error}), whose batch ends at {at}; "
                    "the last checkpoint is kept. "
                    f"Lower train.lr ({config.lr:g}) or train.clip_norm ({config.clip_norm:g})"
                ) from None
        if step % config.validate_every == 0 or self.done:
            validation = self.trainer.validate(validation_rows)
            self.metrics.log_validation(step, validation)
            warmed = step >= round(self.steps * config.l1_warmup_fraction)
            if warmed and (self.best_loss is None or validation.loss < self.best_loss):
                self.best_loss = validation.loss
                self._save_sae(self.folder / "best")
        if self.done:
            self._save_sae(self.folder)
        elif step % config.runtime.checkpoint_every == 0:
            self.save_checkpoint()

    def _save_sae(self, folder: Path) -> None:
        sae = self.trainer.whole_sae()
        if sae:
            save_sae(folder, sae, self.hook, self.statistics, self._about | {"step": self.step})

    def save_checkpoint(self) -> None:
        """Write everything that a resume needs; collective, and written by rank 0."""
        tensors = self.trainer.tensors()
        if not self._writes:
            return
        checkpoint = Checkpoint(
            self.step,
            self.position,
            self.best_loss,
            self.metrics.bytes(),
            self.trainer.kernel.state(),
            self.statistics,
        )
        save_checkpoint(self.folder / "checkpoints", checkpoint, tensors, self.config.runtime.keep_last)


class Metrics:
    """metrics.jsonl: a line every few steps; cut at a resume to what the checkpoint had seen."""

    def __init__(self, path: Path, keep_bytes: int) -> None:
        if path == Path(os.devnull):  # a rank that does not write
            self._file = path.open("wb")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            if path.stat().st_size < keep_bytes:
                raise UserError(f"{path}: shorter than when the checkpoint was written; it was damaged")
            self._file = path.open("r+b")
            self._file.truncate(keep_bytes)
            self._file.seek(keep_bytes)
        self._last: _Mark | None = None

    def bytes(self) -> int:
        return self._file.tell()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write((json.dumps(line) + "\n").encode())
        self._file.flush()

    def log_step(self, step: int, batch_size: int, stepped: Stepped, dead: int, reading: Reading) -> str:
        """Write a step's figures and return the note for the progress bar.

        Raises FloatingPointError when the loss or the gradient is no number.
        """
        results = stepped.result._asdict()
        figures = {name: float(value) for name, value in results.items() if name not in ("gradients", "fired_F")}
        figures["grad_norm"] = float(stepped.grad_norm)
        if not all(value == value and abs(value) != float("inf") for value in figures.values()):
            raise FloatingPointError(f"loss {figures['loss']:g}, gradient norm {figures['grad_norm']:g}")
        now = _Mark(time.monotonic(), step, reading)
        timings = now.since(self._last, batch_size) if self._last else {}
        self._last = now
        head = {"kind": "train", "step": step, "tokens": step * batch_size, "kernel": stepped.kernel}
        schedule = {"lr": stepped.lr, "l1_coefficient": stepped.l1_coefficient, "dead_features": dead}
        self._write(head | figures | schedule | {"timings": timings})
        waits = timings.get("stall_fraction", 0) > 0.1
        note = f"L0 {figures['l0']:.1f}  explained variance {figures['explained_variance']:.3f}"
        return f"{note}  waits for the disk {timings['stall_fraction']:.0%} of the time" if waits else note

    def log_validation(self, step: int, validation: Validation) -> None:
        self._write({"kind": "validation", "step": step, **validation._asdict()})

    def close(self) -> None:
        self._file.close()


class _Mark(NamedTuple):
    """When a line was written, for the speed since then."""

    time: float
    step: int
    reading: Reading

    def since(self, before: "_Mark", batch_size: int) -> dict[str, float]:
        seconds = max(self.time - before.time, 1e-9)
        stall = self.reading.stall_seconds - before.reading.stall_seconds
        return {
            "tokens_per_second": round((self.step - before.step) * batch_size / seconds),
            "gigabytes_read_per_second": round((self.reading.bytes - before.reading.bytes) / seconds / 1e9, 3),
            "stall_ms_per_step": round(1000 * stall / (self.step - before.step), 2),
            "stall_fraction": round(stall / seconds, 3),
        }


def last_figures(folder: Path) -> dict[str, Any]:
    """The last training and validation figures of a folder, for the summary."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    last = {line["kind"]: line for line in map(json.loads, lines)}
    train, validation = last.get("train", {}), last.get("validation", {})
    out = {f"heldout {name}": validation[name] for name in Validation._fields if name in validation}
    return {"steps": train.get("step"), "dead_features": train.get("dead_features"), **out}
