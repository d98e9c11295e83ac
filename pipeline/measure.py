"""Short measurements of this machine for `pipeline estimate`: disk, forward pass, training step, memory.

Each lasts a few seconds. What does not fit is measured on a part (one decoder layer, some of the features)
and scaled by the part's share of the work; `how` says so.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from harvest.device import device_name, resolve_device, resolve_dtype, set_threads
from harvest.files import UserError, is_out_of_memory
from harvest.language_model import HookedModel, load_model
from harvest.progress import size_text
from pipeline.architecture import Architecture
from pipeline.config import PipelineConfig
from train.config import TrainConfig
from train.kinds import new_sae
from train.trainer import Trainer

DISK_BYTES, DISK_SECONDS = 256 << 20, 3.0
BLOCK = 8 << 20
STEP_FLOP = {"cpu": 4e10, "cuda": 1e14}  # of the dense step that is timed: well below a second
LAYER_FLOP = 4e10  # of the one layer that is timed on a CPU
L0_FRACTION = 0.005  # of the features, active in the timed sparse step
L0_DEVIATIONS = 2.576  # a normal variable exceeds as many standard deviations with that probability


class Rate(NamedTuple):
    """A rate or a time, and how it was found; None where it was not."""

    value: float | None
    how: str


class Measured(NamedTuple):
    """What was measured on this machine."""

    device: str
    is_gpu: bool
    element: int  # bytes of a number in the forward pass
    memory: int  # bytes free for the model and the batch: the GPU's, or the host's
    disk_write: Rate  # bytes/s, with fsync
    disk_read: Rate  # bytes/s
    forward: Rate  # tokens/s, up to the last hook
    dense_step: Rate  # seconds of one SAE
    sparse_step: Rate


def measure(config: PipelineConfig, shape: Architecture, layers: int, root: Path) -> Measured:
    """Measure for these settings; `layers` are the decoder layers up to the last hook."""
    device = resolve_device(config.harvest.runtime.device)
    dtype = resolve_dtype(config.harvest.compute_dtype, device)
    set_threads(0, device)
    memory = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    write, read = measure_disk(root)
    forward = _forward(config, shape, layers, device, dtype, memory)
    d_in = shape.skeleton.config.get_text_config().hidden_size
    dense, sparse = (_step(config.train, d_in, kernel, device) for kernel in ("dense", "sparse"))
    return Measured(
        device_name(device), device.type == "cuda", dtype.itemsize, memory, write, read, forward, dense, sparse
    )


def measure_disk(folder: Path) -> tuple[Rate, Rate]:
    """Bytes a second written (with fsync) and read back in a file of the folder that has no name and leaves none."""
    folder.mkdir(parents=True, exist_ok=True)
    block = os.urandom(BLOCK)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            descriptor, began, written = file.fileno(), time.perf_counter(), 0
            while written < DISK_BYTES and time.perf_counter() - began < DISK_SECONDS:
                written += os.write(descriptor, block)
            os.fsync(descriptor)
            write = written / (time.perf_counter() - began)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            buffer, read, began = bytearray(BLOCK), 0, time.perf_counter()
            while read < written and time.perf_counter() - began < DISK_SECONDS:
                read += os.preadv(descriptor, [buffer], read)
            rate = read / (time.perf_counter() - began)
    except OSError as error:
        missing = Rate(None, f"not measured: {folder}: {error.strerror}")
        return missing, missing
    how = f"measured, {size_text(written)} in {folder}"
    return Rate(write, f"{how}, with fsync"), Rate(rate, f"{how}, after asking the system to drop it from memory")


def _forward(
    config: PipelineConfig, shape: Architecture, layers: int, device: torch.device, dtype: torch.dtype, memory: int
) -> Rate:
    """Tokens a second of the real model where its folder is at hand, else of one layer of its shape."""
    size = config.sample.context_size
    contexts = config.harvest.batch_contexts if device.type == "cuda" else 1
    tokens = torch.randint(0, 64, (contexts, size), device=device)
    with torch.inference_mode():
        if shape.has_model and shape.folder:
            hooked = load_model(config.model, None, config.harvest.hooks, dtype, device, offline=True)
            note = _compile(config, hooked, tokens)
            seconds = fastest(lambda: hooked.activations(tokens), device)
            return Rate(tokens.numel() / seconds, f"measured, the model on {contexts} x {size} tokens{note}")
        layer = _one_layer(shape, device, dtype, memory)
        if layer is None:
            return Rate(None, "not measured: one layer does not fit into memory, or is none of this kind by itself")
        if device.type == "cpu":
            weights = sum(p.numel() for p in layer.parameters())
            tokens = tokens[:, : max(16, int(LAYER_FLOP / (2 * weights)))]
        hooked = HookedModel(layer, {}, device, layer.get_submodule(shape.skeleton.layer_list))
        note = _compile(config, hooked, tokens)
        seconds = fastest(lambda: hooked.activations(tokens), device)
    counted = f"{tokens.shape[0]} x {tokens.shape[1]} tokens"
    how = f"measured on one layer of this shape with random weights, {counted}, times {layers} layers{note}"
    return Rate(tokens.numel() / (seconds * layers), how)


def _compile(config: PipelineConfig, hooked: HookedModel, tokens: torch.Tensor) -> str:
    """Compile where the harvest will and it is quick; what to say where not."""
    if not config.harvest.compile:
        return ""
    if hooked.device.type == "cpu":
        return ", not compiled"
    try:
        hooked.compile_layers(tokens)
    except UserError as error:
        return f", not compiled ({error})"
    return ", compiled"


def _one_layer(shape: Architecture, device: torch.device, dtype: torch.dtype, memory: int) -> Any:
    from copy import deepcopy

    from transformers import AutoModelForCausalLM

    layer = shape.skeleton.model.get_submodule(shape.skeleton.layer_list)[0]  # type: ignore[index]
    if sum(p.numel() for p in layer.parameters()) * dtype.itemsize > memory / 2:
        return None
    config = deepcopy(shape.skeleton.config)
    text = config.get_text_config()
    _first_layer(text)
    text.vocab_size, text.pad_token_id = 64, None
    try:
        with device:
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()
    except (ValueError, TypeError, IndexError, KeyError):  # its parts depend on each other (Gemma 3n)
        return None


def _first_layer(config: Any) -> None:
    """Make it a configuration of one decoder layer; per-layer lists are cut alike."""
    total = config.num_hidden_layers
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == total:
            setattr(config, name, value[:1])
    config.num_hidden_layers = 1


def _step(train: TrainConfig, d_in: int, kernel: Any, device: torch.device) -> Rate:
    """Seconds of one training step, Adam included, on so many features as a second takes, scaled to all."""
    d_sae, batch = train.sae.width(d_in), train.batch_size
    part = max(64, min(d_sae, int(STEP_FLOP[device.type] / (10 * batch * d_in))))
    dtype = resolve_dtype(train.compute_dtype, device)
    try:
        narrow = train.sae.model_copy(update={"d_sae": part, "expansion_factor": None})
        sae = new_sae(train.model_copy(update={"sae": narrow}), d_in, 1.0, device)
        if kernel == "sparse":
            sae.b_enc.fill_(-L0_DEVIATIONS * float(sae.W_enc.norm(dim=0).mean()))
        settings = train.model_copy(update={"kernel": kernel, "lr": 0.0})
        trainer = Trainer(sae, settings, 1000, batch, dtype)
        rows = torch.randn(batch, d_in, device=device).bfloat16()
        seconds = fastest(lambda: trainer.step(rows), device)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return Rate(None, "not measured: out of memory")
    except UserError as error:
        return Rate(None, f"not measured: {error}")
    cut = "" if part == d_sae else f" on {part:,} of the features, times {d_sae / part:.3g}"
    active = f" at an L0 of {L0_FRACTION:.1%} of the features" if kernel == "sparse" else ""
    return Rate(seconds * d_sae / part, f"measured{active}{cut}")


def fastest(action: Callable[[], Any], device: torch.device, budget: float = 1.5) -> float:
    """Seconds of the fastest of up to five calls after a first one, within a budget of seconds."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 6 and (not times or time.perf_counter() - began + times[-1] < budget):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def free_memory() -> int:
    """Bytes of host memory that can still be taken: the system's, or the limit of this process' control group."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no such limit, or "max"
        return free
    return max(0, min(free, limit))
