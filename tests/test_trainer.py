import pytest
import torch

from train.adam import Adam, Update
from train.config import SaeConfig, TrainConfig
from train.dataloader import Reading
from train.metrics import _Mark, _timings
from train.standard import Standard
from train.trainer import Trainer


def planted_rows(dictionary: torch.Tensor, rows: int, generator: torch.Generator) -> torch.Tensor:
    """Sparse non-negative combinations of the dictionary's rows, three at a time on average."""
    active = torch.rand(rows, len(dictionary), generator=generator) < 3 / len(dictionary)
    strength = 0.5 + torch.rand(rows, len(dictionary), generator=generator)
    return (active * strength) @ dictionary


def trainer(d_in: int, d_sae: int, steps: int, **settings) -> Trainer:
    values = {"lr": 3e-3, "batch_size": 256, "epochs": 1, "sae": SaeConfig(d_sae=d_sae)}
    sae = Standard.initial(d_in, d_sae, l1_coefficient=0.3)
    return Trainer(sae, TrainConfig(**values | settings), steps, 1000, torch.float32)


def test_a_planted_dictionary_is_found():
    generator = torch.Generator().manual_seed(0)
    dictionary = torch.nn.functional.normalize(torch.randn(24, 32, generator=generator), dim=1)
    steps = 1000
    training = trainer(32, 48, steps)
    scale = 32**0.5 / planted_rows(dictionary, 4096, generator).norm(dim=1).mean()
    for _ in range(steps):
        training.step(planted_rows(dictionary, 256, generator) * scale)
    found = torch.nn.functional.normalize(training.sae.W_dec, dim=1)
    assert (dictionary @ found.T).max(dim=1).values.mean() >= 0.9


def test_start():
    sae = Standard.initial(16, 40, 3)
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.full((40,), 0.1))
    assert all(weight.is_contiguous() for weight in sae.parameters.values())
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()
    assert torch.equal(sae.W_dec, Standard.initial(16, 40, 3).W_dec)


def test_adam_updates_the_elements_that_it_should():
    """Against Adam written out; fused Adam goes wrong in silence when layouts differ."""
    training = trainer(8, 12, 10, clip_norm=1e9, lr_decay_fraction=0)
    before = {name: weight.clone() for name, weight in training.sae.parameters.items()}
    stepped = training.step(torch.randn(256, 8, generator=torch.Generator().manual_seed(1)))
    for name, gradient in stepped.result.gradients.items():
        expected = before[name] - 3e-3 * gradient / (gradient.abs() + 1e-8)
        assert torch.allclose(training.sae.parameters[name], expected, atol=1e-6)


def test_gradients_are_clipped_together():
    rows = 10 * torch.randn(256, 8, generator=torch.Generator().manual_seed(1))
    clipped, whole = trainer(8, 12, 10, clip_norm=0.5), trainer(8, 12, 10, clip_norm=1e9)
    norm = float(clipped.step(rows).grad_norm)
    whole.step(rows)
    assert norm > 0.5
    for name, theirs in whole.adam.exp_avg.items():
        torch.testing.assert_close(clipped.adam.exp_avg[name], theirs * (0.5 / norm), rtol=1e-5, atol=0)


