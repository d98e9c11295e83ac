"""The sparse and the dense step of every kind of SAE that chooses its entries or learns its thresholds.

Gradients are held against float64 autograd of the loss written out here, given the path's own active sets: near a
threshold an entry flips with the last bit of a product.

Shape suffixes: B rows of a batch, D d_in, F d_sae.
"""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from test_sparse_step import differences, rows
from torch import Tensor

from harvest.files import UserError
from train import sparse_step as sparse_module
from train.config import SaeConfig, TrainConfig
from train.kinds import sae_class
from train.nonzeros import PLAIN, ByRow, Entries, Rule
from train.parallel import SINGLE
from train.sae import Dead, Sae
from train.selection import keys, largest_dense
from train.sparse_step import Source
from train.step import StepResult, kernels, total
from train.trainer import Trainer

D, F, B, K = 37, 211, 83, 7
HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "topk": {"k": K, "aux_coefficient": 0.25, "aux_k": 5},
    "batchtopk": {"k": K, "aux_coefficient": 0.25, "aux_k": 5},
    "matryoshka": {"k": K, "prefixes": (20, 90, F), "aux_coefficient": 0.25, "aux_k": 5},
    "jumprelu": {"l0_coefficient": 0.3, "bandwidth": 0.4},
    "jumprelu to a target": {"l0_coefficient": 0.3, "bandwidth": 0.4, "target_l0": 9.0},
}
DEAD = Dead(torch.tensor([3, 17, 18, 60, 100, 150, 209, 210]), 8)


def new(name: str) -> Sae:
    """An SAE whose biases, decoder norms and thresholds all differ from feature to feature."""
    return varied(sae_class(name.split()[0]).initial(D, F, seed=1, scale=1.3, **HYPERPARAMETERS[name]))


def varied(sae: Sae) -> Sae:
    """The SAE, with such biases, norms and thresholds drawn into it."""
    generator = torch.Generator().manual_seed(5)
    sae.b_enc.normal_(0, 0.1, generator=generator)
    sae.b_dec.normal_(0, 0.3, generator=generator)
    sae.W_dec.mul_(torch.rand(sae.d_sae, 1, generator=generator) + 0.5)
    if "log_threshold" in sae.parameters:
        sae.log_threshold.add_(torch.rand(sae.d_sae, generator=generator) - 0.5)
    return sae


def step(path: str, sae: Sae, x_BD: Tensor, dead: Dead | None) -> StepResult:
    return kernels(sae)[path].step(sae, x_BD, sae.coefficients, torch.float32, dead=dead)


def mask(active: ByRow, F: int = F) -> Tensor:
    row_N = torch.arange(len(active.offset_B) - 1).repeat_interleave(active.offset_B.diff())
    out = torch.zeros(len(active.offset_B) - 1, F, dtype=torch.bool)
    out[row_N, active.feature_N.long()] = True
    return out


