"""What grows with the number of shards, at the production run's count: a store of small rows, on disk and in a bucket.

    .venv/bin/python -m benchmarks.counts                      # 1,500 and 15,274 shards; ten minutes on two cores
    .venv/bin/python -m benchmarks.counts --shards 150 600     # to try it out

A shard is 16 rows of width 8, so everything but the number of files is left out. Prints a JSON line for each count, and
at the end how each time grew for a shard (1 is linear). `look` is what a worker of a harvest does when its share is
written: are those of the others there? `start` is what it does first: which shards does it not have to make?
`bucket_start` is the same on a half-complete store behind HTTP with 30 ms a request, `bucket_check_complete` what
training and evaluation do first there, on a complete one.

`host` is the work of training outside the step, at a quarter of the paper's width (4,096 x 16,384, for a CPU's memory)
times four: a copy of the SAE at every look at held-out rows, as if each were the best, a copy of everything at every
checkpoint, and dead features at every line of the log, as part of a step of 14.2 ms.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.check import ROOT
from harvest import verify as verification
from harvest.activation_store import ActivationStore, Geometry, ShardRows
from harvest.device import device_name
from harvest.store_files import LocalFiles, RemoteFiles
from harvest.store_layout import SPLITS
from pipeline.config import load
from train.config import TrainConfig
from train.kinds import new_sae
from train.trainer import Trainer

sys.path.insert(0, str(ROOT / "tests"))

import s3_server

HOOK, D_IN, ROWS, HOLDOUT, REQUEST_S = "model.layers.19", 8, 16, 16, 0.03
STEP_S, NARROWER = 14.2e-3, 4


def geometry(shards: int) -> Geometry:
    """A shard is one context of 16 tokens."""
    return Geometry((HOOK,), D_IN, ROWS, 1, ROWS, shards - HOLDOUT, HOLDOUT)


def rows() -> ShardRows:
    """Of every shard the same."""
    acts = torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(0)).bfloat16()
    norms = acts.float().norm(dim=1).numpy()
    number = np.arange(ROWS)
    bits = acts.view(torch.int16).numpy().view(np.uint16)
    return ShardRows({HOOK: bits}, {HOOK: norms}, number.astype("u4"), number.astype("u4") * 0, number.astype("u2"))


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time."""
    began = time.perf_counter()
    work()
    return round(time.perf_counter() - began, 4)


def best(work: Callable[[], object]) -> float:
    """The least of three, for what changes nothing."""
    return min(seconds(work) for _ in range(3))


def local(folder: Path, shards: int) -> dict[str, float]:
    """Times of a store on a disk."""
    store, made = ActivationStore.create(folder, geometry(shards), {}), rows()

    def write() -> None:
        for split in SPLITS:
            for shard in range(store.geometry.shards(split)):
                store.write_shard(split, shard, made)

    memory = folder.parent / "verify.json"
    return {
        "write": seconds(write),
        "look": best(lambda: [store.recorded_shards(split) for split in SPLITS]),
        "start": best(lambda: [store.complete_shards(split) for split in SPLITS]),
        "records": best(lambda: [store.records(split) for split in SPLITS]),
        "check_complete": best(store.check_complete),
        "norms": best(lambda: [store.read_norms("train", HOOK, n) for n in range(store.geometry.train_shards)]),
        "verify": seconds(lambda: verification.verify(LocalFiles(folder), complete=True, memory=memory)),
        "verify_resumed": resumed(folder, memory, shards),
        "verify_sample_100": seconds(lambda: verification.verify(LocalFiles(folder), sample=100)),
        "digest": best(lambda: verification.digest(LocalFiles(folder))),
        "delete": seconds(LocalFiles(folder).delete_all),
    }


def resumed(folder: Path, memory: Path, shards: int) -> float:
    """Seconds of what is left of a verification that was stopped at nine tenths."""
    stop, own = geometry(shards).train_shards * 9 // 10, ActivationStore.verify_shard

    def stopped(self: ActivationStore, split: str, shard: int) -> None:
        if split == "train" and shard == stop:
            raise KeyboardInterrupt
        own(self, split, shard)

    ActivationStore.verify_shard = stopped  # type: ignore[method-assign]
    try:
        verification.verify(LocalFiles(folder), complete=True, memory=memory)
    except KeyboardInterrupt:
        pass
    finally:
        ActivationStore.verify_shard = own  # type: ignore[method-assign]
    assert memory.exists()
    return seconds(lambda: verification.verify(LocalFiles(folder), complete=True, memory=memory))


