"""The interval controller: its formula, and that it keeps to the bound on simulated trainings.

Needs: nothing.
Run: pytest tests/resilience/test_interval.py
"""

import random

import pytest

from headway.resilience.interval import Interval, _below, interval_for


@pytest.mark.parametrize(
    ("cost", "step", "overhead", "expected"),
    [(0.0, 1.0, 0.035, 1), (0.035, 1.0, 0.035, 1), (0.036, 1.0, 0.035, 2), (1.0, 1.0, 0.1, 10), (1.01, 1.0, 0.1, 20),
     (7.0, 0.1, 0.035, 2000), (0.4, 1.0, 0.1, 5)],
)  # fmt: skip
def test_formula(cost, step, overhead, expected):
    every = interval_for(cost, step, overhead)
    assert every == expected and cost <= overhead * step * every * (1 + 1e-9)


def simulate(cost, steps, disk=0.0, step=0.1, overhead=0.035, seed=0, evaluate=0):
    """A training that saves when the controller says; returns the controller and the share of time that was lost.

    ``cost`` slows the step after a save; ``disk`` seconds are needed for each save, and those beyond the time since the
    last save are waited for.
    """
    rng, interval = random.Random(seed), Interval(overhead)
    lost = total = now = free_at = pending = 0.0
    for number in range(1, steps + 1):
        took = step * rng.uniform(0.95, 1.1)
        extra, busy = pending, pending > 0 or now < free_at
        pending = 0.0
        now += took + extra
        interval.step(took + extra + (20 * step if evaluate and number % evaluate == 0 else 0), busy)
        if number > steps // 2:
            lost, total = lost + extra, total + took + extra
        if interval.every and number % interval.every == 0:
            interval.saved()
            pending = max(cost, 1e-9) + max(0.0, free_at - now)
            free_at = max(now, free_at) + disk
    return interval, lost / total


@pytest.mark.parametrize("cost", [0.0, 0.002, 0.02, 0.1, 1.0])
def test_keeps_to_the_bound_and_no_rarer_than_needed(cost):
    interval, lost = simulate(cost, 4000)
    assert lost <= 0.035 * 1.1
    assert interval_for(cost, 0.1, 0.035) / 2 <= interval.every <= 5 * interval_for(cost, 0.1, 0.035)


@pytest.mark.parametrize("disk", [0.05, 0.3, 2.0])
def test_backs_off_where_the_disk_does_not_keep_up(disk):
    interval, lost = simulate(0.001, 20_000, disk=disk)
    assert lost <= 0.035 * 1.3 and interval.every <= 10 * max(1, disk / 0.1)


def test_evaluations_do_not_count():
    assert simulate(0.02, 2000, evaluate=37)[0].every == simulate(0.02, 2000)[0].every


def test_nothing_is_saved_before_steps_were_watched():
    interval = Interval(0.035)
    for number in range(10):
        assert interval.every is None, number
        interval.step(0.1, False)
    assert interval.every == 10 and interval.cost == 0.0


def test_notches():
    assert [_below(k) for k in (1, 2, 5, 10, 20, 50, 100)] == [1, 1, 2, 5, 10, 20, 50]
