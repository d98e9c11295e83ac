"""The conditions of a benchmark: the model as it is, each feature operated on, and random features beside each.

Shape suffixes: F d_sae, N features that may be drawn.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from evaluate.attempts import Condition
from evaluate.benchmark_config import BenchmarkConfig
from evaluate.operations import Operation, check_features, effective
from harvest.files import UserError
from train.config import exactly

LIKE = 20  # features nearest in density and step, of which the controls are drawn
NONE = Condition("none", (), "none")


class Features(NamedTuple):
    """What decides which features are operated on, from an evaluation's files."""

    density_F: np.ndarray  # part of the kept held-out rows in which each fires
    max_F: np.ndarray  # largest activation on them
    norm_F: np.ndarray  # of each direction
    score_F: np.ndarray | None  # ReasonScore
    quantile: float  # of the scores: what is above it is selected, and no control

    @property
    def step_F(self) -> np.ndarray:
        """How far `add` goes at strength 1, (F,), but for the SAE's input scale."""
        return self.max_F * self.norm_F


def chosen_features(config: BenchmarkConfig, found: Features) -> tuple[int, ...]:
    """The features that are operated on: those of the settings, else the best by ReasonScore.

    Raises UserError for those that the SAE does not have or that never fire, and where none can be found.
    """
    check_features(config.features, len(found.density_F), "benchmark.features")
    for feature in config.features:
        if not found.max_F[feature] > 0:
            raise UserError(
                f"benchmark.features: {feature}: fires on no held-out row, so its largest activation is unknown; take "
                "it out"
            )
    if config.features or not config.best_features:
        return config.features
    way = "benchmark.features names some, and benchmark.best_features=0 measures the model as it is"
    if found.score_F is None:
        raise UserError(f"benchmark.features: empty, and there is no ReasonScore to choose by; {way}")
    best = np.argsort(-found.score_F, kind="stable")[: config.best_features].tolist()
    if not (chosen := tuple(i for i in best if found.score_F[i] > 0 and found.max_F[i] > 0)):
        raise UserError(f"benchmark.features: empty, and no feature has a ReasonScore above 0; {way}")
    return chosen


def controls_of(feature: int, found: Features, count: int, seed: int, taken: Collection[int]) -> list[int]:
    """Random features of like density and step: drawn of the `LIKE` nearest in the logarithms of both.

    Features that ReasonScore selects are left out, and those `taken`; there may be fewer than `count`. Which are drawn
    depends on the feature and the seed, and on no other one of `taken` that is not drawn itself.
    """
    free_F = (found.density_F > 0) & (found.max_F > 0)
    if found.score_F is not None:
        free_F &= ~(found.score_F > np.quantile(found.score_F, found.quantile))
    free_F[feature] = False
    free_N = np.flatnonzero(free_F)
    apart_N = np.hypot(
        np.log(found.density_F[free_N] / found.density_F[feature]), np.log(found.step_F[free_N] / found.step_F[feature])
    )
    nearest = free_N[np.argsort(apart_N, kind="stable")[: LIKE + len(taken)]].tolist()
    drawn = np.random.default_rng([seed, feature]).permutation(nearest[:LIKE]).tolist() + nearest[LIKE:]
    return [other for other in drawn if other not in taken][:count]


def conditions_of(config: BenchmarkConfig, features: Sequence[int], found: Features) -> list[Condition]:
    """None first, then of each feature its conditions, each with its controls behind it."""
    conditions, taken = [NONE], list(features)
    for feature in features:
        controls = controls_of(feature, found, config.controls, config.seed, taken)
        taken += controls
        if len(controls) < config.controls:
            print(
                f"benchmark.controls: {config.controls}: feature {feature} has {len(controls)}, as there are no others "
                "that fire",
                flush=True,
            )
        for operation in _operations(config, feature):
            of = len(conditions)
            conditions.append(Condition(f"feature {_said(operation)}", (operation,), "feature"))
            for other in controls:
                done = operation._replace(feature=other)
                name = f"control {_said(done)} (for {feature})"
                conditions.append(Condition(name, (done,), "control", of))
    return conditions


def count_conditions(config: BenchmarkConfig) -> int:
    """How many conditions there are at most."""
    features = len(config.features) or config.best_features
    return 1 + features * len(_operations(config, 0)) * (1 + config.controls)


def _operations(config: BenchmarkConfig, feature: int) -> list[Operation]:
    """What is done to a feature, each once; what changes nothing is left out."""
    every = [
        Operation(feature, op, 0.0 if op == "ablate" else strength, where)
        for op in config.ops
        for where in config.where
        for strength in config.strengths
    ]
    return [operation for operation in dict.fromkeys(every) if effective([operation])]


def _said(operation: Operation) -> str:
    feature, op, strength, where = operation
    of = [] if op == "ablate" else [exactly(strength)]
    return " ".join([str(feature), op, *of, *([] if where == "all" else [where])])
