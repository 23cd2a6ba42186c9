"""Measure every cell of a grid, each in a process of its own, interleaved and repeated, with a reference in between.

A cell is a set of techniques at a model, a sequence length and a batch. What a cell did, also how it failed, is a
line of an append-only log; a grid that is started again goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from headway.core.errors import HeadwayError
from headway.plan.dissect.isolate import Outcome, run_isolated
from headway.plan.dissect.ledger import Line, Log, environment, fingerprint
from headway.plan.dissect.results import Results

RECIPE_RUNNER = "headway.plan.dissect.measure:measure_recipe"


@dataclass(frozen=True)
class Cell:
    """One thing to measure."""

    techniques: tuple[str, ...]
    work: Mapping[str, Any]
    """What the runner gets: plain JSON-able data. It is the cell's identity, together with the runner."""
    labels: Mapping[str, Any] = field(default_factory=dict)
    """Model, sequence, batch ...: cells with the same labels differ by their techniques alone."""
    runner: str = RECIPE_RUNNER
    """``module:function``, imported in the cell's process; returns what ``measure_recipe`` does."""
    ladder: str = ""
    """Cells of one ladder are climbed in the order in which they are given, until one fails."""

    @property
    def key(self) -> str:
        """Names the cell in the log."""
        return fingerprint([self.runner, dict(self.work)])

    @property
    def title(self) -> str:
        """For progress and tables."""
        where = ", ".join(f"{name} {value}" for name, value in self.labels.items())
        return f"{'+'.join(self.techniques) or 'none'}{f' ({where})' if where else ''}"


@dataclass(frozen=True)
class Conduct:
    """How the cells are measured."""

    repeats: int = 3
    """How often each cell is measured; all cells once, then all once more."""
    timeout: float = 600.0
    """Seconds after which a cell is stopped."""
    memory: int | None = None
    """Bytes that a cell may allocate, to try out a smaller machine."""
    drift: float | None = 0.05
    """A cell is void where the reference next to it was off its median by more than this share. None: no reference."""
    retries: int = 1
    """How often a void cell is measured again."""


def run_cells(
    cells: Sequence[Cell],
    log: str | Path,
    conduct: Conduct | None = None,
    reference: Cell | None = None,
    say: Callable[[str], None] | None = None,
) -> Results:
    """Measure ``cells`` and return all that the log holds of them in this environment.

    Args:
        log: file that is appended to; what it already has is not measured again.
        reference: measured between cells; by default the first cell.
        say: is told of each measurement.

    Raises:
        HeadwayError: there is nothing to measure, or two cells are the same.
    """
    if not cells:
        raise HeadwayError("grid", "has no cell", hint="the rule allows no combination, or a list is empty")
    keys: dict[str, Cell] = {}
    for cell in cells:
        if (same := keys.setdefault(cell.key, cell)) is not cell:
            raise HeadwayError(
                "grid", f"{cell.title} is the same as {same.title}", hint="leave out what changes nothing"
            )
    conduct = conduct or Conduct()
    runner = _Runner(cells, Log(log), conduct, reference or cells[0], say or (lambda _: None))
    for repeat in range(conduct.repeats):
        runner.round(repeat)
    for _ in range(conduct.retries if conduct.drift is not None else 0):
        if not runner.void():
            break
        runner.started = False  # the newest measurement of the reference may be the one that drifted
        for repeat in range(conduct.repeats):
            runner.round(repeat)
    return runner.results()


class _Runner:
    def __init__(self, cells: Sequence[Cell], log: Log, conduct: Conduct, reference: Cell, say: Any) -> None:
        self.cells, self.log, self.conduct, self.reference, self.say = cells, log, conduct, reference, say
        self.environment = environment()
        self.place = fingerprint(self.environment)
        self.session = f"{time.time():.3f}"
        self.started = False
        """Whether the reference was measured before the first cell; it is after every cell."""

    def results(self) -> Results:
        keys = {cell.key for cell in self.cells}
        wanted = [x for x in self.log if x.get("environment") == self.place and (x["key"] in keys or _is_reference(x))]
        return Results(wanted, self.conduct.drift)

    def void(self) -> set[tuple[str, int]]:
        """(cell, repeat) that was measured, but only while the machine was not itself."""
        return self.results().only_void()

    def round(self, repeat: int) -> None:
        """Measure every cell once that has no valid measurement of this repeat."""
        results = self.results()
        for cell in self.cells:
            if results.failed(cell.key) or self._below_failed(cell, results) or results.has(cell.key, repeat):
                continue
            if not self.started:
                self._refer()
            line = self._measure(cell, repeat, "cell")
            self._refer()
            if line["status"] != "ok":
                results = self.results()

    def _below_failed(self, cell: Cell, results: Results) -> bool:
        """Whether the ladder broke on a rung before this one."""
        if not cell.ladder:
            return False
        before = self.cells[: list(self.cells).index(cell)]
        return any(other.ladder == cell.ladder and results.failed(other.key) for other in before)

    def _refer(self) -> None:
        if self.conduct.drift is not None:
            self._measure(self.reference, 0, "reference")
        self.started = True

    def _measure(self, cell: Cell, repeat: int, kind: str) -> Line:
        outcome = run_isolated(cell.runner, dict(cell.work), timeout=self.conduct.timeout, memory=self.conduct.memory)
        line = {
            "kind": kind,
            "key": cell.key,
            "environment": self.place,
            "session": self.session,
            "repeat": repeat,
            "time": time.time(),
            "techniques": list(cell.techniques),
            "labels": dict(cell.labels),
            **outcome.to_dict(),
            "machine": self.environment,
        }
        self.log.append(line)
        self.say(f"{'reference: ' if kind == 'reference' else ''}{cell.title}: {_summary(outcome)}")
        return line


def _is_reference(line: Line) -> bool:
    return line.get("kind") == "reference"


def _summary(outcome: Outcome) -> str:
    if outcome.status != "ok":
        return f"{outcome.status}: {outcome.cause}"
    seconds = outcome.value.get("step_seconds")
    return f"{mean(seconds) * 1e3:.1f} ms a step" if seconds else "done"
