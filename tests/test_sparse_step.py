"""The sparse step against float64 autograd and against the dense step.

The reference is given each path's own active set: near its threshold ReLU flips with the last bit of a
product, and one flip moves a float32 gradient by more than all its rounding does.

Shape suffixes: B rows of a batch, D d_in, F d_sae.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import only
from torch import Tensor

from harvest.activation_store import ActivationStore
from train import sparse_step as sparse_module
from train import step as dense_module
from train.checkpoint import load_sae
from train.config import ExcludeConfig
from train.dataloader import heldout_rows
from train.nonzeros import PLAIN
from train.sae import SAE, initial_sae
from train.sparse_step import active_features, sparse_step
from train.step import StepResult, dense_step, product

L1 = 5.0
STEPS: dict[str, Callable[..., StepResult]] = {"dense": dense_step, "sparse": sparse_step}


def rows(count: int, d_in: int, seed: int = 0) -> Tensor:
    """Rows of norm about √d_in, mixed from 2 × d_in directions of which each row has a few."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(2 * d_in, d_in, generator=torch.Generator().manual_seed(99))
    present = torch.rand(count, 2 * d_in, generator=generator) < 6 / (2 * d_in)
    mixed = (present * torch.rand(count, 2 * d_in, generator=generator)) @ directions
    mixed += 0.1 * torch.randn(count, d_in, generator=generator)
    return mixed * (d_in**0.5 / mixed.norm(dim=1).mean())


def trained(sae: SAE, x_BD: Tensor, step: Callable[..., StepResult], steps: int) -> tuple[SAE, list[StepResult]]:
    """The SAE after fp32 Adam steps on batches of 64 of the rows, and what each step reported."""
    sae = SAE(*(w.clone() for w in sae))
    adam = torch.optim.Adam(sae, lr=2e-3, betas=(0.9, 0.999))
    results = []
    for batch in range(steps):
        at = batch * 64 % (len(x_BD) - 64)
        results.append(step(sae, x_BD[at : at + 64], L1, torch.float32))
        for w, gradient in zip(sae, results[-1].gradients, strict=True):
            w.grad = gradient
        torch.nn.utils.clip_grad_norm_(sae, 1.0)
        adam.step()
    return sae, results


@cache
def after_200_steps() -> SAE:
    return trained(initial_sae(37, 211, seed=1), rows(512, 37, seed=2), dense_step, 200)[0]


def case(name: str) -> tuple[SAE, Tensor]:
    """An SAE and a batch: d_in and d_sae are no powers of two, and the batch is no whole number of blocks."""
    sae, x_BD = initial_sae(37, 211, seed=1), rows(83, 37)
    if name == "trained":
        return after_200_steps(), x_BD
    if name == "empty row and full row":
        sae.b_enc.fill_(-0.01)
        sae.W_enc[0] = 0.1  # makes the row that points along it fire every feature
        x_BD[0] = 0
        x_BD[82] = 0
        x_BD[5] = 20 * torch.eye(37)[0]
    elif name == "feature that never fires":
        sae.b_enc[[0, 100, 210]] = -1e6
    elif name == "nothing fires":
        sae.b_enc.fill_(-1e6)
    return sae, x_BD


CASES = ["start", "trained", "empty row and full row", "feature that never fires", "nothing fires"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_module, "BLOCK_ROWS", 16)
    monkeypatch.setattr(dense_module, "CPU_BLOCK", 50)


