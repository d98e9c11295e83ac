"""One SAE being trained: schedules, step, clipping, Adam, and what a resume needs.

Knows nothing of stores: it takes batches of rows, wherever they come from.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from train.config import TrainConfig
from train.kernel_choice import KernelChoice
from train.sae import SAE
from train.schedules import decayed_lr, warmed_l1
from train.sparse_step import sparse_step
from train.step import StepResult, dense_step

DEAD_ROWS = 10_000_000  # a feature that fired in none of as many rows is dead


class Stepped(NamedTuple):
    """A step's result with what the trainer adds to it."""

    result: StepResult
    grad_norm: Tensor  # before clipping
    lr: float
    l1_coefficient: float
    kernel: str  # the one that was used


class Validation(NamedTuple):
    """Figures of held-out rows, at the full λ."""

    loss: float
    l0: float
    explained_variance: float
    explained_variance_legacy: float


class Trainer:
    """Weights and Adam's moments in float32 on a device; `step` counts finished steps."""

    def __init__(
        self, sae: SAE, scale: float, config: TrainConfig, steps: int, rows: int, compute_dtype: torch.dtype
    ) -> None:
        """`scale` multiplies rows as stored; `rows` is one epoch."""
        self.sae, self.scale, self.config, self.steps = sae, scale, config, steps
        self.compute_dtype = compute_dtype
        self.step_number = 0
        self.kernel = KernelChoice(config, sae.d_sae)
        self.dead_after = min(DEAD_ROWS, rows)
        self.rows_since_fired_F = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.W_enc.device)
        self.adam = torch.optim.Adam(list(sae), lr=config.lr, betas=config.adam_betas, fused=True)
        for weight in sae:
            self.adam.state[weight] = {
                "step": torch.zeros((), device=weight.device),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }

    def scaled(self, rows_BD: Tensor) -> Tensor:
        """Rows as stored -> float32 rows as the SAE sees them, on its device."""
        return rows_BD.to(self.sae.W_enc.device, non_blocking=True).float().mul_(self.scale)

    @torch.no_grad()
    def step(self, rows_BD: Tensor) -> Stepped:
        """Train on one batch of rows as stored."""
        config = self.config
        lr = decayed_lr(config.lr, self.step_number, self.steps, config.lr_decay_fraction)
        l1_coefficient = warmed_l1(config.sae.l1_coefficient, self.step_number, self.steps, config.l1_warmup_fraction)
        kernel = "sparse" if self.kernel.sparse else "dense"
        compute = sparse_step if self.kernel.sparse else dense_step
        result = compute(self.sae, self.scaled(rows_BD), l1_coefficient, self.compute_dtype)
        self.kernel.note(result.l0)
        for weight, gradient in zip(self.sae, result.gradients, strict=True):
            weight.grad = gradient
        grad_norm = torch.nn.utils.clip_grad_norm_(list(self.sae), config.clip_norm)
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        self.rows_since_fired_F.add_(len(rows_BD)).masked_fill_(result.fired_F, 0)
        self.step_number += 1
        return Stepped(result, grad_norm, lr, l1_coefficient, kernel)

    @torch.no_grad()
    def validate(self, rows: Tensor) -> Validation:
        """Figures of held-out rows as stored, in batches of the training size."""
        sums = torch.zeros(4, dtype=torch.float64)
        batches = rows.split(self.config.batch_size)
        for batch in batches:
            x_BD = self.scaled(batch)
            f_BF = self.sae.encode(x_BD)
            error_B = (self.sae.decode(f_BF) - x_BD).square().sum(1)
            spread_B = (x_BD - x_BD.mean(0)).square().sum(1)
            l1_B = f_BF @ self.sae.W_dec.norm(dim=1)
            loss = error_B + self.config.sae.l1_coefficient * l1_B
            figures = [loss, (f_BF > 0).sum(1), error_B / spread_B.sum() * len(batch), error_B / spread_B]
            sums += torch.stack([figure.double().sum() for figure in figures]).cpu()
        loss, l0, unexplained, unexplained_legacy = (sums / len(rows)).tolist()
        return Validation(loss, l0, 1 - unexplained, 1 - unexplained_legacy)

    def dead_features(self) -> int:
        """Features that fired in none of the last min(10M, one epoch) rows."""
        return int((self.rows_since_fired_F >= self.dead_after).sum())

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that a resume needs, by name, on the host."""
        out = dict(self.sae._asdict())
        for name, weight in self.sae._asdict().items():
            state = self.adam.state[weight]
            out |= {f"adam.{key}.{name}": state[key] for key in ("exp_avg", "exp_avg_sq")}
        out["rows_since_fired"] = self.rows_since_fired_F
        return {name: tensor.cpu() for name, tensor in out.items()}

    def restore(self, tensors: dict[str, Tensor], step_number: int, kernel: dict[str, Any]) -> None:
        """Take up the state that `tensors` and `kernel.state` gave."""
        self.kernel.restore(kernel)
        for name, weight in self.sae._asdict().items():
            weight.copy_(tensors[name])
            state = self.adam.state[weight]
            for key in ("exp_avg", "exp_avg_sq"):
                state[key].copy_(tensors[f"adam.{key}.{name}"])
            state["step"].fill_(step_number)
        self.rows_since_fired_F.copy_(tensors["rows_since_fired"])
        self.step_number = step_number
