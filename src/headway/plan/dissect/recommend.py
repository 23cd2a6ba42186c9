"""From a grid's results to an answer: which techniques, under a constraint, and why not the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headway.core.errors import HeadwayError
from headway.core.units import human
from headway.plan.dissect.results import CellResult, Results, ratio, refuse_incomparable

_SMALLER_IS_BETTER = ("step_milliseconds", "peak_memory_bytes", "process_peak_bytes", "device_peak_bytes", "loss")


@dataclass(frozen=True)
class Choice:
    """A cell and what speaks for or against it."""

    cell: CellResult
    value: float | None
    """The objective; None where the cell has no result."""
    reason: str


@dataclass(frozen=True)
class Recommendation:
    """The answer."""

    best: Choice
    as_good: list[Choice]
    """Not told apart from the best within the spread of the repeats; the one with the least memory is ``best``."""
    slower: list[Choice]
    """Possible, from good to bad."""
    excluded: list[Choice]
    """Against the constraint, or without a result."""

    def __str__(self) -> str:
        lines = [f"take {self.best.cell.name}: {self.best.reason}"]
        lines += [f"  as good, within the spread: {c.cell.name}, {c.reason}" for c in self.as_good]
        lines += [f"  {c.cell.name}: {c.reason}" for c in (*self.slower, *self.excluded)]
        return "\n".join(lines)


def recommend(
    results: Results,
    constraint: Mapping[str, float] | None = None,
    objective: str = "tokens_per_second",
    **labels: Any,
) -> Recommendation:
    """The best cell of one table.

    Args:
        constraint: metric -> the most that it may be, such as ``{"peak_memory_bytes": 24e9}``.
        objective: a metric; the largest is best, for times, memory and losses the smallest.
        labels: choose the table: model, sequence, batch. With several batches left, the objective must be a rate.

    Raises:
        HeadwayError: no cell is possible, or the cells must not be compared.
    """
    cells = [c for c in results.cells if all(c.labels.get(key) == value for key, value in labels.items())]
    if not cells:
        raise HeadwayError("results", f"have no cell at {labels}" if labels else "are empty")
    measured = [c for c in cells if c.status == "ok"]
    if objective == "tokens_per_second":
        # Tokens per second are comparable between batches; the other refusals stand.
        for tokens in {c.tokens_per_step for c in measured}:
            refuse_incomparable([c for c in measured if c.tokens_per_step == tokens])
        if len({c.environment for c in measured}) > 1:
            refuse_incomparable(measured)
    else:
        refuse_incomparable(measured)
    possible: list[Choice] = []
    excluded: list[Choice] = []
    for cell in cells:
        choice = _judge(cell, constraint or {}, objective)
        (excluded if choice.value is None else possible).append(choice)
    if not possible:
        why = "; ".join(f"{c.cell.name}: {c.reason}" for c in excluded)
        raise HeadwayError("results", f"no cell is possible ({why})", hint="relax the constraint")
    sign = -1.0 if objective in _SMALLER_IS_BETTER else 1.0
    possible.sort(key=lambda c: -sign * (c.value or 0.0))
    equal = [c for c in possible if c is possible[0] or _not_told_apart(c.cell, possible[0].cell, objective)]
    equal.sort(key=lambda c: c.cell.metric("peak_memory_bytes") or 0.0)
    return Recommendation(equal[0], equal[1:], [c for c in possible if c not in equal], excluded)


def _judge(cell: CellResult, constraint: Mapping[str, float], objective: str) -> Choice:
    if cell.status != "ok":
        return Choice(cell, None, f"{cell.status}: {cell.cause}")
    for metric, most in constraint.items():
        value = cell.metric(metric)
        if value is None:
            return Choice(cell, None, f"{metric} was not measured")
        if value > most:
            return Choice(cell, None, f"{metric} {human(value)} is above {human(most)}")
    value = cell.metric(objective)
    if value is None:
        return Choice(cell, None, f"{objective} was not measured")
    at = ", ".join(f"{key} {value}" for key, value in cell.labels.items())
    memory = cell.metric("peak_memory_bytes")
    peak = f", live peak {human(memory, 'B')}" if memory is not None else ""
    return Choice(cell, value, f"{objective} {human(value)}{peak}{f' ({at})' if at else ''}")


def _not_told_apart(cell: CellResult, best: CellResult, objective: str) -> bool:
    """Whether the repeats of the two overlap; a cell measured once is told apart by its value."""
    shared = cell.values.keys() & best.values.keys()
    if cell.tokens_per_step != best.tokens_per_step or len(shared) < 2 or objective == "peak_memory_bytes":
        return False
    found = ratio(cell, best, objective)
    return found.low <= 1.0 <= found.high
