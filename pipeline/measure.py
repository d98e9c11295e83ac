"""Short measurements of this machine for `pipeline estimate`: disk, a matrix product, one training step, memory."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from harvest.device import device_name, resolve_device, resolve_dtype, set_threads
from harvest.files import UserError, is_out_of_memory
from pipeline.config import PipelineConfig
from pipeline.sizes import Sizes
from train.config import TrainConfig
from train.kinds import new_sae
from train.trainer import Trainer

DISK_BYTES = 128 << 20
PRODUCT_FLOP = {"cpu": 1e10, "cuda": 1e13}
WEIGHT_BYTES = 256 << 20
STEP_FLOP = {"cpu": 4e10, "cuda": 1e14}  # of the dense step that is timed: well below a second
ACTIVE = 0.005  # L0 of the timed step, as a part of its features
ACTIVE_DEVIATIONS = 2.576  # of a normal variable; it is above with that probability
# What part of the rate of its matrix products a forward pass reaches, eager and compiled, writing included: measured
# for 20 layers of the 8B shape on an H100 (benchmarks/results.md).
FORWARD_PART = {False: 0.57, True: 0.71}


class Machine(NamedTuple):
    """How fast a machine is; None where nothing is known."""

    name: str
    is_gpu: bool
    element: int  # bytes of a weight in the forward pass
    memory: int  # bytes for model, SAE and batches: the GPU's, or the host's
    write: float | None  # bytes/s of the disk, with fsync
    read: float | None
    forward: float | None  # tokens/s, up to the last hook
    step: float | None  # seconds, one SAE
    note: str  # how the rates were found


def measure(config: PipelineConfig, s: Sizes, root: Path) -> Machine:
    """Measure this machine for these settings: a product of the model's width, a step on some of the features."""
    device = resolve_device(config.harvest.runtime.device)
    dtype = resolve_dtype(config.harvest.compute_dtype, device)
    set_threads(0, device)
    memory = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory()
    write, read = measure_disk(root)
    forward = FORWARD_PART[config.harvest.compile] * _product_rate(s.geometry.d_in, dtype, device) / s.flop_per_token
    step, note = None, "by the rate of a matrix product"
    if config.train:
        step, part = _step(config.train, s, device)
        note += f"; measured on {part:,} features at an L0 of 0.5%"
    return Machine(device_name(device), device.type == "cuda", dtype.itemsize, memory, write, read, forward, step, note)


def measure_disk(folder: Path) -> tuple[float, float]:
    """Bytes a second written (with fsync) and read back in a file of the folder that has no name and leaves none."""
    folder.mkdir(parents=True, exist_ok=True)
    data = os.urandom(DISK_BYTES)
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - began
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began = time.perf_counter()
        file.read()
        return DISK_BYTES / written, DISK_BYTES / (time.perf_counter() - began)


def _product_rate(d_in: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP a second of products with a matrix of d_in x 4 d_in, as decoder layers have them."""
    rows = max(16, int(PRODUCT_FLOP[device.type] / (8 * d_in * d_in)))
    x, weights = (
        torch.randn(rows, d_in, dtype=dtype, device=device),
        torch.randn(d_in, 4 * d_in, dtype=dtype, device=device),
    )
    return 8 * rows * d_in * d_in / _fastest(lambda: x @ weights, device)


def measure_weights(d_in: int, rows: int, dtype: torch.dtype, device: torch.device) -> float:
    """Bytes of weights a second in products of few rows with matrices that no cache holds, as decoding has them."""
    size = 4 * d_in * d_in * dtype.itemsize
    weights = [torch.randn(4 * d_in, d_in, dtype=dtype, device=device) for _ in range(max(2, WEIGHT_BYTES // size))]
    x = torch.randn(rows, d_in, dtype=dtype, device=device)
    return len(weights) * size / _fastest(lambda: [torch.nn.functional.linear(x, each) for each in weights], device)


def _step(train: TrainConfig, s: Sizes, device: torch.device) -> tuple[float | None, int]:
    """Seconds of one training step, Adam included, scaled from so many features as a second takes; and how many.

    Of several kinds of SAE the mean; without dead features, whose revival is one more product.
    """
    of_kinds = {single.sae.kind: single for single in train.expanded()}.values()
    found = [_step_of_kind(single, s, device) for single in of_kinds]
    seconds = [each for each, _ in found if each is not None]
    return sum(seconds) / len(seconds) if len(seconds) == len(found) else None, found[0][1]


def _step_of_kind(train: TrainConfig, s: Sizes, device: torch.device) -> tuple[float | None, int]:
    d_in, batch, kernel = s.geometry.d_in, train.batch_size, "dense" if train.kernel == "dense" else "sparse"
    part = max(64, min(s.d_sae, int(STEP_FLOP[device.type] / (10 * batch * d_in))))
    try:
        of_rank = "k" in train.sae.hyperparameters()
        rule = {"k": max(1, round(ACTIVE * part))} if of_rank else {}
        width = {"d_sae": part, "expansion_factor": None, "prefixes": None}
        narrow = train.sae.model_copy(update=width | rule)
        settings = train.model_copy(update={"kernel": kernel, "lr": 0.0, "sae": narrow})
        sae = new_sae(settings, d_in, 1.0, device)
        if not of_rank:  # what is active hangs on the weights, and on thresholds where there are some
            sae.b_enc.copy_(getattr(sae, "threshold", 0.0) - ACTIVE_DEVIATIONS * sae.W_enc.norm(dim=0).mean())
        trainer = Trainer(sae, settings, 1000, batch, resolve_dtype(train.compute_dtype, device))
        rows = torch.randn(batch, d_in, device=device).bfloat16()
        return _fastest(lambda: trainer.step(rows), device) * s.d_sae / part, part
    except (MemoryError, RuntimeError, UserError) as error:
        if not isinstance(error, UserError) and not is_out_of_memory(error):
            raise
        return None, part


def _fastest(action: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of five calls after a first one; of fewer where they are slow."""
    times: list[float] = []
    while len(times) < 6 and sum(times) < 1.5:
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _free_memory() -> int:
    """Bytes of host memory that can still be taken: the system's, or the limit of this process' control group."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no such limit, or "max"
        return free
    return max(0, min(free, limit))
