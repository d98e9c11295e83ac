"""How well an SAE rebuilds held-out rows: float64 sums over the whole set, in one pass.

All figures are in the units of the stored activations, except L0 and ratios. "outliers_excluded" leaves
out the rows that training leaves out (their norms would decide every sum); "all_rows" does not.

Shape suffixes: B rows of a batch, D d_in, F d_sae, G groups of rows, C blocks of contexts, K resamplings.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from evaluate.groups import Groups
from evaluate.intervals import with_intervals
from evaluate.subject import Subject
from harvest.activation_store import ActivationStore
from harvest.files import UserError
from train.checkpoint import SavedSae
from train.config import ExcludeConfig
from train.exclusion import kept_rows

DENSE = 0.1  # a feature that fires in more than a tenth of the rows

DEFINITIONS = {
    "rows": "held-out rows counted [rows]",
    "l0": "mean number of active features in a row [features]",
    "explained_variance": "1 - sum |x - x_hat|^2 / sum |x - mean x|^2, float64 sums over the whole set "
    "(SAELens >= 6) [no unit; 1 is perfect]",
    "explained_variance_legacy": "mean over rows of 1 - |x - x_hat|^2 / |x - batch mean|^2 "
    "(as SAELens 5 logged it; the paper's 68.5%) [no unit; 1 is perfect]",
    "mse": "mean over rows of |x - x_hat|^2, summed over d_in [squared units of the stored activations]",
    "cosine": "mean over rows of the cosine of x and x_hat [no unit]",
    "norm_ratio": "mean over rows of |x_hat| / |x|; below 1 is shrinkage [no unit]",
}


BLOCKS = 1024  # of contexts, for intervals: memory stays flat
WITH_INTERVAL = tuple(name for name in DEFINITIONS if name != "rows")


class HeldoutBatch(NamedTuple):
    """Consecutive held-out rows, in stored order."""

    rows_BD: Tensor  # bfloat16, as stored
    kept_B: np.ndarray  # bool: trained on, were it a training row
    context_B: np.ndarray  # int64: number of the held-out context


class Fidelity(NamedTuple):
    """Figures by rows counted ("outliers_excluded", "all_rows") and group ("all", and sources and strata by name)."""

    figures: dict[str, dict[str, dict[str, Any]]]
    density_F: np.ndarray  # part of the kept rows that a feature fires in
    by_group: dict[str, tuple[int, np.ndarray]]  # kept rows of a source or stratum, and density_F on them
    mean_D: Tensor  # float64 mean of the kept rows


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
        """Bool (B,): the rows of these contexts that belong to the group."""
        return np.ones(len(context_B), bool) if self.mask_C is None else self.mask_C[context_B]

    def add(self, context_B: np.ndarray, x_BD: Tensor, per_row_B5: Tensor) -> None:
        """Count rows of the group."""
        if len(x_BD) == 0:
            return
        block_B = context_B % self.blocks if self.block_C is None else self.block_C[context_B]
        on_device_B = torch.from_numpy(block_B).to(x_BD.device)
        spread_B = (x_BD - x_BD.mean(0)).square().sum(1)
        error_B = per_row_B5[:, 0]
        legacy_B = torch.where(spread_B > 0, 1 - error_B / spread_B, torch.zeros_like(error_B))
        of_rows_B7 = torch.cat([torch.ones_like(error_B)[:, None], per_row_B5, legacy_B[:, None]], 1)
        self.of_rows_C7.index_add_(0, on_device_B, of_rows_B7.double())
        self.x_CD.index_add_(0, on_device_B, x_BD.double())

    def figures(self) -> dict[str, Any]:
        used_C = (self.of_rows_C7[:, 0] > 0).cpu().numpy()
        if not used_C.any():
            return {"rows": 0}
        of_rows_C7, x_CD = self.of_rows_C7.cpu().numpy()[used_C], self.x_CD.cpu().numpy()[used_C]

        def figures_of(weights_KC: np.ndarray) -> dict[str, np.ndarray]:
            rows, errors, squares, l0, cosine, ratio, legacy = (weights_KC @ of_rows_C7).T
            spread = squares - np.square(weights_KC @ x_CD).sum(1) / rows
            explained = np.divide(errors, spread, out=np.ones_like(errors), where=spread > 0)
            return {
                "rows": rows,
                "l0": l0 / rows,
                "explained_variance": 1 - explained,
                "explained_variance_legacy": legacy / rows,
                "mse": errors / rows,
                "cosine": cosine / rows,
                "norm_ratio": ratio / rows,
            }

        out = with_intervals(figures_of, len(x_CD), WITH_INTERVAL)
        return out | {"rows": int(out["rows"])}


def measure(subject: Subject) -> Fidelity:
    """One pass over the held-out rows of a subject.

    Raises UserError when training's exclusions leave none of them.
    """
    g, config = subject.store.geometry, subject.config
    with subject.progress("fidelity", g.holdout_shards * g.shard_rows, "rows") as progress:

        def counted() -> Iterator[HeldoutBatch]:
            for batch in heldout_batches(subject.store, subject.saved, subject.exclude, config.batch_rows):
                yield batch
                progress.advance(len(batch.rows_BD))

        found = fidelity(subject.saved, counted(), subject.groups, subject.device)
    if not found.figures["outliers_excluded"]["all"]["rows"]:
        raise UserError(
            f"train.exclude: {subject.exclude.model_dump()}: leaves none of the held-out rows of {subject.store.path}"
        )
    return found


def features(subject: Subject, heldout: Fidelity) -> dict[str, Any]:
    """Figures of the features' densities, which go to `density-<hook>.npy`."""
    np.save(subject.file("density", ".npy"), heldout.density_F)
    return density_figures(heldout.density_F)


