"""Writing and reading a store against the ways that others take.

    .venv/bin/python benchmarks/store_throughput.py --d-in 576
    .venv/bin/python benchmarks/store_throughput.py --d-in 4096

Reads: whole shards with np.fromfile and into memory that is used again (unverified, in order), and chunks in random
order, verified, with the zarr API (our plain twin, one thread and four) and directly. Loaders: batches of shuffled
rows from our loader and from SAELens' cached activations (which are not verified; float32, its default, and
float16). Writes: whole shards with the zarr API and directly, with and without fsync. All in turn, the best of five
rounds. Reads are warm (the page cache holds the store); --cold drops it from the cache before each.
All run in the environment that the Makefile gives the stages.
Prints JSON: GB/s (of rows), rows/s, ratios, and the machine.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from zarr_twin import through_zarr

from harvest.activation_store import ActivationStore, Geometry, ShardRows
from harvest.device import device_name
from train.config import ExcludeConfig
from train.dataloader import ActivationLoader, Position

MAKE_ENVIRONMENT = {  # what the Makefile gives each stage; read when a process starts
    "OMP_WAIT_POLICY": "passive",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "1000000000000",
}
CONTEXT = 512
EPOCHS = 4  # of a loader in each round
HOOK = "h"


def make_rows(g: Geometry, seed: int) -> ShardRows:
    acts = torch.randn(g.shard_rows, g.d_in, generator=torch.Generator().manual_seed(seed)).bfloat16()
    number = np.arange(g.shard_rows)
    provenance = number.astype("u4"), (number // CONTEXT).astype("u4"), (number % CONTEXT).astype("u2")
    return ShardRows({HOOK: acts.view(torch.uint16).numpy()}, {HOOK: acts.float().norm(dim=1).numpy()}, *provenance)


def in_turn(ways: dict[str, Callable[[], Any]], rounds: int, before: Callable[[], Any]) -> dict[str, float]:
    """Least seconds of each way."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            before()
            began = time.perf_counter()
            way()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def read_whole(paths: list[Path], memory: np.ndarray) -> None:
    for path in paths:
        with path.open("rb", buffering=0) as file:
            file.readinto(memory.data)


def measure_reads(store: ActivationStore, pool_rows: int, rounds: int, before: Callable[[], Any]) -> dict[str, float]:
    g = store.geometry
    paths = [store.path / f"train/{HOOK}/acts/c/{shard}/0" for shard in range(g.train_shards)]
    order = np.random.default_rng(0).permutation(g.train_shards * g.chunks_per_shard).tolist()
    pool_chunks = pool_rows // g.chunk_rows
    pools = [order[start : start + pool_chunks] for start in range(0, len(order), pool_chunks)]
    pool = np.zeros((pool_rows, g.d_in), np.uint16)
    memory = np.zeros(paths[0].stat().st_size, np.uint8)

    def shuffled(by_zarr: bool) -> None:
        opened = ActivationStore.open(store.path)
        with through_zarr(by_zarr):
            for chunks in pools:
                opened.read_chunks("train", HOOK, chunks, pool[: len(chunks) * g.chunk_rows])

    def one_by_one() -> None:
        opened = ActivationStore.open(store.path)
        with through_zarr():
            for chunks in pools:
                for place, chunk in enumerate(chunks):
                    pool[place * g.chunk_rows : (place + 1) * g.chunk_rows] = opened.read_chunk("train", HOOK, chunk)

    ways = {
        "np.fromfile": lambda: [np.fromfile(path, np.uint16) for path in paths],
        "preallocated": lambda: read_whole(paths, memory),
        "zarr API, one thread": one_by_one,
        "zarr API, four threads": lambda: shuffled(by_zarr=True),
        "direct": lambda: shuffled(by_zarr=False),
    }
    return in_turn(ways, rounds, before)


def saelens_reader(folder: Path, g: Geometry, dtype: str, batch: int) -> Callable[[int], None]:
    """SAELens' own cache, written and read by its own code, as a function that takes so many batches."""
    import datasets
    from sae_lens import ActivationsStore
    from sae_lens.cache_activations_runner import CacheActivationsRunner

    datasets.disable_progress_bars()
    features = datasets.Features({HOOK: datasets.Array2D(shape=(CONTEXT, g.d_in), dtype=dtype)})
    for shard in range(g.train_shards):
        acts = torch.from_numpy(make_rows(g, shard).acts[HOOK]).view(torch.bfloat16).to(getattr(torch, dtype))
        made = datasets.Dataset.from_dict({HOOK: acts.view(-1, CONTEXT, g.d_in)}, features=features)
        made.save_to_disk(str(folder / ".tmp_shards" / f"shard_{shard:05d}"), num_shards=1)
    CacheActivationsRunner._consolidate_shards(folder / ".tmp_shards", folder, copy_files=False)
    store = ActivationsStore(
        model=None,  # pyright: ignore[reportArgumentType]
        dataset=None,
        streaming=False,
        hook_name=HOOK,
        hook_head_index=None,
        context_size=CONTEXT,
        d_in=g.d_in,
        n_batches_in_buffer=20,
        total_training_tokens=10**9,
        store_batch_size_prompts=8,
        train_batch_size_tokens=batch,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype=dtype,
        cached_activations_path=str(folder),
    )

    def take(batches: int) -> None:
        for _ in range(batches):
            store.next_batch()

    return take


