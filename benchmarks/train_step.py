"""One training step of a ReLU + L1 SAE: other open trainers against ours, dense and sparse.

    .venv/bin/python -m benchmarks.train_step --d-in 576 --d-sae 9216 --batch 4096
    .venv/bin/python -m benchmarks.train_step --store runs/harvest/*/store --sae runs/train/*/model.layers.17
    .venv/bin/python -m benchmarks.train_step --device cuda --d-in 4096 --d-sae 65536 --l0 86 20 300 1000 8000

One process; arms run in turn on the same weights and rows, each built afresh in every round, so that a
busy neighbour or a hot chip falls on all of them. A step is forward, backward, clip of the global norm
to 1.0 and Adam (fused in the plain and in our arms, the others as shipped). Prints one JSON object;
gradients are compared with float64 autograd before anything is timed.

Rows are Gaussian. Biases are set so that the features have the wanted L0, with densities spread over
orders of magnitude as those of a trained SAE are. Dense arms do the same work at every L0.
With --store and --sae, one more arm is a trained SAE on held-out rows of its store.
"""

import argparse
import ctypes
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harvest.activation_store import ActivationStore
from train.adam import Adam, Update
from train.checkpoint import load_sae
from train.config import ExcludeConfig
from train.dataloader import heldout_rows
from train.dense_step import dense_step, product
from train.nonzeros import csr
from train.sae import DECODER_NORM, Sae
from train.sparse_step import active_features, operations_for, sparse_step
from train.standard import Standard
from train.step import StepResult, Tensors, autograd_step

L1, LR = 5.0, 5e-5
CHECKED_ROWS = 256
STEPS_A_ROUND = 2
Step = Callable[[Tensor], object]


class Case(NamedTuple):
    """An SAE and the stored rows (B, D) that a step takes."""

    sae: Sae
    x_BD: Tensor


class Arm(NamedTuple):
    name: str
    case: str
    build: Callable[[Sae], Step]  # from weights that the arm may keep and change


def sae_with_l0(start: Sae, l0: float) -> Sae:
    """The start with biases that make about l0 features fire on a Gaussian row; W_enc is shared."""
    generator = torch.Generator().manual_seed(0)
    density_F = torch.randn(start.d_sae, generator=generator).exp()
    for _ in range(20):  # scaling and clamping in turn; converges unless l0 is near d_sae
        density_F = (density_F * (l0 / density_F.sum())).clamp(1e-7, 0.9)
    b_enc = DECODER_NORM * torch.special.ndtri(density_F)
    return replace(start, parameters=start.parameters | {"b_enc": b_enc.to(start.W_enc.device)})


