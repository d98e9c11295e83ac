"""Training fed from a store on disk against the same step fed from memory, interleaved.

    .venv/bin/python benchmarks/train_end_to_end.py --d-in 576 --d-sae 4608 --batch 2048
    .venv/bin/python benchmarks/train_end_to_end.py --l1 3 5 8        # a sweep: three SAEs from one reading

Writes a store of random rows into a temporary folder (the page cache holds it: what is measured is our reading,
checking and shuffling, not the disk). In a sweep every batch goes to each SAE, from memory as from the store: the
ratio says whether a sweep of three costs more than three steps. Prints JSON: tokens/s of both, the ratio of their
CPU-seconds and wall times (medians of pairs), the reading speed and the stall a step, and the machine.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from itertools import islice
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harvest.activation_store import ActivationStore, Geometry, ShardRows
from harvest.device import device_name, resolve_device, resolve_dtype
from train.config import ExcludeConfig, SaeConfig, TrainConfig
from train.dataloader import ActivationLoader, Batch, Position
from train.exclusion import input_statistics
from train.kinds import new_sae
from train.trainer import Trainer


def make_store(path: Path, d_in: int, shards: int) -> ActivationStore:
    """Sparse mixtures of a random dictionary, as bfloat16."""
    geometry = Geometry(("h",), d_in, 512, 32, max(1, 2**21 // (2 * d_in)), shards, 1)
    geometry = geometry._replace(chunk_rows=1 << (geometry.chunk_rows.bit_length() - 1))
    store = ActivationStore.create(path, geometry, {})
    generator = torch.Generator().manual_seed(0)
    dictionary = torch.nn.functional.normalize(torch.randn(4 * d_in, d_in, generator=generator), dim=1)
    n = geometry.shard_rows
    for split, shard in [("holdout", 0), *(("train", s) for s in range(shards))]:
        active = torch.rand(n, len(dictionary), generator=generator) < 30 / len(dictionary)
        rows = (active * torch.rand(n, len(dictionary), generator=generator)) @ dictionary
        bits = rows.bfloat16().view(torch.uint16).numpy()
        number = np.arange(n)
        provenance = (number.astype(np.uint32), (number // 512).astype(np.uint32), (number % 512).astype(np.uint16))
        store.write_shard(split, shard, ShardRows({"h": bits}, {"h": rows.norm(dim=1).numpy()}, *provenance))
    return store


def measure(trainers: list[Trainer], batches: Iterator[Batch], steps: int, device: torch.device) -> tuple[float, float]:
    """Wall and CPU seconds of so many batches."""
    wall, cpu = time.perf_counter(), time.process_time()
    for batch in islice(batches, steps):
        for trainer in trainers:
            trainer.step(batch.rows_BD)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--d-in", type=int, default=576)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--l1", type=float, nargs="+", default=[5.0], help="λ of each SAE")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    device = resolve_device(options.device)
    dtype = resolve_dtype("auto", device)
    with tempfile.TemporaryDirectory() as temporary:
        store = make_store(Path(temporary) / "store", options.d_in, options.shards)
        exclude = ExcludeConfig()
        found = input_statistics(store, "h", exclude, 4)
        trainers = []
        for l1_coefficient in options.l1:
            config = TrainConfig(
                sae=SaeConfig(d_sae=options.d_sae, l1_coefficient=l1_coefficient),
                epochs=1,
                batch_size=options.batch,
                lr=1e-3,
                l1_warmup_fraction=0,
                sparse_below=0.1 if device.type == "cpu" else 0.01,
            )
            sae = new_sae(config, options.d_in, found.scale, device)
            trainers.append(Trainer(sae, config, 100_000, 10**6, dtype))
        loader = ActivationLoader(
            store, "h", exclude, found.norm_limit, options.batch, 4, 65_536, 0, device.type == "cuda"
        )
        stream = loader.batches(Position())
        for batch in islice(stream, 150):  # until few features are active, as in most of a run
            for trainer in trainers:
                trainer.step(batch.rows_BD)
        walls: dict[str, list[float]] = {"store": [], "memory": []}
        cpus: dict[str, list[float]] = {"store": [], "memory": []}
        before = loader.reading
        for _ in range(options.pairs):
            held = list(islice(stream, options.steps))  # fresh rows: on repeated ones ever fewer features are active
            for name, batches in (("memory", iter(held)), ("store", stream)):
                wall, cpu = measure(trainers, batches, options.steps, device)
                walls[name].append(wall)
                cpus[name].append(cpu)
        stall = (loader.reading.stall_seconds - before.stall_seconds) / (options.pairs * options.steps)
        stream.close()
    tokens = options.steps * options.batch
    print(
        json.dumps(
            {
                "benchmark": "train_end_to_end",
                "shape": {"d_in": options.d_in, "d_sae": options.d_sae, "batch": options.batch},
                "saes": len(trainers),
                "kernels": [trainer.kernel.name for trainer in trainers],
                "tokens_per_second": {name: round(tokens / statistics.median(w)) for name, w in walls.items()},
                "store_over_memory": {
                    "wall": round(
                        statistics.median(m / s for m, s in zip(*(walls[n] for n in ("memory", "store")), strict=True)),
                        3,
                    ),
                    "cpu": round(
                        statistics.median(m / s for m, s in zip(*(cpus[n] for n in ("memory", "store")), strict=True)),
                        3,
                    ),
                },
                "stall_ms_per_step": round(1000 * stall, 2),
                "machine": {
                    "device": device_name(device),
                    "threads": torch.get_num_threads(),
                    "torch": torch.__version__,
                },
                "date": str(date.today()),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
