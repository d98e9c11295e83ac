"""Batches of made-up rows, as a store would give them."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from evaluate.fidelity import Fidelity, FidelitySums
from evaluate.groups import Groups
from evaluate.subject import feed
from harvest.activation_rows import RowBatch
from harvest.contexts import NO_STRATUM
from train.checkpoint import SavedSae

HOOK = "model.layers.1"


def batches(
    rows: torch.Tensor,
    context: np.ndarray,
    kept: np.ndarray | None = None,
    ends: Iterable[int] = (),
    source: np.ndarray | None = None,
) -> Iterator[RowBatch]:
    """Batches that end at these rows, of bfloat16 rows (N, d_in); the position counts the rows of a context."""
    count = len(rows)
    position = np.array([(context[:n] == context[n]).sum() for n in range(count)])
    whole = RowBatch(
        "holdout",
        {HOOK: rows},
        np.zeros(count, np.uint32),
        context.astype(np.int64),
        position,
        np.zeros(count, np.uint8) if source is None else source,
        np.full(count, NO_STRATUM, np.uint16),
        np.ones(count, bool) if kept is None else kept,
    )
    starts = [0, *ends]
    for start, end in zip(starts, [*starts[1:], count], strict=True):
        yield whole.at(slice(start, end))


def measured(saved: SavedSae, rows: Iterable[RowBatch], groups: Groups) -> Fidelity:
    """What one pass over these rows says of an SAE at HOOK."""
    sums = FidelitySums(saved._replace(hook=HOOK), groups, torch.device("cpu"))
    feed(saved._replace(hook=HOOK), rows, [sums])
    return sums.result()
