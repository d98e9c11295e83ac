"""The exact steps against float64 autograd and against each other.

The reference is given each path's own active set: near its threshold ReLU flips with the last bit of a
product, and one flip moves a float32 gradient by more than all its rounding does.

Shape suffixes: B rows of a batch, D d_in, F d_sae.
"""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import ROOT, only
from torch import Tensor

from harvest.activation_store import ActivationStore
from train import dense_step as dense_module
from train import sparse_step as sparse_module
from train.checkpoint import load_sae
from train.config import ExcludeConfig
from train.dataloader import heldout_rows
from train.dense_step import dense_step, product
from train.nonzeros import PLAIN
from train.sae import Sae
from train.sparse_step import active_features, sparse_step
from train.standard import Standard
from train.step import StepResult, autograd_step, total

L1 = {"l1": 5.0}
STEPS: dict[str, Callable[..., StepResult]] = {"autograd": autograd_step, "dense": dense_step, "sparse": sparse_step}


def rows(count: int, d_in: int, seed: int = 0) -> Tensor:
    """Rows of norm about √d_in, mixed from 2 × d_in directions of which each row has a few."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(2 * d_in, d_in, generator=torch.Generator().manual_seed(99))
    present = torch.rand(count, 2 * d_in, generator=generator) < 6 / (2 * d_in)
    mixed = (present * torch.rand(count, 2 * d_in, generator=generator)) @ directions
    mixed += 0.1 * torch.randn(count, d_in, generator=generator)
    return mixed * (d_in**0.5 / mixed.norm(dim=1).mean())


def trained(sae: Sae, x_BD: Tensor, step: Callable[..., StepResult], steps: int) -> tuple[Sae, list[StepResult]]:
    """The SAE after fp32 Adam steps on batches of 64 of the rows, and what each step reported."""
    sae = replace(sae, parameters={name: weight.clone() for name, weight in sae.parameters.items()})
    adam = torch.optim.Adam(sae.parameters.values(), lr=2e-3, betas=(0.9, 0.999))
    results = []
    for batch in range(steps):
        at = batch * 64 % (len(x_BD) - 64)
        results.append(step(sae, x_BD[at : at + 64], L1, torch.float32))
        for name, gradient in results[-1].gradients.items():
            sae.parameters[name].grad = gradient
        torch.nn.utils.clip_grad_norm_(sae.parameters.values(), 1.0)
        adam.step()
    return sae, results


@cache
def after_200_steps() -> Sae:
    return trained(Standard.initial(37, 211, seed=1), rows(512, 37, seed=2), dense_step, 200)[0]


def case(name: str) -> tuple[Sae, Tensor]:
    """An SAE and a batch: d_in and d_sae are no powers of two, and the batch is no whole number of blocks."""
    sae, x_BD = Standard.initial(37, 211, seed=1), rows(83, 37)
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


def active_set(path: str, sae: Sae, x_BD: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """The entries (B, F) that the path itself takes for active."""
    if path == "dense":
        return product(sae.scaled(x_BD), sae.W_enc, compute_dtype) + sae.b_enc > 0
    if path == "autograd":
        with torch.autocast("cpu", torch.bfloat16, enabled=compute_dtype != torch.float32):
            return sae.encode(x_BD) > 0
    active = active_features(sae.W_enc, sae.b_enc, sae.scaled(x_BD), compute_dtype, PLAIN)
    row_N = torch.arange(len(x_BD)).repeat_interleave(active.offset_B.diff())
    active_BF = torch.zeros(len(x_BD), sae.d_sae, dtype=torch.bool)
    active_BF[row_N, active.feature_N.long()] = True
    return active_BF


def written_out(sae: Sae, x_BD: Tensor, active_BF: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, dict, Tensor]:
    """Loss, gradients and f by autograd, with this active set, or ReLU's."""
    leaves = {name: weight.detach().to(dtype).requires_grad_() for name, weight in sae.parameters.items()}
    W_enc, b_enc, W_dec, b_dec = leaves.values()
    x = x_BD.to(dtype) * sae.scale
    f_BF = torch.relu(x @ W_enc + b_enc) if active_BF is None else (x @ W_enc + b_enc) * active_BF
    l1_B = (f_BF * W_dec.norm(dim=1)).sum(1)
    loss = (f_BF @ W_dec + b_dec - x).square().sum(1).mean() + L1["l1"] * l1_B.mean()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return loss.detach(), dict(zip(leaves, gradients, strict=True)), f_BF.detach()


