"""Intervals of claims against SciPy's, and where there is none."""

import numpy as np
import pytest
from scipy import stats

from entropic_fast.experiments.claims import _intervals as intervals

NAN = float("nan")


@pytest.mark.parametrize("seed", range(3))
def test_intervals_are_those_of_scipy(seed):
    rng = np.random.default_rng(seed)
    a = rng.normal(1, 1, rng.integers(2, 9))
    student = stats.ttest_1samp(a, 0).confidence_interval(0.95)
    assert intervals.mean_interval(a) == pytest.approx((student.low, student.high))


def test_pairs_are_of_replicas_that_both_settings_have_and_neither_lost():
    a, b = {0: 1.0, 1: NAN, 3: 4.0, 5: 2.0}, {3: 1.0, 0: 0.5, 1: 3.0, 5: float("inf")}
    first, second, lost = intervals.pairs(a, b)
    assert (first.tolist(), second.tolist(), lost) == ([1.0, 4.0], [0.5, 1.0], 2)


def test_noise_that_settings_share_widens_the_rank_correlations_interval():
    rng = np.random.default_rng(0)
    depth, replica = (a.ravel() for a in np.meshgrid(np.arange(4.0), np.arange(12)))
    times = rng.normal(size=12)[replica.astype(int)] * depth + 0.1 * rng.normal(size=48)
    shared, alone = (
        np.diff(intervals.bootstrap_rank_correlation(depth, times, clusters))
        for clusters in (replica.astype(int), np.arange(48))
    )
    assert shared > 1.2 * alone
    one = intervals.bootstrap_rank_correlation(depth, times, np.zeros(48, dtype=int))
    assert np.isnan(one).all()


def test_equal_values_have_an_interval_of_no_width():
    same = np.full(3, 0.25)
    assert intervals.mean_interval(same) == (0.25, 0.25)
    assert np.isnan(intervals.mean_interval(same[:1])).all()