def sets(path: str, sae: Sae, x_BD: Tensor, dead: Dead | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The entries that the path takes for active, for near a threshold, and among dead features for their largest."""
    x, z_BF = sae.scaled(x_BD), torch.addmm(sae.b_enc, sae.scaled(x_BD), sae.W_enc)
    aux_k = sae.auxiliary(dead.total).k if dead and sae.auxiliary(dead.total) else 0
    if path == "sparse":
        source = Source(sae.W_enc, sae.b_enc, x, torch.float32, PLAIN)
        active, near = sae.split(source.active(sae.batch_rule(), 0, SINGLE)[0])
        of_dead = None
        if aux_k:
            weight_K = sae.W_dec.norm(dim=1)[dead.feature_K]
            part = source._replace(W_enc=sae.W_enc[:, dead.feature_K], b_enc=sae.b_enc[dead.feature_K])
            of_dead = mask(part.active(Rule(largest=aux_k, weight_F=weight_K), 0, SINGLE)[0], len(weight_K))
        return mask(active), None if near is None else mask(near), of_dead
    of_dead = largest_dense((z_BF * sae.W_dec.norm(dim=1))[:, dead.feature_K], aux_k, False) if aux_k else None
    near = ((z_BF - sae.threshold) / sae.bandwidth).abs() < 0.5 if sae.kind == "jumprelu" else None
    return sae.batch_activations(z_BF) != 0, near, of_dead


def exact(sae: Sae, x_BD: Tensor, chosen: tuple[Tensor, Tensor | None, Tensor | None], dead: Dead | None):
    """Loss and gradients in float64, of the loss as docs/training.md has it."""
    active_BF, near_BF, dead_BK = chosen
    leaves = {name: weight.double().requires_grad_() for name, weight in sae.trained.items()}
    W_enc, b_enc, W_dec, b_dec = (leaves[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    x = x_BD.double() * sae.scale
    z = x @ W_enc + b_enc
    f = z * active_BF
    error = f @ W_dec + b_dec - x
    loss = error.square().sum(1).mean()
    for end in sae.levels[:-1]:
        loss = loss + (f[:, :end] @ W_dec[:end] + b_dec - x).square().sum(1).mean()
    if dead_BK is not None:
        k = sae.aux_k
        rebuilt = (z[:, dead.feature_K] * dead_BK) @ W_dec[dead.feature_K]
        scale = min(1, len(dead.feature_K) / k)
        loss = loss + sae.aux_coefficient * scale * (rebuilt + error.detach()).square().sum(1).mean()
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True))
    if near_BF is not None:  # equations 11 and 12 of arXiv 2407.14435
        theta, l0 = leaves["log_threshold"].detach().exp(), active_BF.sum(1).double()
        df = 2 / len(x) * error.detach() @ W_dec.detach().t()
        t = sae.target_l0
        price, slope = (l0, torch.ones_like(l0)) if t is None else (2 / t * (l0 - t) ** 2, 4 / t * (l0 - t))
        of_l0 = sae.l0_coefficient / len(x) * slope[:, None]
        gradients["log_threshold"] = theta * (-(theta * df + of_l0) / sae.bandwidth * near_BF).sum(0)
        loss = loss + sae.l0_coefficient * price.mean()
    return loss.detach(), gradients


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_module, "BLOCK_ROWS", 16)


def trained(sae: Sae, steps: int, dead: Dead) -> Sae:
    """The SAE after so many steps of Adam on random rows, changed in place."""
    x_BD, adam = rows(512, sae.d_in, seed=2), torch.optim.Adam(sae.trained.values(), lr=2e-3)
    for n in range(steps):
        found = step("sparse", sae, x_BD[n * 64 % 448 :][:64], dead)
        for parameter, gradient in found.gradients.items():
            sae.parameters[parameter].grad = gradient
        adam.step()
    return sae


@cache
def after_steps(name: str, count: int) -> Sae:
    return trained(new(name), count, DEAD)


@pytest.mark.parametrize("name", HYPERPARAMETERS)
@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("start", ["start", "after 200 steps"])
@pytest.mark.parametrize("dead", [None, DEAD])
def test_gradients_equal_float64_autograd(name: str, path: str, start: str, dead: Dead | None) -> None:
    sae, x_BD = new(name) if start == "start" else after_steps(name, 200), rows(B, D) + 0.2
    found = step(path, sae, x_BD, dead)
    chosen = sets(path, sae, x_BD, dead)
    loss, gradients = exact(sae, x_BD, chosen, dead)

    assert set(found.gradients) == set(sae.trained)
    assert max(differences(found.gradients, gradients)) <= 1e-5
    assert float(total(found.terms, sae.coefficients)) == pytest.approx(float(loss), rel=1e-5)
    assert float(found.l0) == pytest.approx(float(chosen[0].sum() / B))
    assert torch.equal(found.fired_F, chosen[0].any(0))
    assert ("aux" in found.terms) == (dead is not None and "aux_k" in HYPERPARAMETERS[name])
    if chosen[1] is not None:
        assert chosen[1].sum() > B and (chosen[1] & ~chosen[0]).any()


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_the_largest_are_active(name: str, path: str) -> None:
    """By sorting in numpy; with equal scores the lower feature, then the lower row, comes first."""
    sae = new(name)
    sae.W_enc[:, 40:60] = sae.W_enc[:, 60:80]  # equal twins
    for parameter in (sae.b_enc, sae.W_dec):
        parameter[40:60] = parameter[60:80]
    x_BD = rows(B, D)
    x_BD[70] *= 6  # a row with many
    sae.b_enc[F // 2 :] = -3
    z = torch.addmm(sae.b_enc, sae.scaled(x_BD), sae.W_enc)
    score = (z * sae.W_dec.norm(dim=1)).numpy()
    flat = [(-score[b, i], i, b) for b in range(B) for i in range(F) if score[b, i] > 0]
    if name == "topk":
        wanted = {(b, i) for row in range(B) for _, i, b in sorted(e for e in flat if e[2] == row)[:K]}
    else:
        wanted = {(b, i) for _, i, b in sorted(flat)[: K * B]}
    found = {(int(b), int(i)) for b, i in sets(path, sae, x_BD, None)[0].nonzero()}
    assert found == wanted
    counts = np.bincount([b for b, _ in wanted], minlength=B)
    assert (counts.max() > K) == (name == "batchtopk")


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_too_few_positive_entries_are_all_taken(path: str) -> None:
    for name in ("topk", "batchtopk", "matryoshka"):
        sae = new(name)
        sae.b_enc.fill_(-1e6)
        sae.b_enc[[4, 200]] = 50.0
        found = step(path, sae, rows(B, D), None)
        assert float(found.l0) == 2
        assert found.fired_F.nonzero().flatten().tolist() == [4, 200]
        if name != "topk":
            assert float(found.smallest) == 0


def test_a_batch_unlike_its_first_rows_is_chosen_from_as_any() -> None:
    """The bound comes from the first block: here that block's rows are large, and all others small."""
    sae, x_BD = new("batchtopk"), rows(B, D)
    x_BD[16:] *= 0.01
    sae.b_enc.zero_()
    assert torch.equal(sets("sparse", sae, x_BD, None)[0], sets("dense", sae, x_BD, None)[0])


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka"])
def test_smallest_is_the_least_score_that_was_taken(name: str) -> None:
    sae, x_BD = new(name), rows(B, D)
    z_BF = torch.addmm(sae.b_enc, sae.scaled(x_BD), sae.W_enc)
    score_BF = z_BF * sae.W_dec.norm(dim=1)
    expected = np.sort(score_BF.numpy().ravel())[-K * B]
    for path in ("dense", "sparse"):
        assert float(step(path, sae, x_BD, None).smallest) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_reconstructions_agree(name: str) -> None:
    sae, x_BD = new(name), rows(B, D)
    if "threshold" in sae.parameters:
        sae.threshold.fill_(0.7)
    dense, sparse = (kernels(sae)[path].reconstruction(sae, x_BD, torch.float32) for path in ("dense", "sparse"))
    torch.testing.assert_close(sparse.error_BD, dense.error_BD, rtol=1e-4, atol=1e-4)
    assert torch.equal(sparse.l0_B.long(), (sae.encode(x_BD) > 0).sum(1))
    torch.testing.assert_close(sparse.error_BD / sae.scale, sae.decode(sae.encode(x_BD)) - x_BD, rtol=1e-4, atol=1e-4)
    loss = {kind: total(found.terms, sae.coefficients).mean() for kind, found in (("d", dense), ("s", sparse))}
    assert float(loss["s"]) == pytest.approx(float(loss["d"]), rel=1e-5)


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_a_finished_sae_rebuilds_the_same_rows_with_decoder_rows_of_norm_1(name: str) -> None:
    sae, x_BD = new(name), rows(B, D)
    if "threshold" in sae.parameters:
        sae.threshold.fill_(0.7)
    done = sae.finished()
    torch.testing.assert_close(done.decode(done.encode(x_BD)), sae.decode(sae.encode(x_BD)), rtol=1e-4, atol=1e-4)
    if sae.kind != "jumprelu":
        assert torch.allclose(done.W_dec.norm(dim=1), torch.ones(F))
        assert torch.equal(done.encode(x_BD) > 0, sae.encode(x_BD) > 0)


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_a_nan_reaches_the_loss(name: str) -> None:
    for weight in ("W_enc", "b_enc", "W_dec", "b_dec"):
        sae = new(name)
        getattr(sae, weight).view(-1)[7] = float("nan")
        assert total(step("sparse", sae, rows(B, D), None).terms, sae.coefficients).isnan(), weight


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_a_row_of_nan_lets_no_more_entries_through_than_its_own(name: str) -> None:
    """With a NaN as the bound, all entries of the batch came through: gigabytes before the trainer sees the loss."""
    sae, x_BD = new(name), rows(B, D)
    source = Source(sae.W_enc, sae.b_enc, sae.scaled(x_BD), torch.float32, PLAIN)
    clean = source.entries(sae.batch_rule())
    x_BD[3] = float("nan")
    found = source._replace(x_BD=sae.scaled(x_BD)).entries(sae.batch_rule())
    assert found.count_B[3] == F
    assert found.count_B.sum() <= clean.count_B.sum() + 2 * F


@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka"])
def test_a_decoder_row_of_zeros_is_never_active(name: str) -> None:
    sae, x_BD = new(name), rows(B, D)
    sae.W_dec[11] = 0
    sae.b_enc[11] = 50.0
    for path in ("dense", "sparse"):
        found = step(path, sae, x_BD, None)
        assert not found.fired_F[11] and all(gradient.isfinite().all() for gradient in found.gradients.values())
    done = sae.finished()
    assert all(weight.isfinite().all() for weight in done.parameters.values())
    assert not (done.encode(x_BD)[:, 11] > 0).any()


@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka"])
def test_the_smallest_sizes(name: str, width: int) -> None:
    """One row, fewer features than a group has entries, as many active as there are, rows that are all equal."""
    given = {"prefixes": tuple(range(1, width + 1))} if name == "matryoshka" else {}
    of_kind, x_BD = sae_class(name), rows(4, 3)
    sae = of_kind.initial(3, width, seed=1, k=width, aux_coefficient=0.25, **given)
    for batch_BD in (x_BD[:1], x_BD, x_BD[:1].expand(4, -1)):
        dead = Dead(torch.arange(width), width)
        dense, sparse = (step(path, sae, batch_BD, dead) for path in ("dense", "sparse"))
        assert max(differences(sparse.gradients, {n: g.double() for n, g in dense.gradients.items()})) <= 1e-5
        assert torch.equal(dense.fired_F, sparse.fired_F) and sparse.fired_F.any()


def test_a_batch_with_more_entries_than_can_be_told_apart_is_refused() -> None:
    config = TrainConfig(sae=SaeConfig(kind="batchtopk", d_sae=F, k=K), epochs=1, batch_size=2**25)
    with pytest.raises(UserError, match=r"train\.batch_size: 33,554,432: times d_sae = 211 is above 2\^32"):
        Trainer(new("batchtopk"), config, 1, 1, torch.float32)


def test_entries_that_a_key_cannot_tell_apart_are_refused() -> None:
    entry = torch.ones(1, dtype=torch.int32)
    entries = Entries(entry, entry, torch.ones(1), 1, 1)
    rule = new("batchtopk").batch_rule()
    with pytest.raises(ValueError, match=r"1 rows times 4,294,967,297 features are above 2\^32: use a smaller batch"):
        keys(entries, torch.zeros(1, dtype=torch.int64), rule, first_feature=2**32 + 1 - F)
    key_N = keys(entries, torch.zeros(1, dtype=torch.int64), rule, first_feature=2**32 - F)
    assert key_N > 0


def test_equal_input_gives_equal_bytes() -> None:
    for name in HYPERPARAMETERS:
        sae, x_BD = new(name), rows(B, D)
        first, again = (step("sparse", sae, x_BD, DEAD) for _ in range(2))
        assert all(torch.equal(first.gradients[n], again.gradients[n]) for n in first.gradients)


@pytest.mark.parametrize("given", [False, True])
def test_the_threshold_follows_the_batches(given: bool) -> None:
    """A mean of them all at first, from a given SAE on at a rate of 0.01, and not at all at an lr of 0."""
    start = {"start_from": {"path": "given"}} if given else {}
    config = TrainConfig.model_validate({"sae": {"kind": "batchtopk", "d_sae": F, "k": K}, "epochs": 1, **start})
    sae = new("batchtopk")
    sae.threshold.fill_(0.5 if given else 0.0)
    trainer = Trainer(sae, config, 10, 1000, torch.float32)
    expected = 0.5
    for n in range(3):
        stepped = trainer.step(rows(B, D, seed=n))
        rate = 0.01 if given else 1 / (n + 1)
        expected += rate * (float(stepped.result.smallest) - expected)
    assert float(sae.threshold) == pytest.approx(expected, rel=1e-5)
    if given:
        still = Trainer(sae, config.model_copy(update={"lr": 0.0}), 10, 1000, torch.float32)
        still.step(rows(B, D, seed=9))
        assert float(sae.threshold) == pytest.approx(expected, rel=1e-5)
