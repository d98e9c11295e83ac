"""Rows of 20 layers of the 8B shape: the same bytes from two processes, eager and compiled, and tokens a second.

Weights are random, of one seed, made on the device. Two processes, each with a cache of compiled code of its own,
write the same shards at the same time; then the first one alone measures: the bare forward pass, ours to memory and to
a disk.
`ours` counts from the first token to the last file; `steady` leaves out the first two shards and the last one.

    python -m benchmarks.gpu.harvest OUT    # one process's bytes, as JSON; the check starts it
"""

import hashlib
import json
import shutil
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

from benchmarks import harvest_throughput
from benchmarks.gpu.check import FULL, ROOT, SMALL, Place, finish, start
from benchmarks.harvest_throughput import R1_LLAMA_8B, RoundContexts, bare, truncated
from harvest.activation_store import ActivationStore, Geometry
from harvest.language_model import HookedModel
from harvest.run import write_shards
from harvest.workers import Shard
from pipeline.architecture import find_architecture
from pipeline.config import load
from pipeline.memory import harvest_memory
from pipeline.sizes import sizes

LAYER, BATCH_CONTEXTS, COMPARED_SHARDS = 19, 16, 2
WITHIN = 0.1  # the estimate of the peak
HOOK = f"model.layers.{LAYER}"
MEMORY = Path("/dev/shm")
NARROW = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


