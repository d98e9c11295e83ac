"""Figures of a benchmark against plain counting, and a planted effect that its intervals cover."""

import itertools

import numpy as np
import pytest
from made_benchmark import conditions_of, made

from evaluate.benchmark_figures import (
    Marks,
    benchmark_figures,
    by_problem,
    findings,
    majority,
    marks_of,
    pass_at_k,
)
from evaluate.paired import draws, estimate, holm, sign_flip_p

EFFECT = 0.3
TRUTH = EFFECT * 4 / 7  # of answers that are wrong with a mean chance of 4/7


@pytest.mark.parametrize(("samples", "k"), [(4, 1), (4, 2), (5, 3), (6, 6)])
def test_pass_at_k_counts_all_draws(samples, k):
    for right in range(samples + 1):
        answers = [True] * right + [False] * (samples - right)
        expected = np.mean([any(drawn) for drawn in itertools.combinations(answers, k)])
        assert pass_at_k(np.array([right]), samples, k)[0] == pytest.approx(expected)


def test_pass_at_k_of_many_samples():
    assert pass_at_k(np.array([3]), 1000, 500)[0] == pytest.approx(1 - 500 * 499 * 498 / (1000 * 999 * 998))


@pytest.mark.parametrize(
    ("answers", "value"),
    [
        ([0, 0, 1, 2], 1),  # two right ones beside two different wrong ones
        ([0, 1, 1, 2], 0),
        ([0, 0, 1, 1], 1 / 2),
        ([0, 1, 2, 3], 1 / 4),
        ([0, -1, -1, -1], 1),  # what cannot be read has no vote
        ([-1, -1, -1, -1], 0),
    ],
)
def test_the_majority_is_of_read_answers_and_leads_are_shared(answers, value):
    assert majority(np.array([answers, [3, 3, 3, 3]])).tolist() == pytest.approx([value, 0])


def test_marks_are_those_of_the_attempts_in_any_order():
    found = made(conditions_of(), {7: 0.5}, 6, 3, 0)
    grades = [g._replace(parsed=None) if n % 5 == 0 and not g.correct else g for n, g in enumerate(found.grades)]
    order = np.random.default_rng(0).permutation(len(grades))
    marks = marks_of([found.attempts[n] for n in order], [grades[n] for n in order], 3, 6, 3)
    for attempt, grade in zip(found.attempts, grades, strict=True):
        at = attempt.condition, attempt.problem, attempt.sample
        assert marks.correct_CPN[at] == grade.correct == (marks.answer_CPN[at] == 0)
        assert (marks.answer_CPN[at] == -1) == (grade.parsed is None)
        assert marks.tokens_CPN[at] == attempt.tokens
        assert marks.thinking_CPN[at] == attempt.thinking_tokens
        assert marks.ended_CPN[at] == attempt.ended
    assert len({grade.parsed for grade in grades}) == 5
    for p in range(6):
        mine = [
            (g.parsed, int(marks.answer_CPN[a.condition, p, a.sample]))
            for a, g in zip(found.attempts, grades, strict=True)
            if a.problem == p
        ]
        parsed, numbers = zip(*set(mine), strict=True)
        assert len(set(parsed)) == len(set(numbers)) == len(parsed)


def random_marks(problems: int = 20, samples: int = 3) -> Marks:
    """Of four conditions of unlike accuracy and length; thinking is not known of one answer, nor of a condition."""
    rng = np.random.default_rng(4)
    shape = 5, problems, samples
    rate_C11 = np.array([0.2, 0.45, 0.25, 0.35, 0.3])[:, None, None]
    correct = rng.random(shape) < rate_C11
    answer = np.where(correct, 0, rng.integers(-1, 3, shape))
    answer[(answer == 0) & ~correct] = 1
    tokens = (rng.gamma(2, 30, shape) * (1 + rate_C11)).astype(int)
    thinking = tokens // 2
    thinking[1, 3, 2] = -1
    thinking[4] = -1
    return Marks(correct, answer, rng.random(shape) < 0.9, tokens, thinking)


def test_figures_are_means_over_problems():
    marks = random_marks()
    conditions = conditions_of((7, 8))
    section = benchmark_figures(conditions, marks, 5)
    drawn = draws(20, 5)
    figures = {(figure.rows, figure.name): figure for figure in section.figures}
    for c, (condition, entry) in enumerate(zip(conditions, section.lists["conditions"], strict=True)):
        for name, plain in {
            "pass_at_1": marks.correct_CPN[c].mean(),
            "pass_at_n": marks.correct_CPN[c].any(1).mean(),
            "tokens": marks.tokens_CPN[c].mean(),
            "cut_off": 1 - marks.ended_CPN[c].mean(),
            "unparsed": (marks.answer_CPN[c] == -1).mean(),
        }.items():
            figure = figures[condition.name, name]
            assert figure.value == entry[name]["value"] == pytest.approx(plain), name
            assert figure.interval == (entry[name]["low"], entry[name]["high"])
            assert figure.interval == pytest.approx(estimate(by_problem(marks, c)[name], drawn).interval)
            assert figure.interval[0] < figure.value < figure.interval[1]
        assert [each["k"] for each in entry["pass_at"]] == [1, 2, 3]
        assert entry["pass_at"][0]["value"] == pytest.approx(entry["pass_at_1"]["value"])
        assert entry["pass_at"][1]["value"] == pytest.approx(pass_at_k(marks.correct_CPN[c].sum(1), 3, 2).mean())
        assert entry["operations"] == [operation._asdict() for operation in condition.operations]
    thinking = np.delete(marks.thinking_CPN[1], 3, 0)  # a problem that is not known whole is left out
    assert section.lists["conditions"][1]["thinking_tokens"]["value"] == pytest.approx(thinking.mean())
    assert section.lists["conditions"][4]["thinking_tokens"] is None
    assert ("control 108 add 1", "thinking_tokens") not in figures


