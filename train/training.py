"""One SAE on its way: its trainer, its folder of checkpoints and figures, and its place in the stream of batches.

Several of them can be fed from one reading of a store: each takes the batches that it has not seen yet.
"""

import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harvest.activation_store import ActivationStore
from harvest.files import UserError
from train.background import BackgroundWriter
from train.checkpoint import ABOUT, Checkpoint, newest_checkpoint, run_fingerprint, save_checkpoint, save_sae
from train.config import TrainConfig
from train.dataloader import ActivationLoader, Batch, Position
from train.exclusion import InputStatistics, input_statistics, mean_row
from train.kinds import new_sae
from train.metrics import DivergedError, Metrics, open_tracker
from train.parallel import FeatureRanks
from train.start import starting_sae
from train.trainer import Trainer


def total_steps(config: TrainConfig, rows: int) -> int:
    """Steps of a run over a store of so many training rows.

    Raises UserError where they do not fill a batch.
    """
    try:
        return config.batches(rows)
    except ValueError as error:
        raise UserError(str(error)) from None


def is_trained(folder: Path) -> bool:
    """Whether a folder holds an SAE after its last step."""
    return (folder / ABOUT).exists()


class _Fed(NamedTuple):
    """A step and where its batch began and ended."""

    step: int
    start: Position
    end: Position


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
        if config.start_from and not found:
            sae = starting_sae(config, hook, g.d_in, self.statistics.scale, "cpu", ranks)
            self.statistics = self.statistics._replace(scale=sae.scale)
        else:
            sae = new_sae(config, g.d_in, self.statistics.scale, "cpu", ranks)
            if config.sae.b_dec_init_method == "mean" and not found:
                limit = self.statistics.norm_limit
                sae = sae.centered(mean_row(store, hook, config.exclude, limit, config.window_shards))
        self.trainer = Trainer(sae, config, self.steps, rows, compute_dtype, ranks, device)
        self._writes = ranks.rank == 0
        self.position = Position()
        self.best_loss: float | None = None
        logged: dict[str, Any] = {}
        if found:
            checkpoint, tensors = found
            shapes = {name: tuple(tensors[name].shape) if name in tensors else None for name in sae.parameters}
            if shapes != sae.shapes(g.d_in, self.trainer.d_sae):
                raise UserError(f"{folder}: its checkpoint is of an SAE of shapes {shapes}; train with --force")
            self.trainer.restore(tensors, checkpoint.step, checkpoint.kernel)
            self.position, self.best_loss = checkpoint.position, checkpoint.best_loss
            logged = {"losses": checkpoint.losses, "crc32c": checkpoint.metrics_crc32c}
        runtime, tracker = config.runtime, None
        if runtime.tracker and self._writes:
            settings = config.model_dump(exclude={"runtime", "sweep"}) | {"hook": hook}
            tracker = open_tracker(runtime.tracker, folder, f"{folder.parent.name} {hook}", settings)
        path = folder / "metrics.jsonl" if self._writes else None
        seen = found[0].metrics_bytes if found else 0
        self.metrics = Metrics(path, seen, runtime.spike_factor, tracker, **logged)
        self.note = ""
        self._writer, self._host = BackgroundWriter(), dict[str, Tensor]()
        self._saved_at = time.monotonic()
        self._recent: deque[_Fed] = deque(maxlen=runtime.log_every)
        self._run = run_fingerprint(folder)
        self._about = {
            **({"fingerprint": self._run} if self._run else {}),
            "architecture": sae.kind,
            "model": store.attributes.get("model"),
            "context_size": store.attributes.get("ingested", g._asdict())["context_size"],
        }

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.trainer.step_number

    @property
    def done(self) -> bool:
        """Whether the last step is made."""
        return self.step >= self.steps

    def take(self, batch: Batch, loader: ActivationLoader, validation_rows: Tensor) -> None:
        """Train on the next batch, and log, validate (on rows as stored, (rows, d_in)) and save when it is time to.

        Raises UserError when the loss is NaN, infinite or spikes, and OSError when a write behind it failed.
        """
        self._writer.wait(only_if_done=True)
        config, stepped = self.config, self.trainer.step(batch.rows_BD)
        step, warmed = self.step, self.step >= round(self.steps * self.config.l1_warmup_fraction)
        self._recent.append(_Fed(step, self.position, batch.next))
        self.position = batch.next
        if step % config.runtime.log_every == 0 or self.done:
            bad_step, dead = int(self.trainer.bad_step), self.trainer.dead_features()
            try:
                read = loader.reading
                self.note = self.metrics.log_step(step, config.batch_size, stepped, bad_step, dead, read, warmed)
            except DivergedError as error:
                raise self._explained(error, loader) from None
        folders = []
        if step % config.validate_every == 0 or self.done:
            validation = self.trainer.validate(validation_rows)
            self.metrics.log_validation(step, validation)
            if warmed and (self.best_loss is None or validation.loss < self.best_loss):
                self.best_loss = validation.loss
                folders.append(self.folder / "best")
        if self.done:
            folders.append(self.folder)
        self._save(folders, checkpoint=not self.done and self._checkpoint_due())
        if self.done:
            self._writer.wait()

    def _checkpoint_due(self) -> bool:
        """Collective: due on all ranks when it is on one."""
        runtime = self.config.runtime
        if runtime.checkpoint_every and self.step % runtime.checkpoint_every == 0:
            return True
        if runtime.checkpoint_minutes is None or self.step % runtime.log_every:  # the host waits at a log line anyway
            return False
        return self.trainer.ranks.any(time.monotonic() - self._saved_at >= 60 * runtime.checkpoint_minutes)

    def _explained(self, error: DivergedError, loader: ActivationLoader) -> UserError:
        config = self.config
        try:
            rows = next(loader.describe(fed.start, fed.end) for fed in self._recent if fed.step == error.step)
        except (StopIteration, UserError):  # a stream has deleted them
            rows = "unknown"
        return UserError(
            f"{self.folder}: {error}; the last checkpoint is kept. Rows of its batch with the largest norms: {rows}. "
            f"Lower train.lr ({config.lr:g}) or train.clip_norm ({config.clip_norm:g}), or leave such rows out by "
            f"train.exclude; train.runtime.spike_factor ({config.runtime.spike_factor}) says what a spike is"
        )

    def close(self) -> None:
        """Finish what is being written."""
        try:
            self._writer.close()
        finally:
            self.metrics.close()

    def save_checkpoint(self) -> None:
        """Write everything that a resume needs, while training goes on. Collective."""
        self._save((), checkpoint=True)

    def _save(self, folders: Sequence[Path], checkpoint: bool) -> None:
        """Copy what is to be saved to the host, once, and write it while training goes on: the SAE into each folder,
        then a checkpoint.

        Collective; rank 0 writes.
        """
        if checkpoint and int(self.trainer.bad_step) >= 0:
            checkpoint = False  # not yet told: a resume from before it finds it again
        if checkpoint:
            self._saved_at = time.monotonic()
        if not folders and not checkpoint:
            return
        self._writer.wait()  # it reads the copy that is written over now
        tensors = self.trainer.tensors(self._host) if checkpoint else self.trainer.weights(self._host)
        if not self._writes:
            return
        sae, about = self.trainer.sae_of(tensors), self._about | {"step": self.step}
        state = self._state() if checkpoint else None

        def write() -> None:
            if folders:
                finished = sae.finished()
                for folder in folders:
                    save_sae(folder, finished, self.hook, self.statistics, about | finished.settings())
            if state:
                self.metrics.sync()  # before a checkpoint that counts on its length
                save_checkpoint(self.folder / "checkpoints", state, tensors, self.config.runtime.keep_last)

        self._writer.submit(write)

    def _state(self) -> Checkpoint:
        return Checkpoint(
            self.step,
            self.position,
            self.best_loss,
            self.metrics.bytes(),
            self.trainer.kernel.state(),
            self.statistics,
            list(self.metrics.losses),
            self.metrics.checksum(),
            self._run,
        )
