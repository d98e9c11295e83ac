"""One SAE being trained: schedules, step, clipping, Adam, and what a resume needs.

Knows nothing of stores: it takes batches of rows, wherever they come from. Where the features are split
over ranks, each rank has a trainer, and all of them make the same calls with the same rows.

Shape suffixes: B rows of a batch, D d_in, F d_sae, K dead features.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harvest.files import UserError
from train.adam import Adam, Update
from train.config import TrainConfig
from train.kernel_choice import KernelChoice
from train.kinds import check_class
from train.parallel import SINGLE, FeatureRanks
from train.sae import Dead, Sae
from train.selection import TIE_BITS
from train.step import AUTOGRAD, StepResult, kernels, total

MOMENTS = ("exp_avg", "exp_avg_sq")
DEAD_ROWS = 10_000_000  # a feature that fired in none of as many rows is dead
THRESHOLD_RATE = 0.01  # of a running threshold: that of SAELens


class Stepped(NamedTuple):
    """A step's result with what the trainer adds to it."""

    result: StepResult
    loss: Tensor
    grad_norm: Tensor  # before clipping
    lr: float
    coefficients: dict[str, float]  # of the loss's terms
    kernel: str  # the one that was used


class Validation(NamedTuple):
    """Figures of held-out rows, at the full coefficients."""

    loss: float
    l0: float
    explained_variance: float
    explained_variance_legacy: float


