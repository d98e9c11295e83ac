"""One training step of every kind of SAE: its gradients against float64, then milliseconds against the floor.

The standard SAE by benchmarks/train_step.py: its dense step, its sparse one at several L0, autograd, and plain torch;
SAELens too, where it is installed. Other kinds by each of their kernels, on random rows, with the settings that
benchmarks/gpu/kernels.py gives them. Best of some rounds; `floor` is what no step can beat.
"""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.check import Place
from benchmarks.gpu.kernels import new_sae
from benchmarks.train_step import Arm, measure, time_arm, with_update
from train.config import KINDS
from train.sae import Sae
from train.step import AUTOGRAD, Kernel, kernels

L0S = (86, 20, 300, 1000)  # dense steps take the first
ROUNDS = 2


def gradients(sae: Sae, x_BD: Tensor, operands: Mapping[str, Tensor], kernel: Kernel, dtype: torch.dtype):
    """Of one batch (B, D), by name, as `with_update` asks for them."""
    return kernel.step(sae, x_BD, sae.coefficients, dtype, operands=operands).gradients


def run(place: Place) -> None:
    """The check."""
    s, dtype = place.sizes, torch.bfloat16 if place.on_gpu else torch.float32
    place.note(**standard(place, dtype))
    x_BD = torch.randn(s.batch, s.d_in, device=place.device)
    for kind in [kind for kind in KINDS if kind != "standard"]:
        sae = new_sae(kind, s.d_in, s.d_sae, place.device)
        if hasattr(sae, "k"):
            sae = replace(sae, k=L0S[0] if place.on_gpu else 20)
        for name, kernel in kernels(sae).items():
            precision = torch.float32 if kernel is AUTOGRAD else dtype  # of the operands; autocast makes its own
            take = partial(gradients, kernel=kernel, dtype=dtype)
            arm = Arm(name, kind, partial(with_update, gradients=take, compute_dtype=precision))
            times = [wall for _ in range(ROUNDS) for wall, *_ in time_arm(arm, sae, x_BD)]
            place.note(**{f"{kind} {name}, ms": 1e3 * min(times)})


def standard(place: Place, dtype: torch.dtype) -> dict[str, object]:
    """The figures of benchmarks/train_step.py."""
    s = place.sizes
    arguments = Namespace(
        device=place.device.type,
        d_in=s.d_in,
        d_sae=s.d_sae,
        batch=s.batch,
        l0=L0S if place.on_gpu else (20,),
        repeats=ROUNDS,
        arms=["ours", "plain torch autocast", "saelens autocast", "saelens tf32"],
        store=None,
        sae=None,
    )
    report = measure(arguments, dtype)
    floor = {name: value for name, value in report["floors"].items() if name.endswith("ms")}
    arms = {f"{name}, ms": row["ms"] for name, row in report["arms"].items()}
    peak = {name: row["peak_bytes"] / 1e9 for name, row in report["arms"].items()}
    return {**arms, "floor": floor, "peak_gb": peak, "skipped": report["skipped"]}
