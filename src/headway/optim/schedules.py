"""Learning-rate schedules: the factor on the base rate as a pure function of the step, or of the share of a budget.

A run's length is known in steps, or only as a budget of time or tokens. Both go through one formula, since every
schedule is a function of ratios (position / length, warm-up / length): in steps the length is ``total_steps``; under
a budget the length is 1, the position is the ``progress`` that the caller passes with each step, and what is given in
steps is converted at the run's pace so far (``progress / step`` of the budget per step). At a steady pace they agree.

The first step (0) of a warm-up of W steps has factor 1/W and step W - 1 has 1; a later step has what ``transformers``
gives it. So no step of the run is spent at a rate of 0, and ``final`` is what the step after the last one would have.
(Only under a budget is the first step's factor 0, as the pace is not known before it.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from headway.core.errors import RecipeError
from headway.optim.options import ScheduleOptions

__all__ = ["Schedule", "Schedules", "build_schedule", "factor"]

# A slow first step (compilation) may use up the warm-up's whole share of a time budget; the rise still takes these
# many steps.
SHORTEST_WARMUP = 10


def factor(
    name: str, position: float, *, length: float = 1.0, warmup: float = 0.0, decay: float = 0.0, final: float = 0.0
) -> float:
    """The learning-rate factor of schedule ``name`` after its warm-up.

    Args:
        position: how far the run is, in the unit of ``length``; at or past the end of the warm-up.
        length: of the whole run; 1 makes ``position`` the progress.
        warmup: length of the warm-up, same unit.
        decay: length of the fall of ``wsd``, same unit.
        final: factor at the end of the run (cosine, linear, wsd).

    Returns:
        A number in [0, 1]; after the end, the one at the end.
    """
    if name == "constant":
        return 1.0
    if name == "inverse-sqrt":  # continuous at the end of the warm-up; Vaswani et al. 2017, section 5.3
        return math.sqrt(warmup / max(position, warmup))
    falling = decay if name == "wsd" else length - warmup
    done = 1.0 if position >= length or falling <= 0 else max(0.0, 1.0 - (length - position) / falling)
    rest = 0.5 * (1.0 + math.cos(math.pi * done)) if name == "cosine" else 1.0 - done
    return final + (1.0 - final) * rest


@dataclass(frozen=True)
class Schedule:
    """``schedule(step)`` or ``schedule(step, progress)`` -> factor in [0, 1] of the base learning rate.

    Stateless, so that a resumed run needs nothing but its step (and the budget it has used).
    """

    options: ScheduleOptions
    total_steps: int | None

    def __call__(self, step: int, progress: float | None = None) -> float:
        """The factor for optimizer step ``step``, counted from 0.

        Args:
            step: steps done before this one.
            progress: share in [0, 1] of the budget used before this step; looked at only where ``total_steps`` is None.

        Raises:
            RecipeError: neither the number of steps nor ``progress`` is known, and the schedule depends on it.
        """
        options, total = self.options, self.total_steps
        if total is None and progress is not None:
            return self._by_progress(step, min(max(progress, 0.0), 1.0))
        if total is None:
            if options.name not in ("constant", "inverse-sqrt") or isinstance(options.warmup, float):
                raise RecipeError(
                    "schedule",
                    "depends on the length of the run, which is not known in steps",
                    hint="pass progress, or use constant or inverse-sqrt with warmup in steps",
                )
            total = 0  # these two do not look at it
        warmup = _steps(options.warmup, total)
        if step < warmup:
            return (step + 1) / warmup
        decay = _steps(options.fall, total)
        return factor(options.name, step, length=total, warmup=warmup, decay=decay, final=options.final or 0.0)

    def _by_progress(self, step: int, progress: float) -> float:
        options = self.options
        pace = progress / step if step else 0.0  # budget per step so far
        if isinstance(options.warmup, float):
            warmup = options.warmup
            rise = min(progress / warmup, (step + 1) / SHORTEST_WARMUP) if warmup > 0 else 1.0
        else:
            warmup = options.warmup * pace
            rise = (step + 1) / options.warmup if step < options.warmup else 1.0
        if rise < 1:
            return rise
        decay = options.fall if isinstance(options.fall, float) else options.fall * pace
        return factor(options.name, progress, warmup=warmup, decay=decay, final=options.final or 0.0)


def _steps(value: float | int, total: int) -> int:
    """A share of the run in whole steps, rounded up as transformers does; a number of steps stays as it is."""
    return math.ceil(round(value * total, 6)) if isinstance(value, float) else value


def build_schedule(options: ScheduleOptions, total_steps: int | None) -> Schedule:
    """The schedule of a run.

    Args:
        total_steps: optimizer steps of the run; None under a budget of time or tokens (then pass ``progress``).

    Raises:
        RecipeError: warm-up and decay do not fit into the run.
    """
    if total_steps is not None:
        warmup, decay = _steps(options.warmup, total_steps), _steps(options.fall, total_steps)
        if warmup + decay > total_steps + 1:  # two shares that add up to 100% may each be rounded up
            raise RecipeError(
                "schedule.warmup" if warmup > total_steps else "schedule",
                f"warm-up ({warmup} steps) and decay ({decay}) do not fit into a run of {total_steps}",
                hint="a share such as 5% follows the length of the run",
            )
    return Schedule(options, total_steps)


class Schedules:
    """The registry's entry for all of them: the options' class and the builder."""

    Options = ScheduleOptions
    build = staticmethod(build_schedule)