def exact(sae: Sae, x_BD: Tensor, active_BF: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients in float64, with this active set."""
    return written_out(sae, x_BD, active_BF, torch.float64)[:2]


def differences(gradients: dict[str, Tensor], reference: dict[str, Tensor]) -> list[float]:
    """‖g − reference‖ / ‖reference‖ of the four gradients; absolute where the reference is zero."""
    pairs = [(gradients[name], b) for name, b in reference.items()]
    return [float((a - b).norm() / (b.norm() if b.any() else 1)) for a, b in pairs]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("path", STEPS)
def test_gradients_equal_float64_autograd(path: str, name: str) -> None:
    sae, x_BD = case(name)
    step = STEPS[path](sae, x_BD, L1, torch.float32)
    active_BF = active_set(path, sae, x_BD, torch.float32)
    loss, gradients = exact(sae, x_BD, active_BF)

    assert max(differences(step.gradients, gradients)) <= 1e-5
    assert float(total(step.terms, L1)) == pytest.approx(float(loss), rel=1e-5)
    assert float(step.l0) == pytest.approx(float(active_BF.sum() / len(x_BD)))
    assert torch.equal(step.fired_F, active_BF.any(0))
    assert all(g.is_contiguous() and g.dtype == torch.float32 for g in step.gradients.values())


@pytest.mark.parametrize("start", ["new", "trained"])
@pytest.mark.parametrize("path", STEPS)
def test_gradients_on_rows_of_a_model(path: str, start: str, finished: Path) -> None:
    """Activations of the tiny language model, by the SAE before and after its training, outlier rows included."""
    saved = load_sae(only(finished, "runs/train/*/model.layers.1"))
    store = ActivationStore.open(only(finished, "runs/harvest/*/store"))
    rows_BD = heldout_rows(store, saved.hook, ExcludeConfig(norm_above_median=None), None, 100)
    fresh = Standard.initial(saved.sae.d_in, saved.sae.d_sae, scale=saved.sae.scale)
    sae = saved.sae if start == "trained" else fresh
    step = STEPS[path](sae, rows_BD, L1, torch.float32)
    gradients = exact(sae, rows_BD, active_set(path, sae, rows_BD, torch.float32))[1]
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
@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_bf16_products_are_as_close_as_autocast(path: str, name: str) -> None:
    sae, x_BD = case(name)[0], rows(384, 37)  # enough rows to average rounding out of the ratio
    step = STEPS[path](sae, x_BD, L1, torch.bfloat16)
    ours = differences(step.gradients, exact(sae, x_BD, active_set(path, sae, x_BD, torch.bfloat16))[1])

    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, gradients, f_BF = written_out(sae, x_BD, None, torch.float32)
    autocast = differences(gradients, exact(sae, x_BD, f_BF > 0)[1])

    assert all(a <= 1.2 * b for a, b in zip(ours, autocast, strict=True)), (ours, autocast)


def test_dense_and_sparse_train_alike() -> None:
    sae, x_BD = Standard.initial(64, 512), rows(1024, 64)
    dense, sparse = (trained(sae, x_BD, step, 50)[1] for step in (dense_step, sparse_step))
    for index, (a, b) in enumerate(zip(dense, sparse, strict=True)):
        assert float(total(b.terms, L1)) == pytest.approx(float(total(a.terms, L1)), rel=1e-5 if index < 10 else 1e-3)
        assert float(b.l0) == pytest.approx(float(a.l0), rel=5e-3)
        assert float(b.explained_variance) == pytest.approx(float(a.explained_variance), rel=5e-3)
    assert total(dense[-1].terms, L1) < 0.9 * total(dense[0].terms, L1)  # it did train


def test_metrics_equal_the_dense_steps() -> None:
    sae, x_BD = case("trained")
    dense, sparse = dense_step(sae, x_BD, L1, torch.float32), sparse_step(sae, x_BD, L1, torch.float32)
    torch.testing.assert_close(sparse.terms, dense.terms, rtol=1e-5, atol=0)
    for name in ("l0", "explained_variance", "explained_variance_legacy"):
        assert float(getattr(sparse, name)) == pytest.approx(float(getattr(dense, name)), rel=1e-5), name


def test_same_input_gives_the_same_bytes() -> None:
    sae, x_BD = Standard.initial(64, 4096), rows(300, 64)
    first, *others = (sparse_step(sae, x_BD, L1, torch.float32) for _ in range(4))
    for other in others:
        assert all(torch.equal(first.terms[name], term) for name, term in other.terms.items())
        assert all(torch.equal(first.gradients[name], gradient) for name, gradient in other.gradients.items())


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
    assert total(sparse_step(sae, x_BD, L1, torch.float32).terms, L1).isnan()


def test_torchs_warnings_of_sparse_matrices_are_not_shown():
    code = (
        "import torch\n"
        "from train.nonzeros import ByRow, row_dots\n"
        "active = ByRow(torch.tensor([0, 1, 2]).int(), torch.tensor([1, 0]).int(), torch.ones(2))\n"
        "print(row_dots(active, torch.eye(2, 3), torch.arange(6.0).view(2, 3)).tolist())"
    )
    ran = subprocess.run([sys.executable, "-W", "always", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ran.stdout.strip(), ran.stderr) == ("[3.0, 1.0]", "")
