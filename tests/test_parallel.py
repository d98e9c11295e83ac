"""Features split over 2 and 3 ranks (gloo, float32) against one process, for each kernel and kind of SAE.

100 features are no multiple of 3 ranks, and more than k on each. Three processes do all the work once for the module,
first two of them together, then all; `Outcome` is what each brings back.
"""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from train.config import KINDS, SaeConfig, TrainConfig
from train.kinds import new_sae, sae_class
from train.parallel import SINGLE, FeatureRanks
from train.sae import Dead, Sae
from train.sparse_step import sparse_step
from train.standard import Standard
from train.trainer import Trainer, Validation

D_IN, D_SAE, BATCH, SAVED_AT = 32, 100, 64, 5
K = 40  # more than a rank of three has features
OTHERS = [kind for kind in KINDS if kind != "standard"]
STEPS = {"dense": 40, "sparse": 40, "auto": 40, **dict.fromkeys(OTHERS, 16)}  # of each case: a kernel or a kind
SETTINGS = {kind: {"k": 5, "aux_coefficient": 0.5, "aux_k": 4, "dead_after": 4 * BATCH} for kind in OTHERS}
SETTINGS["matryoshka"]["prefixes"] = (1, 20, 40, D_SAE)
SETTINGS["jumprelu"] = {"l0_coefficient": 0.1, "target_l0": 5.0}
AGAIN = ("auto", *OTHERS)
SWITCH = 0.6  # auto goes sparse below this part of d_sae: half of it is active at the start, so after a few steps
SECONDS = 120  # for all the processes' work, which takes some 10
FIGURES = ("l0", "explained_variance", "explained_variance_legacy")


class Outcome(NamedTuple):
    """A run of `trained`, seen by one rank."""

    figures: list[dict[str, float]]  # of each step
    kernels: list[str]
    validation: Validation
    dead: int
    b_dec: list[Tensor]  # with Adam's moments
    contiguous: bool
    restored: dict[str, Tensor]  # right after the restore, if any; whole, on rank 0
    tensors: dict[str, Tensor]  # at the end
    sae: Sae | None
    kernel: dict


class Saved(NamedTuple):
    step: int
    tensors: dict[str, Tensor]
    kernel: dict