def test_a_bad_batch_changes_nothing_and_is_remembered():
    training = trainer(8, 12, 10)
    rows = torch.randn(256, 8, generator=torch.Generator().manual_seed(1))
    training.step(rows)
    before = {name: tensor.clone() for name, tensor in training.tensors().items() if name != "rows_since_fired"}
    assert training.bad_step == -1
    for row in (float("nan"), 1.0, float("inf")):
        bad = rows.clone()
        bad[17] = row
        training.step(bad)
        if row != 1.0:
            assert training.bad_step == 1
    assert training.step_number == 4
    assert all(torch.isfinite(tensor).all() for tensor in training.tensors().values())
    again = trainer(8, 12, 10)
    again.step(rows)
    again.step(rows.index_fill(0, torch.tensor([17]), float("nan")))
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(("d_in", "d_sae"), [(8, 12), (33, 70)])
def test_the_update_is_torchs_adam(d_in: int, d_sae: int):
    """Ours against torch.optim.Adam and clip_grad_norm_, over steps that are clipped and steps that are not."""
    mine, reference = (Standard.initial(d_in, d_sae).parameters for _ in range(2))
    ours = Adam(mine, torch.bfloat16)
    theirs = torch.optim.Adam(reference.values(), lr=1e-3, betas=(0.9, 0.99))
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        gradients = {name: torch.randn(w.shape, generator=generator) * 0.1**step for name, w in mine.items()}
        for name, gradient in gradients.items():
            reference[name].grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_(reference.values(), 1.0)
        theirs.step()
        ours.update(gradients, Update(1e-3, (0.9, 0.99), step + 1, norm.clamp_min(1.0)))
    for name, weight in mine.items():
        torch.testing.assert_close(weight, reference[name], rtol=1e-5, atol=1e-7)
    assert torch.equal(ours.operands["W_dec"], mine["W_dec"].bfloat16())
    assert torch.equal(ours.operands["W_enc"], mine["W_enc"].bfloat16())
    assert ours.operands["b_enc"] is mine["b_enc"]


def test_dead_features_are_counted_over_the_last_rows():
    training = trainer(8, 12, 10)
    training.sae.b_enc[3] = -1e9
    rows = torch.randn(256, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        training.step(rows)
    assert training.dead_features() == 0
    training.step(rows)  # 1,024 rows: more than an epoch of 1,000
    assert training.dead_features() == 1


def test_restored_it_goes_on_as_if_nothing_had_been():
    rows = [torch.randn(256, 8, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    straight = trainer(8, 12, 8)
    for batch in rows:
        straight.step(batch)
    first = trainer(8, 12, 8)
    for batch in rows[:5]:
        first.step(batch)
    second = trainer(8, 12, 8)
    second.restore({name: tensor.clone() for name, tensor in first.tensors().items()}, 5, first.kernel.state())
    for batch in rows[5:]:
        second.step(batch)
    for name, tensor in straight.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name


@pytest.mark.parametrize("kernel", ["dense", "sparse"])
def test_validation_is_at_the_full_penalty(kernel: str):
    training = trainer(8, 12, 10, kernel=kernel)
    training.sae.b_dec.fill_(0.1)
    rows = torch.randn(300, 8, generator=torch.Generator().manual_seed(1))
    found = training.validate(rows)
    f = training.sae.encode(rows)
    error = (training.sae.decode(f) - rows).square().sum(1)
    loss = error + 0.3 * f @ training.sae.W_dec.norm(dim=1)
    assert found.loss == pytest.approx(loss.mean().item(), rel=1e-5)
    assert found.l0 == pytest.approx((f > 0).sum(1).float().mean().item())


@pytest.mark.parametrize("kernel", ["dense", "sparse"])
def test_a_feature_at_its_threshold_is_not_active(kernel: str):
    """Rows of zeros, and biases of zero."""
    assert trainer(8, 12, 10, kernel=kernel).validate(torch.zeros(256, 8)).l0 == 0


def test_a_copy_on_the_host_is_written_over_by_the_next():
    training, host = trainer(8, 12, 10), {}
    rows = torch.randn(256, 8, generator=torch.Generator().manual_seed(1))
    first = training.tensors(host)
    before = {name: tensor.clone() for name, tensor in first.items()}
    training.step(rows)
    assert all(torch.equal(first[name], tensor) for name, tensor in before.items())
    second = training.tensors(host)
    assert all(second[name] is first[name] for name in first)
    assert all(torch.equal(second[name], tensor) for name, tensor in training.tensors().items())
    assert not torch.equal(second["W_enc"], before["W_enc"])
    assert training.weights(host)["W_dec"] is first["W_dec"]


def test_speed_and_stalls_since_the_line_before():
    before, now = _Mark(10.0, 3, Reading(2_000_000, 0.5, 0.1)), _Mark(14.0, 10, Reading(34_345_678, 1.5055, 0.98765))
    assert _timings(before, now, 64) == {
        "tokens_per_second": 112,  # 7 steps of 64 in 4 s
        "gigabytes_read_per_second": 0.008,
        "stall_ms_per_step": 143.64,
        "stall_fraction": 0.251,
        "pool_fill": 0.988,
    }
