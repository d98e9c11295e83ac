"""Intervals, p values and corrections of paired differences, against scipy's and plain counting."""

import itertools

import numpy as np
import pytest
from scipy import stats

from evaluate.paired import RESAMPLES, draws, estimate, holm, levels, sign_flip_p


def test_an_interval_is_that_of_resampled_problems():
    value_P = np.random.default_rng(3).gamma(1.0, 20.0, 30)
    found = estimate(value_P, draws(30, 0))
    assert found and found.interval
    assert found.value == pytest.approx(value_P.mean())
    picks = np.random.default_rng(8).integers(0, 30, (40_000, 30))
    tail = stats.norm.cdf(-stats.t.ppf(0.975, 29) * np.sqrt(30 / 29))
    assert found.interval == pytest.approx(np.quantile(value_P[picks].mean(1), [tail, 1 - tail]), rel=0.02)
    plain = np.quantile(value_P[picks].mean(1), [0.025, 0.975])
    assert found.interval[0] < plain[0] and plain[1] < found.interval[1]


def test_draws_are_resamples_of_all_problems():
    drawn_RP = draws(7, 1)
    assert drawn_RP.shape == (RESAMPLES, 7)
    assert (drawn_RP.sum(1) == 7).all()
    assert np.array_equal(drawn_RP, draws(7, 1)) and not np.array_equal(drawn_RP, draws(7, 2))


def test_problems_where_a_figure_is_not_known_are_left_out():
    value_P = np.array([1.0, np.nan, 4.0, 5.0, np.nan, 9.0])
    found = estimate(value_P, draws(6, 0))
    assert found and found.interval
    assert found.value == 4.75
    assert 1 <= found.interval[0] < 4.75 < found.interval[1] <= 9
    assert estimate(np.full(3, np.nan), draws(3, 0)) is None


def test_problems_that_are_all_alike_give_no_interval():
    assert estimate(np.full(5, 0.25), draws(5, 0)) == (0.25, None)
    assert estimate(np.array([0.5]), draws(1, 0)) == (0.5, None)


@pytest.mark.parametrize(
    ("up", "down", "same"), [(3, 12, 5), (0, 4, 30), (9, 9, 0), (1, 0, 0), (0, 0, 6), (30, 55, 400)]
)
def test_p_of_single_answers_is_mcnemar_s(up, down, same):
    difference_P = np.array([1] * up + [-1] * down + [0] * same)
    expected = stats.binomtest(up, up + down).pvalue if up + down else 1.0
    assert sign_flip_p(difference_P, 0) == pytest.approx(expected)


def test_p_of_means_is_that_of_all_signs():
    difference_P = np.array([4, -1, 0, 2, 2, -3, 1, 5, 0, 1])
    sums = [abs(np.dot(signs, difference_P)) for signs in itertools.product((-1, 1), repeat=len(difference_P))]
    expected = np.mean(np.array(sums) >= difference_P.sum())
    assert sign_flip_p(difference_P, 0) == pytest.approx(expected)
    assert sign_flip_p(-difference_P, 0) == pytest.approx(expected)
    plain = stats.permutation_test(
        (difference_P, 0 * difference_P), lambda a, b: np.mean(a - b), permutation_type="samples"
    )
    assert sign_flip_p(difference_P, 0) == pytest.approx(plain.pvalue)


def test_drawn_signs_agree_with_all_signs(monkeypatch):
    difference_P = np.random.default_rng(2).integers(-5, 8, 60)
    exact = sign_flip_p(difference_P, 0)
    monkeypatch.setattr("evaluate.paired.EXACT", 0)
    drawn = sign_flip_p(difference_P, 0)
    assert 0.001 < exact < 0.2
    assert drawn == pytest.approx(exact, rel=0.2)
    assert drawn == sign_flip_p(difference_P, 0) != sign_flip_p(difference_P, 1)
    assert sign_flip_p(np.full(200, 3), 0) == pytest.approx(1 / 20_001)  # never 0


def test_holm_is_stepped_and_never_above_1():
    assert holm(np.array([0.04, 0.01, 0.03, 0.005])) == pytest.approx([0.06, 0.03, 0.06, 0.02])
    assert holm(np.array([0.5, 0.9])) == pytest.approx([1, 1])
    assert len(holm(np.empty(0))) == 0


@pytest.mark.parametrize(("problems", "least"), [(12, 0.92), (40, 0.935)])
def test_intervals_cover_the_truth(problems, least):
    """Differences of mean marks of four answers, 1,000 times; plain percentiles cover less."""
    rng = np.random.default_rng(0)
    drawn_RP = draws(problems, 0)
    base_TP = rng.beta(0.6, 0.8, (1000, problems))
    before_TP = (rng.random((4, 1000, problems)) < base_TP).mean(0)
    after_TP = (rng.random((4, 1000, problems)) < base_TP + 0.3 * (1 - base_TP)).mean(0)
    mean_RT = drawn_RP @ (after_TP - before_TP).T / problems
    truth = 0.3 * (1 - 0.6 / 1.4)

    def coverage(quantiles):
        low_T, high_T = np.quantile(mean_RT, quantiles, axis=0)
        return ((low_T <= truth) & (truth <= high_T)).mean()

    lower = stats.norm.cdf(stats.t.ppf(0.025, problems - 1) * np.sqrt(problems / (problems - 1)))
    assert levels(problems) == pytest.approx((lower, 1 - lower))
    assert least <= coverage(levels(problems)) <= 0.965
    assert coverage((0.025, 0.975)) < coverage(levels(problems))
