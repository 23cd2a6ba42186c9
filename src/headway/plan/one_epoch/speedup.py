"""How much sooner one run reaches a loss than another: the paper's measure of a speed-up.

    speed-up at loss L = time at which the baseline reaches L / time at which the run reaches L

Time is whatever the curves are drawn over: seconds on one machine (warm-up included), steps or FLOPs. A run may be
stopped at its best, so a curve that turns up later counts by its lowest point, and by nothing after it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headway.core.errors import HeadwayError

__all__ = ["Reached", "Speedup", "lower_envelope", "monotone", "speedup_at_loss", "time_to_loss"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Speedup:
    """``baseline_time / run_time``; infinite where only the run reaches the target, 0 where only the baseline does."""

    target: float
    baseline_time: float
    """Infinite where the baseline never reaches the target."""
    run_time: float
    """Infinite where the run never reaches the target."""

    @property
    def ratio(self) -> float:
        """The speed-up; nan where neither run reaches the target."""
        if math.isinf(self.baseline_time):
            return math.nan if math.isinf(self.run_time) else math.inf
        return self.baseline_time / self.run_time

    def __str__(self) -> str:
        if math.isinf(self.run_time):
            who = "neither run" if math.isinf(self.baseline_time) else "the run"
            return f"never: {who} reaches a loss of {self.target:.4g}"
        if math.isinf(self.baseline_time):
            return f"the baseline never reaches a loss of {self.target:.4g}"
        return f"{self.ratio:.2f} times sooner at a loss of {self.target:.4g}"


def monotone(times: ArrayLike, loss: ArrayLike, smooth: int = 1) -> tuple[Array, Array]:
    """A learning curve made non-increasing: cut after its lowest point, then the nearest falling curve to the rest.

    Args:
        times: seconds, steps or FLOPs [N], increasing.
        loss: loss there [N].
        smooth: points of a running mean by which the lowest point is found and the curve smoothed; 1 for none.

    Returns:
        Times and losses [M], M <= N; a curve that falls already is given back as it is.

    Raises:
        HeadwayError: lists of unequal length, no point, times that do not increase, a loss that is not finite.
    """
    x, y = np.asarray(times, dtype=float), np.asarray(loss, dtype=float)
    if x.ndim != 1 or x.shape != y.shape or not x.size:
        raise HeadwayError(
            "learning curve", f"has {x.size} times and {y.size} losses", expected="one loss for each time"
        )
    if not np.isfinite(x).all() or (np.diff(x) <= 0).any():
        raise HeadwayError("learning curve", "has times that do not increase", expected="each time once, in order")
    if not np.isfinite(y).all():
        raise HeadwayError("learning curve", "has a loss that is not finite", hint="leave diverged runs out")
    if smooth > 1:
        count = np.convolve(np.ones_like(y), np.ones(smooth), mode="same")
        y = np.convolve(y, np.ones(smooth), mode="same") / count
    end = int(y.argmin()) + 1
    return x[:end], _falling(y[:end])


def _falling(y: Array) -> Array:
    """The non-increasing curve with the least squared distance: pool adjacent violators (Barlow et al. 1972)."""
    means: list[float] = []
    sizes: list[int] = []
    for value in y:
        mean, size = float(value), 1
        while means and means[-1] < mean:
            mean = (mean * size + means[-1] * sizes[-1]) / (size + sizes[-1])
            size += sizes.pop()
            means.pop()
        means.append(mean)
        sizes.append(size)
    return np.repeat(means, sizes)


def time_to_loss(times: ArrayLike, loss: ArrayLike, target: float, smooth: int = 1) -> float:
    """When a curve first reaches ``target``, between its points in a straight line; infinite where it never does.

    Raises:
        HeadwayError: as `monotone`.
    """
    x, y = monotone(times, loss, smooth)
    if y[-1] > target:
        return math.inf
    after = int(np.argmax(y <= target))
    if after == 0:
        return float(x[0])  # at its first point already: it cannot be known how much sooner
    share = (y[after - 1] - target) / (y[after - 1] - y[after])
    return float(x[after - 1] + share * (x[after] - x[after - 1]))


Curve = tuple[ArrayLike, ArrayLike]


def speedup_at_loss(baseline: Curve, run: Curve, target: float | None = None, smooth: int = 1) -> Speedup:
    """How many times sooner ``run`` reaches a loss than ``baseline``.

    Args:
        baseline: (times, losses) of the run compared against, allowed its best settings and early stopping.
        run: (times, losses) of the run in question, over the same kind of time.
        target: the loss; None takes the lowest that the baseline reaches.
        smooth: as for `monotone`.

    Raises:
        HeadwayError: as `monotone`.
    """
    if target is None:
        target = float(monotone(*baseline, smooth)[1][-1])
    return Speedup(target, time_to_loss(*baseline, target, smooth), time_to_loss(*run, target, smooth))


@dataclass(frozen=True)
class Reached:
    """The best run of several at one time."""

    time: float
    name: str
    loss: float


def lower_envelope(curves: Mapping[str, Curve], times: Sequence[float], smooth: int = 1) -> list[Reached]:
    """Which run has the lowest loss by each of ``times``, all curves over the same kind of time.

    Where models of several sizes cross is where the next larger one begins to pay.

    Raises:
        HeadwayError: as `monotone`; or a time before any curve has a point.
    """
    falling = {name: monotone(*curve, smooth) for name, curve in curves.items()}
    envelope = []
    for time in times:
        reached = [
            Reached(time, name, float(np.interp(time, x, y))) for name, (x, y) in falling.items() if x[0] <= time
        ]
        if not reached:
            raise HeadwayError("lower envelope", f"has no curve with a point by time {time:g}")
        envelope.append(min(reached, key=lambda r: r.loss))
    return envelope
