"""95% intervals of figures that are functions of sums over contexts: a bootstrap that draws contexts, not rows.

Rows of one context depend on each other, so resampling rows would give intervals that are far too narrow.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

RESAMPLES = 1000
QUANTILES = (0.025, 0.975)


def with_intervals(
    figures_of: Callable[[np.ndarray], Mapping[str, np.ndarray]], contexts: int, names: tuple[str, ...]
) -> dict[str, Any]:
    """Figures, and `<name>_interval` of those named.

    `figures_of` takes weights (K, contexts), how often each context counts in each of K samples, and returns
    arrays (K,). With one context there is no interval.
    """
    figures: dict[str, Any] = {name: float(v[0]) for name, v in figures_of(np.ones((1, contexts))).items()}
    if contexts < 2:
        return figures
    weights = np.random.default_rng(0).multinomial(contexts, np.full(contexts, 1 / contexts), size=RESAMPLES)
    resampled = figures_of(weights.astype(np.float64))
    for name in names:
        values = resampled[name][np.isfinite(resampled[name])] if name in resampled else np.empty(0)
        if len(values):
            figures[f"{name}_interval"] = np.quantile(values, QUANTILES).tolist()
    return figures
