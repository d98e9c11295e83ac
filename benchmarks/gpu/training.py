"""Training from a store of made-up rows: killed and resumed, and once more in another process, gives the same bytes.

A run for each kind of SAE, one after another in a process; at the same time the same runs in another process; and each
alone in a process that is killed, all resumed in one more. The rate is high, so that L0 falls and a run of a kind with
fast steps goes from the dense to the sparse one. The kill is SIGKILL right after a step, once a checkpoint of an
earlier step is complete; what is compared is every checkpoint, the weights and the metrics but for their timings.

    python -m benchmarks.gpu.training STORE RUNS STEP    # killed after STEP, if not 0; the check starts these
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.check import Place, finish, start
from benchmarks.gpu.kernels import VALUES
from harvest.activation_store import ActivationStore, Geometry, ShardRows
from train.config import KINDS, TrainConfig
from train.run import Task
from train.run import run as run_training
from train.training import Training

HOOK, MADE = "h", "made"  # the latter: a file with the steps of the last process
STEPS, CHECKPOINT_EVERY, KILLED_AFTER = 60, 25, 33
TOGETHER = 2 + len(KINDS)  # processes beside each other: all whole runs twice, and those that are killed
Runs = Mapping[str, dict[str, Any]]  # settings by the folder that a run fills


def make_store(directory: Path, place: Place) -> None:
    """A store of random rows whose mean is not 0, written as a harvest writes one."""
    s = place.sizes
    shard_contexts = max(1, 2 * s.batch // s.context_size)
    chunk_rows = min(1024, shard_contexts * s.context_size // 4)
    g = Geometry((HOOK,), s.d_in, s.context_size, shard_contexts, chunk_rows, train_shards=8, holdout_shards=1)
    store = ActivationStore.create(directory / "store", g, {"model": "random rows"})
    mean = torch.randn(g.d_in, device=place.device)
    number = np.arange(g.shard_rows)
    provenance = number.astype("u4"), (number // g.context_size).astype("u4"), (number % g.context_size).astype("u2")
    for split in ("holdout", "train"):
        for shard in range(g.shards(split)):
            acts = (mean + torch.randn(g.shard_rows, g.d_in, device=place.device)).bfloat16()
            norms = acts.float().norm(dim=1).cpu().numpy()
            rows = ShardRows({HOOK: acts.cpu().view(torch.uint16).numpy()}, {HOOK: norms}, *provenance)
            store.write_shard(split, shard, rows)


def settings(kind: str, d_sae: int, place: Place, **more: Any) -> dict[str, Any]:
    """Of a run of STEPS steps, for JSON."""
    own = {name: VALUES[name] for name in KINDS[kind].hyperparameters if name in VALUES}
    runtime = {"log_every": 5, "checkpoint_every": CHECKPOINT_EVERY, "spike_factor": None, "threads": 1}
    return {
        "sae": {"kind": kind, "d_sae": d_sae, **own},
        "training_tokens": STEPS * place.sizes.batch,
        "batch_size": place.sizes.batch,
        "lr": 3e-3,
        "l1_warmup_fraction": 0.05,
        "sparse_below": 0.25,
        "window_shards": 4,
        "pool_rows": 4 * place.sizes.batch,
        "validation_rows": 2 * place.sizes.batch,
        **more,
        "runtime": runtime | more.get("runtime", {}),
    }


def train(store: Path, runs: Runs, killed_after: int = 0) -> subprocess.Popen[bytes]:
    """A process of its own that makes these runs, one after another."""
    return start(["benchmarks.gpu.training", str(store), json.dumps(runs), str(killed_after)])


def undisturbed(store: Path, runs: Runs) -> None:
    """Runs to their ends."""
    finish(train(store, runs))


def killed(store: Path, out: Path, about: dict[str, Any], after: int) -> int:
    """A run that is killed after a step; the step of its newest checkpoint."""
    assert train(store, {str(out): about}, after).wait() == -signal.SIGKILL
    assert not (out / HOOK / "sae.json").exists(), "it was killed too late"
    steps = [int(path.parent.name) for path in (out / HOOK / "checkpoints").glob("*/checkpoint.json")]
    assert steps, "no checkpoint to go on from"
    return max(steps)


def resumed(store: Path, runs: Runs, steps: Sequence[int]) -> None:
    """Killed runs to their ends, from these steps: a run that began anew would give the same bytes."""
    undisturbed(store, runs)
    for out, step in zip(runs, steps, strict=True):
        made = int((Path(out) / MADE).read_text())
        assert made == STEPS - step, f"{out}: {made} steps after the checkpoint of step {step}"


def result(out: Path) -> dict[str, str]:
    """sha256 of what a run promises to be the same, by name."""
    found = {}
    for path in sorted(p for p in (out / HOOK).rglob("*") if p.suffix == ".safetensors"):
        with path.open("rb") as file:
            found[str(path.relative_to(out))] = hashlib.file_digest(file, "sha256").hexdigest()
    found["metrics.jsonl"] = json.dumps([line | {"timings": None} for line in metrics(out)])
    return found


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (out / HOOK / "metrics.jsonl").read_text().splitlines()]


def differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Names of what two runs have not alike."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def jobs(place: Place) -> Iterator[tuple[str, dict[str, Any]]]:
    """A name and settings for each kind; only the standard one is wide, for its checkpoints are on the disk."""
    s = place.sizes
    for kind in KINDS:
        yield kind, settings(kind, s.narrow_d_sae if kind == "standard" else s.narrow_d_sae // 4, place)


def run(place: Place) -> None:
    """The check."""
    store, made = place.folder / "made", dict(jobs(place))
    make_store(store, place)
    outs = {way: {name: place.folder / f"{name}-{way}" for name in made} for way in ("undisturbed", "again", "killed")}
    runs = {way: {str(out): made[name] for name, out in of.items()} for way, of in outs.items()}
    with ThreadPoolExecutor(TOGETHER if place.on_gpu else 2) as pool:
        whole = [pool.submit(undisturbed, store, runs[way]) for way in ("undisturbed", "again")]
        kills = [pool.submit(killed, store, outs["killed"][name], made[name], KILLED_AFTER) for name in made]
        resumed(store, runs["killed"], [kill.result() for kill in kills])
        for way in whole:
            way.result()
    for name in made:
        found = {way: result(outs[way][name]) for way in outs}
        lines = [line for line in metrics(outs["undisturbed"][name]) if line["kind"] == "train"]
        used = sorted({line["kernel"] for line in lines})
        place.note(**{f"{name} steps": " and ".join(used), f"{name} L0 at the end": lines[-1]["l0"]})
        for way, says in (("again", "in another process"), ("killed", "killed and resumed")):
            different = differences(found["undisturbed"], found[way])
            assert not different, f"{name} {says}: {different} differ from the undisturbed run's"
        place.note(**{f"{name} files alike": len(found["undisturbed"])})
        assert len(used) == 2 or name != "standard", f"{name}: only {used} was used"


def make_runs(store: Path, runs: Runs, killed_after: int) -> None:
    """Train in this process; it kills itself after a step, once what it was writing is written."""
    take, made = Training.take, 0

    def take_and_die(self: Training, *arguments: Any) -> None:
        nonlocal made
        take(self, *arguments)
        made += 1
        if self.step == killed_after:
            self._writer.wait()
            os.kill(os.getpid(), signal.SIGKILL)

    Training.take = take_and_die
    for folder, about in runs.items():
        out, made = Path(folder), 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        run_training([Task(TrainConfig(**about), out, lambda _numerics: None)], store)
        (out / MADE).write_text(str(made))
        if torch.cuda.is_available():
            print(f"peak on the device: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB", flush=True)
            (out / "peak").write_text(str(torch.cuda.max_memory_allocated()))


if __name__ == "__main__":
    make_runs(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]))
