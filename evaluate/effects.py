"""How far two groups of texts lie apart: Cohen's d with an interval, and Welch's p. Texts are the unit.

    d = (mean a − mean b) / √((s_a² + s_b²) / 2)

with the groups' own variances (n − 1). Their mean counts both alike, whatever their sizes: more untouched texts make d
more exact and do not change what it means (Cohen 1988, for groups of one size). Where neither group varies d is 0 if
the means are equal, else `LARGEST` with their sign; no d is beyond that.

Shape suffixes: N and M texts of the two groups, R resamples.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import stdtr

LARGEST = 100.0
RESAMPLES = 1000
QUANTILES = (0.025, 0.975)


class Effect(NamedTuple):
    """Of a change, against a reference."""

    mean: float  # of the changed texts
    d: float
    d_interval: tuple[float, float]  # 95%, percentiles of a bootstrap that draws texts of both groups
    p: float  # Welch's test, of both sides


def effect(changed_N: np.ndarray, reference_M: np.ndarray) -> Effect:
    """The effect of a change on the activations of texts, of two texts or more in each group."""
    a_N, b_M = changed_N.astype(np.float64), reference_M.astype(np.float64)
    rng = np.random.default_rng(0)
    a_RN, b_RM = (x[rng.integers(0, len(x), (RESAMPLES, len(x)))] for x in (a_N, b_M))
    low, high = np.quantile(cohens_d(a_RN, b_RM), QUANTILES).tolist()
    return Effect(float(a_N.mean()), float(cohens_d(a_N, b_M)), (low, high), welch_p(a_N, b_M))


def cohens_d(a_N: np.ndarray, b_M: np.ndarray) -> np.ndarray:
    """d of each pair of groups, whose texts are the last axis: () of (N,) and (M,), (R,) of (R, N) and (R, M)."""
    difference = a_N.mean(-1) - b_M.mean(-1)
    spread = np.sqrt((a_N.var(-1, ddof=1) + b_M.var(-1, ddof=1)) / 2)
    d = np.divide(difference, spread, out=np.asarray(np.sign(difference) * LARGEST), where=spread > 0)
    return np.clip(d, -LARGEST, LARGEST)


def welch_p(a_N: np.ndarray, b_M: np.ndarray) -> float:
    """Two-sided p of Welch's t test; where neither group (N,), (M,) varies 1 for equal means, else 0."""
    difference = a_N.mean() - b_M.mean()
    errors = np.array([a_N.var(ddof=1) / len(a_N), b_M.var(ddof=1) / len(b_M)])
    if not errors.sum():
        return float(difference == 0)
    freedom = errors.sum() ** 2 / (errors**2 / [len(a_N) - 1, len(b_M) - 1]).sum()
    return float(2 * stdtr(freedom, -abs(difference) / np.sqrt(errors.sum())))
