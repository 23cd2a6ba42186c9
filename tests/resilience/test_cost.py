"""The cost model: its formulas at hand-made numbers, and against an event-by-event simulation.

Needs: nothing.
Run: pytest tests/resilience/test_cost.py
"""

import random

import pytest

from headway.resilience.cost import ENGINES, PAPER, Load, back_pressure, bars, stall, time_per_step


def load(**changes):
    return Load(**{"state": 100.0, "to_host": 50.0, "to_disk": 10.0, "window": 1.5, "step": 2.0, "every": 1, **changes})


def test_stalls_by_hand():
    assert [stall(engine, load()) for engine in ENGINES] == [12.0, 2.0, 0.5, 0.5]
    assert stall("lazy", load(ring=50.0)) == 50 / 50 + 50 / 10 - 1.5
    assert stall("lazy", load(ring=100.0)) == 0.5 and stall("lazy", load(window=30.0, ring=1.0)) == 0.0


def test_back_pressure_by_hand():
    assert back_pressure("blocking", load()) == 0.0
    assert back_pressure("staged", load()) == 10 - 2 - 2 and back_pressure("staged", load(every=5)) == 0.0
    assert time_per_step("lazy", load(every=10)) == pytest.approx(2.0 + 0.5 / 10)


def simulate(case, steps=400, pieces=400):
    """Training that saves through a ring, piece by piece; the mean time of a step in the second half."""
    size = case.state / pieces
    room = max(1, int(case.ring / size)) if case.ring != float("inf") else pieces
    clock = copied = written = 0.0
    done = []  # when each piece left the ring
    for number in range(steps):
        if number == steps // 2:
            begin = clock
        clock += case.step - case.window
        if number % case.every == 0:
            at = max(clock, copied)
            for _ in range(pieces):
                at = max(at, done[-room]) if len(done) >= room else at
                at += size / case.to_host
                written = max(written, at) + size / case.to_disk
                done.append(written)
            copied = at
        clock = max(clock + case.window, copied)
    return (clock - begin) / (steps - steps // 2)


@pytest.mark.parametrize("seed", range(25))
def test_lazy_against_a_simulation(seed):
    rng = random.Random(seed)
    step = rng.uniform(0.5, 3)
    case = load(step=step, window=step * 0.95, every=rng.choice([1, 2, 5, 20]), to_host=rng.uniform(20, 300),
                to_disk=rng.uniform(5, 100), ring=rng.choice([20.0, 60.0, 200.0]))  # fmt: skip
    assert time_per_step("lazy", case) == pytest.approx(simulate(case), rel=0.05 if case.ring >= 100 else 0.2)


@pytest.mark.parametrize("every", [1, 5, 50])
def test_the_papers_order(every):
    for name, row in bars(every).items():
        times = [row[engine] for engine in ENGINES]
        assert times == sorted(times, reverse=True) and row["lazy"] >= 1, (name, row)
    assert set(bars(1)) == set(PAPER)
