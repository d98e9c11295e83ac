"""One SAE being trained: schedules, step, clipping, Adam, and what a resume needs.

Knows nothing of stores: it takes batches of rows, wherever they come from. Where the features are split
over ranks, each rank has a trainer, and all of them make the same calls with the same rows.

Shape suffixes: B rows of a batch, D d_in, F d_sae.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from train.adam import Adam, Update
from train.config import TrainConfig
from train.kernel_choice import KernelChoice
from train.parallel import SINGLE, FeatureRanks
from train.sae import SAE
from train.schedules import decayed_lr, warmed_l1
from train.sparse_step import sparse_reconstruction, sparse_step
from train.step import StepResult, dense_reconstruction, dense_step

MOMENTS = ("exp_avg", "exp_avg_sq")
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
        self,
        sae: SAE,
        scale: float,
        config: TrainConfig,
        steps: int,
        rows: int,
        compute_dtype: torch.dtype,
        ranks: FeatureRanks = SINGLE,
    ) -> None:
        """`scale` multiplies rows as stored; `rows` is one epoch.

        `sae` is whole; `self.sae`, and what hangs on it, are this rank's features of it.
        """
        self.scale, self.config, self.steps = scale, config, steps
        self.compute_dtype, self.ranks = compute_dtype, ranks
        self.d_sae = sae.d_sae
        self.kernel = KernelChoice(config, sae.d_sae)
        self.sae = sae = ranks.shard(sae)
        self.step_number = 0
        self.dead_after = min(DEAD_ROWS, rows)
        self.rows_since_fired_F = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.W_enc.device)
        self.bad_step = torch.full((), -1, device=sae.W_enc.device)  # the first whose loss or gradient is no number
        self.adam = Adam(sae, compute_dtype)
        device = sae.W_enc.device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def scaled(self, rows_BD: Tensor) -> Tensor:
        """Rows as stored -> float32 rows (B, D) as the SAE sees them, on its device."""
        device = self.sae.W_enc.device
        if self._copies:  # the host is ahead: the copy runs beside the step before
            with torch.cuda.stream(self._copies):
                rows_BD = rows_BD.to(device, non_blocking=True)
            torch.cuda.current_stream(device).wait_stream(self._copies)
            rows_BD.record_stream(torch.cuda.current_stream(device))
        return rows_BD.to(device).float().mul_(self.scale)

    @torch.no_grad()
    def step(self, rows_BD: Tensor) -> Stepped:
        """Train on one batch of rows as stored."""
        config = self.config
        lr = decayed_lr(config.lr, self.step_number, self.steps, config.lr_decay_fraction)
        l1_coefficient = warmed_l1(config.sae.l1_coefficient, self.step_number, self.steps, config.l1_warmup_fraction)
        kernel = "sparse" if self.kernel.sparse else "dense"
        compute = sparse_step if self.kernel.sparse else dense_step
        result = compute(
            self.sae,
            self.scaled(rows_BD),
            l1_coefficient,
            self.compute_dtype,
            sum_over_ranks=self.ranks.sum_over_ranks,
            operands=self.adam.operands,
        )
        result, grad_norm = self._whole(result, l1_coefficient)
        self.kernel.note(result.l0)
        bad = torch.isfinite(grad_norm + result.loss).logical_not_() & (self.bad_step < 0)
        self.bad_step.masked_fill_(bad, self.step_number)
        divisor = (grad_norm / config.clip_norm).clamp_min(1.0)
        self.adam.update(result.gradients, Update(lr, config.adam_betas, self.step_number + 1, divisor))
        self.rows_since_fired_F.add_(len(rows_BD)).masked_fill_(result.fired_F, 0)
        self.step_number += 1
        return Stepped(result, grad_norm, lr, l1_coefficient, kernel)

    def _whole(self, result: StepResult, l1_coefficient: float) -> tuple[StepResult, Tensor]:
        """The result with the loss, l1 and l0 of all features, and the norm of all gradients."""
        W_enc, b_enc, W_dec, b_dec = map(torch.linalg.vector_norm, result.gradients)
        parts = self.ranks.each(torch.stack([result.l1, result.l0, W_enc, b_enc, W_dec]))
        result = result.with_sparsity(parts[:, 0].sum(), parts[:, 1].sum(), l1_coefficient)
        return result, torch.linalg.vector_norm(torch.cat([parts[:, 2:].flatten(), b_dec.unsqueeze(0)]))

    @torch.no_grad()
    def validate(self, rows: Tensor) -> Validation:
        """Figures of held-out rows as stored (rows, D), in batches of the training size and with its kernel."""
        rebuild = sparse_reconstruction if self.kernel.sparse else dense_reconstruction
        sums = torch.zeros(4, dtype=torch.float64)
        for batch in rows.split(self.config.batch_size):
            x_BD = self.scaled(batch)
            rebuilt = rebuild(self.sae, x_BD, self.compute_dtype, self.ranks.sum_over_ranks, self.adam.operands)
            error_B = rebuilt.error_BD.square().sum(1)
            spread_B = (x_BD - x_BD.mean(0)).square().sum(1).clamp_min(1e-30)  # a last batch of one row has none
            l1_B, l0_B = self.ranks.sum(rebuilt.l1_B), self.ranks.sum(rebuilt.l0_B)
            loss = error_B + self.config.sae.l1_coefficient * l1_B
            figures = [loss, l0_B, error_B / spread_B.sum() * len(batch), error_B / spread_B]
            sums += torch.stack([figure.double().sum() for figure in figures]).cpu()
        loss, l0, unexplained, unexplained_legacy = (sums / len(rows)).tolist()
        return Validation(loss, l0, 1 - unexplained, 1 - unexplained_legacy)

    def dead_features(self) -> int:
        """Features that fired in none of the last min(10M, one epoch) rows."""
        return int(self.ranks.sum((self.rows_since_fired_F >= self.dead_after).sum()))

    def whole_sae(self) -> SAE | None:
        """The weights of all features, on the host; None but on rank 0."""
        weights = self.ranks.gather(self.sae._asdict(), self.d_sae)
        return SAE(**weights) if weights else None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that a resume needs, by name, whole, on the host of rank 0; {} on other ranks.

        `W_enc`, ..., `b_dec` and Adam's `adam.exp_avg.W_enc`, ... with the shapes of `SAE`, all float32;
        `rows_since_fired` int64 (F,).
        """
        out = dict(self.sae._asdict())
        for name in SAE._fields:
            out |= {f"adam.{key}.{name}": getattr(getattr(self.adam, key), name) for key in MOMENTS}
        out["rows_since_fired"] = self.rows_since_fired_F
        return self.ranks.gather(out, self.d_sae)

    def restore(self, tensors: dict[str, Tensor], step_number: int, kernel: dict[str, Any]) -> None:
        """Take up the state that `tensors` and `kernel.state` gave, of any number of ranks.

        Every rank is given the whole tensors, shapes as in `tensors`.
        """
        tensors = self.ranks.shard_tensors(tensors)
        self.kernel.restore(kernel)
        for name, weight in self.sae._asdict().items():
            weight.copy_(tensors[name])
            for key in MOMENTS:
                getattr(getattr(self.adam, key), name).copy_(tensors[f"adam.{key}.{name}"])
        self.adam.weights_changed()
        self.rows_since_fired_F.copy_(tensors["rows_since_fired"])
        self.step_number = step_number
