"""What a benchmark's marks say: how often answers are right and how long they are, in each condition and against none.

A figure is first one number a problem, from all answers to it, then a mean over problems (evaluate/paired.py). A change
is that of the same problems: to no intervention, and beyond the random features of a condition, its controls.

Shape suffixes: C conditions, P problems, N samples (answers to one problem in one condition), A different answers, R
resamples.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import gammaln

from evaluate.attempts import Attempt, Condition
from evaluate.figures import Figure, Section
from evaluate.grading import Grade
from evaluate.paired import Estimate, draws, estimate, holm, sign_flip_p

NAMES = ("pass_at_1", "maj_at_n", "pass_at_n", "tokens", "thinking_tokens", "cut_off", "unparsed")
CHANGES = ("pass_at_1", "tokens", "thinking_tokens")  # of which differences are tested
AGAINST = ("change", "beyond_control")  # to no intervention; to the mean of the controls
TOLD_APART = 0.05  # of a corrected p


class Marks(NamedTuple):
    """All answers of a benchmark, (C, P, N)."""

    correct_CPN: np.ndarray  # bool
    answer_CPN: np.ndarray  # int, which of the answers to its problem, the right one being 0; -1: none could be read
    ended_CPN: np.ndarray  # bool, before the limit of tokens
    tokens_CPN: np.ndarray  # int
    thinking_CPN: np.ndarray  # int, of these up to </think>; -1 where it cannot be known


def marks_of(
    attempts: Sequence[Attempt], grades: Sequence[Grade], conditions: int, problems: int, samples: int
) -> Marks:
    """The marks of every answer, in any order; `grades` are those of `attempts`.

    Right answers are one answer, however written; wrong ones are told apart by what was parsed.
    """
    shape = conditions, problems, samples
    marks = Marks(
        np.zeros(shape, bool), np.full(shape, -1), np.zeros(shape, bool), np.zeros(shape, np.int64), np.full(shape, -1)
    )
    wrong: list[dict[str, int]] = [{} for _ in range(problems)]
    for attempt, grade in zip(attempts, grades, strict=True):
        at = attempt.condition, attempt.problem, attempt.sample
        marks.correct_CPN[at], marks.ended_CPN[at] = grade.correct, attempt.ended
        marks.tokens_CPN[at] = attempt.tokens
        if attempt.thinking_tokens is not None:
            marks.thinking_CPN[at] = attempt.thinking_tokens
        if grade.correct:
            marks.answer_CPN[at] = 0
        elif grade.parsed is not None:
            known = wrong[attempt.problem]
            marks.answer_CPN[at] = known.setdefault(grade.parsed, len(known) + 1)
    return marks


def benchmark_figures(conditions: Sequence[Condition], marks: Marks, seed: int) -> Section:
    """Figures of every condition, and lists: `problems`, `samples`, and `conditions`, with their changes.

    The first condition of the group "none" is what others are compared with. `seed` is of the resamples.
    """
    problems, samples = marks.correct_CPN.shape[1:]
    drawn_RP = draws(problems, seed)
    values = [{n: estimate(v_P, drawn_RP) for n, v_P in by_problem(marks, c).items()} for c in range(len(conditions))]
    figures = [
        Figure("benchmark", name, found.value, condition.name, interval=found.interval)
        for condition, by_name in zip(conditions, values, strict=True)
        for name, found in by_name.items()
        if found
    ]
    totals = {"pass_at_1": marks.correct_CPN, "tokens": marks.tokens_CPN, "thinking_tokens": marks.thinking_CPN}
    total_CP = {name: np.where((v < 0).any(2), np.nan, v.sum(2, dtype=float)) for name, v in totals.items()}

    def changes(number: int, others: Sequence[int]) -> dict[str, Any] | None:
        if not others:
            return None
        out: dict[str, Any] = {}
        for name, v_CP in total_CP.items():
            difference_P = len(others) * v_CP[number] - v_CP[list(others)].sum(0)
            found = estimate(difference_P / (len(others) * samples), drawn_RP)
            known_P = difference_P[np.isfinite(difference_P)].astype(np.int64)
            out[name] = found and {**_stored(found), "p": sign_flip_p(known_P, seed), "p_holm": None}
        return out

    none = next(n for n, condition in enumerate(conditions) if condition.group == "none")
    entries = []
    for number, (condition, by_name) in enumerate(zip(conditions, values, strict=True)):
        controls = [n for n, each in enumerate(conditions) if each.group == "control" and each.of == number]
        entries.append(
            {
                "name": condition.name,
                "group": condition.group,
                "of": condition.of,
                "operations": [operation._asdict() for operation in condition.operations],
                **{name: found and _stored(found) for name, found in by_name.items()},
                "pass_at": [
                    {"k": k, **_stored(found)}
                    for k in _ks(samples)
                    if (found := estimate(pass_at_k(marks.correct_CPN[number].sum(1), samples, k), drawn_RP))
                ],
                "change": None if number == none else changes(number, [none]),
                "beyond_control": changes(number, controls),
            }
        )
    _correct(entries)
    return Section(figures, {"problems": problems, "samples": samples, "conditions": entries})


def by_problem(marks: Marks, condition: int) -> dict[str, np.ndarray]:
    """The figures of each problem in a condition by name, float (P,); NaN where one is not known of all its answers."""
    correct_PN, answer_PN = marks.correct_CPN[condition], marks.answer_CPN[condition]
    thinking_PN = marks.thinking_CPN[condition]
    samples = correct_PN.shape[1]
    values = (
        correct_PN.mean(1),
        majority(answer_PN),
        pass_at_k(correct_PN.sum(1), samples, samples),
        marks.tokens_CPN[condition].mean(1),
        np.where((thinking_PN < 0).any(1), np.nan, thinking_PN.mean(1)),
        1 - marks.ended_CPN[condition].mean(1),
        (answer_PN < 0).mean(1),
    )
    return dict(zip(NAMES, values, strict=True))


def majority(answer_PN: np.ndarray) -> np.ndarray:
    """Whether the answer given most often is the right one, number 0, float (P,); unread ones have no vote.

    Where several lead, one of them is right by its share of a draw: 1/2 of two. Without any vote it is wrong.
    """
    vote_PA = (answer_PN[:, :, None] == np.arange(max(1, answer_PN.max() + 1))).sum(1)
    leads_PA = (vote_PA == vote_PA.max(1, keepdims=True)) & (vote_PA > 0)
    return leads_PA[:, 0] / np.maximum(leads_PA.sum(1), 1)


def pass_at_k(correct_P: np.ndarray, samples: int, k: int) -> np.ndarray:
    """How often k answers drawn from all have a right one, float (P,): 1 − C(n − c, k) / C(n, k), of c right ones of n.

    The unbiased estimate of Chen et al. 2021 (arXiv 2107.03374).
    """
    wrong_P = samples - correct_P
    enough_P = wrong_P >= k
    left_P = np.where(enough_P, wrong_P, k)  # without k wrong ones every draw has a right one
    log_P = gammaln(left_P + 1) - gammaln(left_P - k + 1) - gammaln(samples + 1) + gammaln(samples - k + 1)
    return np.where(enough_P, 1 - np.exp(log_P), 1.0)


def _ks(samples: int) -> list[int]:
    """1, 2, 4, ... and all samples."""
    return sorted({*(2**power for power in range(samples.bit_length())), samples} - {0})


def _stored(found: Estimate) -> dict[str, Any]:
    low, high = found.interval or (None, None)
    return {"value": found.value, "low": low, "high": high}


def _correct(entries: list[dict[str, Any]]) -> None:
    """Fill in p_holm: of each figure over all feature conditions."""
    for against in AGAINST:
        for name in CHANGES:
            tested = [e[against][name] for e in entries if e["group"] == "feature" and e[against]]
            tested = [each for each in tested if each]
            for each, p in zip(tested, holm(np.array([each["p"] for each in tested])), strict=True):
                each["p_holm"] = float(p)


def findings(lists: dict[str, Any]) -> list[str]:
    """What the lists of `benchmark_figures` say of pass@1, in sentences."""
    features = [each for each in lists["conditions"] if each["group"] == "feature"]
    if not features:
        return ["No feature was operated on: these are the figures of the model as it is."]
    told = [each for each in features if each["change"]["pass_at_1"]["p_holm"] < TOLD_APART]
    if told:
        return [_finding(each) for each in told]
    ends = [each["change"]["pass_at_1"][end] or 0 for each in features for end in ("low", "high")]
    return [
        f"No condition changes how often answers are right (pass@1) with a corrected p below {TOLD_APART}; the 95% "
        f"intervals of the change reach from {100 * min(ends):+.0f} to {100 * max(ends):+.0f} points."
    ]


def _finding(entry: dict[str, Any]) -> str:
    change, control = entry["change"]["pass_at_1"], entry["beyond_control"]
    sentence = f"With {entry['name']}, pass@1 changes by {_points(change)}"
    if not control:
        return f"{sentence}; there is no control to compare with."
    beyond = control["pass_at_1"]
    is_beyond = beyond["p_holm"] < TOLD_APART and beyond["value"] * change["value"] > 0
    return f"{sentence}{', and' if is_beyond else ', but not'} beyond its control: {_points(beyond)}."


def _points(change: dict[str, Any]) -> str:
    """A change in points, with its interval and p."""
    interval = (
        "" if change["low"] is None else f"95% interval {100 * change['low']:+.0f} to {100 * change['high']:+.0f}, "
    )
    return f"{100 * change['value']:+.0f} points ({interval}corrected p {p_value(change['p_holm'])})"


def p_value(p: float) -> str:
    """A p value as tables write it."""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"
