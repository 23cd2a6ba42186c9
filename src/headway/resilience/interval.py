"""How often to save: the interval at which saving costs no more than an allowed share of the time."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

_PROFILE, _SKIP = 8, 2


def interval_for(cost: float, step: float, overhead: float) -> int:
    """Steps between checkpoints that cost ``cost`` seconds each, so that they take at most ``overhead`` of the time.

    Rounded up to 1, 2, 5, 10, 20 ...: multiples of the next are multiples of the last, mostly, so that changing the
    interval brings no two saves close together.

    Args:
        cost: seconds that one checkpoint adds.
        step: seconds of a step without.
        overhead: allowed share, such as 0.035.

    Source: Mohan et al., CheckFreq (FAST 2021), section 4.3; there ceil(cost / (overhead * step)).
    """
    needed = max(1, math.ceil(cost / (overhead * step) - 1e-9))
    decade = 10 ** (len(str(needed)) - 1)
    return next(decade * factor for factor in (1, 2, 5, 10) if decade * factor >= needed)


class Interval:
    """Chooses the interval from the times of steps with and without a checkpoint under way.

    The first steps are watched without saving. After that every checkpoint's cost is what the steps it touched took
    longer than the median of quiet ones, medians again, so that evaluations in between do not count.
    """

    def __init__(self, overhead: float) -> None:
        self.overhead = overhead
        self._quiet: deque[float] = deque(maxlen=50)
        self._busy: deque[float] = deque(maxlen=50)
        self._touched: deque[int] = deque(maxlen=8)
        self._count = -_SKIP
        self._current = 0
        self._steps: int | None = None

    @property
    def every(self) -> int | None:
        """Steps between checkpoints; None while the first steps are watched."""
        if self._steps is None and len(self._quiet) >= _PROFILE:
            self._steps = 10
        return self._steps

    def step(self, seconds: float, busy: bool) -> None:
        """A step took ``seconds``; ``busy``: a checkpoint was being made meanwhile."""
        self._count += 1
        if self._count <= 0:
            return
        (self._busy if busy else self._quiet).append(seconds)
        self._current += busy

    def saved(self) -> None:
        """A checkpoint begins: judge those before it."""
        if self._current:
            self._touched.append(self._current)
            self._current = 0
        if not self._touched or not self._quiet:
            return
        quiet = median(self._quiet)
        cost = max(0.0, median(self._busy) - quiet) * median(self._touched)
        wanted = interval_for(cost, quiet, self.overhead)
        # Down only when there is much to gain: an interval that swings to and fro serves nobody.
        if self._steps is None or wanted > self._steps or wanted * 2 < self._steps:
            self._steps = wanted

    @property
    def cost(self) -> float:
        """Seconds that one checkpoint adds, as measured; 0 before the second."""
        if not self._touched or not self._quiet:
            return 0.0
        return max(0.0, median(self._busy) - median(self._quiet)) * median(self._touched)