def options() -> Namespace:
    """As benchmarks/harvest_throughput.py takes them."""
    sizes = FULL if torch.cuda.is_available() else SMALL
    return Namespace(
        shape="r1-llama-8b",
        layer=LAYER,
        context_size=sizes.context_size,
        batch_contexts=min(BATCH_CONTEXTS, sizes.shard_contexts // 2),
        shard_contexts=sizes.shard_contexts,
    )


def model(compiled: bool) -> HookedModel:
    """The same weights every time; narrow ones on a CPU."""
    device, chosen = torch.device("cuda" if torch.cuda.is_available() else "cpu"), options()
    if device.type == "cpu":
        narrow = {**R1_LLAMA_8B.to_dict(), **NARROW, "head_dim": 16, "vocab_size": 4096}
        harvest_throughput.R1_LLAMA_8B = LlamaConfig(**narrow)
    made = truncated(chosen, HOOK, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    assert len(made.layers) == LAYER + 1
    if compiled:
        made.compile_layers(torch.zeros(chosen.batch_contexts, chosen.context_size, dtype=torch.long))
        assert all("forward" in vars(layer) for layer in made.layers), "a layer is not compiled"
    return made


def write(made: HookedModel, tokens: np.ndarray, folder: Path) -> list[float]:
    """Write tokens (contexts, context_size) as shards; when each batch was launched, in seconds."""
    chosen, config = options(), made.model.config
    rows = chosen.shard_contexts * chosen.context_size
    shards = len(tokens) // chosen.shard_contexts
    g = Geometry((HOOK,), config.hidden_size, chosen.context_size, chosen.shard_contexts, min(rows, 512), shards, 0)
    store = ActivationStore.create(folder / "store", g, {})
    launched: list[float] = []
    every = [Shard("train", number) for number in range(shards)]
    contexts = RoundContexts(tokens)
    write_shards(made, contexts, store, every, chosen.batch_contexts, 0, lambda _: launched.append(time.perf_counter()))  # pyright: ignore[reportArgumentType]
    return launched


def some_tokens(shards: int) -> np.ndarray:
    """Random tokens of so many shards, (contexts, context_size)."""
    chosen = options()
    shape = (shards * chosen.shard_contexts, chosen.context_size)
    return np.random.default_rng(0).integers(1000, 4000, shape, dtype=np.uint32)


def digests(made: HookedModel, where: Path | None) -> dict[str, str]:
    """sha256 of every file that is written for the compared shards."""
    with tempfile.TemporaryDirectory(dir=where) as folder:
        write(made, some_tokens(COMPARED_SHARDS), Path(folder))
        paths = sorted(p for p in Path(folder).rglob("*") if p.is_file())
        assert len(paths) > COMPARED_SHARDS
        return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def both() -> tuple[dict[str, HookedModel], dict[str, dict[str, str]]]:
    """The eager and the compiled model, and the digests of their rows."""
    models = {"eager": model(compiled=False), "compiled": model(compiled=True)}
    return models, {name: digests(made, memory()) for name, made in models.items()}


def memory() -> Path | None:
    """A folder in memory, where there is room for the largest store."""
    need = 12 << 30 if torch.cuda.is_available() else 0
    return MEMORY if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > need else None


def tokens_per_second(made: HookedModel, where: Path | None, shards: int) -> dict[str, float]:
    """Of ours: `ours` all in all, `steady` without start and end."""
    tokens = some_tokens(shards)
    with tempfile.TemporaryDirectory(dir=where) as folder:
        began = time.perf_counter()
        launched = write(made, tokens, Path(folder))
        ended = time.perf_counter()
    a_shard = len(launched) // shards
    first, last = launched[2 * a_shard - 1], launched[-a_shard - 1]
    steady = (shards - 3) * tokens.size / shards / (last - first)
    return {"ours": tokens.size / (ended - began), "steady": steady}


def bare_tokens_per_second(made: HookedModel, shards: int) -> float:
    """Of the forward pass alone."""
    tokens, run_bare = some_tokens(shards), bare(made, options())
    run_bare(tokens[: options().batch_contexts])
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    run_bare(tokens)
    wait()
    return tokens.size / (time.perf_counter() - began)


def estimated() -> int:
    """Bytes that `make estimate` expects the harvest to take on the device, and a second model of that size."""
    config = load(ROOT / "configs" / "r1-llama-8b.yaml", [])
    machine: Any = SimpleNamespace(element=2)
    s = sizes(config, find_architecture(config.model, offline=True))
    return machine.element * s.parameters + harvest_memory(s, machine).of(BATCH_CONTEXTS)


def run(place: Place) -> None:
    """The check."""
    other = place.folder / "other.json"
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(place.folder / "cache"), "TRITON_CACHE_DIR": str(place.folder / "triton")}
    child = start(["benchmarks.gpu.harvest", str(other)], **caches)
    models, found = both()
    finish(child)
    theirs = json.loads(other.read_text())
    for name, mine in found.items():
        different = [file for file in mine if mine[file] != theirs[name].get(file)]
        assert not different, f"{name}: two processes wrote different {different}"
    acts = [{f: d for f, d in mine.items() if "/acts/c/" in f} for mine in found.values()]
    assert all(len(set(mine.values())) == len(mine) == COMPARED_SHARDS for mine in acts), "shards are alike"
    place.note(files_alike=sum(map(len, found.values())))
    shards = place.sizes.timed_shards
    for name in ("compiled", "eager"):
        n = shards if name == "compiled" else shards // 2
        bare_rate = bare_tokens_per_second(models[name], max(1, n // 2))
        place.note(**{f"{name} bare tokens/s": bare_rate})
        to_memory = tokens_per_second(models[name], memory(), n)
        to_memory["steady, of bare"] = to_memory["steady"] / bare_rate
        place.note(**{f"{name} to memory, tokens/s": to_memory})
        if name == "compiled":
            place.note(**{f"{name} to disk, tokens/s": tokens_per_second(models[name], place.folder, n)})
    if place.on_gpu:
        peak, expected = torch.cuda.max_memory_allocated(), estimated()
        place.note(peak_gb=peak / 1e9, peak_of_estimate=peak / expected, in_memory=str(memory()))
        assert abs(peak / expected - 1) <= WITHIN, f"the peak is {peak:,} bytes, the estimate {expected:,}"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(both()[1]))
