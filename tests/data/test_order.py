"""The sample order: a permutation per pass, uniform, a function of seed and position alone.

Needs nothing. Run: pytest tests/data/test_order.py
"""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from scipy.stats import chi2, kstest

from headway.data.order import sample_index

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 97, 100, 101, 256, 257, 1009, 4096, 4099, 10007, 65536, 100_003]


@pytest.mark.parametrize("n", SIZES)
def test_each_pass_visits_every_sample_once(n: int) -> None:
    for number in (0, 1, 12):
        order = sample_index(5, np.arange(number * n, (number + 1) * n), n)
        assert order.dtype == np.int64
        assert (np.sort(order) == np.arange(n)).all()


def test_every_small_size() -> None:
    for n in range(1, 400):
        assert set(sample_index(n, np.arange(n), n).tolist()) == set(range(n)), n


def test_any_place_can_be_asked_alone_and_in_any_shape() -> None:
    n = 1009
    whole = sample_index(3, np.arange(3 * n), n)
    places = np.random.default_rng(0).integers(0, 3 * n, 50)
    assert [int(sample_index(3, int(p), n)) for p in places] == whole[places].tolist()
    assert sample_index(3, 5, n).shape == ()
    assert (sample_index(3, places.reshape(5, 10), n) == whole[places].reshape(5, 10)).all()


def test_far_places_and_odd_seeds() -> None:
    for seed in (0, 2**63 - 1, 2**64 + 17, -4):
        order = sample_index(seed, np.arange(10**15, 10**15 + 10), 10)
        assert ((order >= 0) & (order < 10)).all()


def test_seeds_and_passes_give_other_orders() -> None:
    n = 1000
    orders = [sample_index(seed, np.arange(n) + n * number, n) for seed in range(4) for number in range(4)]
    for one, other in itertools.combinations(orders, 2):
        # two random permutations agree at about one place
        assert (one == other).sum() < 12


def test_places_are_uniform_by_chi_square() -> None:
    """Over many passes, every sample stands at every place equally often."""
    n, passes = 24, 4800
    counts = np.zeros((n, n))
    np.add.at(counts, (np.tile(np.arange(n), passes), sample_index(3, np.arange(passes * n), n)), 1)
    statistic = ((counts - passes / n) ** 2 / (passes / n)).sum()
    # rows and columns have fixed sums: (n - 1)^2 degrees of freedom
    assert chi2.sf(statistic, (n - 1) ** 2) > 1e-4
    assert chi2.cdf(statistic, (n - 1) ** 2) > 1e-4


def test_first_places_are_uniform_over_seeds() -> None:
    n, seeds = 10, 1000
    counts = np.bincount([int(sample_index(seed, 0, n)) for seed in range(seeds)], minlength=n)
    assert chi2.sf(((counts - seeds / n) ** 2 / (seeds / n)).sum(), n - 1) > 1e-4


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_of_few_samples_are_equally_likely(n: int) -> None:
    passes, orders = 12_000, list(itertools.permutations(range(n)))
    seen = Counter(map(tuple, sample_index(0, np.arange(passes * n), n).reshape(passes, n).tolist()))
    expected = passes / len(orders)
    statistic = sum((seen[o] - expected) ** 2 / expected for o in orders)
    assert chi2.sf(statistic, len(orders) - 1) > 1e-4


def test_neighbours_are_independent() -> None:
    """Distances between consecutive samples of a long pass are those of random places."""
    n = 50_000
    order = sample_index(1, np.arange(n), n)
    distance = np.abs(np.diff(order)) / n
    assert kstest(distance, lambda x: 1 - (1 - x) ** 2).pvalue > 1e-4
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.02


def test_the_order_never_changes() -> None:
    """Written down once: a run must resume under any later version, NumPy's or ours."""
    assert sample_index(0, np.arange(12), 10).tolist() == [7, 8, 1, 2, 3, 6, 0, 9, 5, 4, 6, 4]
    assert sample_index(7, 10**9, 12345) == 11068


def test_no_samples() -> None:
    with pytest.raises(ValueError, match="no samples"):
        sample_index(0, 0, 0)
