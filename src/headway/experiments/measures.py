"""Measurements over finished arms, for experiments that need nothing more: values, ratios, differences.

A metric is a key of ``summary.json`` or a function of a run. With several seeds, arms are paired by seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headway.core.errors import HeadwayError, nearest
from headway.experiments.base import Measurement
from headway.experiments.statistics import bootstrap, paired_difference, paired_ratio

if TYPE_CHECKING:
    from headway.core.run import Run
    from headway.experiments.context import Context

Metric = str | Callable[["Run"], float]


def metric_of(run: Run, metric: Metric) -> float:
    """The value of ``metric`` in a finished run.

    Raises:
        HeadwayError: its summary has no such number.
    """
    if callable(metric):
        return float(metric(run))
    value = run.summary.get(metric)
    if not isinstance(value, int | float):
        numbers = [key for key, known in run.summary.items() if isinstance(known, int | float)]
        raise HeadwayError(f"{run.path}/summary.json", f"has no number {metric!r}", hint=nearest(metric, numbers))
    return float(value)


def _values(context: Context, arm: str, metric: Metric) -> list[float]:
    return [metric_of(run, metric) for run in context.runs(arm)]


@dataclass(frozen=True)
class Final:
    """A metric of one arm: the median over the seeds."""

    name: str
    arm: str
    metric: Metric
    unit: str = ""

    def measure(self, context: Context) -> Measurement:
        """The number."""
        return Measurement.of(bootstrap(_values(context, self.arm, self.metric)), self.unit)


@dataclass(frozen=True)
class Ratio:
    """A metric of arm ``of`` divided by that of arm ``to``: the median over the seeds.

    For times and memory take ``Interleaved``: runs one after the other see different states of the machine.
    """

    name: str
    metric: Metric
    of: str
    to: str

    def measure(self, context: Context) -> Measurement:
        """The number."""
        pair = (_values(context, arm, self.metric) for arm in (self.of, self.to))
        return Measurement.of(paired_ratio(*pair), "x")


@dataclass(frozen=True)
class Difference:
    """A metric of arm ``of`` minus that of arm ``to``: the median over the seeds."""

    name: str
    metric: Metric
    of: str
    to: str
    unit: str = ""

    def measure(self, context: Context) -> Measurement:
        """The number."""
        pair = (_values(context, arm, self.metric) for arm in (self.of, self.to))
        return Measurement.of(paired_difference(*pair), self.unit)


@dataclass(frozen=True)
class Interleaved:
    """A ratio of two arms trained in turns in one process.

    ``quantity``: ``seconds_per_token``, ``live_peak_bytes``, ``train_loss``, ``eval_loss`` or ``bits_per_byte``.
    Measurements of the same two arms with the same blocks and steps share one comparison.
    """

    name: str
    quantity: str
    of: str
    to: str
    blocks: int = 8
    steps: int = 4
    repeats: int = 1

    def measure(self, context: Context) -> Measurement:
        """The number."""
        options: dict[str, Any] = {"blocks": self.blocks, "steps": self.steps, "repeats": self.repeats}
        ratios = context.compare(self.of, self.to, **options).ratios
        if self.quantity not in ratios:
            raise HeadwayError(self.name, f"there is no ratio {self.quantity!r}", hint=nearest(self.quantity, ratios))
        return Measurement.of(ratios[self.quantity], "x")
