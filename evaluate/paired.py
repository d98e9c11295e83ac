"""Means over problems and their paired differences: 95% intervals by bootstrap over problems, exact p values, Holm.

Problems are drawn, not answers: samples of one problem depend on each other. One set of draws serves every figure, so a
difference is that of the same problems under both conditions.

With few problems plain percentiles are too narrow: a bootstrap's variance lacks the factor P / (P − 1), and its tails
are a normal's where Student's belong. So the levels are those of the expanded percentile interval (Hesterberg 2015,
arXiv 1411.5279): Φ(∓t √(P / (P − 1))), t Student's 97.5% quantile of P − 1 degrees of freedom. Unlike the bootstrap-t
it needs no variance of a resample, which is zero where few problems change.

Shape suffixes: P problems, R resamples, M tests, S sums.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, stdtrit

RESAMPLES = 2000
DRAWS = 20_000  # of signs, where there are too many sums for all
EXACT = 200_000_000  # additions that an exact p may take; a second or so


class Estimate(NamedTuple):
    """A mean over problems."""

    value: float
    interval: tuple[float, float] | None  # 95%; None where all problems are alike: no resample says how far it is off


def draws(problems: int, seed: int) -> np.ndarray:
    """How often each problem is in each resample, float64 (R, P)."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(problems, np.full(problems, 1 / problems), size=RESAMPLES).astype(np.float64)


def estimate(value_P: np.ndarray, drawn_RP: np.ndarray) -> Estimate | None:
    """The mean of a figure over problems, float (P,), NaN where it is not known; None where it is known of none.

    `drawn_RP` are `draws`.
    """
    known_P = np.isfinite(value_P)
    count = int(known_P.sum())
    if not count:
        return None
    value_P, drawn_RP = value_P[known_P], drawn_RP[:, known_P]
    mean = float(value_P.mean())
    if np.ptp(value_P) == 0:
        return Estimate(mean, None)
    weight_R = drawn_RP.sum(1)
    mean_R = (drawn_RP @ value_P)[weight_R > 0] / weight_R[weight_R > 0]
    low, high = np.quantile(mean_R, levels(count))
    return Estimate(mean, (float(low), float(high)))


def levels(problems: int) -> tuple[float, float]:
    """The quantiles of resampled means that bound a 95% interval of at least two problems."""
    lower = float(ndtr(-stdtrit(problems - 1, 0.975) * np.sqrt(problems / (problems - 1))))
    return lower, 1 - lower


def sign_flip_p(difference_P: np.ndarray, seed: int) -> float:
    """Two-sided p of paired differences, int (P,), under random signs: how often |Σ ±d| is at least |Σ d|.

    Of differences in {-1, 0, 1} this is McNemar's exact test. All signs are counted, by a table of the sums, where that
    is quick; else 20,000 are drawn with the seed, and those of the data are one more.
    """
    size_P = np.abs(difference_P[difference_P != 0]).astype(np.int64)
    observed, largest = abs(int(difference_P.sum())), int(size_P.sum())
    if largest * len(size_P) > EXACT:
        signs_RP = np.random.default_rng(seed).integers(0, 2, (DRAWS, len(size_P)), np.int8)
        sum_R = 2 * (signs_RP @ size_P) - largest
        return float((1 + (np.abs(sum_R) >= observed).sum()) / (1 + DRAWS))
    chance_S = np.zeros(largest + 1)  # of each sum of the sizes that have a plus
    chance_S[0] = 1
    for size in size_P:
        chance_S[size:] = chance_S[size:] + chance_S[:-size]
        chance_S /= 2
    far_S = np.abs(2 * np.arange(largest + 1) - largest) >= observed
    return min(1.0, float(chance_S[far_S].sum()))


def holm(p_M: np.ndarray) -> np.ndarray:
    """p values corrected for their number, step by step from the smallest (Holm 1979), float64 (M,)."""
    order_M = np.argsort(p_M, kind="stable")
    stepped_M = np.maximum.accumulate(p_M[order_M] * np.arange(len(p_M), 0, -1))
    corrected_M = np.empty(len(p_M))
    corrected_M[order_M] = np.minimum(stepped_M, 1)
    return corrected_M
