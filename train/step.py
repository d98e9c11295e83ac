"""Loss and exact gradients of one batch, dense: five matrix products and no autograd graph.

    loss = mean over rows of ‖x − x̂‖² + λ Σ_i f_i ‖W_dec,i‖₂          (arXiv 2503.18878, eq. 3)

With e = x̂ − x and the active set S = {(b, i): f_bi > 0}:

    df_bi     = (2/B) e_b·W_dec,i + (λ/B) ‖W_dec,i‖                          for (b, i) in S, else 0
    dW_dec,i  = (2/B) Σ_b f_bi e_b + (λ/B) (Σ_b f_bi) W_dec,i / ‖W_dec,i‖
    dW_enc,·i = Σ_b df_bi x_b        db_enc,i = Σ_b df_bi        db_dec = (2/B) Σ_b e_b

Products run in `compute_dtype`; weights, sums, residual and gradients stay float32.
The backward is written out because autograd would take six products (it differentiates x too when x
comes from a module) and keep two more (B, F) float32 tensors alive.

A step may be given a part of the features: `SumOverRanks` then adds the other ranks' parts of x̂.

Shape suffixes: B rows of a batch, D d_in, F d_sae.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from train.sae import SAE

# Makes this rank's part of a tensor the sum of all ranks' parts, in place, and returns it.
SumOverRanks = Callable[[Tensor], Tensor]


class StepResult(NamedTuple):
    """What a step yields, whatever the kernel. Scalars are 0-d float32 tensors on the device.

    Given a part of the features, gradients, loss, l1, l0 and fired_F are of that part, the rest is of all;
    `with_sparsity` makes loss, l1 and l0 whole.
    """

    gradients: SAE
    loss: Tensor
    mse: Tensor  # mean over rows of ‖x − x̂‖²
    l1: Tensor  # mean over rows of Σ_i f_i ‖W_dec,i‖, before λ
    l0: Tensor  # mean number of active features in a row
    explained_variance: Tensor  # 1 − Σ‖x − x̂‖² / Σ‖x − x̄‖², x̄ the batch mean
    explained_variance_legacy: Tensor  # mean over rows of 1 − ‖x − x̂‖² / ‖x − x̄‖² (SAELens < 6)
    fired_F: Tensor  # bool: the feature is active in some row

    def with_sparsity(self, l1: Tensor, l0: Tensor, l1_coefficient: float) -> "StepResult":
        """The same with these l1 and l0, and the loss that they give."""
        return self._replace(loss=self.mse + l1_coefficient * l1, l1=l1, l0=l0)


def product(a: Tensor, b: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """a @ b with operands in compute_dtype, result float32."""
    return (a.to(compute_dtype) @ b.to(compute_dtype)).float()


def dense_step(
    sae: SAE,
    x_BD: Tensor,
    l1_coefficient: float,
    compute_dtype: torch.dtype,
    sum_over_ranks: SumOverRanks | None = None,
) -> StepResult:
    """Gradients and metrics of one batch of scaled float32 rows.

    With sum_over_ranks, the SAE's features are a part of all, and it is called once, with the part of x̂.
    """
    B = x_BD.shape[0]
    norm_F = sae.W_dec.norm(dim=1)
    f_BF = product(x_BD, sae.W_enc, compute_dtype).add_(sae.b_enc).relu_()
    active_BF = f_BF > 0
    error_BD = product(f_BF, sae.W_dec, compute_dtype)
    if sum_over_ranks:
        sum_over_ranks(error_BD)
    error_BD.add_(sae.b_dec).sub_(x_BD)

    df_BF = product(error_BD, sae.W_dec.t(), compute_dtype).mul_(2 / B).add_(norm_F, alpha=l1_coefficient / B)
    df_BF *= active_BF
    f_sum_F = f_BF.sum(0)
    W_dec = product(f_BF.t(), error_BD, compute_dtype).mul_(2 / B)
    W_dec.addcmul_(sae.W_dec, (f_sum_F / norm_F.clamp_min(1e-30)).unsqueeze(1), value=l1_coefficient / B)
    gradients = SAE(
        W_enc=product(x_BD.t(), df_BF, compute_dtype),
        b_enc=df_BF.sum(0),
        W_dec=W_dec,
        b_dec=error_BD.sum(0).mul_(2 / B),
    )
    count_F = active_BF.sum(0)
    return result(x_BD, error_BD, gradients, f_sum_F @ norm_F / B, count_F, l1_coefficient)


def result(
    x_BD: Tensor, error_BD: Tensor, gradients: SAE, l1: Tensor, count_F: Tensor, l1_coefficient: float
) -> StepResult:
    """The metrics that every kernel reports, from the residual x̂ − x and the rows each feature fired in."""
    error_B = error_BD.square().sum(1)
    spread_B = (x_BD - x_BD.mean(0)).square().sum(1)
    mse = error_B.mean()
    return StepResult(
        gradients=gradients,
        loss=mse + l1_coefficient * l1,
        mse=mse,
        l1=l1,
        l0=count_F.sum() / x_BD.shape[0],
        explained_variance=1 - error_B.sum() / spread_B.sum(),
        explained_variance_legacy=(1 - error_B / spread_B).mean(),
        fired_F=count_F > 0,
    )
