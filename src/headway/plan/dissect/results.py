"""What a grid measured: cells with their raw step times, tables of ratios, and refusals of comparisons that mislead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from headway.core.errors import HeadwayError
from headway.plan.dissect.ledger import Line, Log

LEAST_STEPS = 3
METRICS = ("tokens_per_second", "step_milliseconds", "flops_rate", "peak_memory_bytes", "process_peak_bytes")


@dataclass(frozen=True)
class CellResult:
    """What is known of one cell: every valid measurement of it."""

    key: str
    techniques: tuple[str, ...]
    labels: dict[str, Any]
    status: str
    """``ok``, how it failed, or ``void``: measured only while the machine was not itself."""
    cause: str
    environment: str
    values: dict[int, dict[str, Any]]
    """Repeat -> what the runner returned."""

    @property
    def name(self) -> str:
        """The techniques, joined."""
        return "+".join(self.techniques) or "none"

    @property
    def repeats(self) -> list[dict[str, Any]]:
        """What the runner returned, repeat by repeat."""
        return [self.values[repeat] for repeat in sorted(self.values)]

    @property
    def step_seconds(self) -> list[list[float]]:
        """The raw time of each measured step, per repeat."""
        return [repeat["step_seconds"] for repeat in self.repeats]

    @property
    def seconds(self) -> list[float]:
        """Every measured step of every repeat."""
        return [value for steps in self.step_seconds for value in steps]

    @property
    def mean_seconds(self) -> float:
        """Mean step time."""
        return mean(self.seconds)

    @property
    def spread_seconds(self) -> float:
        """Standard deviation of the step time; 0 of a single step."""
        return stdev(self.seconds) if len(self.seconds) > 1 else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Tokens of one step, over all ranks."""
        return self.repeats[0]["tokens_per_step"]

    @property
    def tokens_per_second(self) -> float:
        """Tokens per step over the mean time of a step."""
        return self.tokens_per_step / self.mean_seconds

    @property
    def flops_rate(self) -> float:
        """The model's FLOPs per step over the mean time of a step; what is computed again is not counted."""
        return self.repeats[0]["flops_per_step"] / self.mean_seconds

    @property
    def precision(self) -> dict[str, float] | None:
        """Share of the FLOPs by data type; None where the runner does not say."""
        return self.repeats[0].get("precision")

    @property
    def utilization(self) -> float | None:
        """Share of the measured matrix-product peak; None where the peak or the mix of data types is unknown."""
        peak = self.repeats[0].get("matmul_peak")
        precision = self.precision
        if not precision or not peak:
            return None
        if isinstance(peak, dict):
            if any(name not in peak for name in precision):
                return None
            return self.flops_rate * sum(share / peak[name] for name, share in precision.items())
        return self.flops_rate / peak if len(precision) == 1 else None

    def metric(self, name: str) -> float | None:
        """A number by name: a property of this class, or the largest of what the repeats measured."""
        if name == "step_milliseconds":
            return self.mean_seconds * 1e3
        if name in ("tokens_per_second", "flops_rate", "utilization"):
            return getattr(self, name)
        values = [r[name] for r in self.repeats if r.get(name) is not None]
        return max(values) if values else None

    def loss_after(self, tokens: float) -> float | None:
        """The loss of the step that ends at ``tokens`` tokens or just before; None where it never got there."""
        index = int(tokens // self.tokens_per_step) - 1
        losses = self.repeats[0]["losses"]
        return losses[index] if 0 <= index < len(losses) else None


@dataclass(frozen=True)
class Ratio:
    """One cell against another, over the repeats that both have."""

    value: float
    """Median over the repeats."""
    low: float
    high: float
    """Smallest and largest of the repeats."""


class Results:
    """The lines of a log.

    Args:
        lines: in the order in which they were written.
        drift: as in ``Conduct``.
    """

    def __init__(self, lines: Iterable[Line], drift: float | None = 0.05) -> None:
        self.lines, self.drift = list(lines), drift
        self._void = _void_lines(self.lines, drift)

    @classmethod
    def load(cls, log: str | Path, drift: float | None = 0.05) -> Results:
        """All that a log holds, of every environment."""
        return cls(Log(log), drift)

    def _of(self, key: str) -> list[tuple[int, Line]]:
        return [(i, x) for i, x in enumerate(self.lines) if x["kind"] == "cell" and x["key"] == key]

    def has(self, key: str, repeat: int) -> bool:
        """Whether a valid measurement of this repeat is there."""
        return any(x["repeat"] == repeat and i not in self._void for i, x in self._of(key))

    def failed(self, key: str) -> bool:
        """Whether the cell failed; it is then not measured again."""
        return any(x["status"] != "ok" for _, x in self._of(key))

    def only_void(self) -> set[tuple[str, int]]:
        """(cell, repeat) of which every measurement is void."""
        pairs = {(x["key"], x["repeat"]) for x in self.lines if x["kind"] == "cell" and x["status"] == "ok"}
        return {(key, repeat) for key, repeat in pairs if not self.has(key, repeat)}

    @property
    def cells(self) -> list[CellResult]:
        """Every cell, in the order in which they were first measured; of one environment each."""
        keys = dict.fromkeys((x["key"], x["environment"]) for x in self.lines if x["kind"] == "cell")
        return [self._cell(key, place) for key, place in keys]

    def _cell(self, key: str, place: str) -> CellResult:
        lines = [(i, x) for i, x in self._of(key) if x["environment"] == place]
        first = lines[0][1]
        valid = {x["repeat"]: x["value"] for i, x in lines if x["status"] == "ok" and i not in self._void}
        broken = [x for _, x in lines if x["status"] != "ok"]
        if broken:
            status, cause = broken[0]["status"], broken[0]["cause"]
        elif not valid:
            status, cause = "void", f"the reference drifted by more than {self.drift:.0%} beside every measurement"
        else:
            status, cause = "ok", ""
        return CellResult(key, tuple(first["techniques"]), first["labels"], status, cause, place, valid)

    def find(self, *techniques: str, **labels: Any) -> CellResult:
        """The cell with these techniques and labels.

        Raises:
            HeadwayError: there is none, or more than one.
        """
        found = [
            cell
            for cell in self.cells
            if set(cell.techniques) == set(techniques) and all(cell.labels.get(k) == v for k, v in labels.items())
        ]
        if len(found) != 1:
            what = "+".join(techniques) or "none"
            where = f" at {labels}" if labels else ""
            raise HeadwayError(
                what, f"is {len(found)} cells{where}", expected="one", hint="give model, sequence, batch"
            )
        return found[0]

    def tables(self) -> list[list[CellResult]]:
        """The cells in groups that may be compared: same labels, same environment."""
        groups: dict[Any, list[CellResult]] = {}
        for cell in self.cells:
            groups.setdefault((cell.environment, tuple(sorted(cell.labels.items()))), []).append(cell)
        return list(groups.values())


def refuse_incomparable(cells: Sequence[CellResult]) -> None:
    """Refuse cells that one table must not hold.

    Raises:
        HeadwayError: they come from different machines or versions, have different tokens per step, or fewer than three
            measured steps.
    """
    measured = [cell for cell in cells if cell.status == "ok"]
    if len({cell.environment for cell in cells}) > 1:
        raise HeadwayError("cells", "were measured on different machines or versions", hint="make a table of each")
    short = [cell.name for cell in measured if min(map(len, cell.step_seconds)) < LEAST_STEPS]
    if short:
        raise HeadwayError(
            ", ".join(short), f"has fewer than {LEAST_STEPS} measured steps", hint="raise the number of measured steps"
        )
    if len({cell.tokens_per_step for cell in measured}) > 1:
        counts = ", ".join(f"{cell.name} {cell.tokens_per_step:g}" for cell in measured)
        raise HeadwayError(
            "cells", f"have different numbers of tokens per step ({counts})", hint="compare equal batches"
        )


def ratio(of: CellResult, to: CellResult, metric: str = "step_milliseconds") -> Ratio:
    """``of`` / ``to``, repeat by repeat.

    Raises:
        HeadwayError: they cannot be compared, or one has no result.
    """
    refuse_incomparable([of, to])
    for cell in (of, to):
        if cell.status != "ok":
            raise HeadwayError(cell.name, f"has no result: {cell.status}, {cell.cause}")
    shared = sorted(of.values.keys() & to.values.keys())
    pairs = [(_of_repeat(of.values[i], metric), _of_repeat(to.values[i], metric)) for i in shared]
    values = sorted(a / b for a, b in pairs if a is not None and b)
    if not values:
        raise HeadwayError(metric, f"was not measured for {of.name} and {to.name}")
    return Ratio(median(values), values[0], values[-1])


def _of_repeat(value: dict[str, Any], metric: str) -> float | None:
    seconds = mean(value["step_seconds"])
    if metric == "step_milliseconds":
        return seconds * 1e3
    if metric == "tokens_per_second":
        return value["tokens_per_step"] / seconds
    if metric == "flops_rate":
        return value["flops_per_step"] / seconds
    return value.get(metric)


def _void_lines(lines: Sequence[Line], drift: float | None) -> set[int]:
    """Indices of the cells beside which the reference was not as usual.

    Usual is the median of the reference over the session. The neighbours are the measurements of the reference just
    before and just after; one that failed is no measurement.
    """
    if drift is None:
        return set()
    void: set[int] = set()
    sessions = dict.fromkeys(x.get("session") for x in lines)
    for session in sessions:
        own = [(i, x) for i, x in enumerate(lines) if x.get("session") == session]
        times = {
            i: mean(x["value"]["step_seconds"]) for i, x in own if x["kind"] == "reference" and x["status"] == "ok"
        }
        if not times:
            continue
        usual = median(times.values())
        for i, x in own:
            if x["kind"] != "cell" or x["status"] != "ok":
                continue
            before = [j for j in times if j < i]
            after = [j for j in times if j > i]
            beside = [*before[-1:], *after[:1]]
            if any(abs(times[j] / usual - 1) > drift for j in beside):
                void.add(i)
    return void
