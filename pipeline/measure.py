"""Short measurements of this machine for `pipeline estimate`: disk, forward pass, training step, memory.

Each lasts a few seconds, on a part (one decoder layer, some of the features), and is scaled by the part's share of the
work; the notes say so.
"""

import os
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch

from harvest.device import device_name, resolve_device, resolve_dtype, set_threads
from harvest.files import is_out_of_memory
from harvest.language_model import HookedModel
from harvest.progress import size_text
from pipeline.architecture import Architecture
from pipeline.config import PipelineConfig
from pipeline.sizes import Sizes
from train.config import TrainConfig
from train.sae import initial_sae
from train.trainer import Trainer

DISK_BYTES, DISK_SECONDS, BLOCK = 256 << 20, 3.0, 8 << 20
STEP_FLOP = {"cpu": 4e10, "cuda": 1e14}  # of the dense step that is timed: well below a second
LAYER_FLOP = 4e10  # of the one layer that is timed on a CPU
L0_FRACTION = 0.005  # of the features, active in the timed sparse step
L0_DEVIATIONS = 2.576  # a normal variable exceeds as many standard deviations with that probability


class Rate(NamedTuple):
    """A rate or a time, and how it was found; None where it was not."""

    value: float | None
    how: str


class Machine(NamedTuple):
    """How fast a machine is, and its memory."""

    name: str
    is_gpu: bool
    element: int  # bytes of a weight in the forward pass
    memory: int  # bytes for model, SAE and batches: the GPU's, or the host's
    write: Rate  # bytes/s of the disk, with fsync
    read: Rate
    forward: Rate  # tokens/s, up to the last hook
    step: Rate  # seconds, one SAE


def measure(config: PipelineConfig, shape: Architecture, s: Sizes, root: Path) -> Machine:
    """Measure this machine for these settings."""
    device = resolve_device(config.harvest.runtime.device)
    dtype = resolve_dtype(config.harvest.compute_dtype, device)
    set_threads(0, device)
    memory = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory()
    write, read = measure_disk(root)
    forward, step = _forward(config, shape, s.layers, device, dtype, memory), _step(config.train, s, device)
    return Machine(device_name(device), device.type == "cuda", dtype.itemsize, memory, write, read, forward, step)


def measure_disk(folder: Path) -> tuple[Rate, Rate]:
    """Bytes a second written (with fsync) and read back in a file of the folder that has no name and leaves none."""
    folder.mkdir(parents=True, exist_ok=True)
    block, buffer = os.urandom(BLOCK), bytearray(BLOCK)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            descriptor, began, written, read = file.fileno(), time.perf_counter(), 0, 0
            while written < DISK_BYTES and time.perf_counter() - began < DISK_SECONDS:
                written += os.write(descriptor, block)
            os.fsync(descriptor)
            write_rate = written / (time.perf_counter() - began)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            while read < written and time.perf_counter() - began < DISK_SECONDS:
                read += os.preadv(descriptor, [buffer], read)
            read_rate = read / (time.perf_counter() - began)
    except OSError as error:
        missing = Rate(None, f"not measured: {folder}: {error.strerror}")
        return missing, missing
    how = f"measured, {size_text(written)} in {folder}"
    return Rate(write_rate, f"{how}, with fsync"), Rate(read_rate, f"{how}, after asking the system to forget it")


def _forward(
    config: PipelineConfig, shape: Architecture, layers: int, device: torch.device, dtype: torch.dtype, memory: int
) -> Rate:
    """Tokens a second through so many layers, by one of the model's shape."""
    layer = _one_layer(shape, device, dtype, memory)
    if layer is None:
        return Rate(None, "not measured: one layer does not fit into memory, or is none of this kind by itself")
    contexts = config.harvest.batch_contexts if device.type == "cuda" else 1
    tokens = torch.randint(0, 64, (contexts, config.sample.context_size), device=device)
    if device.type == "cpu":
        weights = sum(p.numel() for p in layer.parameters())
        tokens = tokens[:, : max(16, int(LAYER_FLOP / (2 * weights)))]
    hooked = HookedModel(layer, {}, device, layer.get_submodule(shape.skeleton.layer_list))
    compiled = config.harvest.compile and device.type == "cuda"
    with torch.inference_mode():
        if compiled:
            hooked.compile_layers(tokens)
        seconds = _fastest(lambda: hooked.activations(tokens), device)
    counted = f"{tokens.shape[0]} x {tokens.shape[1]} tokens{', compiled' if compiled else ''}"
    how = f"measured on one layer of this shape with random weights, {counted}, times {layers} layers"
    return Rate(tokens.numel() / (seconds * layers), how)


def _one_layer(shape: Architecture, device: torch.device, dtype: torch.dtype, memory: int) -> Any:
    """A model of this shape with one decoder layer; None where there is no such thing, or no room for it."""
    from transformers import AutoModelForCausalLM

    layer = shape.skeleton.model.get_submodule(shape.skeleton.layer_list)[0]  # type: ignore[index]
    if sum(p.numel() for p in layer.parameters()) * dtype.itemsize > memory / 2:
        return None
    config = deepcopy(shape.skeleton.config)
    text = config.get_text_config()
    for name, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers:  # an entry for each layer
            setattr(text, name, value[:1])
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 1, 64, None
    try:
        with device:
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()
    except (ValueError, TypeError, IndexError, KeyError):  # its parts depend on each other (Gemma 3n)
        return None


def _step(train: TrainConfig, s: Sizes, device: torch.device) -> Rate:
    """Seconds of one training step, Adam included, on so many features as a second takes, scaled to all."""
    d_in, batch, kernel = s.geometry.d_in, train.batch_size, "dense" if train.kernel == "dense" else "sparse"
    part = max(64, min(s.d_sae, int(STEP_FLOP[device.type] / (10 * batch * d_in))))
    try:
        sae = initial_sae(d_in, part, 0, device)
        if kernel == "sparse":
            sae.b_enc.fill_(-L0_DEVIATIONS * float(sae.W_enc.norm(dim=0).mean()))
        settings = train.model_copy(update={"kernel": kernel, "lr": 0.0})
        trainer = Trainer(sae, 1.0, settings, 1000, batch, resolve_dtype(train.compute_dtype, device))
        rows = torch.randn(batch, d_in, device=device).bfloat16()
        seconds = _fastest(lambda: trainer.step(rows), device)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return Rate(None, "not measured: out of memory")
    cut = "" if part == s.d_sae else f" on {part:,} of the features, times {s.d_sae / part:.3g}"
    active = f" at an L0 of {L0_FRACTION:.1%} of the features" if kernel == "sparse" else ""
    return Rate(seconds * s.d_sae / part, f"measured, {kernel}{active}{cut}")


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
