"""Comparison of arms: paired differences or Welch's test, intervals, Holm's correction for several comparisons."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass
class Comparison:
    """An arm against the base, in units of the metric: the mean difference, its 95 % interval, p-values."""

    n: int  # pairs, or runs of the arm
    difference: float
    low: float
    high: float
    p: float  # t-test, paired or Welch's
    p_sign: float  # sign test; nan without pairs
    p_holm: float = math.nan  # p after Holm's correction, set by `holm`


def compare(arm: dict[str, float], base: dict[str, float], paired: bool, seed: int = 0) -> Comparison:
    """arm, base: values by pairing key (a seed), or by any key if they are independent.

    Paired: d_i = arm_i - base_i over the common keys, the interval by bootstrap (scipy's, BCa), the p-values of the
    paired t-test and of the sign test. Else Welch's t-test and interval.
    """
    if paired:
        keys = [k for k in arm if k in base]
        d = np.array([arm[k] - base[k] for k in keys])
        low, high = bootstrap(d, seed)
        p = float(stats.ttest_1samp(d, 0.0).pvalue) if len(d) > 1 and d.std() > 0 else math.nan
        ups, downs = int((d > 0).sum()), int((d < 0).sum())
        sign = float(stats.binomtest(ups, ups + downs).pvalue) if ups + downs else math.nan
        return Comparison(len(d), float(d.mean()) if len(d) else math.nan, low, high, p, sign)
    a, b = np.array(list(arm.values())), np.array(list(base.values()))
    if min(len(a), len(b)) < 2 or a.std() + b.std() == 0:
        difference = float(a.mean() - b.mean()) if len(a) and len(b) else math.nan
        return Comparison(len(a), difference, math.nan, math.nan, math.nan, math.nan)
    test = stats.ttest_ind(a, b, equal_var=False)
    interval = test.confidence_interval(0.95)
    return Comparison(len(a), float(a.mean() - b.mean()), interval.low, interval.high, float(test.pvalue), math.nan)


def bootstrap(d: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean: nan with fewer than 3 values."""
    if len(d) < 3:
        return math.nan, math.nan
    if d.std() == 0:
        return float(d[0]), float(d[0])
    rng = np.random.default_rng(seed)
    interval = stats.bootstrap((d,), np.mean, n_resamples=9999, method="BCa", rng=rng).confidence_interval
    return float(interval.low), float(interval.high)


def holm(comparisons: list[Comparison]) -> None:
    """Set p_holm: the k-th smallest of m p-values times m - k + 1, never below the previous one (Holm 1979)."""
    known = sorted((c for c in comparisons if not math.isnan(c.p)), key=lambda c: c.p)
    running = 0.0
    for k, c in enumerate(known):
        running = max(running, min(1.0, c.p * (len(known) - k)))
        c.p_holm = running


def mean_interval(values: list[float]) -> tuple[float, float, float]:
    """(mean, low, high) of Student's 95 % interval; nan with a single value."""
    x = np.array(values)
    if len(x) < 2 or x.std() == 0:
        return float(x.mean()), math.nan, math.nan
    low, high = stats.t.interval(0.95, len(x) - 1, loc=x.mean(), scale=stats.sem(x))
    return float(x.mean()), float(low), float(high)
