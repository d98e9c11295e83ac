"""All stages of configs/tiny.yaml on the GPU and on the CPU, in float32: the same figures; and a stream on one device.

The CPU's run takes the assets that the GPU's takes. A GPU sums in other orders, so after 96 steps figures differ:
bounds are below. The same is done with a model of the default's shape, and a third run takes the GPU for one without
bfloat16 and kernels. A stream of one epoch must give the very bytes of a harvest and a training of one epoch on the
same device; without a GPU that is all.
"""

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.gpu.check import ROOT, Place, finish, start
from evaluate.figures import read_figures
from pipeline.cli import main

sys.path.insert(0, str(ROOT / "tests"))

import tiny

CONFIG = str(ROOT / "configs" / "tiny.yaml")
FLOAT32 = ("harvest.compute_dtype=float32", "train.compute_dtype=float32")
ONE_EPOCH = ("train.epochs=1", "harvest.runtime.disk_limit=2 windows")
STAGES = ("harvest", "train", "evaluate")
# The model of configs/smollm2.yaml but for the number of layers and the vocabulary, and the width of its SAE.
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
SHAPED = (
    "sample.context_size=64",
    "sample.train_tokens=32768",
    "sample.holdout_tokens=4096",
    "harvest.hooks=[model.layers.2]",
    "harvest.threads=2",
    "train.sae.expansion_factor=8",
    "train.batch_size=512",
    "train.pool_rows=4096",
    "train.epochs=1",
    "train.runtime.threads=2",
    "evaluate.runtime.threads=2",
)
# Largest difference that two devices may have, absolute; other figures are noted, and bound nothing.
BOUNDS = {"explained_variance": 0.01, "cosine": 0.01, "norm_ratio": 0.01, "ce_clean": 1e-3, "ce_sae": 0.01, "l0": 0.5}
SHAPED_BOUNDS = BOUNDS | {"l0": 1.0}  # of 545 after its 64 steps


def on(device: str) -> tuple[str, ...]:
    """The settings that put every stage on a device."""
    return tuple(f"{stage}.runtime.device={device}" for stage in STAGES)


def pipeline(command: str, cwd: Path, *settings: str, module: str = "pipeline"):
    """A command in a process of its own."""
    return start([module, command, "--config", CONFIG, *settings], cwd, OMP_NUM_THREADS="1")


def weights(folder: Path) -> dict[str, str]:
    """sha256 of every trained SAE of a folder."""
    paths = folder.glob("runs/train/*/*/sae_weights.safetensors")
    return {"/".join(p.parts[-3:]): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def figures(folder: Path) -> dict[str, float]:
    """The numbers of the one evaluation of a folder, by name."""
    (directory,) = (folder / "runs" / "evaluate").glob("[0-9a-f]*")
    (sae,) = read_figures(directory).saes
    return {f"{f.section} {f.name} {f.rows} {f.source}": f.value for f in sae.figures if f.value is not None}


def compare(
    place: Place,
    name: str,
    ours: dict[str, float],
    theirs: dict[str, float],
    bounds: Mapping[str, float] = BOUNDS,
) -> None:
    """Note how far figures are from the CPU's; fails where they are too far."""
    assert ours.keys() == theirs.keys(), f"figures of one side alone: {sorted(ours.keys() ^ theirs.keys())}"
    differences = {figure: abs(value - theirs[figure]) for figure, value in ours.items()}
    bounded = {figure: bound for figure in ours if (bound := bounds.get(figure.split()[1]))}
    largest = {kind: max(differences[figure] for figure in bounded if figure.split()[1] == kind) for kind in bounds}
    place.note(**{f"{name}, figures equal": f"{sum(d == 0 for d in differences.values())} of {len(ours)}"})
    place.note(**{f"{name}, largest difference": largest})
    over = {figure: (ours[figure], theirs[figure]) for figure, bound in bounded.items() if differences[figure] > bound}
    assert not over, f"{name} and CPU: {over}"


def run(place: Place) -> None:
    """The check."""
    device, started = place.device.type, []

    def begun(name: str, *settings: str, module: str = "pipeline", documents: int = 120, **shape: int) -> Path:
        tiny.make_assets(place.folder / name, documents, **shape)
        started.append(pipeline("run", place.folder / name, *settings, module=module))
        return place.folder / name

    whole = begun("whole", *on(device), ONE_EPOCH[0])
    compared: list[tuple[str, Path, Path, Mapping[str, float]]] = []
    if place.on_gpu:
        cpu, here = begun("cpu", *FLOAT32, *on("cpu")), begun("device", *FLOAT32, *on(device))
        old = begun("old", *on(device), module="benchmarks.gpu.stages")
        compared += [(device, here, cpu, BOUNDS), ("as an older GPU", old, cpu, BOUNDS)]
        cpu = begun("shaped_cpu", *FLOAT32, *SHAPED, *on("cpu"), documents=600, **SHAPE)
        here = begun("shaped", *FLOAT32, *SHAPED, *on(device), documents=600, **SHAPE)
        compared.append(("of the default's shape", here, cpu, SHAPED_BOUNDS))
    streamed = place.folder / "streamed"
    tiny.make_assets(streamed)
    finish(pipeline("sample", streamed, *on(device), *ONE_EPOCH))
    finish(pipeline("stream", streamed, *on(device), *ONE_EPOCH))
    finish(*started)
    for name, here, cpu, bounds in compared:
        compare(place, name, figures(here), figures(cpu), bounds)
    assert weights(whole), "no weights"
    assert weights(whole) == weights(streamed), "the stream's weights are others"
    place.note(stream="the same weights")


if __name__ == "__main__":
    torch.cuda.get_device_capability = lambda _device=None: (7, 5)
    main()
