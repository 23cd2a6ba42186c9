"""Which of several one-epoch runs cannot win any more, judged by their first 10 to 20 %.

At a constant learning rate each run's curve is a power law, so its end can be foretold with an interval; a run whose
best case is worse than the worst case of another cannot win. With a decaying schedule the law does not hold (the end of
the run falls faster than its beginning says), so that runs are compared at equal fractions instead, with a margin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from headway.core.errors import HeadwayError
from headway.plan.one_epoch.power_law import fit_power_law
from headway.plan.one_epoch.speedup import monotone

__all__ = ["PartialRun", "Verdict", "cannot_win"]

Outcome = Literal["keep", "stop", "diverged", "unknown"]


@dataclass(frozen=True)
class PartialRun:
    """What is known of a run that is under way."""

    steps: ArrayLike
    """Of the evaluations so far."""
    loss: ArrayLike
    total_steps: int
    """At which it would end."""


@dataclass(frozen=True)
class Verdict:
    """What to do with one run, and why."""

    outcome: Outcome
    reason: str
    predicted: float | None = None
    interval: tuple[float, float] | None = None


def cannot_win(
    runs: Mapping[str, PartialRun],
    *,
    schedule: Literal["constant", "decaying"] = "constant",
    level: float = 0.95,
    margin: float = 0.02,
    skip: float = 0.1,
) -> dict[str, Verdict]:
    """Tell runs that cannot have the lowest final loss from those that may.

    Args:
        runs: name -> its curve so far and its length; lengths may differ (equal compute at several sizes).
        schedule: ``constant`` (or inverse square root, or none) extrapolates; ``decaying`` compares at the largest
            fraction that all runs have reached.
        level: of the intervals compared.
        margin: relative difference in loss below which runs count as equal; with ``decaying`` it is all there is.
        skip: share of each curve's known part left out as warm-up.

    Returns:
        name -> verdict; ``unknown`` where a curve cannot be extrapolated yet, which is no reason to stop it.

    Raises:
        HeadwayError: no runs, or a run without evaluations.
    """
    if not runs:
        raise HeadwayError("early stopping", "has no runs to compare")
    verdicts: dict[str, Verdict] = {}
    alive: dict[str, PartialRun] = {}
    for name, run in runs.items():
        if not np.size(run.loss):
            raise HeadwayError(f"early stopping of {name}", "has no evaluation yet")
        if np.isfinite(np.asarray(run.loss, dtype=float)).all():
            alive[name] = run
        else:
            verdicts[name] = Verdict("diverged", "the loss is not finite")
    judge = _by_prediction(alive, level, margin, skip) if schedule == "constant" else _at_equal_fraction(alive, margin)
    return {name: {**verdicts, **judge}[name] for name in runs}


def _by_prediction(runs: dict[str, PartialRun], level: float, margin: float, skip: float) -> dict[str, Verdict]:
    verdicts: dict[str, Verdict] = {}
    told: dict[str, tuple[float, float, float]] = {}
    for name, run in runs.items():
        try:
            fit = fit_power_law(run.steps, run.loss, skip=skip)
        except HeadwayError as error:
            verdicts[name] = Verdict("unknown", str(error))
            continue
        told[name] = (fit.predict(run.total_steps), *fit.interval(run.total_steps, level))
    leader = min(told, key=lambda name: told[name][2], default="")
    for name, (predicted, low, high) in told.items():
        worst = told[leader][2]
        if name != leader and low > worst * (1 + margin):
            reason = f"ends at {low:.4g} at best, {leader} at {worst:.4g} at worst"
            verdicts[name] = Verdict("stop", reason, predicted, (low, high))
        else:
            verdicts[name] = Verdict("keep", "may still win", predicted, (low, high))
    return verdicts


def _at_equal_fraction(runs: dict[str, PartialRun], margin: float) -> dict[str, Verdict]:
    if not runs:
        return {}
    fraction = min(float(np.asarray(run.steps, dtype=float)[-1]) / run.total_steps for run in runs.values())
    there = {}
    for name, run in runs.items():
        x, y = monotone(run.steps, run.loss)
        there[name] = float(np.interp(fraction * run.total_steps, x, y)) if x.size else math.inf
    leader = min(there, key=lambda name: there[name])
    verdicts = {}
    for name, loss in there.items():
        if loss > there[leader] * (1 + margin):
            reason = f"is at {loss:.4g} after {fraction:.0%} of the run, {leader} at {there[leader]:.4g}"
            verdicts[name] = Verdict("stop", reason)
        else:
            verdicts[name] = Verdict("keep", f"is within {margin:.0%} of the best after {fraction:.0%} of the run")
    return verdicts
