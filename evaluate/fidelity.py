"""How well an SAE rebuilds held-out rows, and how often its features fire: float64 sums over the whole set.

All figures are in the units of the stored activations, except L0 and ratios. "outliers_excluded" leaves
out the rows that training leaves out (their norms would decide every sum); "all_rows" does not.

Shape suffixes: B rows of a batch, D d_in, F d_sae, C blocks of contexts, K resamplings.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from evaluate.figures import EVERY, KEPT, definitions
from evaluate.groups import Groups
from evaluate.intervals import with_intervals
from evaluate.subject import Encoded
from train.checkpoint import SavedSae

DENSE = 0.1  # a feature that fires in more than a tenth of the rows
BLOCKS = 1024  # of contexts, for intervals: memory stays flat
NAMES = tuple(definitions()["fidelity"])


class Fidelity(NamedTuple):
    """Figures of all groups ("all", and sources and strata by name), and what other analyses need of the same pass."""

    figures: dict[str, dict[str, dict[str, Any]]]  # rows counted -> group -> name
    density_F: np.ndarray  # part of the kept rows that a feature fires in
    max_F: np.ndarray  # its largest activation on them
    by_group: dict[str, tuple[int, np.ndarray]]  # kept rows of a source or stratum, and density_F on them
    mean_D: Tensor  # float64 mean of the kept rows


class FidelitySums:
    """Reads rows; its result is a `Fidelity`."""

    def __init__(self, saved: SavedSae, groups: Groups, device: torch.device) -> None:
        """`groups` are masks of the held-out contexts; the SAE is on `device`."""
        self.saved = saved
        masks = {"all": None, **groups}
        self.sums = {
            rows: {name: _Sums(mask_C, saved.sae.d_in, device) for name, mask_C in masks.items()}
            for rows in (KEPT, EVERY)
        }
        self.max_F = torch.zeros(saved.sae.d_sae, device=device)
        self.fired = {name: torch.zeros(saved.sae.d_sae, dtype=torch.int64, device=device) for name in masks}

    def add(self, batch: Encoded) -> None:
        """Count the rows of a batch; the legacy explained variance depends on where batches end."""
        x_BD, active_BF = batch.x_BD, batch.f_BF > 0
        x_hat_BD = self.saved.sae.decode(batch.f_BF)
        norm_B, norm_hat_B = x_BD.norm(dim=1), x_hat_BD.norm(dim=1)
        per_row = [
            torch.ones_like(norm_B),
            (x_hat_BD - x_BD).square().sum(1),
            norm_B.square(),
            active_BF.sum(1).float(),
            (x_BD * x_hat_BD).sum(1) / (norm_B * norm_hat_B).clamp_min(1e-30),
            norm_hat_B / norm_B.clamp_min(1e-30),
        ]
        per_row_B6 = torch.stack(per_row, dim=1)
        if batch.rows.kept.any():
            kept_B = torch.from_numpy(batch.rows.kept).to(x_BD.device)
            self.max_F = torch.maximum(self.max_F, batch.f_BF[kept_B].amax(0))
        for rows, by_group in self.sums.items():
            for name, sums in by_group.items():
                chosen_B = sums.holds(batch.rows.context)
                if rows == KEPT:
                    chosen_B = chosen_B & batch.rows.kept
                mask_B = torch.from_numpy(chosen_B).to(x_BD.device)
                if chosen_B.any():
                    sums.add(batch.rows.context[chosen_B], x_BD[mask_B], per_row_B6[mask_B])
                if rows == KEPT:
                    self.fired[name] += active_BF[mask_B].sum(0)

    def result(self) -> Fidelity:
        """The figures of all rows that were added."""
        figures = {
            rows: {name: sums.figures() for name, sums in by_group.items()} for rows, by_group in self.sums.items()
        }
        counted = {name: found["rows"] for name, found in figures[KEPT].items()}
        density = {name: fired_F.cpu().numpy() / max(1, counted[name]) for name, fired_F in self.fired.items()}
        by_group = {name: (counted[name], density[name]) for name in density if name != "all"}
        mean_D = self.sums[KEPT]["all"].x_CD.sum(0).cpu() / max(1, counted["all"])
        return Fidelity(figures, density["all"], self.max_F.cpu().numpy(), by_group, mean_D)


def add_by(sums_CK: Tensor, group_B: Tensor, values_BK: Tensor) -> None:
    """Add each row of values to the sum of its group, in place; the same bytes each time."""
    if sums_CK.is_cuda:  # index_add_ has atomics there, which sum in no order
        sums_CK.index_put_((group_B,), values_BK, accumulate=True)
    else:
        sums_CK.index_add_(0, group_B, values_BK)


class _Sums:
    """Sums of one group of rows, by block of its contexts (C)."""

    def __init__(self, mask_C: np.ndarray | None, d_in: int, device: torch.device) -> None:
        """`mask_C` is bool (held-out contexts,): those of the group; None where the number of contexts is unknown."""
        self.mask_C = mask_C
        self.blocks = BLOCKS if mask_C is None else max(1, min(int(mask_C.sum()), BLOCKS))
        # The group's own contexts are counted off, so that none of its blocks stays empty.
        self.block_C = None if mask_C is None else (mask_C.cumsum() - 1) % self.blocks
        # rows, errors, squares, l0, cosine, norm ratio, legacy
        self.of_rows_C7 = torch.zeros(self.blocks, 7, dtype=torch.float64, device=device)
        self.x_CD = torch.zeros(self.blocks, d_in, dtype=torch.float64, device=device)

    def holds(self, context_B: np.ndarray) -> np.ndarray:
        return np.ones(len(context_B), bool) if self.mask_C is None else self.mask_C[context_B]

    def add(self, context_B: np.ndarray, x_BD: Tensor, per_row_B6: Tensor) -> None:
        block_B = context_B % self.blocks if self.block_C is None else self.block_C[context_B]
        on_device_B = torch.from_numpy(block_B).to(x_BD.device)
        spread_B, error_B = (x_BD - x_BD.mean(0)).square().sum(1), per_row_B6[:, 1]
        legacy_B = torch.where(spread_B > 0, 1 - error_B / spread_B, torch.zeros_like(error_B))
        add_by(self.of_rows_C7, on_device_B, torch.cat([per_row_B6, legacy_B[:, None]], 1).double())
        add_by(self.x_CD, on_device_B, x_BD.double())

    def figures(self) -> dict[str, Any]:
        used_C = (self.of_rows_C7[:, 0] > 0).cpu().numpy()
        if not used_C.any():
            return {"rows": 0}
        of_rows_C7, x_CD = self.of_rows_C7.cpu().numpy()[used_C], self.x_CD.cpu().numpy()[used_C]

        def figures_of(weights_KC: np.ndarray) -> dict[str, np.ndarray]:
            rows, errors, squares, l0, cosine, ratio, legacy = (weights_KC @ of_rows_C7).T
            spread = squares - np.square(weights_KC @ x_CD).sum(1) / rows
            explained = 1 - np.divide(errors, spread, out=np.ones_like(errors), where=spread > 0)
            means = (l0 / rows, explained, legacy / rows, errors / rows, cosine / rows, ratio / rows)
            return dict(zip(NAMES, (rows, *means), strict=True))

        out = with_intervals(figures_of, len(x_CD), NAMES[1:])
        return out | {"rows": int(out["rows"])}


def density_figures(density_F: np.ndarray) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Dead and dense features, and a histogram of log10 density, from the density on held-out rows."""
    alive = density_F[density_F > 0].clip(min=1e-7)  # the first bin has those below its edge too
    counts, edges = np.histogram(np.log10(alive), bins=56, range=(-7, 0))
    figures = {
        "d_sae": len(density_F),
        "dead_features": int((density_F == 0).sum()),
        "dead_fraction": float((density_F == 0).mean()),
        "dense_features": int((density_F > DENSE).sum()),
    }
    return figures, {"counts": counts.tolist(), "edges": edges.tolist()}