class Trainer:
    """Weights and Adam's moments in float32 on a device; `step` counts finished steps."""

    def __init__(
        self,
        sae: Sae,
        config: TrainConfig,
        steps: int,
        rows: int,
        compute_dtype: torch.dtype,
        ranks: FeatureRanks = SINGLE,
        device: torch.device | None = None,
    ) -> None:
        """`rows` is one epoch. `sae` is this rank's features of train.sae's width; `self.sae`, and what hangs on
        it, are on a device (the SAE's).

        Raises UserError for several ranks of a kind that trains in one process, for a batch that is too large for its
        kind, and for what `check_class` finds.
        """
        self.kernels = kernels(sae)
        check_class(sae, self.kernels)
        self.d_sae = sae.d_sae if ranks.size == 1 else config.sae.width(sae.d_in)
        self.kernel = KernelChoice(config, self.d_sae, self.kernels)
        if ranks.size > 1 and self.kernels[self.kernel.name] is AUTOGRAD:
            way_out = "train.kernel=sparse" if "sparse" in self.kernels else "train.sae.kind=standard"
            said = f"train.sae.kind: {sae.kind!r} trains in one process with kernel {self.kernel.name}"
            raise UserError(f"{said}, and {ranks.size} were started; start one, or choose {way_out}")
        if "sparse" in self.kernels and sae.batch_rule().of_batch and config.batch_size * self.d_sae > 2**TIE_BITS:
            said = f"train.batch_size: {config.batch_size:,}: times d_sae = {self.d_sae:,} is above 2^{TIE_BITS}"
            raise UserError(f"{said}, the entries that kind {sae.kind} can tell apart; use a smaller batch")
        assert sae.d_sae == len(ranks.features(self.d_sae))
        self.config, self.steps, self.compute_dtype, self.ranks = config, steps, compute_dtype, ranks
        self.axes = sae.feature_axes() | {"rows_since_fired": 0}
        self.device = device = device or sae.W_enc.device
        self.sae = sae = sae.to(device)
        self.step_number = 0
        self.dead_after = min(DEAD_ROWS, rows)
        self.revive_after = config.sae.dead_after or max(1, min(DEAD_ROWS, rows // 10))
        self.rows_since_fired_F = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        self.bad_step = torch.full((), -1, device=device)  # the first whose loss or gradient is NaN or infinite
        self.adam = Adam(sae.trained, torch.float32 if "autograd" in self.kernels else compute_dtype, sae.rates)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def on_device(self, rows_BD: Tensor) -> Tensor:
        """Rows as stored (B, D), on the SAE's device."""
        if self._copies:  # the host is ahead: the copy runs beside the step before
            with torch.cuda.stream(self._copies):
                rows_BD = rows_BD.to(self.device, non_blocking=True)
            torch.cuda.current_stream(self.device).wait_stream(self._copies)
            rows_BD.record_stream(torch.cuda.current_stream(self.device))
        return rows_BD.to(self.device)

    def _dead(self) -> Dead | None:
        """The features that are to be revived."""
        if not self.sae.auxiliary(1):
            return None
        mine_K = (self.rows_since_fired_F >= self.revive_after).nonzero().squeeze(1)
        count = int(self.ranks.sum(torch.tensor(len(mine_K), device=self.device)))
        return Dead(mine_K, count) if count else None

    @torch.no_grad()
    def step(self, rows_BD: Tensor) -> Stepped:
        """Train on one batch of rows as stored."""
        config, kernel = self.config, self.kernel.name
        lr = decayed_lr(config.lr, self.step_number, self.steps, config.lr_decay_fraction)
        warm = warmed(self.step_number, self.steps, config.l1_warmup_fraction)
        coefficients = {name: value * warm for name, value in self.sae.coefficients.items()}
        options = (self.compute_dtype, self.ranks, self.adam.operands, self._dead())
        part = self.kernels[kernel].step(self.sae, self.on_device(rows_BD), coefficients, *options)
        result, grad_norm = self._whole(part)
        loss = total(result.terms, coefficients)
        self.kernel.note(result.l0)
        bad = torch.isfinite(grad_norm + loss).logical_not_() & (self.bad_step < 0)
        self.bad_step.masked_fill_(bad, self.step_number)
        divisor = (grad_norm / config.clip_norm).clamp_min(1.0)
        self.adam.update(result.gradients, Update(lr, config.adam_betas, self.step_number + 1, divisor))
        if "threshold" in self.sae.running and result.smallest is not None and lr > 0:
            rate = THRESHOLD_RATE if config.start_from else max(THRESHOLD_RATE, 1 / (self.step_number + 1))
            moved = self.sae.threshold.lerp(result.smallest, rate)
            self.sae.threshold.copy_(torch.where(divisor.isfinite() & moved.isfinite(), moved, self.sae.threshold))
        self.rows_since_fired_F.add_(len(rows_BD)).masked_fill_(result.fired_F, 0)
        self.step_number += 1
        return Stepped(result, loss, grad_norm, lr, coefficients, kernel)

    def _whole(self, result: StepResult) -> tuple[StepResult, Tensor]:
        """The result with the terms and l0 of all features, and the norm of all gradients."""
        norms = {name: torch.linalg.vector_norm(gradient) for name, gradient in result.gradients.items()}
        split = [norm for name, norm in norms.items() if self.axes[name] is not None]
        on_all = [norm.unsqueeze(0) for name, norm in norms.items() if self.axes[name] is None]
        parts = [name for name in result.terms if name in self.sae.parts]
        of_ranks = self.ranks.each(torch.stack([*(result.terms[name] for name in parts), result.l0, *split]))
        terms = result.terms | {name: of_ranks[:, i].sum() for i, name in enumerate(parts)}
        result = result._replace(terms=terms, l0=of_ranks[:, len(parts)].sum())
        return result, torch.linalg.vector_norm(torch.cat([of_ranks[:, len(parts) + 1 :].flatten(), *on_all]))

    @torch.no_grad()
    def validate(self, rows: Tensor) -> Validation:
        """Figures of held-out rows as stored (rows, D), in batches of the training size and with its kernel."""
        rebuild, coefficients = self.kernels[self.kernel.name].reconstruction, self.sae.coefficients
        options = (self.compute_dtype, self.ranks, self.adam.operands)
        sums = torch.zeros(4, dtype=torch.float64)
        for batch in rows.split(self.config.batch_size):
            batch_BD = self.on_device(batch)
            x_BD = self.sae.scaled(batch_BD)
            rebuilt = rebuild(self.sae, batch_BD, *options)
            error_B = rebuilt.error_BD.square().sum(1)
            spread_B = (x_BD - x_BD.mean(0)).square().sum(1).clamp_min(1e-30)  # a last batch of one row has none
            terms = {n: self.ranks.sum(term) if n in self.sae.parts else term for n, term in rebuilt.terms.items()}
            loss, l0_B = total(terms, coefficients).expand(len(batch)), self.ranks.sum(rebuilt.l0_B)
            figures = [loss, l0_B, error_B / spread_B.sum() * len(batch), error_B / spread_B]
            sums += torch.stack([figure.double().sum() for figure in figures]).cpu()
        loss, l0, unexplained, unexplained_legacy = (sums / len(rows)).tolist()
        return Validation(loss, l0, 1 - unexplained, 1 - unexplained_legacy)

    def dead_features(self) -> int:
        """Features that fired in none of the last min(10M, one epoch) rows."""
        return int(self.ranks.sum((self.rows_since_fired_F >= self.dead_after).sum()))

    def whole_sae(self) -> Sae | None:
        """The weights of all features as they are saved, on the host; None but on rank 0."""
        weights = self.weights()
        return self.sae_of(weights).finished() if weights else None

    def sae_of(self, tensors: Mapping[str, Tensor]) -> Sae:
        """The SAE of weights by name, shapes as in `sae.shapes`, that `weights` or `tensors` gave."""
        return replace(self.sae, parameters={name: tensors[name] for name in self.sae.parameters})

    def weights(self, host: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The SAE's parameters of all features by name, shapes as in `sae.shapes`, on the host of rank 0; {} on other
        ranks. `host` as in `FeatureRanks.gather`.
        """
        return self.ranks.gather(self.sae.parameters, self.axes, self.d_sae, host)

    def _own_tensors(self) -> dict[str, Tensor]:
        moments = {f"adam.{key}.{n}": t for key in MOMENTS for n, t in getattr(self.adam, key).items()}
        return self.sae.parameters | moments | {"rows_since_fired": self.rows_since_fired_F}

    def tensors(self, host: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """All tensors that a resume needs, by name, whole, on the host of rank 0; {} on other ranks.

        The SAE's parameters and Adam's moments `adam.exp_avg.W_enc`, ..., of the same shapes and float32;
        `rows_since_fired` int64 (F,). `host` as in `FeatureRanks.gather`.
        """
        return self.ranks.gather(self._own_tensors(), self.axes, self.d_sae, host)

    def restore(self, tensors: dict[str, Tensor], step_number: int, kernel: dict[str, Any]) -> None:
        """Take up the state that `tensors` and `kernel.state` gave, of any number of ranks.

        Every rank is given the whole tensors, shapes as in `tensors`.
        """
        tensors = self.ranks.shard_tensors(tensors, self.axes)
        self.kernel.restore(kernel)
        for name, mine in self._own_tensors().items():
            mine.copy_(tensors[name])
        self.adam.weights_changed()
        self.step_number = step_number


def decayed_lr(lr: float, step: int, steps: int, decay_fraction: float) -> float:
    """lr of step 0 ≤ step < steps: constant, then linear towards 0; the last step still moves."""
    decay = round(steps * decay_fraction)
    return lr * min(1.0, (steps - step) / decay) if decay else lr


def warmed(step: int, steps: int, warmup_fraction: float) -> float:
    """Part of a coefficient that counts at a step: 0 at the first, linear up to 1, then 1."""
    warmup = round(steps * warmup_fraction)
    return min(1.0, step / warmup) if warmup else 1.0