def test_changes_are_of_the_same_problems():
    marks = random_marks()
    conditions = conditions_of((7, 8))
    conditions[4] = conditions[4]._replace(of=1)  # two controls beside the first, none beside the second
    entries = benchmark_figures(conditions, marks, 5).lists["conditions"]
    drawn = draws(20, 5)
    right = marks.correct_CPN.astype(float)
    for c in range(1, 5):
        difference_P = right[c].mean(1) - right[0].mean(1)
        found = entries[c]["change"]["pass_at_1"]
        assert found["value"] == pytest.approx(difference_P.mean())
        assert [found["low"], found["high"]] == pytest.approx(estimate(difference_P, drawn).interval)
        assert found["p"] == pytest.approx(sign_flip_p(np.rint(3 * difference_P).astype(int), 5))
    assert entries[0]["change"] is None
    beyond_P = right[1].mean(1) - (right[2].mean(1) + right[4].mean(1)) / 2
    beyond = entries[1]["beyond_control"]["pass_at_1"]
    assert beyond["value"] == pytest.approx(beyond_P.mean())
    assert [beyond["low"], beyond["high"]] == pytest.approx(estimate(beyond_P, drawn).interval)
    assert beyond["p"] == pytest.approx(sign_flip_p(np.rint(6 * beyond_P).astype(int), 5))
    assert entries[3]["beyond_control"] is None
    known = np.arange(20) != 3
    thinking_P = (marks.thinking_CPN[1] - marks.thinking_CPN[0]).mean(1)[known]
    assert entries[1]["change"]["thinking_tokens"]["value"] == pytest.approx(thinking_P.mean())
    assert entries[4]["change"]["thinking_tokens"] is None


def test_p_is_corrected_over_the_features_alone():
    entries = benchmark_figures(conditions_of((7, 8)), random_marks(), 5).lists["conditions"]
    for name in ("pass_at_1", "tokens"):
        raw = np.array([entries[c]["change"][name]["p"] for c in (1, 3)])
        assert [entries[c]["change"][name]["p_holm"] for c in (1, 3)] == pytest.approx(holm(raw).tolist())
        assert [entries[c]["change"][name]["p_holm"] for c in (2, 4)] == [None, None]
    assert entries[1]["change"]["pass_at_1"]["p_holm"] == pytest.approx(2 * entries[1]["change"]["pass_at_1"]["p"])


def test_one_answer_to_one_problem_has_no_interval():
    found = made(conditions_of(), {}, 1, 1, 0)
    entries = benchmark_figures(found.conditions, found.marks(1), 0).lists["conditions"]
    assert entries[1]["pass_at_1"]["low"] is None
    assert entries[1]["change"]["pass_at_1"]["p"] == 1
    assert [each["k"] for each in entries[1]["pass_at"]] == [1]
    alone = made(conditions_of()[:1], {}, 5, 2, 0)
    section = benchmark_figures(alone.conditions, alone.marks(2), 0)
    assert findings(section.lists) == ["No feature was operated on: these are the figures of the model as it is."]


@pytest.mark.parametrize("samples", [1, 4])
def test_intervals_cover_a_planted_effect_and_the_control_s_covers_none(samples):
    """A hundred benchmarks of 40 problems, from the answers on."""
    conditions = conditions_of()
    covered = np.zeros((100, 3), bool)
    raised = 0
    for repetition in range(100):
        found = made(conditions, {7: EFFECT}, 40, samples, repetition)
        entries = benchmark_figures(conditions, found.marks(samples), repetition).lists["conditions"]
        three = entries[1]["change"], entries[2]["change"], entries[1]["beyond_control"]
        for n, (change, truth) in enumerate(zip(three, (TRUTH, 0.0, TRUTH), strict=True)):
            covered[repetition, n] = change["pass_at_1"]["low"] <= truth <= change["pass_at_1"]["high"]
        raised += three[0]["pass_at_1"]["p_holm"] < 0.05
    assert (covered.sum(0) >= 93).all(), covered.sum(0)
    assert raised >= (30 if samples == 1 else 85)  # and the effect is seen


def test_findings_say_whether_the_control_does_it_too():
    conditions = conditions_of((7,), (1.0,))
    found = made(conditions, {7: 0.6}, 60, 4, 1)
    (said,) = findings(benchmark_figures(conditions, found.marks(4), 0).lists)
    assert said.startswith("With feature 7 add 1, pass@1 changes by +") and ", and beyond its control: +" in said
    for control in (0.6, 0.99):  # as much, and more
        found = made(conditions, {7: 0.6, 107: control}, 60, 4, 1)
        (said,) = findings(benchmark_figures(conditions, found.marks(4), 0).lists)
        assert ", but not beyond its control: " in said
    alone = conditions[:2]
    (said,) = findings(benchmark_figures(alone, made(alone, {7: 0.6}, 60, 4, 1).marks(4), 0).lists)
    assert said.startswith("With feature 7 add 1, pass@1 changes by +")
    assert said.endswith("); there is no control to compare with.")
    found = made(conditions, {}, 60, 4, 2)
    (said,) = findings(benchmark_figures(conditions, found.marks(4), 0).lists)
    assert said.startswith("No condition changes how often answers are right")