@contextmanager
def slow_bucket(objects: dict[str, bytes], request_s: float) -> Iterator[RemoteFiles]:
    """These objects behind HTTP, `request_s` seconds a request; a page of a listing has 1,000 keys, as S3's."""
    handler: Any = s3_server.Handler
    own, s3_server.PAGE = handler.handle_request, 1000
    handler.do_GET = handler.do_HEAD = lambda self: (time.sleep(request_s), own(self))
    try:
        with s3_server.serving() as server:
            server.objects.update(objects)
            keys = {"AWS_ACCESS_KEY_ID": "writer", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "r"}
            keys["AWS_ENDPOINT_URL"] = server.url
            os.environ.update(keys)
            yield RemoteFiles(f"s3://{s3_server.BUCKET}/store", allow_http=True)
    finally:
        handler.do_GET = handler.do_HEAD = own


def in_a_bucket(folder: Path, shards: int) -> dict[str, float]:
    """Seconds until a harvest knows what is missing of a half-complete store, and until a complete one is checked."""
    store, made, found = ActivationStore.create(folder, geometry(shards), {}), rows(), list[int]()

    def write(first: int, last: int) -> dict[str, bytes]:
        for shard in range(first, last):
            store.write_shard("train", shard, made)
        return {f"store/{name}": store.files.read(name) for name in store.files.names()}

    for shard in range(HOLDOUT):
        store.write_shard("holdout", shard, made)
    half = shards // 2 - HOLDOUT
    with slow_bucket(write(0, half), REQUEST_S) as remote:
        there = ActivationStore.open(remote)
        start = seconds(lambda: found.extend(len(there.complete_shards(split)) for split in SPLITS))
    assert sum(found) == shards // 2, found
    with slow_bucket(write(half, store.geometry.train_shards), REQUEST_S) as remote:
        complete = seconds(lambda: ActivationStore.open(remote).check_complete())
    return {"bucket_start": start, "bucket_check_complete": complete}


def host(width: int) -> dict[str, float]:
    """Seconds of copies to the host, and their part of a run with those of the log."""
    base = load(ROOT / "configs" / "r1-llama-8b.yaml", []).train
    assert base is not None
    config = TrainConfig.model_validate(base.model_dump() | {"sae": {"d_sae": width}})
    trainer = Trainer(new_sae(config, 4096, 1.0, "cpu"), config, 1000, 10**6, torch.float32)
    memory: dict[str, torch.Tensor] = {}
    trainer.tensors(memory)  # allocates it
    sae = NARROWER * min(seconds(lambda: trainer.weights(memory)) for _ in range(3))
    every = NARROWER * min(seconds(lambda: trainer.tensors(memory)) for _ in range(3))
    dead = NARROWER * min(seconds(trainer.dead_features) for _ in range(3))
    steps = base.batches(0)
    checkpoints = base.runtime.checkpoints(steps, STEP_S * steps) / steps
    each = sae / base.validate_every + every * checkpoints + dead / base.runtime.log_every
    return {"copy_sae": sae, "copy_all": every, "dead_features": dead, "part_of_a_step": each / STEP_S}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs=2, default=(1500, 15_274), help="two counts, the smaller first")
    parser.add_argument("--width", type=int, default=65_536 // NARROWER, help="features of `host`")
    options = parser.parse_args()
    os.fsync = lambda _file: None  # tens of milliseconds a file, whatever the count
    found: list[dict[str, Any]] = []
    for shards in options.shards:
        with tempfile.TemporaryDirectory() as folder:
            times = local(Path(folder) / "store", shards)
        with tempfile.TemporaryDirectory() as folder:
            times |= in_a_bucket(Path(folder) / "store", shards)
        found.append(times)
        print(json.dumps({"benchmark": "counts", "shards": shards, "seconds": times}), flush=True)
    few, many = found
    ratio = options.shards[1] / options.shards[0]
    growth = {name: round(many[name] / few[name] / ratio, 2) for name in many if few[name]}
    machine = {"device": device_name(torch.device("cpu")), "threads": torch.get_num_threads()}
    print(json.dumps({"growth": growth, "host": host(options.width), "machine": machine}))


if __name__ == "__main__":
    main()
