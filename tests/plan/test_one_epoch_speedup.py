"""Speed-up at a loss: exact on analytic curves, `never` where the target is not reached, early stopping, envelopes.

Needs: numpy and scipy only.
Run: pytest tests/plan/test_one_epoch_speedup.py
"""

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from headway.core.errors import HeadwayError
from headway.plan.one_epoch import lower_envelope, monotone, speedup_at_loss, time_to_loss

TIME = np.linspace(1, 1000, 1000)


def falling(rate):
    return 2 + 3 / (1 + rate * TIME / 100)


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.3])
def test_a_run_that_is_faster_by_a_factor_has_that_speedup(factor):
    result = speedup_at_loss((TIME, falling(1.0)), (TIME, falling(factor)), target=4.0)
    assert result.baseline_time == pytest.approx(50.0, rel=1e-4)  # 2 + 3 / (1 + t / 100) = 4
    assert result.ratio == pytest.approx(factor, rel=1e-3)


def test_straight_lines_are_exact_and_the_default_target_is_the_baselines_best():
    result = speedup_at_loss(([0, 10], [5.0, 3.0]), ([0, 2, 10], [5.0, 3.5, 1.5]))
    assert result.target == 3.0
    assert result.baseline_time == 10.0
    assert result.run_time == 4.0
    assert result.ratio == 2.5
    assert "2.50 times sooner" in str(result)


def test_never_is_said_and_not_a_number_that_could_be_averaged():
    good, bad = ([1, 2], [5.0, 3.0]), ([1, 2], [5.0, 4.0])
    assert speedup_at_loss(good, bad).ratio == 0.0
    assert str(speedup_at_loss(good, bad)) == "never: the run reaches a loss of 3"
    assert speedup_at_loss(bad, good, target=3.5).ratio == math.inf
    assert "baseline never" in str(speedup_at_loss(bad, good, target=3.5))
    neither = speedup_at_loss(good, bad, target=1.0)
    assert math.isnan(neither.ratio)
    assert "neither run" in str(neither)


def test_a_baseline_that_turns_up_counts_by_its_best():
    turns = (TIME, falling(1.0) + np.maximum(0, TIME - 500) / 200)
    assert monotone(*turns)[0][-1] == 500
    assert speedup_at_loss(turns, (TIME, falling(2.0))).ratio == pytest.approx(2.0, rel=1e-3)


def test_noise_does_not_bias_the_time():
    """Taking the first point below the target would be too early by much; the falling curve through them is not."""
    rng = np.random.default_rng(0)
    target = 2.5
    exact = time_to_loss(TIME, falling(1.0), target)
    times = [time_to_loss(TIME, falling(1.0) + 0.05 * rng.normal(size=TIME.size), target) for _ in range(50)]
    first = [TIME[np.argmax(falling(1.0) + 0.05 * rng.normal(size=TIME.size) <= target)] for _ in range(50)]
    assert np.mean(times) == pytest.approx(exact, rel=0.03)
    assert np.mean(first) < 0.9 * exact


def test_monotone_is_the_nearest_falling_curve():
    y = np.array([5.0, 3.0, 4.0, 4.5, 2.0, 2.2, 2.5, 1.0])
    _, ours = monotone(np.arange(8), y)
    order = [{"type": "ineq", "fun": lambda z, i=i: z[i] - z[i + 1]} for i in range(7)]
    theirs = minimize(lambda z: ((z - y) ** 2).sum(), np.full(8, 3.0), constraints=order, method="SLSQP", tol=1e-12)
    assert ours == pytest.approx(theirs.x, abs=1e-4)
    assert (np.diff(ours) <= 0).all()


def test_a_running_mean_keeps_a_lucky_point_from_being_the_best():
    loss = np.array([5.0, 4.0, 1.0, 4.0, 3.5, 3.0, 2.9, 2.8])
    assert monotone(np.arange(8), loss)[0][-1] == 2
    assert monotone(np.arange(8), loss, smooth=3)[0][-1] > 2
    assert monotone(np.arange(8), np.full(8, 2.0), smooth=3)[1] == pytest.approx(2.0)  # the ends are not lowered


def test_reached_at_the_first_point_and_exactly_at_a_point():
    assert time_to_loss([3, 4], [2.0, 1.0], 2.5) == 3.0
    assert time_to_loss([3, 4, 5], [2.0, 1.5, 1.0], 1.5) == 4.0
    assert time_to_loss([3], [2.0], 1.0) == math.inf


def test_the_envelope_names_the_best_size_at_each_time():
    small, large = 3 + 1 / (1 + TIME / 10), 2 + 4 / (1 + TIME / 100)
    envelope = lower_envelope({"small": (TIME, small), "large": (TIME, large)}, [10, 100, 900])
    assert [r.name for r in envelope] == ["small", "small", "large"]
    assert envelope[0].loss == pytest.approx(3.5)
    late = lower_envelope({"small": (TIME, small), "late": (TIME[500:], large[500:] - 5)}, [100, 600])
    assert [r.name for r in late] == ["small", "late"]
    with pytest.raises(HeadwayError, match="no curve with a point"):
        lower_envelope({"late": (TIME[500:], large[500:])}, [10])


@pytest.mark.parametrize(
    ("times", "loss", "says"),
    [
        ([1, 2], [1.0], "2 times and 1 losses"),
        ([], [], "0 times"),
        ([2, 1], [1.0, 2.0], "do not increase"),
        ([1, 2], [1.0, np.nan], "not finite"),
    ],
)
def test_bad_curves_are_refused(times, loss, says):
    with pytest.raises(HeadwayError, match=says):
        monotone(times, loss)
