"""Training at the paper's width: killed after a checkpoint and resumed, the same weights and metrics; and its memory.

As benchmarks/gpu/training.py, once, for the standard SAE. One checkpoint of 6.4 GB and two copies of the weights a run,
so it is the disk that takes the time.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

from benchmarks.gpu.check import Place
from benchmarks.gpu.training import (
    differences,
    killed,
    make_store,
    metrics,
    result,
    resumed,
    settings,
    undisturbed,
)
from pipeline.memory import training_memory
from train.config import TrainConfig
from train.kinds import sae_class

CHECKPOINT_EVERY, KILLED_AFTER = 35, 40  # no second checkpoint before the end
WITHIN = 0.1  # the estimate of the peak


def estimated(place: Place, about: dict[str, Any]) -> int:
    """Bytes that `make estimate` expects training to take on the device."""
    config, d_in = TrainConfig(**about), place.sizes.d_in
    d_sae = config.sae.width(d_in)
    sae = 4 * sum(math.prod(shape) for shape in sae_class(config.sae.kind).shapes(d_in, d_sae).values())
    known: Any = SimpleNamespace(geometry=SimpleNamespace(d_in=d_in), saes=1, sae=sae, d_sae=d_sae)
    machine: Any = SimpleNamespace(element=2, is_gpu=True)
    return training_memory(config, known, machine)


def run(place: Place) -> None:
    """The check."""
    s, store = place.sizes, place.folder / "made"
    make_store(store, place)
    runtime = {"checkpoint_every": CHECKPOINT_EVERY, "keep_last": 1}
    about = settings("standard", s.d_sae, place, runtime=runtime)
    whole, again = place.folder / "whole", place.folder / "again"
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(undisturbed, store, {str(whole): about})
        step = killed(store, again, about, KILLED_AFTER)
        resumed(store, {str(again): about}, [step])
        beside.result()
    lines = [line for line in metrics(whole) if line["kind"] == "train"]
    place.note(l0_at_the_end=lines[-1]["l0"], kernels=sorted({line["kernel"] for line in lines}))
    assert not (different := differences(result(whole), result(again))), f"{different} differ"
    place.note(files_alike=len(result(whole)))
    if place.on_gpu:
        peak = int((whole / "peak").read_text())
        place.note(peak_gb=peak / 1e9, peak_of_estimate=peak / (expected := estimated(place, about)))
        assert abs(peak / expected - 1) <= WITHIN, f"the peak is {peak:,} bytes, the estimate {expected:,}"
