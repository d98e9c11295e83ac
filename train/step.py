"""One training step: gradients and figures of a batch, by autograd for any kind of SAE, or by a kind's own fast path.

A fast path (train/dense_step.py, train/sparse_step.py) is faster and exact; tests hold it against this one. It may be
given a rank's part of the features: the ranks then add their parts of x̂.

Shape suffixes: B rows of a batch, D d_in, F d_sae.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from train.parallel import SINGLE, FeatureRanks
from train.sae import Dead, Sae

Tensors = Mapping[str, Tensor]


class StepResult(NamedTuple):
    """What a step yields, whatever the kernel. Scalars are 0-d float32 tensors on the device.

    Given a part of the features, gradients, l0, fired_F and the terms of `Sae.parts` are of that part.
    """

    gradients: dict[str, Tensor]
    terms: dict[str, Tensor]  # of the loss; "mse" is the mean over rows of ‖x − x̂‖²
    l0: Tensor  # mean number of active features in a row
    explained_variance: Tensor  # 1 − Σ‖x − x̂‖² / Σ‖x − x̄‖², x̄ the batch mean
    explained_variance_legacy: Tensor  # mean over rows of 1 − ‖x − x̂‖² / ‖x − x̄‖² (SAELens < 6)
    fired_F: Tensor  # bool: the feature is active in some row
    smallest: Tensor | None = None  # score that the rule of the batch took


class Reconstruction(NamedTuple):
    """Rows rebuilt, without gradients; parts as in `StepResult`."""

    error_BD: Tensor  # x̂ − target, float32, at the SAE's scale
    terms: dict[str, Tensor]  # of the loss by row (B,), or 0-d where it has no rows
    l0_B: Tensor  # active features


class Kernel(NamedTuple):
    """One way to compute; arguments as of `autograd_step` and `autograd_reconstruction`."""

    step: Callable[..., StepResult]
    reconstruction: Callable[..., Reconstruction]


def autograd_step(
    sae: Sae,
    x_BD: Tensor,
    coefficients: Mapping[str, float],
    compute_dtype: torch.dtype,
    ranks: FeatureRanks = SINGLE,
    operands: Tensors | None = None,
    dead: Dead | None = None,
    target_BD: Tensor | None = None,
) -> StepResult:
    """Gradients and figures of one batch of stored rows, which are their own target if there is no other.

    coefficients are those of the loss's terms at this step. A fast path runs its products in compute_dtype, takes
    `operands` (W_enc and W_dec in that type, by default made there), and may have a part of the features on each of
    several ranks. Here products run under autocast, and features are whole.
    """
    del ranks, operands
    target_BD = x_BD if target_BD is None else target_BD
    leaves = {name: weight.detach().requires_grad_() for name, weight in sae.trained.items()}
    narrow = compute_dtype != torch.float32
    with torch.enable_grad(), torch.autocast(x_BD.device.type, compute_dtype if narrow else None, enabled=narrow):
        found = replace(sae, parameters=sae.parameters | leaves).loss(x_BD, target_BD, dead)
        loss = total(found.terms, coefficients)
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    terms = {name: term.detach().float() for name, term in found.terms.items()}
    by_name = {name: gradient.contiguous() for name, gradient in zip(leaves, gradients, strict=True)}
    f_BF = found.f_BF.detach()
    out = result(sae.scaled(target_BD), found.error_BD.detach(), by_name, terms, (f_BF != 0).sum(0))
    return out._replace(smallest=sae.smallest(f_BF))


def autograd_reconstruction(
    sae: Sae,
    x_BD: Tensor,
    compute_dtype: torch.dtype,
    ranks: FeatureRanks = SINGLE,
    operands: Tensors | None = None,
) -> Reconstruction:
    """Stored rows rebuilt; arguments as of `autograd_step`."""
    del ranks, operands
    narrow = compute_dtype != torch.float32
    with torch.autocast(x_BD.device.type, compute_dtype if narrow else None, enabled=narrow):
        f_BF = sae.encode(x_BD)
        error_BD = torch.addmm(sae.b_dec, f_BF, sae.W_dec).float() - sae.scaled(x_BD)
        l0_B = (f_BF > 0).sum(1)
        terms = {"mse": error_BD.square().sum(1), **sae.penalties(f_BF), **sae.nested(f_BF, x_BD)}
    return Reconstruction(error_BD, terms | sae.l0_terms(l0_B.float()), l0_B)


AUTOGRAD = Kernel(autograd_step, autograd_reconstruction)


def kernels(sae: Sae) -> dict[str, Kernel]:
    """The ways to train an SAE, by name."""
    # A class's own, not those of one that it is made from: with another loss their gradients are wrong.
    return vars(type(sae)).get("kernels") or {"autograd": AUTOGRAD}


def total(terms: Tensors, coefficients: Mapping[str, float]) -> Tensor:
    """The loss: the sum of its terms, 0-d or (B,), each times its coefficient if it has one."""
    return sum((coefficients.get(name, 1.0) * term for name, term in terms.items()), torch.tensor(0.0))


def result(
    x_BD: Tensor, error_BD: Tensor, gradients: dict[str, Tensor], terms: dict[str, Tensor], count_F: Tensor
) -> StepResult:
    """The figures that every kernel reports, of scaled rows, from the residual x̂ − x and the rows each feature fired
    in; adds "mse", as the first term, where `terms` (0-d) lack it."""
    error_B = error_BD.square().sum(1)
    spread_B = (x_BD - x_BD.mean(0)).square().sum(1).clamp_min(1e-30)  # rows that are all equal have none
    return StepResult(
        gradients=gradients,
        terms={"mse": error_B.mean(), **terms},
        l0=count_F.sum() / x_BD.shape[0],
        explained_variance=1 - error_B.sum() / spread_B.sum(),
        explained_variance_legacy=(1 - error_B / spread_B).mean(),
        fired_F=count_F > 0,
    )
