"""Bootstrap intervals and paired ratios, against scipy and a simulation of their coverage.

Needs nothing. Run: pytest tests/experiments/test_statistics.py
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from headway.experiments.statistics import bootstrap, paired_difference, paired_ratio


@pytest.mark.parametrize("statistic", [np.mean, np.median])
@pytest.mark.parametrize("level", [0.8, 0.9, 0.95])
def test_interval_is_that_of_scipy(statistic, level):
    sample = np.random.default_rng(5).gamma(2.0, size=41)
    ours = bootstrap(sample, statistic, level=level, resamples=20000)
    theirs = scipy.stats.bootstrap(
        (sample,),
        statistic,
        confidence_level=level,
        n_resamples=20000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.value == statistic(sample)
    assert abs(ours.low - theirs.low) < 0.05 * width
    assert abs(ours.high - theirs.high) < 0.05 * width


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    samples = rng.normal(3.0, 1.0, size=(300, 30))
    inside = [e.low <= 3.0 <= e.high for e in (bootstrap(s, np.mean, resamples=500) for s in samples)]
    assert 0.84 < np.mean(inside) < 0.94  # 90 %, a little less for a percentile interval of 30 values


def test_pairs_take_out_what_both_share():
    state = np.random.default_rng(0).uniform(1.0, 10.0, size=16)  # of the machine, the same for both of a pair
    paired = paired_ratio(2 * state, state)
    assert paired.value == paired.low == paired.high == 2.0
    assert paired_difference(state + 0.5, state).value == pytest.approx(0.5)
    shuffled = paired_ratio(2 * state, state[::-1])
    assert shuffled.high - shuffled.low > 0.5


def test_same_values_give_the_same_interval():
    values = [1.0, 2.0, 4.0, 8.0]
    assert bootstrap(values) == bootstrap(np.array(values))


def test_one_value_has_no_interval():
    estimate = bootstrap([1.5])
    assert (estimate.value, estimate.interval, str(estimate)) == (1.5, None, "1.500")


def test_nothing_to_estimate_is_an_error():
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap([])
    with pytest.raises(ValueError, match="not 2 and 3"):
        paired_ratio([1, 2], [1, 2, 3])
