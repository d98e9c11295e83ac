"""One SAE on its way: its trainer, its folder of checkpoints and figures, and its place in the stream of batches.

Several of them can be fed from one reading of a store: each takes the batches that it has not seen yet.
"""

from collections import deque
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
            sae = starting_sae(config, hook, g.d_in, self.statistics.scale, device)
            self.statistics = self.statistics._replace(scale=sae.scale)
        else:
            sae = new_sae(config, g.d_in, self.statistics.scale, device)
            if config.sae.b_dec_init_method == "mean" and not found:
                limit = self.statistics.norm_limit
                sae = sae.centered(mean_row(store, hook, config.exclude, limit, config.window_shards))
        self.trainer = Trainer(sae, config, self.steps, rows, compute_dtype, ranks)
        self._writes = ranks.rank == 0
        self.position = Position()
        self.best_loss: float | None = None
        logged: dict[str, Any] = {}
        if found:
            checkpoint, tensors = found
            shapes = {name: tuple(tensors[name].shape) if name in tensors else None for name in sae.parameters}
            if shapes != sae.shapes(g.d_in, sae.d_sae):
                raise UserError(f"{folder}: its checkpoint is of an SAE of shapes {shapes}")
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
        self._writer = BackgroundWriter()
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
        if step % config.validate_every == 0 or self.done:
            validation = self.trainer.validate(validation_rows)
            self.metrics.log_validation(step, validation)
            if warmed and (self.best_loss is None or validation.loss < self.best_loss):
                self.best_loss = validation.loss
                self._save_sae(self.folder / "best")
        if self.done:
            self._save_sae(self.folder)
            self._writer.wait()
        elif step % config.runtime.checkpoint_every == 0:
            self.save_checkpoint()

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

    def _save_sae(self, folder: Path) -> None:
        self._writer.wait()  # before the copy, so that one is held in memory
        sae = self.trainer.whole_sae()
        if sae:
            about = self._about | sae.settings() | {"step": self.step}
            self._writer.submit(lambda: save_sae(folder, sae, self.hook, self.statistics, about))

    def save_checkpoint(self) -> None:
        """Copy everything that a resume needs to the host, and write it while training goes on.

        Collective; rank 0 writes.
        """
        if int(self.trainer.bad_step) >= 0:
            return  # not yet told: a resume from before it finds it again
        self._writer.wait()  # before the copy, so that one is held in memory
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
            list(self.metrics.losses),
            self.metrics.checksum(),
            self._run,
        )
        folder, keep_last = self.folder / "checkpoints", self.config.runtime.keep_last

        def write() -> None:
            self.metrics.sync()  # before a checkpoint that counts on its length
            save_checkpoint(folder, checkpoint, tensors, keep_last)

        self._writer.submit(write)
