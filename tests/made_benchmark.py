"""Made answers to made problems, right with known chances."""

from typing import NamedTuple

import numpy as np

from evaluate.attempts import Attempt, Condition
from evaluate.benchmark_figures import Marks, marks_of
from evaluate.grading import Grade
from evaluate.operations import Operation
from evaluate.tasks import Problem


class Made(NamedTuple):
    """A finished benchmark."""

    problems: list[Problem]
    conditions: list[Condition]
    attempts: list[Attempt]
    grades: list[Grade]

    def marks(self, samples: int) -> Marks:
        return marks_of(self.attempts, self.grades, len(self.conditions), len(self.problems), samples)


def conditions_of(features: tuple[int, ...] = (7,), strengths: tuple[float, ...] = (1.0,)) -> list[Condition]:
    """No intervention, and each feature with a control, 100 numbers on, at each strength."""
    found = [Condition("no intervention", (), "none")]
    for feature in features:
        for strength in strengths:
            done = (Operation(feature, "add", strength),)
            found.append(Condition(f"feature {feature} add {strength:g}", done, "feature"))
            of = len(found) - 1
            other = (Operation(feature + 100, "add", strength),)
            found.append(Condition(f"control {feature + 100} add {strength:g}", other, "control", of))
    return found


def answer(rng: np.random.Generator, base: float, turned: float) -> tuple[str, bool]:
    """A stand-in's answer: right with a chance, and where it is not, it turns right with another."""
    if rng.random() < base or rng.random() < turned:
        return "the answer is 42", True
    return f"the answer is {rng.integers(3)}", False


def made(
    conditions: list[Condition], turned: dict[int, float], problems: int, samples: int, seed: int, longer: int = 0
) -> Made:
    """Answers whose wrong ones turn right with the chance of their feature in `turned`, and are `longer` then.

    The chance of a right answer without anything is that of the problem, from Beta(0.6, 0.8), of mean 3/7.
    """
    rng = np.random.default_rng(seed)
    base_P = rng.beta(0.6, 0.8, problems)
    attempts, grades = [], []
    for c, condition in enumerate(conditions):
        chance = max((turned.get(operation.feature, 0.0) for operation in condition.operations), default=0.0)
        for p in range(problems):
            for n in range(samples):
                text, correct = answer(rng, base_P[p], chance)
                tokens = int(rng.integers(20, 60)) + (longer if chance else 0)
                thought = f"Let me see, problem {p}.</think> {text}"
                attempts.append(Attempt(c, p, n, thought, tokens, tokens // 2, tokens < 55, tokens + 30, tokens))
                grades.append(Grade(text.split()[-1], correct))
    asked = [Problem(str(p), f"Problem {p}: what is 6 times 7?", "42") for p in range(problems)]
    return Made(asked, conditions, attempts, grades)