def autograd_loss(weights: Tensors, x_BD: Tensor, active_BF: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The loss and f as plain torch writes them, of scaled rows; active_BF replaces ReLU by a given set."""
    pre_BF = x_BD @ weights["W_enc"] + weights["b_enc"]
    f_BF = torch.relu(pre_BF) if active_BF is None else pre_BF * active_BF
    l1_B = (f_BF * weights["W_dec"].norm(dim=1)).sum(1)
    x_hat_BD = f_BF @ weights["W_dec"] + weights["b_dec"]
    return (x_hat_BD - x_BD).square().sum(1).mean() + L1 * l1_B.mean(), f_BF


def plain_gradients(sae: Sae, x_BD: Tensor, autocast: bool) -> Tensors:
    leaves = {name: weight.detach().requires_grad_() for name, weight in sae.parameters.items()}
    with torch.autocast(x_BD.device.type, torch.bfloat16, enabled=autocast):
        loss = autograd_loss(leaves, sae.scaled(x_BD))[0]
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def our_gradients(
    sae: Sae,
    x_BD: Tensor,
    step: Callable[..., StepResult],
    compute_dtype: torch.dtype,
    operands: Tensors | None = None,
) -> Tensors:
    return step(sae, x_BD, {"l1": L1}, compute_dtype, operands=operands).gradients


def with_update(sae: Sae, gradients: Callable[..., Tensors], compute_dtype: torch.dtype) -> Step:
    """As `train.trainer` makes a step."""
    adam = Adam(sae.trained, compute_dtype)

    def run(x_BD: Tensor) -> None:
        found = gradients(sae, x_BD, operands=adam.operands)
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in found.values()]))
        adam.update(found, Update(LR, (0.9, 0.999), 1, norm.clamp_min(1.0)))

    return run


def with_adam(sae: Sae, gradients: Callable[[Sae, Tensor], Tensors]) -> Step:
    weights = sae.parameters.values()
    adam = torch.optim.Adam(weights, lr=LR, fused=True)

    def run(x_BD: Tensor) -> None:
        for name, gradient in gradients(sae, x_BD).items():
            sae.parameters[name].grad = gradient
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        adam.step()
        adam.zero_grad()

    return run


def saelens(sae: Sae, autocast: bool, tf32: bool = False) -> Step:
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    device = str(sae.W_enc.device)
    config = StandardTrainingSAEConfig(
        d_in=sae.d_in, d_sae=sae.d_sae, device=device, apply_b_dec_to_input=False, l1_coefficient=L1
    )
    theirs = StandardTrainingSAE(config)
    theirs.load_state_dict(sae.parameters)
    settings = SAETrainerConfig(10**9, 4096, lr=LR, lr_end=LR, device=device, autocast=autocast)
    trainer = SAETrainer(settings, theirs, data_provider=iter(()))

    def run(x_BD: Tensor) -> None:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        trainer.step(x_BD)
        torch.backends.cuda.matmul.allow_tf32 = False

    return run


def dictionary_learning(sae: Sae, autocast: bool) -> Step:
    from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate

    trainer = StandardTrainerAprilUpdate(
        steps=10**6, activation_dim=sae.d_in, dict_size=sae.d_sae, layer=0, lm_name="", lr=LR,
        l1_penalty=L1, warmup_steps=0, sparsity_warmup_steps=None, device=str(sae.W_enc.device),
    )  # fmt: skip
    with torch.no_grad():
        trainer.ae.encoder.weight.copy_(sae.W_enc.t())
        trainer.ae.encoder.bias.copy_(sae.b_enc)
        trainer.ae.decoder.weight.copy_(sae.W_dec.t())

    def run(x_BD: Tensor) -> None:
        with torch.autocast(x_BD.device.type, torch.bfloat16, enabled=autocast):
            trainer.update(1, x_BD)

    return run


def arms(cases: dict[str, Case], compute_dtype: torch.dtype) -> Iterator[Arm]:
    first = next(iter(cases))
    dense = partial(our_gradients, step=dense_step, compute_dtype=compute_dtype)
    sparse = partial(our_gradients, step=sparse_step, compute_dtype=compute_dtype)
    for mode, autocast in (("fp32", False), ("autocast", True)):
        plain = partial(plain_gradients, autocast=autocast)
        yield Arm(f"saelens {mode}", first, partial(saelens, autocast=autocast))
        yield Arm(f"dictionary_learning {mode}", first, partial(dictionary_learning, autocast=autocast))
        yield Arm(f"plain torch {mode}", first, partial(with_adam, gradients=plain))
    if cases[first].x_BD.is_cuda:
        yield Arm("saelens tf32", first, partial(saelens, autocast=False, tf32=True))
    ours = partial(our_gradients, step=autograd_step, compute_dtype=compute_dtype)
    yield Arm("ours autograd", first, partial(with_update, gradients=ours, compute_dtype=compute_dtype))
    yield Arm("ours dense", first, partial(with_update, gradients=dense, compute_dtype=compute_dtype))
    for case in cases:
        yield Arm(f"ours sparse {case}", case, partial(with_update, gradients=sparse, compute_dtype=compute_dtype))


def trained_case(store: Path, sae: Path, batch: int, device: str) -> Case:
    """A trained SAE and a batch of kept held-out rows of its store."""
    saved = load_sae(sae)
    opened = ActivationStore.open(store)
    rows = heldout_rows(opened, saved.hook, ExcludeConfig(), saved.statistics.norm_limit, batch)
    return Case(saved.sae.to(device), rows.to(device))


def own_active_set(path: str, sae: Sae, x_BD: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """The entries (B, F) that a path takes for active: products differ in their last bits."""
    if path.startswith("ours sparse"):
        ops = operations_for(x_BD.device)
        active = active_features(sae.W_enc, sae.b_enc, sae.scaled(x_BD), compute_dtype, ops)
        return csr(active, sae.d_sae).to_dense() > 0
    if path == "ours dense":
        return product(sae.scaled(x_BD), sae.W_enc, compute_dtype) + sae.b_enc > 0
    with torch.autocast(x_BD.device.type, torch.bfloat16, enabled=compute_dtype != torch.float32):
        return autograd_loss(sae.parameters, sae.scaled(x_BD))[1] > 0


def gradient_errors(sae: Sae, x_BD: Tensor, compute_dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """‖g − g₆₄‖ / ‖g₆₄‖ of each gradient, g₆₄ by float64 autograd with the path's own active set.

    Exits where one is over 1e-5 and over 1.2 times plain torch's of the same product type.
    """
    paths = {
        "plain torch": partial(plain_gradients, autocast=compute_dtype != torch.float32),
        "ours dense": partial(our_gradients, step=dense_step, compute_dtype=compute_dtype),
        "ours sparse": partial(our_gradients, step=sparse_step, compute_dtype=compute_dtype),
    }
    errors = {}
    for path, gradients in paths.items():
        active_BF = own_active_set(path, sae, x_BD, compute_dtype)
        leaves = {name: weight.double().requires_grad_() for name, weight in sae.parameters.items()}
        loss = autograd_loss(leaves, x_BD.double() * sae.scale, active_BF)[0]
        exact = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        found = gradients(sae, x_BD)
        errors[path] = {name: float((found[name] - e).norm() / e.norm()) for name, e in exact.items()}
        for name, error in errors[path].items():
            if error > max(1e-5, 1.2 * errors["plain torch"][name]):
                raise SystemExit(f"{path}: gradient of {name} is {error:.1e} from float64's")
    return errors


class Memory:
    """Peak bytes of the device (allocator) or of this process (resident set) above a moment's level."""

    def __init__(self, device: str) -> None:
        self.device = device
        gc.collect()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.level = torch.cuda.memory_allocated()
        elif sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            self.level = self.resident("VmRSS")

    @staticmethod
    def resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

    def peak(self) -> int:
        """Bytes; 0 where the system does not tell."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() - self.level
        return self.resident("VmHWM") - self.level if sys.platform == "linux" else 0


def seconds(call: Callable[[Tensor], object], x: Tensor) -> tuple[float, float]:
    """Wall and process seconds of one call, to the end of its work on the device."""
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    call(x)
    wait()
    return time.perf_counter() - wall, time.process_time() - cpu


def copied(sae: Sae) -> Sae:
    """One that an arm may change."""
    return replace(sae, parameters={name: weight.clone() for name, weight in sae.parameters.items()})


def time_arm(arm: Arm, sae: Sae, x_BD: Tensor) -> list[tuple[float, float, int]]:
    """Wall and process seconds of some steps, and the peak memory of weights, optimizer and step."""
    memory = Memory(x_BD.device.type)
    run = arm.build(copied(sae))
    run(x_BD)  # Adam's moments, kernels, allocator
    times = [seconds(run, x_BD) for _ in range(STEPS_A_ROUND)]
    return [(*time, memory.peak()) for time in times]


def floors(sae: Sae, x_BD: Tensor, compute_dtype: torch.dtype) -> dict[str, float]:
    """What no step can beat: its dense products, and 32 bytes a weight of Adam (28) and norm (4)."""
    x, W_enc = x_BD.to(compute_dtype), sae.W_enc.to(compute_dtype)
    pre_BF, target = x @ W_enc, torch.empty_like(sae.W_dec)
    product_s = min(seconds(lambda x: torch.mm(x, W_enc, out=pre_BF), x)[0] for _ in range(10))
    copy_s = min(seconds(target.copy_, sae.W_dec)[0] for _ in range(10))
    update_s = 32 * sum(weight.numel() for weight in sae.parameters.values()) * copy_s / (2 * target.nbytes)
    return {
        "product_ms": 1e3 * product_s,
        "product_tflops": 2 * x.shape[0] * W_enc.numel() / product_s / 1e12,
        "copy_gb_per_s": 2 * target.nbytes / copy_s / 1e9,
        "dense_ms": 1e3 * (5 * product_s + update_s),
        "sparse_ms": 1e3 * (product_s + update_s),
    }


def measure(arguments: argparse.Namespace, compute_dtype: torch.dtype) -> dict[str, object]:
    start = Standard.initial(arguments.d_in, arguments.d_sae, device=arguments.device)
    generator = torch.Generator().manual_seed(1)
    x_BD = torch.randn(arguments.batch, arguments.d_in, generator=generator).to(arguments.device)
    cases = {f"L0={l0:g}": Case(sae_with_l0(start, l0), x_BD) for l0 in arguments.l0}
    if arguments.sae:
        cases["trained SAE"] = trained_case(arguments.store, arguments.sae, arguments.batch, arguments.device)
    report = {
        "settings": {**vars(arguments), "compute_dtype": compute_dtype},
        "machine": {
            "device": torch.cuda.get_device_name() if x_BD.is_cuda else platform.machine(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "l0": {name: float(sparse_step(*case, {"l1": L1}, compute_dtype).l0) for name, case in cases.items()},
        "gradient_errors": {
            name: gradient_errors(case.sae, case.x_BD[:CHECKED_ROWS], compute_dtype) for name, case in cases.items()
        },
        "floors": floors(start, x_BD, compute_dtype),
    }
    chosen = [arm for arm in arms(cases, compute_dtype) if any(a in arm.name for a in arguments.arms)]
    tiny = Standard.initial(16, 32, device=arguments.device)
    skipped: dict[str, str] = {}
    found: dict[str, list[tuple[float, float, int]]] = {}
    for arm in chosen * arguments.repeats:
        try:
            arm.build(copied(tiny))(x_BD[:8, :16])  # imports, which are not its memory
            found.setdefault(arm.name, []).extend(time_arm(arm, *cases[arm.case]))
        except (ImportError, torch.OutOfMemoryError) as error:
            skipped[arm.name] = str(error)
    return {**report, "skipped": skipped, "arms": table(found, arguments.batch)}


def table(found: dict[str, list[tuple[float, float, int]]], batch: int) -> dict[str, dict[str, float]]:
    """Best and median ms, best process ms, tokens/s, peak bytes, and SAELens' fp32 over each."""
    rows: dict[str, dict[str, float]] = {}
    for name, measured in found.items():
        wall, cpu, peak = zip(*measured, strict=True)
        row = {"ms": 1e3 * min(wall), "cpu_ms": 1e3 * min(cpu), "peak_bytes": max(peak)}
        rows[name] = row | {"ms_median": 1e3 * statistics.median(wall), "tokens_per_s": batch / min(wall)}
        if reference := rows.get("saelens fp32"):
            rows[name] |= {f"{key}_ratio": reference[key] / row[key] for key in row if row[key]}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--d-in", type=int, default=576)
    parser.add_argument("--d-sae", type=int, default=9216)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5, help="rounds over all arms")
    parser.add_argument("--l0", type=float, nargs="+", default=[86, 20, 300], help="dense arms use the first")
    parser.add_argument("--arms", nargs="+", default=[""], help="only arms whose name contains one of these")
    parser.add_argument("--compute-dtype", choices=["float32", "bfloat16"], help="of our products; bfloat16 on cuda")
    parser.add_argument("--store", type=Path, help="activation store of --sae")
    parser.add_argument("--sae", type=Path, help="folder of a trained SAE")
    arguments = parser.parse_args()
    dtype = arguments.compute_dtype or ("bfloat16" if arguments.device == "cuda" else "float32")
    if bool(arguments.store) != bool(arguments.sae):
        parser.error("--store and --sae belong together")
    print(json.dumps(measure(arguments, getattr(torch, dtype)), indent=2, default=str))


if __name__ == "__main__":
    main()
