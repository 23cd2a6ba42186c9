"""Nodes with uneven links, and the schedules that run on them: plain numbers, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headway.core.errors import HeadwayError

Path = tuple[int, ...]
"""The nodes of one micro-batch's forward pass, its data node first; the loss is back there, then all in reverse."""
Stages = tuple[tuple[int, ...], ...]
"""The nodes of each stage, stage 0 (the data nodes) first."""
UNIT_SLIP = 50.0
"""A link so many times slower than the median of its two nodes' others was given in another unit."""


class ScheduleError(HeadwayError):
    """A cluster or a schedule that cannot be used; the message names the pair of nodes or the constraint."""


@dataclass(frozen=True)
class Cluster:
    """What a scheduler knows of the machines.

    Raises:
        ScheduleError: a pair of nodes without a cost, with two costs, or with one in another unit.
    """

    costs: NDArray[np.float64]
    """[N, N] seconds for one micro-batch's activations from node to node; symmetric, 0 on the diagonal."""
    compute: NDArray[np.float64]
    """[N] seconds of one stage's forward pass of a micro-batch; backward takes 1.5 times as long, the loss a fourth."""
    memory: int = 3
    """Micro-batches that a node can hold between forward and backward."""
    names: tuple[str, ...] = ()
    units: bool = True
    """Refuse links that look as if given in another unit."""

    def __post_init__(self) -> None:
        costs, n = self.costs, len(self.compute)
        if costs.shape != (n, n):
            raise ScheduleError("costs", f"are {costs.shape[0]} x {costs.shape[-1]} for {n} nodes")
        for i in range(n):
            for j in range(i + 1, n):
                there, back = float(costs[i, j]), float(costs[j, i])
                if not (np.isfinite([there, back]).all() and there >= 0 and back >= 0):
                    raise ScheduleError(f"costs[{self.name(i)}, {self.name(j)}]", "is missing", got=(there, back),
                                        expected="seconds")  # fmt: skip
                if abs(there - back) > 1e-9 * max(there, back):
                    raise ScheduleError(f"costs[{self.name(i)}, {self.name(j)}]",
                                        f"is {there:g} s there and {back:g} s back",
                                        expected="one cost for both directions")  # fmt: skip
        if self.units:
            self._check_units()

    def _check_units(self) -> None:
        n = len(self.compute)
        for i in range(n):
            for j in range(i + 1, n):
                others = np.delete(np.concatenate([self.costs[i], self.costs[j]]), [i, j, n + i, n + j])
                others = others[others > 0]
                cost = float(self.costs[i, j])
                if len(others) and cost > UNIT_SLIP * float(np.median(others)):
                    raise ScheduleError(f"costs[{self.name(i)}, {self.name(j)}]",
                                        f"is {cost:g} s where the other links of the two take about "
                                        f"{np.median(others):g} s", hint="give all links in one unit")  # fmt: skip

    def name(self, node: int) -> str:
        """A node in words."""
        return f"{node} ({self.names[node]})" if self.names else str(node)

    def pass_seconds(self, path: Path) -> float:
        """Forward, loss and backward of one micro-batch that never waits: ``sum 2.5 w + sum 2 c + w0 / 4``."""
        hops = zip(path, (*path[1:], path[0]))
        links = 2 * sum(float(self.costs[a, b]) for a, b in hops)
        return 2.5 * float(self.compute[list(path)].sum()) + links + float(self.compute[path[0]]) / 4


@dataclass(frozen=True)
class Rules:
    """What a path may look like, and how much every node and stage may be used (constraints CC and TC1)."""

    length: int
    """Stages of every path, stage 0 among them."""
    swaps: int = 2
    """Visits below the highest stage so far, and their total distance; 0 keeps the order."""
    jump: int = 4
    """How far ahead of the highest stage so far the next may be."""
    memory: int = 3
    """Paths through one node."""


@dataclass(frozen=True)
class Schedule:
    """Where every stage lives and which way every micro-batch takes."""

    stages: Stages
    paths: tuple[Path, ...]
    seconds: float = float("nan")
    """Predicted time of an iteration."""
    gap: float = float("nan")
    """How far above the best that is possible the slowest path may be, as a share; 0: it is the best there is."""
    label: str = ""
    """Which search made it and how it ended."""
    extra: dict[str, Any] = field(default_factory=dict)

    def stage_of(self) -> dict[int, int]:
        """Node -> stage."""
        return {node: stage for stage, nodes in enumerate(self.stages) for node in nodes}

    def orders(self) -> tuple[tuple[int, ...], ...]:
        """The stages that every path visits, in its order."""
        of = self.stage_of()
        return tuple(tuple(of[node] for node in path) for path in self.paths)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a checkpoint or JSON."""
        return {"stages": [list(s) for s in self.stages], "paths": [list(p) for p in self.paths],
                "seconds": self.seconds, "gap": self.gap, "label": self.label, "extra": self.extra}  # fmt: skip

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Schedule:
        """The inverse of ``to_dict``."""
        stages = tuple(tuple(s) for s in data["stages"])
        paths = tuple(tuple(p) for p in data["paths"])
        return cls(stages, paths, data["seconds"], data["gap"], data["label"], data["extra"])


def visits(orders: Sequence[Sequence[int]], stages: int) -> list[int]:
    """How many of ``orders`` visit each stage."""
    return [sum(stage in order for order in orders) for stage in range(stages)]