def heldout_batches(
    store: ActivationStore,
    saved: SavedSae,
    exclude: ExcludeConfig,
    batch_rows: int,
) -> Iterator[HeldoutBatch]:
    """Every held-out row of the SAE's hook, in stored order; the last batch may be short."""
    g = store.geometry
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for shard in range(g.holdout_shards):
        chunks = range(shard * g.chunks_per_shard, (shard + 1) * g.chunks_per_shard)
        rows = np.empty((g.shard_rows, g.d_in), np.uint16)
        store.read_chunks("holdout", saved.hook, chunks, rows)
        kept = kept_rows(store, "holdout", saved.hook, shard, exclude, saved.statistics.norm_limit)
        context = store.read_provenance("holdout", "context", shard).astype(np.int64)
        for start in range(0, len(rows), batch_rows):
            here = slice(start, start + batch_rows)
            parts.append((rows[here], kept[here], context[here]))
            if sum(len(p[0]) for p in parts) >= batch_rows:
                batch, parts = _join(parts, batch_rows)
                yield batch
    while parts:
        batch, parts = _join(parts, batch_rows)
        yield batch


def _join(parts: list[Any], batch_rows: int) -> tuple[HeldoutBatch, list[Any]]:
    rows, kept, context = (np.concatenate(p) for p in zip(*parts, strict=True))
    rest = [(rows[batch_rows:], kept[batch_rows:], context[batch_rows:])] if len(rows) > batch_rows else []
    acts = torch.from_numpy(rows[:batch_rows]).view(torch.bfloat16)
    return HeldoutBatch(acts, kept[:batch_rows], context[:batch_rows]), rest


@torch.no_grad()
def fidelity(saved: SavedSae, batches: Iterator[HeldoutBatch], groups: Groups, device: torch.device) -> Fidelity:
    """All figures of an SAE, which is on `device`, from batches of held-out rows.

    `groups` are of the held-out contexts; empty for rows without text. Sums are kept by context, for intervals, or by
    blocks of contexts where they are many: at most BLOCKS x d_in float64 a group.
    """
    sae = saved.sae
    every_C = next((np.ones_like(mask_C) for mask_C in groups.values()), None)
    masks = {"all": every_C, **groups}
    sums = {
        counted: {name: _Sums(mask_C, sae.d_in, device) for name, mask_C in masks.items()}
        for counted in ("outliers_excluded", "all_rows")
    }
    fired_GF = torch.zeros(len(masks), sae.d_sae, dtype=torch.int64, device=device)
    for batch in batches:
        x_BD = batch.rows_BD.to(device).float()
        f_BF = sae.encode(x_BD)
        x_hat_BD = sae.decode(f_BF)
        active_BF = f_BF > 0
        norm_B, norm_hat_B = x_BD.norm(dim=1), x_hat_BD.norm(dim=1)
        per_row = torch.stack(
            [
                (x_hat_BD - x_BD).square().sum(1),
                norm_B.square(),
                active_BF.sum(1).float(),
                (x_BD * x_hat_BD).sum(1) / (norm_B * norm_hat_B).clamp_min(1e-30),
                norm_hat_B / norm_B.clamp_min(1e-30),
            ],
            dim=1,
        )
        for counted, by_group in sums.items():
            rows_B = batch.kept_B if counted == "outliers_excluded" else np.ones_like(batch.kept_B)
            for number, group in enumerate(by_group.values()):
                of_group_B = rows_B & group.holds(batch.context_B)
                mask_B = torch.from_numpy(of_group_B).to(device)
                group.add(batch.context_B[of_group_B], x_BD[mask_B], per_row[mask_B])
                if counted == "outliers_excluded":
                    fired_GF[number] += active_BF[mask_B].sum(0)
    kept = sums["outliers_excluded"]["all"]
    figures = {counted: {g: s.figures() for g, s in by_group.items()} for counted, by_group in sums.items()}
    rows = {group: figures["outliers_excluded"][group]["rows"] for group in masks}
    density_GF = {g: fired_F / max(1, rows[g]) for g, fired_F in zip(masks, fired_GF.cpu().numpy(), strict=True)}
    by_group = {group: (rows[group], density_GF[group]) for group in groups}
    return Fidelity(figures, density_GF["all"], by_group, kept.x_CD.sum(0).cpu() / max(1, rows["all"]))


def density_figures(density_F: np.ndarray) -> dict[str, Any]:
    """Dead and dense features and a histogram of log10 density, from the density on held-out rows."""
    alive = density_F[density_F > 0].clip(min=1e-7)  # the first bin has those below its edge too
    counts, edges = np.histogram(np.log10(alive), bins=56, range=(-7, 0))
    return {
        "d_sae": len(density_F),
        "dead_features": int((density_F == 0).sum()),
        "dead_fraction": float((density_F == 0).mean()),
        "dense_features": int((density_F > DENSE).sum()),
        "log10_density_histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
    }


DENSITY_DEFINITIONS = {
    "dead_features": "features that fire in none of the held-out rows (outliers excluded) [features]",
    "dead_fraction": "dead_features / d_sae [no unit]",
    "dense_features": f"features that fire in more than {DENSE:.0%} of them [features]",
    "log10_density_histogram": "living features by log10 of the part of the rows that they fire in",
}