def active_set(path: str, sae: SAE, x_BD: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """The entries (B, F) that the path itself takes for active."""
    if path == "dense":
        return product(x_BD, sae.W_enc, compute_dtype) + sae.b_enc > 0
    active = active_features(sae, x_BD, compute_dtype, PLAIN)
    row_N = torch.arange(len(x_BD)).repeat_interleave(active.offset_B.diff())
    active_BF = torch.zeros(len(x_BD), sae.d_sae, dtype=torch.bool)
    active_BF[row_N, active.feature_N.long()] = True
    return active_BF


def exact(sae: SAE, x_BD: Tensor, active_BF: Tensor) -> tuple[Tensor, SAE]:
    """Loss and gradients in float64 by autograd, with this active set."""
    sae64, x = SAE(*(w.double().requires_grad_() for w in sae)), x_BD.double()
    f_BF = (x @ sae64.W_enc + sae64.b_enc) * active_BF
    l1_B = (f_BF * sae64.W_dec.norm(dim=1)).sum(1)
    loss = (sae64.decode(f_BF) - x).square().sum(1).mean() + L1 * l1_B.mean()
    return loss.detach(), SAE(*torch.autograd.grad(loss, sae64))


def differences(gradients: SAE, reference: SAE) -> list[float]:
    """‖g − reference‖ / ‖reference‖ of the four gradients; absolute where the reference is zero."""
    pairs = zip(gradients, reference, strict=True)
    return [float((a - b).norm() / (b.norm() if b.any() else 1)) for a, b in pairs]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("path", STEPS)
def test_gradients_equal_float64_autograd(path: str, name: str) -> None:
    sae, x_BD = case(name)
    step = STEPS[path](sae, x_BD, L1, torch.float32)
    active_BF = active_set(path, sae, x_BD, torch.float32)
    loss, gradients = exact(sae, x_BD, active_BF)

    assert max(differences(step.gradients, gradients)) <= 1e-5
    assert float(step.loss) == pytest.approx(float(loss), rel=1e-5)
    assert float(step.l0) == pytest.approx(float(active_BF.sum() / len(x_BD)))
    assert torch.equal(step.fired_F, active_BF.any(0))
    assert all(g.is_contiguous() and g.dtype == torch.float32 for g in step.gradients)


@pytest.mark.parametrize("start", ["new", "trained"])
@pytest.mark.parametrize("path", STEPS)
def test_gradients_on_rows_of_a_model(path: str, start: str, finished: Path) -> None:
    """Activations of the tiny language model, by the SAE before and after its training, outlier rows included."""
    saved = load_sae(only(finished, "runs/train/*/model.layers.1"))
    store = ActivationStore.open(only(finished, "runs/harvest/*/store"))
    rows_BD = heldout_rows(store, saved.hook, ExcludeConfig(norm_above_median=None), None, 100)
    x_BD = rows_BD.float() * saved.statistics.scale
    sae = saved.sae if start == "trained" else initial_sae(saved.sae.d_in, saved.sae.d_sae, seed=0)
    step = STEPS[path](sae, x_BD, L1, torch.float32)
    gradients = exact(sae, x_BD, active_set(path, sae, x_BD, torch.float32))[1]
    assert 0 < float(step.l0) < saved.sae.d_sae
    assert max(differences(step.gradients, gradients)) <= 1e-5


def test_the_cases_are_what_they_say() -> None:
    count_B = active_set("sparse", *case("empty row and full row"), torch.float32).sum(1)
    assert count_B[0] == 0 and count_B[82] == 0 and count_B[5] == 211
    fired_F = active_set("sparse", *case("feature that never fires"), torch.float32).any(0)
    assert not fired_F[[0, 100, 210]].any() and fired_F.sum() > 150
    assert not active_set("sparse", *case("nothing fires"), torch.float32).any()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("path", STEPS)
def test_active_set_differs_from_float64_only_at_the_threshold(path: str, name: str) -> None:
    sae, x_BD = case(name)
    pre_BF = x_BD.double() @ sae.W_enc.double() + sae.b_enc.double()
    differs_BF = active_set(path, sae, x_BD, torch.float32) != (pre_BF > 0)
    near_BF = pre_BF.abs() <= 1e-5 * pre_BF.abs().amax(1, keepdim=True)
    assert not (differs_BF & ~near_BF).any()


@pytest.mark.parametrize("name", ["start", "trained"])
@pytest.mark.parametrize("path", STEPS)
def test_bf16_products_are_as_close_as_autocast(path: str, name: str) -> None:
    sae, x_BD = case(name)[0], rows(384, 37)  # enough rows to average rounding out of the ratio
    step = STEPS[path](sae, x_BD, L1, torch.bfloat16)
    ours = differences(step.gradients, exact(sae, x_BD, active_set(path, sae, x_BD, torch.bfloat16))[1])

    leaves = SAE(*(w.clone().requires_grad_() for w in sae))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        f_BF = torch.relu(x_BD @ leaves.W_enc + leaves.b_enc)
        l1_B = (f_BF * leaves.W_dec.norm(dim=1)).sum(1)
        error_BD = f_BF @ leaves.W_dec + leaves.b_dec - x_BD
        loss = error_BD.square().sum(1).mean() + L1 * l1_B.mean()
    autocast = differences(SAE(*torch.autograd.grad(loss, leaves)), exact(sae, x_BD, f_BF.detach() > 0)[1])

    assert all(a <= 1.2 * b for a, b in zip(ours, autocast, strict=True)), (ours, autocast)


def test_dense_and_sparse_train_alike() -> None:
    sae, x_BD = initial_sae(64, 512, seed=0), rows(1024, 64)
    dense, sparse = (trained(sae, x_BD, step, 50)[1] for step in (dense_step, sparse_step))
    for index, (a, b) in enumerate(zip(dense, sparse, strict=True)):
        assert float(b.loss) == pytest.approx(float(a.loss), rel=1e-5 if index < 10 else 1e-3)
        assert float(b.l0) == pytest.approx(float(a.l0), rel=5e-3)
        assert float(b.explained_variance) == pytest.approx(float(a.explained_variance), rel=5e-3)
    assert dense[-1].loss < 0.9 * dense[0].loss  # it did train


def test_metrics_equal_the_dense_steps() -> None:
    sae, x_BD = case("trained")
    dense, sparse = dense_step(sae, x_BD, L1, torch.float32), sparse_step(sae, x_BD, L1, torch.float32)
    for name in ("loss", "mse", "l1", "l0", "explained_variance", "explained_variance_legacy"):
        assert float(getattr(sparse, name)) == pytest.approx(float(getattr(dense, name)), rel=1e-5), name


def test_same_input_gives_the_same_bytes() -> None:
    sae, x_BD = initial_sae(64, 4096, seed=0), rows(300, 64)
    first, *others = (sparse_step(sae, x_BD, L1, torch.float32) for _ in range(4))
    for other in others:
        assert torch.equal(first.loss, other.loss)
        assert all(torch.equal(a, b) for a, b in zip(first.gradients, other.gradients, strict=True))


@pytest.mark.parametrize("path", STEPS)
def test_block_size_changes_no_more_than_rounding(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x_BD = case("trained")
    small = STEPS[path](sae, x_BD, L1, torch.float32)
    monkeypatch.setattr(sparse_module, "BLOCK_ROWS", 512)
    monkeypatch.setattr(dense_module, "CPU_BLOCK", 512)
    assert max(differences(small.gradients, STEPS[path](sae, x_BD, L1, torch.float32).gradients)) <= 1e-5


@pytest.mark.parametrize("weight", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_a_nan_reaches_the_loss(weight: str) -> None:
    sae, x_BD = case("start")
    getattr(sae, weight).view(-1)[7] = float("nan")
    assert sparse_step(sae, x_BD, L1, torch.float32).loss.isnan()
