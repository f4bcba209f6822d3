"""A sweep's statistics against scipy, statsmodels' definition of Holm, and numbers by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from util.sweep.statistics import Comparison, bootstrap, compare, holm, mean_interval

BASE = {"0": 70.0, "1": 72.0, "2": 69.0, "3": 71.5, "4": 70.5, "9": 60.0}
ARM = {"4": 71.0, "0": 71.0, "1": 72.5, "2": 70.5, "3": 71.0}


def test_paired_differences_are_of_equal_seeds_only():
    c = compare(ARM, BASE, paired=True)
    d = np.array([1.0, 0.5, 1.5, -0.5, 0.5])
    assert c.n == 5 and c.difference == pytest.approx(0.6)
    assert c.p == pytest.approx(stats.ttest_rel([71, 72.5, 70.5, 71, 71], [70, 72, 69, 71.5, 70.5]).pvalue)
    assert c.p_sign == pytest.approx(2 * (math.comb(5, 0) + math.comb(5, 1)) / 2**5)  # 4 of 5 above 0
    expected = stats.bootstrap((d,), np.mean, method="BCa", n_resamples=20_000, rng=1).confidence_interval
    assert (c.low, c.high) == pytest.approx((expected.low, expected.high), abs=0.05)


def test_the_interval_covers_the_mean_about_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        low, high = bootstrap(rng.normal(1.0, 2.0, 30))
        covered += low <= 1.0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_without_pairs_it_is_welchs_test():
    c = compare(ARM, BASE, paired=False)
    test = stats.ttest_ind(list(ARM.values()), list(BASE.values()), equal_var=False)
    assert (c.p, c.difference) == pytest.approx(
        (test.pvalue, np.mean(list(ARM.values())) - np.mean(list(BASE.values())))
    )
    assert c.low < c.difference < c.high and math.isnan(c.p_sign)


def test_holm_multiplies_the_smallest_by_all_and_never_falls():
    """By hand: 0.01 x 4, 0.02 x 3, max(0.06, 0.03 x 2), max(0.06, 0.04)."""
    given = [0.03, math.nan, 0.01, 0.04, 0.02]
    comparisons = [Comparison(5, 0, 0, 0, p, math.nan) for p in given]
    holm(comparisons)
    assert [c.p_holm for c in comparisons] == pytest.approx([0.06, math.nan, 0.04, 0.06, 0.06], nan_ok=True)


def test_too_few_values_have_no_interval_and_equal_ones_no_test():
    for runs in ({"0": 1.0}, {"0": 1.0, "1": 2.0}):
        assert math.isnan(compare(runs, BASE, paired=True).low)
    same = compare({"0": 71.0, "1": 73.0, "2": 70.0}, {"0": 70.0, "1": 72.0, "2": 69.0}, paired=True)
    assert (same.low, same.high) == (1.0, 1.0) and math.isnan(same.p) and same.p_sign == 0.25
    assert math.isnan(mean_interval([3.0])[1])
    low, high = mean_interval([1.0, 2.0, 3.0])[1:]
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), rel=1e-5)
