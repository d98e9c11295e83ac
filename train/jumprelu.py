"""JumpReLU: a feature is active above a threshold of its own, which is learnt (arXiv 2407.14435).

A step has no gradient, so thresholds get that of a rectangle of width ε around them (equations 11 and 12 there):

    ∂f_i/∂θ_i = −(θ_i/ε) K((z_i − θ_i)/ε)      ∂L0/∂θ_i = −(1/ε) Σ K((z_i − θ_i)/ε)      K(u) = 1 where |u| < 1/2

They are learnt through log θ, which keeps them positive.

Shape suffixes: B rows of a batch, F d_sae, N entries.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from train.nonzeros import ByRow, Rule, by_feature, masked, rows_of
from train.sae import Sae
from train.sparse_step import SPARSE
from train.step import AUTOGRAD

# Many features fire at first, as one that never does learns nothing; thresholds then rise, three times as fast as
# weights move. Measured: docs/training.md.
START_L0 = 30  # times target_l0
UNTARGETED_L0 = 100
THRESHOLD_LR = 3.0  # times train.lr


@dataclass(frozen=True, eq=False)
class JumpRelu(Sae):
    """f = z where z > θ_i, else 0, loss ‖x − x̂‖² + l0_coefficient · L0, or that times (2/t)(L0 − t)² of each row with
    target_l0 = t (arXiv 2407.14435)"""

    kind = "jumprelu"
    saelens = "jumprelu"
    elementwise = True
    decoder_norm = 1.0
    dims = Sae.dims | {"log_threshold": ("d_sae",)}
    rates: ClassVar = {"log_threshold": THRESHOLD_LR}
    published_names: ClassVar = {"log_threshold": "threshold"}
    kernels: ClassVar = {"dense": AUTOGRAD, "sparse": SPARSE}

    l0_coefficient: float = 0.0
    target_l0: float | None = None
    bandwidth: float = 0.0

    @classmethod
    def from_published(cls, tensors: dict[str, Tensor], scale: float, **rule: Any) -> Self:
        threshold_F = tensors["threshold"].clamp_min(0)  # f is positive, so a negative threshold is 0
        return cls({name: tensors[name] for name in Sae.dims} | {"log_threshold": threshold_F.log()}, scale, **rule)

    def published(self) -> dict[str, Tensor]:
        return {name: self.parameters[name] for name in Sae.dims} | {"threshold": self.threshold}

    @property
    def threshold(self) -> Tensor:
        """θ (F,), above 0."""
        return self.log_threshold.exp()

    def batch_rule(self) -> Rule:
        return Rule(above_F=self.threshold - self.bandwidth / 2)  # and those near below, for the thresholds

    def reading_rule(self) -> Rule:
        return Rule(above_F=self.threshold)

    def activations(self, z_BF: Tensor) -> Tensor:
        return torch.relu(z_BF) * (z_BF > self.threshold)

    def batch_activations(self, z_BF: Tensor) -> Tensor:
        return _Jump.apply(z_BF, self.threshold, self.bandwidth)

    def gates(self, z_BF: Tensor) -> dict[str, Tensor]:
        return {"sparsity": self.price(_Step.apply(z_BF, self.threshold, self.bandwidth).sum(1))[0].mean()}

    def price(self, l0_B: Tensor) -> tuple[Tensor, Tensor]:
        """What rows of an L0 pay, and its derivative; before l0_coefficient."""
        if self.target_l0 is None:
            return l0_B, torch.ones_like(l0_B)
        off_B = l0_B - self.target_l0
        return off_B.square() * (2 / self.target_l0), off_B * (4 / self.target_l0)

    def l0_terms(self, l0_B: Tensor) -> dict[str, Tensor]:
        return {"sparsity": self.price(l0_B)[0]}

    def split(self, entries: ByRow) -> tuple[ByRow, ByRow | None]:
        threshold_N = self.threshold[entries.feature_N]
        active_N = ~(entries.f_N <= threshold_N)
        return masked(entries, active_N), masked(entries, near(entries.f_N, threshold_N, self.bandwidth))

    def threshold_gradients(
        self, near: ByRow, df_N: Tensor, l0_B: Tensor, coefficients: Mapping[str, float]
    ) -> dict[str, Tensor]:
        slope_B = self.price(l0_B)[1] * (coefficients["sparsity"] / len(l0_B))
        row_N = rows_of(near.offset_B.diff(), len(df_N))
        gradient_N = (self.threshold[near.feature_N] * df_N + slope_B[row_N]) / -self.bandwidth
        by = by_feature(near, self.d_sae)
        sums_F = torch.segment_reduce(gradient_N[by.order_N], "sum", offsets=by.offset_F)
        return {"log_threshold": sums_F * self.threshold}

    @property
    def coefficients(self) -> dict[str, float]:
        return {"sparsity": self.l0_coefficient}

    @classmethod
    def initial(cls, d_in: int, d_sae: int, *args: Any, **hyperparameters: Any) -> Self:
        """As of any kind; thresholds such that so many features fire on a row in a random direction."""
        out = super().initial(d_in, d_sae, *args, **hyperparameters)
        # z is the product of a decoder row and a row of norm about √d_in: for a random direction a standard normal.
        share = torch.tensor(min(0.4, START_L0 * (out.target_l0 or UNTARGETED_L0) / d_sae), dtype=torch.float64)
        out.log_threshold.fill_(float((cls.decoder_norm * -torch.special.ndtri(share)).log()))
        return out


class _Jump(torch.autograd.Function):
    """z where it is above its threshold; the gradient of the threshold is the rectangle's."""

    @staticmethod
    def forward(ctx: Any, z_BF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z_BF, threshold_F)
        ctx.bandwidth = bandwidth
        return z_BF * ~(z_BF <= threshold_F)  # a NaN counts: it has to reach the loss

    @staticmethod
    def backward(ctx: Any, grad_BF: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        z_BF, threshold_F = ctx.saved_tensors
        near_BF = near(z_BF, threshold_F, ctx.bandwidth)
        return grad_BF * ~(z_BF <= threshold_F), (grad_BF * near_BF).sum(0) * (-threshold_F / ctx.bandwidth), None


class _Step(torch.autograd.Function):
    """1 where z is above its threshold; the gradient of the threshold is the rectangle's, z has none."""

    @staticmethod
    def forward(ctx: Any, z_BF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z_BF, threshold_F)
        ctx.bandwidth = bandwidth
        return (~(z_BF <= threshold_F)).float()

    @staticmethod
    def backward(ctx: Any, grad_BF: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[override]
        z_BF, threshold_F = ctx.saved_tensors
        return None, (grad_BF * near(z_BF, threshold_F, ctx.bandwidth)).sum(0) / -ctx.bandwidth, None


def near(z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """K((z − θ)/ε), bool, of shapes that broadcast."""
    return ((z - threshold) / bandwidth).abs() < 0.5
