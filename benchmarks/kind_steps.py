"""One training step of each kind of SAE, update included, beside SAELens' and dictionary_learning's of the same kind.

    .venv/bin/python -m benchmarks.kind_steps                              # 576 x 9,216, batch 4,096, an L0 of 86
    .venv/bin/python -m benchmarks.kind_steps --kinds batchtopk --repeats 10

Rows are Gaussian. All arms run in turn in one process; the standard SAE's sparse step, at the same L0, runs in every
round too. Kinds with k take that L0; jumprelu's thresholds are set so that about so many fire. "aux" revives 256
features at once. Prints JSON: best CPU-ms and wall ms of each, the ratio to our standard step, and to theirs.
"""

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.train_step import Arm, Step, copied, sae_with_l0, seconds, with_update
from harvest.device import device_name
from train.kinds import sae_class
from train.sae import Dead, Sae
from train.standard import Standard
from train.step import kernels

THEIRS = {"topk": "TopK", "batchtopk": "BatchTopK", "matryoshka": "MatryoshkaBatchTopK", "jumprelu": "JumpReLU"}
LR = 1e-3


def start(kind: str, options: argparse.Namespace) -> Sae:
    """An SAE of a kind at which a Gaussian row has about that L0."""
    d_in, d_sae, l0 = options.d_in, options.d_sae, options.l0
    if kind == "standard":
        return sae_with_l0(Standard.initial(d_in, d_sae, l1_coefficient=5.0), l0)
    if kind == "jumprelu":
        sae = sae_class(kind).initial(d_in, d_sae, target_l0=float(l0), l0_coefficient=1.0, bandwidth=0.1)
        density = torch.tensor(l0 / d_sae, dtype=torch.float64)
        sae.log_threshold.fill_(float((-torch.special.ndtri(density)).log()))
        return sae
    return sae_class(kind).initial(d_in, d_sae, k=l0, aux_coefficient=1 / 32)


def gradients(sae: Sae, x_BD: Tensor, operands: Any, dead: Dead | None = None) -> Any:
    """Of one batch, by the sparse step."""
    step = kernels(sae)["sparse"].step
    return step(sae, x_BD, sae.coefficients, torch.float32, operands=operands, dead=dead).gradients


def saelens(sae: Sae, kind: str, l0: int) -> Step:
    """A step of SAELens' trainer."""
    from sae_lens import saes
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    name = f"{THEIRS[kind]}TrainingSAE"
    own: dict[str, Any] = {"k": l0} if kind != "jumprelu" else {"jumprelu_init_threshold": float(sae.threshold[0])}
    if kind == "matryoshka":
        own["matryoshka_widths"] = list(sae.levels)
    config = {"d_in": sae.d_in, "d_sae": sae.d_sae, "apply_b_dec_to_input": False, "decoder_init_norm": 1.0, **own}
    theirs = getattr(saes, name)(getattr(saes, f"{name}Config")(**config))
    trainer = SAETrainer(SAETrainerConfig(10**9, 4096, lr=LR, lr_end=LR), theirs, data_provider=iter(()))
    return trainer.step


def dictionary_learning(sae: Sae, kind: str, l0: int) -> Step:
    """A step of dictionary_learning's trainer."""
    from dictionary_learning import trainers

    more: dict[str, Any] = {"k": l0} if kind != "jumprelu" else {"target_l0": float(l0)}
    if kind == "matryoshka":
        ends = (0, *sae.levels)
        more["group_fractions"] = [(b - a) / sae.d_sae for a, b in zip(ends, sae.levels, strict=False)]
    name = {"jumprelu": "JumpReluTrainer"}.get(kind, f"{THEIRS[kind]}Trainer")
    of_kind = getattr(trainers, name, None) or _by_module(name, kind)
    shape = {"activation_dim": sae.d_in, "dict_size": sae.d_sae, "layer": 0, "lm_name": "", "device": "cpu"}
    trainer = of_kind(steps=10**6, lr=LR, **shape, **more)
    if kind == "jumprelu":
        trainer.ae.threshold.data.fill_(float(sae.threshold[0]))
    return lambda x_BD: trainer.update(1, x_BD)


def _by_module(name: str, kind: str) -> Callable[..., Any]:
    from importlib import import_module

    modules = {"matryoshka": "matryoshka_batch_top_k", "jumprelu": "jumprelu"}
    return getattr(import_module(f"dictionary_learning.trainers.{modules[kind]}"), name)


def arms(options: argparse.Namespace) -> Iterator[tuple[Arm, Sae]]:
    """What is timed, and the SAE that it starts from."""
    updated = partial(with_update, compute_dtype=torch.float32)
    for kind in ("standard", *options.kinds):
        sae = start(kind, options)
        yield Arm(kind, kind, partial(updated, gradients=gradients)), sae
        if sae.auxiliary(1):
            dead = Dead(torch.arange(0, sae.d_sae, sae.d_sae // 256)[:256], 256)
            yield Arm(f"{kind} with aux", kind, partial(updated, gradients=partial(gradients, dead=dead))), sae
        if kind in THEIRS and not options.alone:
            yield Arm(f"{kind} saelens", kind, partial(saelens, kind=kind, l0=options.l0)), sae
            yield Arm(f"{kind} dictionary_learning", kind, partial(dictionary_learning, kind=kind, l0=options.l0)), sae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=576)
    parser.add_argument("--d-sae", type=int, default=9216)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--l0", type=int, default=86)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", default=list(THEIRS), choices=list(THEIRS))
    parser.add_argument("--alone", action="store_true", help="without the others' steps")
    options = parser.parse_args()
    x_BD = torch.randn(options.batch, options.d_in, generator=torch.Generator().manual_seed(1))
    ran: dict[str, tuple[str, Step]] = {}
    skipped: dict[str, str] = {}
    for arm, sae in arms(options):
        try:
            ran[arm.name] = arm.case, arm.build(copied(sae))
            ran[arm.name][1](x_BD)  # imports, moments, allocator
        except ImportError as error:
            ran.pop(arm.name, None)
            skipped[arm.name] = str(error)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ran}
    for _ in range(options.repeats):
        for name, (_, step) in ran.items():
            times[name].append(seconds(step, x_BD))
    best = {name: {"cpu_ms": 1e3 * min(c for _, c in t), "ms": 1e3 * min(w for w, _ in t)} for name, t in times.items()}
    for name, row in best.items():
        row["of_standard"] = row["cpu_ms"] / best["standard"]["cpu_ms"]
        row["of_ours"] = row["cpu_ms"] / best[ran[name][0]]["cpu_ms"]
    rows = {name: {key: round(value, 2) for key, value in row.items()} for name, row in best.items()}
    machine = {
        "device": device_name(torch.device("cpu")),
        "system": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    shape = {key: getattr(options, key) for key in ("d_in", "d_sae", "batch", "l0")}
    report = {"benchmark": "kind_steps", "shape": shape, "arms": rows, "skipped": skipped, "machine": machine}
    print(json.dumps({**report, "date": str(date.today())}, indent=1))


if __name__ == "__main__":
    main()
