"""The interval controller: its formula, and that it keeps to the bound on simulated trainings.

Needs: nothing.
Run: pytest tests/resilience/test_interval.py
"""

import random

import pytest

from headway.resilience.interval import Interval, interval_for


@pytest.mark.parametrize(
    ("cost", "step", "overhead", "expected"),
    [(0.0, 1.0, 0.035, 1), (0.035, 1.0, 0.035, 1), (0.036, 1.0, 0.035, 2), (1.0, 1.0, 0.1, 10), (1.01, 1.0, 0.1, 20),
     (7.0, 0.1, 0.035, 2000), (0.4, 1.0, 0.1, 5)],
)  # fmt: skip
def test_formula(cost, step, overhead, expected):
    every = interval_for(cost, step, overhead)
    assert every == expected and cost <= overhead * step * every * (1 + 1e-9)


def simulate(cost, steps, overhead=0.035, step=0.1, touched=1, seed=0, evaluate=0):
    """A training that saves when the controller says; returns the controller and the share of time that was lost."""
    rng, interval, busy, lost, total = random.Random(seed), Interval(overhead), 0, 0.0, 0.0
    for number in range(1, steps + 1):
        took = step * rng.uniform(0.95, 1.1) + (cost / touched if busy else 0.0)
        if evaluate and number % evaluate == 0:
            took += 20 * step
        interval.step(took, busy > 0)
        if number > steps // 2:
            lost += cost / touched if busy else 0.0
            total += took
        busy = max(0, busy - 1)
        if interval.every and number % interval.every == 0:
            interval.saved()
            busy = touched
    return interval, lost / total


@pytest.mark.parametrize("cost", [0.0, 0.002, 0.02, 0.1, 1.0])
@pytest.mark.parametrize("touched", [1, 3])
def test_keeps_to_the_bound_and_no_rarer_than_needed(cost, touched):
    interval, lost = simulate(cost, 3000, touched=touched)
    assert lost <= 0.035 * 1.25
    assert interval.every <= 5 * max(1, interval_for(cost, 0.1, 0.035))


def test_evaluations_do_not_count():
    assert simulate(0.02, 2000, evaluate=37)[0].every == simulate(0.02, 2000)[0].every


def test_nothing_is_saved_before_steps_were_watched():
    interval = Interval(0.035)
    for number in range(10):
        assert interval.every is None, number
        interval.step(0.1, False)
    assert interval.every == 10 and interval.cost == 0.0
