"""How well an SAE rebuilds held-out rows: float64 sums over the whole set, in one pass.

All figures are in the units of the stored activations, except L0 and ratios. "outliers_excluded" leaves
out the rows that training leaves out (their norms would decide every sum); "all_rows" does not.

Shape suffixes: B rows of a batch, D d_in, F d_sae.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from evaluate.subject import Subject
from harvest.activation_store import ActivationStore
from train.checkpoint import SavedSae
from train.config import ExcludeConfig
from train.exclusion import kept_rows

DENSE = 0.1  # a feature that fires in more than a tenth of the rows

DEFINITIONS = {
    "rows": "held-out rows counted",
    "l0": "mean number of active features in a row",
    "explained_variance": "1 - sum |x - x_hat|^2 / sum |x - mean x|^2, float64 sums over the whole set (SAELens >= 6)",
    "explained_variance_legacy": "mean over rows of 1 - |x - x_hat|^2 / |x - batch mean|^2 "
    "(as SAELens 5 logged it; the paper's 68.5%)",
    "mse": "mean over rows of |x - x_hat|^2, in squared units of the stored activations",
    "cosine": "mean over rows of the cosine of x and x_hat",
    "norm_ratio": "mean over rows of |x_hat| / |x|; below 1 is shrinkage",
}


class HeldoutBatch(NamedTuple):
    rows_BD: Tensor  # bfloat16, as stored
    kept_B: np.ndarray  # bool: trained on, were it a training row
    source_B: np.ndarray  # uint8


class Fidelity(NamedTuple):
    """Figures by rows counted ("outliers_excluded", "all_rows") and source ("all" and each by name)."""

    figures: dict[str, dict[str, dict[str, float]]]
    density_F: np.ndarray  # part of the kept rows that a feature fires in
    mean_D: Tensor  # float64 mean of the kept rows


class _Sums:
    """Sums of one group of rows."""

    def __init__(self, d_in: int) -> None:
        self.rows = 0
        self.of_rows = np.zeros(6)  # errors, squares, l0, legacy, cosine, norm ratio
        self.x_D = np.zeros(d_in)

    def add(self, x_BD: Tensor, per_row: Tensor) -> None:
        if len(x_BD) == 0:
            return
        mean_D = x_BD.mean(0)
        spread_B = (x_BD - mean_D).square().sum(1)
        error_B, square_B, l0_B, cosine_B, ratio_B = per_row.unbind(1)
        legacy_B = torch.where(spread_B > 0, 1 - error_B / spread_B, torch.zeros_like(error_B))
        sums = torch.stack([error_B, square_B, l0_B, legacy_B, cosine_B, ratio_B]).double().sum(1)
        self.rows += len(x_BD)
        self.of_rows += sums.cpu().numpy()
        self.x_D += x_BD.double().sum(0).cpu().numpy()

    def figures(self) -> dict[str, float]:
        if not self.rows:
            return {"rows": 0}
        errors, squares, l0, legacy, cosine, ratio = self.of_rows
        spread = squares - np.square(self.x_D).sum() / self.rows
        return {
            "rows": self.rows,
            "l0": float(l0 / self.rows),
            "explained_variance": float(1 - errors / spread) if spread > 0 else 0.0,
            "explained_variance_legacy": float(legacy / self.rows),
            "mse": float(errors / self.rows),
            "cosine": float(cosine / self.rows),
            "norm_ratio": float(ratio / self.rows),
        }


def measure(subject: Subject) -> Fidelity:
    """One pass over the held-out rows of a subject."""
    g, config = subject.store.geometry, subject.config
    with subject.progress("fidelity", g.holdout_shards * g.shard_rows, "rows") as progress:

        def counted() -> Iterator[HeldoutBatch]:
            for batch in heldout_batches(
                subject.store, subject.saved, subject.exclude, subject.context_source, config.batch_rows
            ):
                yield batch
                progress.advance(len(batch.rows_BD))

        return fidelity(subject.saved, counted(), subject.contexts.sources, subject.device)


def features(subject: Subject, heldout: Fidelity) -> dict[str, Any]:
    """Figures of the features' densities, which go to `density-<hook>.npy`."""
    np.save(subject.file("density", ".npy"), heldout.density_F)
    return density_figures(heldout.density_F)


