"""Which rows an SAE is trained on, and the scale at which it sees them.

The first position of a context and a few delimiters have norms a hundred times the median; 0.3% of the
rows can hold 98% of all squared norm. Everything is stored; what is left out is decided here, from the
provenance of the rows, and never needs another harvest.

Shape suffixes: B rows of a chunk, D d_in.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from harvest.activation_store import ActivationStore
from harvest.files import UserError
from train.config import ExcludeConfig
from train.sae import input_scale

WAY_TO_KNOW = {
    "token_id": "ingest.token_ids, or token_ids beside them",
    "position": "ingest.context_size or file_is_context, or as (contexts, context_size, d_in)",
}


class InputStatistics(NamedTuple):
    """Taken once, from the first window in row order; kept with the SAE for held-out rows and evaluation."""

    scale: float  # s = √d_in / mean norm of the kept rows
    median_norm: float  # of all rows
    norm_limit: float | None  # rows above it are left out


class Exclusion(NamedTuple):
    """The one definition of the rows that training leaves out."""

    config: ExcludeConfig
    norm_limit: float | None = None

    def __call__(self, rows: Callable[[str], np.ndarray]) -> np.ndarray:
        """Bool (B,): the rows that are kept. `rows` gives "token_id", "position" and "norm" of all, each (B,)."""
        kept: np.ndarray | bool = True
        if self.config.token_ids:
            kept &= ~np.isin(rows("token_id"), self.config.token_ids)
        if self.config.positions:
            kept &= ~np.isin(rows("position"), self.config.positions)
        if self.norm_limit is not None:
            kept &= rows("norm") <= self.norm_limit
        return kept if isinstance(kept, np.ndarray) else np.ones(rows("token_id").shape, bool)


def kept_rows(
    store: ActivationStore,
    split: str,
    hook: str,
    shard: int,
    exclude: ExcludeConfig,
    norm_limit: float | None,
) -> np.ndarray:
    """Bool (shard_rows,): the rows of a shard that are trained on.

    Raises UserError where an ingested store does not know what is to be excluded.
    """
    absent = store.attributes.get("ingested", {}).get("absent", ())
    for name, wanted in (("token_id", exclude.token_ids), ("position", exclude.positions)):
        if wanted and name in absent:
            raise UserError(
                f"{exclude.setting}.{name}s: {list(wanted)}: these activations were ingested without {name}s; set it "
                f"to [], or ingest them with {WAY_TO_KNOW[name]}"
            )

    def rows(name: str) -> np.ndarray:
        return store.read_norms(split, hook, shard) if name == "norm" else store.read_provenance(split, name, shard)

    return Exclusion(exclude, norm_limit)(rows)


def input_statistics(
    store: ActivationStore, hook: str, exclude: ExcludeConfig, window_shards: int, split: str = "train"
) -> InputStatistics:
    """Median norm, limit and scale from the first window of a split.

    Raises UserError when the exclusions leave no row.
    """
    shards = range(min(window_shards, store.geometry.shards(split)))
    norms = np.concatenate([store.read_norms(split, hook, shard) for shard in shards])
    median = float(np.median(norms))
    limit = None if exclude.norm_above_median is None else exclude.norm_above_median * median
    keep = np.concatenate([kept_rows(store, split, hook, shard, exclude, limit) for shard in shards])
    if not keep.any():
        raise UserError(f"{exclude.setting}: {exclude.model_dump()}: leaves no row of the first window; exclude less")
    mean = float(norms[keep].mean(dtype=np.float64))
    if not mean > 0:
        raise UserError(f"{store.path}: all rows of {hook} in the first window are zero; there is nothing to learn")
    return InputStatistics(input_scale(store.geometry.d_in, mean), median, limit)


def mean_row(
    store: ActivationStore, hook: str, exclude: ExcludeConfig, norm_limit: float | None, window_shards: int
) -> np.ndarray:
    """Mean of the kept rows of the first window of training, float64 (d_in,), in stored units."""
    total, rows = np.zeros(store.geometry.d_in), 0
    for shard in range(min(window_shards, store.geometry.train_shards)):
        kept = kept_rows(store, "train", hook, shard, exclude, norm_limit).reshape(-1, store.geometry.chunk_rows)
        for i, kept_B in enumerate(kept):
            acts_BD = torch.from_numpy(store.read_chunk("train", hook, shard * len(kept) + i)).view(torch.bfloat16)
            total += acts_BD[torch.from_numpy(kept_B)].float().numpy().sum(0, dtype=np.float64)
            rows += int(kept_B.sum())
    return total / max(1, rows)
