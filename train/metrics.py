"""metrics.jsonl: a line every few steps, the same to an optional tracker, and the first look at a run gone wrong."""

import json
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harvest.files import UserError, file_crc32c
from train.dataloader import Reading
from train.trainer import Stepped, Validation

PROJECT = "reasoning-sae"
SPIKE_LINES = 20  # logged losses whose median a spike is measured against


class DivergedError(Exception):
    """The loss is NaN or infinite, or far above what it was, at a step."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(reason)
        self.step = step


def open_tracker(name: str, folder: Path, run_name: str, settings: dict[str, Any]) -> Any:
    """A tracker of accelerate's, begun: tensorboard writes below `folder`, the others where their own settings say.

    Raises UserError when its package is not installed, or it does not start.
    """
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    PartialState(cpu=True)  # trackers log through it; it takes up a process group that is there, and makes none
    try:
        tracker = kind("tensorboard", folder) if kind.requires_logging_directory else kind(PROJECT, name=run_name)
        tracker.main_process_only = False  # rank 0 alone makes one
        tracker.start()
        tracker.store_init_configuration({key: str(value) for key, value in settings.items()})
    except ModuleNotFoundError as error:
        raise UserError(
            f"train.runtime.tracker: {name!r}: {error.name} is not installed; "
            f"`.venv/bin/pip install {name}`, or train.runtime.tracker=null"
        ) from None
    except Exception as error:  # whatever a tracker's service answers
        raise UserError(f"train.runtime.tracker: {name!r} does not start: {error}; null takes it away") from None
    return tracker


class _Mark(NamedTuple):
    """When a line was written, for the speed since then."""

    time: float
    step: int
    reading: Reading


class Metrics:
    """Appends to metrics.jsonl, cut at a resume to what the checkpoint had seen; `path` None writes nothing."""

    def __init__(
        self,
        path: Path | None,
        keep_bytes: int,
        spike_factor: float | None,
        tracker: Any = None,
        losses: Sequence[float] = (),
        crc32c: int | None = None,
    ) -> None:
        """`losses`: the last ones that were logged before a resume; `crc32c`: of the file up to `keep_bytes`.

        Raises UserError for a file that is shorter than `keep_bytes`, or has changed.
        """
        self._file, self._tracker, self._spike_factor = None, tracker, spike_factor
        self.losses: deque[float] = deque(losses, maxlen=SPIKE_LINES)
        self._last: _Mark | None = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        if path.stat().st_size < keep_bytes:
            raise UserError(f"{path}: shorter than when the checkpoint was written; restore it, or train with --force")
        if crc32c is not None and file_crc32c(path, keep_bytes) != crc32c:
            raise UserError(f"{path}: has changed since the checkpoint was written; restore it, or train with --force")
        self._file = path.open("r+b")
        self._file.truncate(keep_bytes)
        self._file.seek(keep_bytes)

    def bytes(self) -> int:
        """Length of the file so far."""
        return self._file.tell() if self._file else 0

    def checksum(self) -> int | None:
        """crc32c of the file so far."""
        return file_crc32c(Path(self._file.name)) if self._file else None

    def _write(self, line: dict[str, Any]) -> None:
        if self._file:
            self._file.write((json.dumps(line) + "\n").encode())
            self._file.flush()
        if self._tracker:
            flat = line | line.get("timings", {})
            figures = {f"{line['kind']}/{name}": v for name, v in flat.items() if isinstance(v, int | float)}
            self._tracker.log(figures, step=line["step"])

    def log_step(
        self, step: int, batch_size: int, stepped: Stepped, bad_step: int, dead: int, reading: Reading, warmed: bool
    ) -> str:
        """Write a step's figures and return the note for the progress bar.

        `bad_step` is the first step whose loss or gradient was NaN or infinite, or −1. Raises DivergedError for one,
        and once penalties are `warmed` for a loss above spike_factor times the median of the last logged ones.
        """
        found = stepped.result
        tensors = {"loss": stepped.loss, **found.terms}
        tensors |= {name: getattr(found, name) for name in ("l0", "explained_variance", "explained_variance_legacy")}
        figures = {name: float(value) for name, value in tensors.items()} | {"grad_norm": float(stepped.grad_norm)}
        loss = figures["loss"]
        if bad_step >= 0 or not all(map(math.isfinite, figures.values())):
            first = bad_step + 1 if bad_step >= 0 else step
            raise DivergedError(first, f"the loss is NaN or infinite at step {first}")
        if self._spike_factor and len(self.losses) == SPIKE_LINES:
            usual = statistics.median(self.losses)
            if loss > self._spike_factor * usual:
                raise DivergedError(step, f"the loss rose to {loss:g} at step {step}, from {usual:g}")
        if warmed:
            self.losses.append(loss)
        now = _Mark(time.monotonic(), step, reading)
        timings = _timings(self._last, now, batch_size) if self._last else {}
        self._last = now
        head = {"kind": "train", "step": step, "tokens": step * batch_size, "kernel": stepped.kernel}
        coefficients = {f"{name}_coefficient": value for name, value in stepped.coefficients.items()}
        schedule = {"lr": stepped.lr, **coefficients, "dead_features": dead}
        self._write(head | figures | schedule | {"timings": timings})
        note, stalled = (
            f"L0 {figures['l0']:.1f}  EV {figures['explained_variance']:.3f}",
            timings.get("stall_fraction", 0),
        )
        return f"{note}  waits for the disk {stalled:.0%} of the time" if stalled > 0.1 else note

    def log_validation(self, step: int, validation: Validation) -> None:
        """Write the figures of held-out rows."""
        self._write({"kind": "validation", "step": step, **validation._asdict()})

    def sync(self) -> None:
        """Make what was written survive a power cut."""
        if self._file:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close file and tracker."""
        if self._file:
            self._file.close()
        if self._tracker:
            self._tracker.finish()


def _timings(before: _Mark, now: _Mark, batch_size: int) -> dict[str, float]:
    seconds, steps = max(now.time - before.time, 1e-9), now.step - before.step
    stall = now.reading.stall_seconds - before.reading.stall_seconds
    return {
        "tokens_per_second": round(steps * batch_size / seconds),
        "gigabytes_read_per_second": round((now.reading.bytes - before.reading.bytes) / seconds / 1e9, 3),
        "stall_ms_per_step": round(1000 * stall / steps, 2),
        "stall_fraction": round(stall / seconds, 3),
        "pool_fill": round(now.reading.pool_fill, 3),
    }


def last_figures(folder: Path) -> dict[str, Any]:
    """The last training and validation figures of a folder, for the summary."""
    last = {line["kind"]: line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}
    train, validation = last.get("train", {}), last.get("validation", {})
    out = {f"heldout {name}": validation[name] for name in Validation._fields if name in validation}
    return {"steps": train.get("step"), "dead_features": train.get("dead_features"), **out}
