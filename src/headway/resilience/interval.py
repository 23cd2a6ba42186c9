"""How often to save: the interval at which saving costs no more than an allowed share of the time."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

_PROFILE, _SKIP = 8, 2
_JUDGED = 3
_PATIENCE = 20


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


def _below(every: int) -> int:
    """The next smaller of 1, 2, 5, 10, 20 ..."""
    return max(1, every // 2 if str(every)[0] != "5" else every * 2 // 5)


class Interval:
    """Chooses the interval from the times of steps with and without a checkpoint under way.

    The first steps are watched without saving. After that a checkpoint's cost is what the steps that it touched took
    longer than the median of quiet ones, and the median over checkpoints, so that evaluations do not count. Too dear,
    the interval grows at once to what the formula says; cheap, it shrinks by one notch at a time and for a while not to
    what has been too dear, since saving more often makes a checkpoint dearer where the disk does not keep up.
    """

    def __init__(self, overhead: float) -> None:
        self.overhead = overhead
        self._quiet: deque[float] = deque(maxlen=50)
        self._costs: deque[float] = deque(maxlen=8)
        self._count = -_SKIP
        self._touched: list[float] = []
        self._steps: int | None = None
        self._floor, self._patience = 1, 0

    @property
    def every(self) -> int | None:
        """Steps between checkpoints; None while the first steps are watched."""
        if self._steps is None and len(self._quiet) >= _PROFILE:
            self._steps = 10
        return self._steps

    @property
    def cost(self) -> float:
        """Seconds that one checkpoint adds at the present interval; 0 before one has been measured."""
        return max(0.0, median(self._costs)) if self._costs else 0.0

    def step(self, seconds: float, busy: bool) -> None:
        """A step took ``seconds``; ``busy``: a checkpoint was being made meanwhile."""
        self._count += 1
        if self._count <= 0:
            return
        (self._touched if busy else self._quiet).append(seconds)

    def saved(self) -> None:
        """A checkpoint begins: judge those before it."""
        if self._touched and self._quiet:
            self._costs.append(sum(self._touched) - median(self._quiet) * len(self._touched))
        self._touched = []
        self._patience -= 1
        if self._patience == 0:
            self._floor = 1
        if self._steps is None or len(self._costs) < _JUDGED:
            return
        wanted = interval_for(self.cost, median(self._quiet), self.overhead)
        if wanted > self._steps:
            self._floor, self._patience = interval_for(self._steps + 1, 1, 1), _PATIENCE
            self._change(wanted)
        elif wanted < self._steps and (lower := _below(self._steps)) >= max(wanted, self._floor):
            self._change(lower)

    def _change(self, steps: int) -> None:
        self._steps = steps
        self._costs.clear()
