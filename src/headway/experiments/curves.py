"""The curves of runs: what was logged, as charts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from headway.experiments.charts import Chart, Format, Line, Style

if TYPE_CHECKING:
    from headway.core.run import Run

Record = dict[str, Any]


@dataclass
class Log:
    """What one run logged."""

    label: str
    steps: list[Record]
    evaluations: list[Record] = field(default_factory=list)

    @classmethod
    def of(cls, run: Run, label: str) -> Log:
        """From the run's directory."""
        return cls(label, run.metrics(), run.evaluations())

    @cached_property
    def tokens(self) -> list[float]:
        """Tokens seen at each logged step."""
        return [float(r["tokens"]) for r in self.steps]

    @cached_property
    def seconds(self) -> list[float]:
        """Training time at each logged step: the tokens since the line before, at the rate logged for them."""
        gaps = [after - before for before, after in zip([0.0, *self.tokens], self.tokens)]
        rates = [r.get("tokens_per_second") or math.inf for r in self.steps]
        return list(accumulate(gap / rate for gap, rate in zip(gaps, rates)))

    def values(self, key: str) -> list[float]:
        """One quantity at each logged step; NaN where a line has none."""
        return [_number(r.get(key)) for r in self.steps]

    def evaluated(self, key: str, by_time: bool) -> tuple[list[float], list[float]]:
        """Where on the horizontal axis the run was evaluated, and what came out."""
        at = [float(r["tokens"]) for r in self.evaluations]
        if by_time:
            at = [_interpolated(x, self.tokens, self.seconds) for x in at]
        return at, [_number(r.get(key)) for r in self.evaluations]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _interpolated(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    before_x = before_y = 0.0
    for after_x, after_y in zip(xs, ys):
        if x <= after_x:
            share = (x - before_x) / (after_x - before_x) if after_x > before_x else 1.0
            return before_y + share * (after_y - before_y)
        before_x, before_y = after_x, after_y
    return before_y


def smoothed(values: Sequence[float]) -> list[float]:
    """An average over about a twenty-fifth of the values, around each one.

    Exponential, once forwards and once backwards: their mean lags in neither direction, as one alone would.
    """
    keep = 1 - 1 / max(1.0, len(values) / 50)
    forwards = _remembering(values, keep)
    backwards = _remembering(values[::-1], keep)[::-1]
    return [(a + b) / 2 for a, b in zip(forwards, backwards)]


def _remembering(values: Sequence[float], keep: float) -> list[float]:
    total = weight = 0.0
    result = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(total / weight if weight else math.nan)
    return result


def loss_chart(logs: list[Log], by_time: bool = False) -> Chart:
    """Train and evaluation loss of every run; training is smoothed, with the logged values faint behind it."""
    single = len(logs) == 1
    lines = []
    for index, log in enumerate(logs):
        x = log.seconds if by_time else log.tokens
        losses = log.values("loss")
        name = "train" if single else log.label
        if len(losses) > 50:
            lines.append(Line(name, x, losses, index, "faint"))
        lines.append(Line(name, x, smoothed(losses), index))
    for index, log in enumerate(logs):
        at, losses = log.evaluated("eval_loss", by_time)
        style: Style = "points" if len(at) == 1 else "line" if single else "dashed"
        lines.append(Line("eval" if single else f"{log.label}, eval", at, losses, 1 if single else index, style))
    if by_time:
        return Chart("Loss by training time", "training time", "loss", lines, x_format="seconds", full=True)
    return Chart("Loss by tokens", "tokens", "loss", lines, full=True)


def quantity_chart(
    logs: list[Log], key: str, title: str, unit: str = "", form: Format = "plain", smooth: bool = False
) -> Chart:
    """One logged quantity of every run by tokens; ``smooth`` draws its average, with the logged values faint behind."""
    lines = []
    for index, log in enumerate(logs):
        name = title.lower() if len(logs) == 1 else log.label
        values = log.values(key)
        if smooth and len(values) > 50:
            lines.append(Line(name, log.tokens, values, index, "faint"))
            values = smoothed(values)
        lines.append(Line(name, log.tokens, values, index))
    return Chart(title, "tokens", unit, lines, y_format=form, from_zero=True)


def other_charts(logs: list[Log]) -> list[Chart]:
    """Throughput, learning rate, gradient norm, memory: those that were logged."""
    charts = [
        quantity_chart(logs, "tokens_per_second", "Throughput", "tokens/s", "si", smooth=True),
        quantity_chart(logs, "lr", "Learning rate"),
        quantity_chart(logs, "grad_norm", "Gradient norm"),
        quantity_chart(logs, "peak_memory_bytes", "Live memory, peak so far", "", "bytes"),
    ]
    charts = [chart for chart in charts if not chart.empty]
    if len(charts) % 2:
        charts[-1].full = True  # it has a row of the page to itself
    return charts