def measure_loaders(
    store: ActivationStore, folder: Path, pool_rows: int, batch: int, rounds: int, before: Callable[[], Any]
) -> dict[str, float]:
    """Seconds of four epochs of batches; both readers stay open and go on from round to round, as in training.

    What ours has read ahead when its turn comes is one pool, an eighth of them.
    """
    g = store.geometry
    batches = EPOCHS * g.train_shards * g.shard_rows // batch
    loader = ActivationLoader(store, HOOK, ExcludeConfig(norm_above_median=None), None, batch, 4, pool_rows, 0)
    stream = loader.batches(Position())

    def ours() -> None:
        for _ in islice(stream, batches):
            pass

    ways: dict[str, Callable[[], Any]] = {"ours": ours}
    for dtype in ("float32", "float16"):
        take = saelens_reader(folder / dtype, g, dtype, batch)
        ways[f"SAELens, {dtype}"] = lambda take=take: take(batches)
    try:
        return in_turn(ways, rounds, before)
    finally:
        stream.close()


def measure_writes(folder: Path, g: Geometry, rounds: int) -> dict[str, float]:
    rows = make_rows(g, 0)

    def write(by_zarr: bool, durable: bool) -> None:
        with mock.patch("os.fsync", os.fsync if durable else lambda _: None), through_zarr(by_zarr):
            store = ActivationStore.open(folder)
            for shard in range(g.train_shards):
                store.write_shard("train", shard, rows)

    def clear() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        ActivationStore.create(folder, g, {})
        os.sync()

    kinds = {"zarr API": True, "direct": False}
    ways = {
        f"{name}, {'with' if durable else 'without'} fsync": lambda z=by_zarr, f=durable: write(z, f)
        for durable in (True, False)
        for name, by_zarr in kinds.items()
    }
    found = in_turn(ways, rounds, clear)
    shutil.rmtree(folder)
    return found


def evict(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=576)
    parser.add_argument("--gigabytes", type=float, default=0.3, help="size of the store")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the stores are made and deleted again")
    options = parser.parse_args()
    if not MAKE_ENVIRONMENT.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MAKE_ENVIRONMENT})
    chunk_rows = 1 << ((2**22 // options.d_in).bit_length() - 1)  # 4 to 8 MB
    shard_bytes = (8 if options.d_in < 2048 else 16) * chunk_rows * options.d_in * 2
    g = Geometry((HOOK,), options.d_in, CONTEXT, shard_bytes // (CONTEXT * options.d_in * 2), chunk_rows, 1, 1)
    g = g._replace(train_shards=max(2, round(options.gigabytes * 1e9 / shard_bytes)))
    gigabytes, rows = g.train_shards * shard_bytes / 1e9, g.train_shards * g.shard_rows
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        writes = measure_writes(folder / "written", g, options.rounds)
        store = ActivationStore.create(folder / "store", g, {})
        for shard in range(g.train_shards):
            store.write_shard("train", shard, make_rows(g, shard))
        before = (lambda: evict(folder)) if options.cold else (lambda: None)
        pool_rows = max(chunk_rows, g.shard_rows * g.train_shards // 2)
        reads = measure_reads(store, pool_rows, options.rounds, before)
        loaders = measure_loaders(store, folder / "saelens", pool_rows, options.batch, options.rounds, before)
    zarr_read = min(seconds for name, seconds in reads.items() if "zarr" in name)
    saelens = min(seconds for name, seconds in loaders.items() if "SAELens" in name)
    report = {
        "benchmark": "store_throughput",
        "shape": {"d_in": g.d_in, "chunk_rows": chunk_rows, "shard_rows": g.shard_rows, "shards": g.train_shards},
        "cache": "cold" if options.cold else "warm",
        "read_gb_per_second": {name: round(gigabytes / seconds, 2) for name, seconds in reads.items()},
        "loader_rows_per_second": {name: round(EPOCHS * rows / seconds) for name, seconds in loaders.items()},
        "write_gb_per_second": {name: round(gigabytes / seconds, 2) for name, seconds in writes.items()},
        "ratios": {
            "read: direct / np.fromfile": round(reads["np.fromfile"] / reads["direct"], 2),
            "read: direct / preallocated": round(reads["preallocated"] / reads["direct"], 2),
            "read: direct / best zarr API": round(zarr_read / reads["direct"], 2),
            "loader: ours / SAELens, float32 (its default)": round(loaders["SAELens, float32"] / loaders["ours"], 2),
            "loader: ours / best SAELens": round(saelens / loaders["ours"], 2),
            **{
                f"write: direct / zarr API, {how} fsync": round(
                    writes[f"zarr API, {how} fsync"] / writes[f"direct, {how} fsync"], 2
                )
                for how in ("with", "without")
            },
        },
        "machine": {
            "device": device_name(torch.device("cpu")),
            "cpus": os.cpu_count(),
            "numpy": np.__version__,
            "torch": torch.__version__,
        },
        "date": str(date.today()),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