def heldout_batches(
    store: ActivationStore,
    saved: SavedSae,
    exclude: ExcludeConfig,
    context_source: np.ndarray,
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
        context = store.read_provenance("holdout", "context", shard)
        source = context_source[context] if len(context_source) else np.zeros(len(context), np.uint8)
        for start in range(0, len(rows), batch_rows):
            here = slice(start, start + batch_rows)
            parts.append((rows[here], kept[here], source[here]))
            if sum(len(p[0]) for p in parts) >= batch_rows:
                batch, parts = _join(parts, batch_rows)
                yield batch
    while parts:
        batch, parts = _join(parts, batch_rows)
        yield batch


def _join(parts: list[Any], batch_rows: int) -> tuple[HeldoutBatch, list[Any]]:
    rows, kept, source = (np.concatenate(p) for p in zip(*parts, strict=True))
    rest = [(rows[batch_rows:], kept[batch_rows:], source[batch_rows:])] if len(rows) > batch_rows else []
    acts = torch.from_numpy(rows[:batch_rows]).view(torch.bfloat16)
    return HeldoutBatch(acts, kept[:batch_rows], source[:batch_rows]), rest


@torch.no_grad()
def fidelity(saved: SavedSae, batches: Iterator[HeldoutBatch], sources: list[str], device: torch.device) -> Fidelity:
    """All figures of an SAE, which is on `device`, from batches of held-out rows."""
    sae, scale = saved.sae, saved.statistics.scale
    groups = ["all", *sources]
    sums = {counted: {group: _Sums(sae.d_in) for group in groups} for counted in ("outliers_excluded", "all_rows")}
    fired_F = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
    for batch in batches:
        x_BD = batch.rows_BD.to(device).float()
        f_BF = sae.encode(x_BD * scale)
        x_hat_BD = sae.decode(f_BF) / scale
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
        kept_B = torch.from_numpy(batch.kept_B).to(device)
        source_B = torch.from_numpy(batch.source_B).to(device)
        fired_F += active_BF[kept_B].sum(0)
        for counted, by_group in sums.items():
            rows_B = kept_B if counted == "outliers_excluded" else torch.ones_like(kept_B)
            for number, group in enumerate(groups):
                mask_B = rows_B if group == "all" else rows_B & (source_B == number - 1)
                by_group[group].add(x_BD[mask_B], per_row[mask_B])
    kept = sums["outliers_excluded"]["all"]
    figures = {counted: {g: s.figures() for g, s in by_group.items()} for counted, by_group in sums.items()}
    rows = max(1, kept.rows)
    return Fidelity(figures, fired_F.cpu().numpy() / rows, torch.from_numpy(kept.x_D / rows))


def density_figures(density_F: np.ndarray) -> dict[str, Any]:
    """Dead and dense features and a histogram of log10 density, from the density on held-out rows."""
    alive = density_F[density_F > 0]
    counts, edges = np.histogram(np.log10(alive), bins=56, range=(-7, 0))
    return {
        "d_sae": len(density_F),
        "dead_features": int((density_F == 0).sum()),
        "dead_fraction": float((density_F == 0).mean()),
        "dense_features": int((density_F > DENSE).sum()),
        "log10_density_histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
    }


DENSITY_DEFINITIONS = {
    "dead_features": "features that fire in none of the held-out rows (outliers excluded)",
    "dead_fraction": "dead_features / d_sae",
    "dense_features": f"features that fire in more than {DENSE:.0%} of them",
    "log10_density_histogram": "living features by log10 of the part of the rows that they fire in",
}
