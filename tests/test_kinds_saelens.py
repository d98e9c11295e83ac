"""The steps of each kind against SAELens' training class of it: same tensors, same rows, same loss and gradients.

What SAELens defines otherwise is set aside here, and named in docs/training.md: the dead features' pre-activations are
positive, the auxiliary loss counts as much, and a threshold's gradient is ours over the threshold.

Shape suffixes: B rows of a batch, D d_in, F d_sae, K dead features.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from conftest import only
from test_kind_steps import step, trained, varied
from test_sparse_step import rows
from torch import Tensor

from harvest.activation_store import ActivationStore
from train.config import ExcludeConfig
from train.dataloader import heldout_rows
from train.kinds import sae_class
from train.sae import Dead, Sae
from train.step import total

sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed: nothing to compare with")

D, F, B, K = 32, 211, 96, 7
AUX = {"aux_coefficient": 1.0}
WIDTHS = (1, 20, 90, F)
OURS: dict[str, dict[str, Any]] = {
    "topk": {"k": K, **AUX},
    "batchtopk": {"k": K, **AUX},
    "matryoshka": {"k": K, "prefixes": WIDTHS, **AUX},
    "jumprelu": {"l0_coefficient": 0.3, "bandwidth": 0.4},
    "jumprelu to a target": {"l0_coefficient": 0.3, "bandwidth": 0.4, "target_l0": 9.0},
}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "topk": ("TopK", {"k": K}),
    "batchtopk": ("BatchTopK", {"k": float(K)}),
    "matryoshka": ("MatryoshkaBatchTopK", {"k": float(K), "matryoshka_widths": list(WIDTHS)}),
    "jumprelu": ("JumpReLU", {"jumprelu_bandwidth": 0.4}),
    "jumprelu to a target": (
        "JumpReLU",
        {"jumprelu_bandwidth": 0.4, "jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 9.0},
    ),
}
DEAD = Dead(torch.tensor([3, 17, 60, 100, 150, 210]), 6)


@cache
def sae_of(name: str, steps: int) -> Sae:
    """After so many steps of Adam on random rows; biases, decoder norms and thresholds differ between features."""
    sae = trained(varied(sae_class(name.split()[0]).initial(D, F, seed=1, **OURS[name])), steps, DEAD)
    return replace(sae, parameters={n: weight.detach().clone() for n, weight in sae.parameters.items()})


def theirs_of(name: str, sae: Sae) -> Any:
    of_class, settings = THEIRS[name]
    config = getattr(sae_lens, f"{of_class}TrainingSAEConfig")
    shared = {"d_in": D, "d_sae": F, "apply_b_dec_to_input": False, "normalize_activations": "none"}
    out = getattr(sae_lens, f"{of_class}TrainingSAE")(config(**shared, **settings))
    weights = {n: sae.parameters[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if sae.kind == "jumprelu":
        weights["threshold"] = sae.threshold
    out.load_state_dict(weights, strict=False)
    return out


def compare(name: str, path: str, sae: Sae, x_BD: Tensor, dead: Dead | None) -> None:
    from sae_lens.saes.sae import TrainStepInput

    theirs = theirs_of(name, sae)
    dead_F = torch.zeros(F, dtype=torch.bool)
    if dead:
        dead_F[dead.feature_K] = True
    output = theirs.training_forward_pass(
        TrainStepInput(
            sae_in=sae.scaled(x_BD),
            coefficients={"l0": 0.3},
            dead_neuron_mask=dead_F,
            n_training_steps=0,
            is_logging_step=False,
        )
    )
    output.loss.backward()
    ours = step(path, sae, x_BD, dead)
    gradients = ours.gradients
    if "log_threshold" in gradients:
        gradients = gradients | {"threshold": gradients["log_threshold"] / sae.threshold}
        del gradients["log_threshold"]

    assert torch.equal(ours.fired_F, (output.feature_acts > 0).any(0))
    assert float(ours.l0) == pytest.approx(float((output.feature_acts > 0).float().sum(1).mean()))
    assert float(total(ours.terms, sae.coefficients)) == pytest.approx(output.loss.item(), rel=1e-5)
    if dead and sae.kind != "jumprelu":
        assert float(ours.terms["aux"]) == pytest.approx(
            output.losses["auxiliary_reconstruction_loss"].item(), rel=1e-5
        )
        assert ours.terms["aux"] > 0
    for parameter, gradient in gradients.items():
        expected = getattr(theirs, parameter).grad
        assert expected.norm() > 0
        assert (gradient - expected).norm() <= 1e-4 * expected.norm(), parameter


@pytest.mark.parametrize("steps", [0, 200])
@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("name", OURS)
def test_loss_and_gradients_equal_saelens(name: str, path: str, steps: int) -> None:
    sae = sae_of(name, steps)
    compare(name, path, sae, rows(B, D, seed=3), None)


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("name", OURS)
def test_loss_and_gradients_equal_saelens_on_stored_rows(name: str, path: str, finished) -> None:
    store = ActivationStore.open(only(finished, "runs/harvest/*/store"))
    x_BD = heldout_rows(store, "model.layers.1", ExcludeConfig(), torch.inf, B)
    sae = sae_of(name, 200)
    sae = replace(sae, scale=float(D**0.5 / x_BD.float().norm(dim=1).mean()))
    compare(name, path, sae, x_BD, None)


@pytest.mark.parametrize("steps", [0, 200])
@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("name", [name for name in OURS if "jumprelu" not in name])
def test_dead_features_equal_saelens(name: str, path: str, steps: int) -> None:
    """Their biases make them positive without being among the largest, which neither definition asks about."""
    sae = sae_of(name, steps)
    sae = replace(sae, parameters=sae.parameters | {n: sae.parameters[n].clone() for n in ("W_enc", "b_enc")})
    sae.W_enc[:, DEAD.feature_K] *= 0.01
    sae.b_enc[DEAD.feature_K] = 0.1
    x_BD = rows(B, D, seed=3)
    z_BK = (sae.scaled(x_BD) @ sae.W_enc + sae.b_enc)[:, DEAD.feature_K]
    assert (z_BK > 0).all()
    compare(name, path, sae, x_BD, DEAD)
