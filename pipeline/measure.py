"""Short measurements of this machine for `pipeline estimate`: disk, one decoder layer, one training step, memory."""

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
from pipeline.architecture import Architecture
from pipeline.config import PipelineConfig
from pipeline.sizes import Sizes
from train.config import TrainConfig
from train.sae import initial_sae
from train.trainer import Trainer

DISK_BYTES = 128 << 20
STEP_FLOP = {"cpu": 4e10, "cuda": 1e14}  # of the dense step that is timed: well below a second
LAYER_FLOP = 4e10  # of the layer that is timed on a CPU
ACTIVE_DEVIATIONS = 2.576  # of a normal variable; it is above with a probability of 0.5%, the L0 of the timed step


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


def measure(config: PipelineConfig, shape: Architecture, s: Sizes, root: Path) -> Machine:
    """Measure this machine for these settings: on one decoder layer with random weights, and some of the features."""
    device = resolve_device(config.harvest.runtime.device)
    dtype = resolve_dtype(config.harvest.compute_dtype, device)
    set_threads(0, device)
    memory = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory()
    write, read = measure_disk(root)
    layer = _one_layer(shape, device, dtype, memory)
    forward = _layer_rate(config, shape, layer, device) / s.layers if layer else None
    step, part = _step(config.train, s, device)
    note = f"measured on one layer of this shape, times {s.layers}; on {part:,} features at an L0 of 0.5%"
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


def _layer_rate(config: PipelineConfig, shape: Architecture, layer: Any, device: torch.device) -> float:
    """Tokens a second of one layer."""
    contexts = config.harvest.batch_contexts if device.type == "cuda" else 1
    tokens = torch.randint(0, 64, (contexts, config.sample.context_size), device=device)
    if device.type == "cpu":
        weights = sum(p.numel() for p in layer.parameters())
        tokens = tokens[:, : max(16, int(LAYER_FLOP / (2 * weights)))]
    hooked = HookedModel(layer, {}, device, layer.get_submodule(shape.skeleton.layer_list))
    with torch.inference_mode():
        if config.harvest.compile and device.type == "cuda":
            hooked.compile_layers(tokens)
        return tokens.numel() / _fastest(lambda: hooked.activations(tokens), device)


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


def _step(train: TrainConfig, s: Sizes, device: torch.device) -> tuple[float | None, int]:
    """Seconds of one training step, Adam included, scaled from so many features as a second takes; and how many."""
    d_in, batch, kernel = s.geometry.d_in, train.batch_size, "dense" if train.kernel == "dense" else "sparse"
    part = max(64, min(s.d_sae, int(STEP_FLOP[device.type] / (10 * batch * d_in))))
    try:
        sae = initial_sae(d_in, part, 0, device)
        sae.b_enc.fill_(-ACTIVE_DEVIATIONS * float(sae.W_enc.norm(dim=0).mean()))
        settings = train.model_copy(update={"kernel": kernel, "lr": 0.0})
        trainer = Trainer(sae, 1.0, settings, 1000, batch, resolve_dtype(train.compute_dtype, device))
        rows = torch.randn(batch, d_in, device=device).bfloat16()
        return _fastest(lambda: trainer.step(rows), device) * s.d_sae / part, part
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
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
