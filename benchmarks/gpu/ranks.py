"""Harvest and training of the tiny settings by two processes, a GPU each, against one: NCCL, and the shards shared.

The store must be the same bytes. SAEs agree up to the order of sums: in float32, the loss within 1e-5 over the first
ten steps and 1e-3 after them, as tests/test_parallel.py has it on a CPU.
"""

import json
import subprocess
from pathlib import Path

from benchmarks.gpu.check import Place, finish, start
from benchmarks.gpu.stages import CONFIG, FLOAT32, on, pipeline, tiny
from harvest.store_files import LocalFiles
from harvest.verify import digest

RANKS = 2
SETTINGS = {
    "standard": (),
    "batchtopk": ("train.sae.kind=batchtopk", "train.sae.k=8"),
}  # the latter chooses among all ranks
FIRST_STEPS, AT_FIRST, LATER = 10, 1e-5, 1e-3  # relative


def launched(command: str, cwd: Path, *settings: str) -> subprocess.Popen[bytes]:
    """A command in RANKS processes, as `make` starts it."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    return start([*launcher, "-m", "pipeline", command, "--config", CONFIG, *settings], cwd, OMP_NUM_THREADS="1")


def losses(folder: Path) -> dict[int, float]:
    """Of the latest training run of a folder, by step."""
    path = max(folder.glob("runs/train/*/*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def run(place: Place) -> None:
    """The check."""
    settings = (*FLOAT32, *on(place.device.type), "train.runtime.log_every=1")
    one, several = folders = place.folder / "one", place.folder / "several"
    for folder in folders:
        tiny.make_assets(folder)
    finish(*(pipeline("sample", folder, *settings) for folder in folders))
    finish(pipeline("harvest", one, *settings), launched("harvest", several, *settings))
    stores = [LocalFiles(next(folder.glob("runs/harvest/*/store"))) for folder in folders]
    assert digest(stores[0]) == digest(stores[1]), "the stores differ"
    place.note(store="the same bytes")
    for kind, own in SETTINGS.items():
        finish(pipeline("train", one, *settings, *own), launched("train", several, *settings, *own))
        expected, found = losses(one), losses(several)
        assert expected.keys() == found.keys()
        off = {step: abs(found[step] / loss - 1) for step, loss in expected.items()}
        first, last = max(off[step] for step in off if step <= FIRST_STEPS), max(off.values())
        place.note(**{f"{kind}, loss off": {f"in {FIRST_STEPS} steps": first, "in all": last}})
        assert first <= AT_FIRST, f"{kind}: the loss of {RANKS} ranks is off by {first} in the first steps"
        assert last <= LATER, f"{kind}: the loss of {RANKS} ranks is off by {last}"