def batch(step: int) -> Tensor:
    """Rows of norm about √d_in, mixed from 24 directions of which each row has a few."""
    directions = torch.randn(24, D_IN, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(step)
    present = torch.rand(BATCH, 24, generator=generator) < 1 / 8
    mixed = (present * torch.rand(BATCH, 24, generator=generator)) @ directions
    return mixed + 0.1 * torch.randn(BATCH, D_IN, generator=generator)


def trained(ranks: FeatureRanks, case: str, steps: int | None = None, start: Saved | None = None) -> Outcome:
    """Train up to `steps` (the case's), from the beginning or from what was saved."""
    settings = {"kind": case, **SETTINGS[case]} if case in OTHERS else {"l1_coefficient": 1.0}
    config = TrainConfig(
        sae=SaeConfig(d_sae=D_SAE, **settings),
        lr=3e-3,
        batch_size=BATCH,
        epochs=1,
        kernel="auto" if case in OTHERS else case,
        sparse_below=SWITCH,
    )
    sae = new_sae(config, D_IN, 2.0, "cpu")
    sae.b_enc[95:] = -1e3  # the last rank's: they never fire
    sae.b_dec.fill_(0.5)  # to be counted once
    trainer = Trainer(ranks.shard(sae), config, 200, 1000, torch.float32, ranks)
    if start:
        trainer.restore(start.tensors, start.step, start.kernel)
    restored = {name: tensor.clone() for name, tensor in trainer.tensors().items()}
    figures, kernels = [], []
    while trainer.step_number < (steps or STEPS[case]):
        stepped = trainer.step(batch(trainer.step_number))
        tensors = {name: getattr(stepped.result, name) for name in FIGURES} | stepped.result.terms
        tensors |= {"loss": stepped.loss, "grad_norm": stepped.grad_norm}
        figures.append({name: float(value) for name, value in tensors.items()})
        kernels.append(stepped.kernel)
    b_dec = trainer.sae.b_dec
    moments = [trainer.adam.exp_avg["b_dec"], trainer.adam.exp_avg_sq["b_dec"]]
    return Outcome(
        figures,
        kernels,
        trainer.validate(torch.cat([batch(-step) for step in range(1, 4)])[:150]),
        trainer.dead_features(),
        [b_dec, *moments],
        all(weight.is_contiguous() for weight in trainer.sae.parameters.values()),
        restored,
        trainer.tensors(),
        trainer.whole_sae(),
        trainer.kernel.state(),
    )


def one_step(ranks: FeatureRanks, kind: str) -> dict[str, Tensor]:
    """Gradients and what fired in a step of exact numbers, so that many scores are equal; whole, on rank 0.

    Some rank has fewer features than k, and only the last one dead features.
    """
    k = {"k": K} if "k" in SETTINGS[kind] else {}
    config = TrainConfig(sae=SaeConfig(kind=kind, d_sae=D_SAE, **SETTINGS[kind] | k), epochs=1)
    sae = new_sae(config, D_IN, 1.0, "cpu")
    sae.W_enc.mul_(4).round_().div_(4)
    sae.W_dec.copy_(torch.eye(D_IN)[torch.arange(D_SAE) % D_IN])
    mine, features = ranks.shard(sae), ranks.features(D_SAE)
    dead_K = torch.tensor([i - features.start for i in (90, 97, 99) if i in features], dtype=torch.int64)
    rows_BD = batch(0).mul_(4).round_()
    found = sparse_step(mine, rows_BD, mine.coefficients, torch.float32, ranks, dead=Dead(dead_K, 3))
    assert ("aux" in found.terms) == (kind != "jumprelu")
    axes = sae.feature_axes() | {"fired": 0}
    return ranks.gather(found.gradients | {"fired": found.fired_F}, axes, D_SAE)


def rank_work(process: int, folder: Path, ports: dict[int, int]) -> None:
    """What each of the three processes does, as rank `process`; writes its outcomes into the folder."""
    torch.set_num_threads(1)
    outcomes: dict[str, Outcome] = {}
    exchanged, steps = {}, {}
    for size in (2, 3):
        if process >= size:
            continue
        environment = {"RANK": process, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports[size]}
        os.environ.update({name: str(value) for name, value in environment.items()})
        ranks = FeatureRanks.from_environment(torch.device("cpu"))
        for case in STEPS:
            outcomes[f"{size} {case}"] = trained(ranks, case)
        for case in AGAIN:
            outcomes[f"{size} {case} again"] = trained(ranks, case)
        steps |= {f"{size} {kind}": one_step(ranks, kind) for kind in OTHERS}
        if size == 2:
            first = trained(ranks, "auto", SAVED_AT)
            if process == 0:
                torch.save(Saved(SAVED_AT, first.tensors, first.kernel), folder / "saved.pt")
        else:
            dist.barrier()
            start = torch.load(folder / "saved.pt", weights_only=False)
            outcomes["3 resumed"] = trained(ranks, "auto", start=start)
        exchanged[size] = [ranks.any(process == size - 1), ranks.any(False)]
        ranks.close()
    torch.save((outcomes, exchanged, steps), folder / f"{process}.pt")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Ranks(NamedTuple):
    outcomes: list[dict[str, Outcome]]  # of each process
    exchanged: list[dict[int, dict]]
    steps: list[dict[str, dict[str, Tensor]]]
    saved: Saved


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """More would wait for each other at these shapes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    folder = tmp_path_factory.mktemp("ranks")
    processes = torch.multiprocessing.start_processes(
        rank_work, (folder, {2: free_port(), 3: free_port()}), nprocs=3, join=False, start_method="fork"
    )
    deadline = time.monotonic() + SECONDS
    while not processes.join(timeout=1):  # raises when one fails, and ends the others
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            pytest.fail(f"ranks are not done after {SECONDS} s")
    brought = [torch.load(folder / f"{process}.pt", weights_only=False) for process in range(3)]
    outcomes, exchanged, steps = zip(*brought, strict=True)
    return Ranks(list(outcomes), list(exchanged), list(steps), torch.load(folder / "saved.pt", weights_only=False))


@pytest.fixture(scope="module")
def one_process() -> dict[str, Outcome]:
    return {case: trained(SINGLE, case) for case in STEPS}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("case", STEPS)
@pytest.mark.parametrize("size", [2, 3])
class TestAgainstOneProcess:
    def test_figures(self, ranks: Ranks, one_process: dict[str, Outcome], size: int, case: str) -> None:
        ours, one = ranks.outcomes[0][f"{size} {case}"].figures, one_process[case].figures
        for step, (a, b) in enumerate(zip(ours, one, strict=True)):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5 if step < 10 else 1e-3), step
            for name in b:
                assert a[name] == pytest.approx(b[name], rel=1e-5 if step < 1 else 5e-3), (name, step)
        assert one[-1]["mse"] < 0.75 * one[0]["mse"]  # it did train
        assert one[0]["grad_norm"] > 1  # and was clipped

    def test_the_same_kernel_at_every_step(
        self, ranks: Ranks, one_process: dict[str, Outcome], size: int, case: str
    ) -> None:
        for rank in range(size):
            assert ranks.outcomes[rank][f"{size} {case}"].kernels == one_process[case].kernels
        expected = {"auto": {"dense", "sparse"}} | {kind: {"sparse"} for kind in OTHERS}
        assert set(one_process[case].kernels) == expected.get(case, {case})

    def test_validation_and_dead_features(
        self, ranks: Ranks, one_process: dict[str, Outcome], size: int, case: str
    ) -> None:
        one = one_process[case]
        assert one.dead >= 5
        for rank in range(size):
            ours = ranks.outcomes[rank][f"{size} {case}"]
            assert ours.validation == pytest.approx(one.validation, rel=5e-3)
            assert ours.dead == one.dead

    def test_tensors_are_whole_and_close(
        self, ranks: Ranks, one_process: dict[str, Outcome], size: int, case: str
    ) -> None:
        ours, one = ranks.outcomes[0][f"{size} {case}"], one_process[case]
        assert ours.tensors.keys() == one.tensors.keys()
        for name, tensor in one.tensors.items():
            assert ours.tensors[name].shape == tensor.shape, name
            assert ours.tensors[name].dtype == tensor.dtype, name
        of_kind = sae_class(case) if case in OTHERS else Standard
        for name in of_kind.dims:
            assert (ours.tensors[name] - one.tensors[name]).norm() <= 1e-2 * one.tensors[name].norm(), name
        assert ours.sae is not None and one.sae is not None
        for name in of_kind.dims:
            expected = one.sae.parameters[name]
            assert (ours.sae.parameters[name] - expected).norm() <= 1e-2 * expected.norm(), name


@pytest.mark.parametrize("case", STEPS)
@pytest.mark.parametrize("size", [2, 3])
class TestRanks:
    def test_agree_to_the_bit(self, ranks: Ranks, size: int, case: str) -> None:
        first, *others = (ranks.outcomes[rank][f"{size} {case}"] for rank in range(size))
        assert first.contiguous
        for other in others:
            assert other.figures == first.figures
            assert other.validation == first.validation
            assert other.kernel == first.kernel
            assert all(torch.equal(a, b) for a, b in zip(other.b_dec, first.b_dec, strict=True))
            assert other.contiguous
            assert other.tensors == {}
            assert other.sae is None


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_choose_the_entries_that_one_process_does(ranks: Ranks, size: int, kind: str) -> None:
    ours, one = ranks.steps[0][f"{size} {kind}"], one_step(SINGLE, kind)
    assert torch.equal(ours.pop("fired"), one.pop("fired"))
    for name, gradient in one.items():
        assert (ours[name] - gradient).norm() <= 1e-6 * gradient.norm(), name
        assert (ours[name].norm() > 0) == (name != "log_threshold" or gradient.norm() > 0)


@pytest.mark.parametrize("case", AGAIN)
@pytest.mark.parametrize("size", [2, 3])
def test_the_same_ranks_give_the_same_bytes_twice(ranks: Ranks, size: int, case: str) -> None:
    for rank in range(size):
        first, again = (ranks.outcomes[rank][f"{size} {case}{which}"] for which in ("", " again"))
        assert again.figures == first.figures
        assert_same(again.tensors, first.tensors)


class TestSavedOnTwo:
    def test_restored_on_one(self, ranks: Ranks) -> None:
        start = ranks.saved
        resumed = trained(SINGLE, "auto", start=start)
        assert_same(resumed.restored, start.tensors)
        self.goes_on(resumed, ranks)

    def test_restored_on_three(self, ranks: Ranks) -> None:
        resumed = ranks.outcomes[0]["3 resumed"]
        assert_same(resumed.restored, ranks.saved.tensors)
        self.goes_on(resumed, ranks)

    def goes_on(self, resumed: Outcome, ranks: Ranks) -> None:
        straight = ranks.outcomes[0]["2 auto"]
        assert resumed.kernels == straight.kernels[SAVED_AT:]
        for step, (a, b) in enumerate(zip(resumed.figures, straight.figures[SAVED_AT:], strict=True)):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5 if step < 10 else 1e-3), step


@pytest.mark.parametrize("size", [2, 3])
def test_a_flag_reaches_all_ranks(ranks: Ranks, size: int) -> None:
    for rank in range(size):
        assert ranks.exchanged[rank][size] == [True, False]
