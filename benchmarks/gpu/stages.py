"""All stages of configs/tiny.yaml on the GPU and on the CPU, in float32: the same figures; and a stream on one device.

The CPU's run takes the assets that the GPU's takes. A GPU sums in other orders, so after 96 steps figures differ: bounds
are below. A stream of one epoch must give the very bytes of a harvest and a training of one epoch on the same device.
"""

import hashlib
import sys
from pathlib import Path

from benchmarks.gpu.check import ROOT, Place, finish, start
from evaluate.figures import read_figures

sys.path.insert(0, str(ROOT / "tests"))

import tiny

CONFIG = str(ROOT / "configs" / "tiny.yaml")
FLOAT32 = ("harvest.compute_dtype=float32", "train.compute_dtype=float32")
ONE_EPOCH = ("train.epochs=1", "harvest.runtime.disk_limit=2 windows")
STAGES = ("harvest", "train", "evaluate")
# Largest difference that two devices may have, absolute; other figures are noted, and bound nothing.
BOUNDS = {"explained_variance": 0.01, "cosine": 0.01, "norm_ratio": 0.01, "ce_clean": 1e-3, "ce_sae": 0.01, "l0": 0.5}


def on(device: str) -> tuple[str, ...]:
    """The settings that put every stage on a device."""
    return tuple(f"{stage}.runtime.device={device}" for stage in STAGES)


def pipeline(command: str, cwd: Path, *settings: str):
    """A command in a process of its own."""
    return start(["pipeline", command, "--config", CONFIG, *settings], cwd, OMP_NUM_THREADS="1")


def weights(folder: Path) -> dict[str, str]:
    """sha256 of every trained SAE of a folder."""
    paths = folder.glob("runs/train/*/*/sae_weights.safetensors")
    return {"/".join(p.parts[-3:]): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def figures(folder: Path) -> dict[str, float]:
    """The numbers of the one evaluation of a folder, by name."""
    (directory,) = (folder / "runs" / "evaluate").glob("[0-9a-f]*")
    (sae,) = read_figures(directory).saes
    return {f"{f.section} {f.name} {f.rows} {f.source}": f.value for f in sae.figures if f.value is not None}


def run(place: Place) -> None:
    """The check."""
    device = place.device.type
    folders = {name: place.folder / name for name in ("device", "cpu", "whole", "streamed")}
    for folder in folders.values():
        tiny.make_assets(folder)
    running = [
        pipeline("run", folders["device"], *FLOAT32, *on(device)),
        pipeline("run", folders["cpu"], *FLOAT32, *on("cpu")),
        pipeline("run", folders["whole"], *on(device), ONE_EPOCH[0]),
    ]
    streamed = folders["streamed"]
    finish(pipeline("sample", streamed, *on(device), *ONE_EPOCH))
    finish(pipeline("stream", streamed, *on(device), *ONE_EPOCH))
    finish(*running)
    ours, theirs = figures(folders["device"]), figures(folders["cpu"])
    assert ours.keys() == theirs.keys(), f"figures of one side alone: {sorted(ours.keys() ^ theirs.keys())}"
    differences = {name: abs(value - theirs[name]) for name, value in ours.items()}
    bounded = {name: bound for name in ours if (bound := BOUNDS.get(name.split()[1]))}
    assert len(bounded) > len(BOUNDS)
    largest = {kind: max(d for name, d in differences.items() if name.split()[1] == kind) for kind in BOUNDS}
    place.note(figures=len(ours), equal=sum(d == 0 for d in differences.values()), largest_difference=largest)
    over = {name: (ours[name], theirs[name]) for name, bound in bounded.items() if differences[name] > bound}
    assert not over, f"{device} and CPU: {over}"
    assert weights(folders["whole"]) and weights(folders["whole"]) == weights(streamed), "the stream's weights are others"
    place.note(stream="the same weights")
