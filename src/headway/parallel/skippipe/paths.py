"""The best path of one micro-batch: A* over stages and nodes, with what it may not visit and where it has to wait."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from headway.parallel.skippipe.cluster import Cluster, Path, Rules, Stages

Visit = tuple[int, float, float]
"""Node, enter, leave."""


@dataclass(frozen=True)
class Forbidden:
    """What one micro-batch may not do."""

    stages: frozenset[int] = frozenset()
    nodes: frozenset[int] = frozenset()
    busy: frozenset[Visit] = frozenset()
    """Times at which a node is another's."""


@dataclass(frozen=True)
class Route:
    """A path with its times."""

    path: Path
    seconds: float
    """When its backward pass is done."""
    visits: tuple[Visit, ...]
    """Forward, loss, backward, in order."""


class PathFinder:
    """Finds the best legal path from a data node; remembers what it found."""

    def __init__(self, cluster: Cluster, stages: Stages, rules: Rules) -> None:
        self.stages, self.rules = stages, rules
        self.costs, self.compute = cluster.costs.tolist(), cluster.compute.tolist()
        self.stage_of = {node: stage for stage, nodes in enumerate(stages) for node in nodes}
        used = [node for nodes in stages for node in nodes]
        self.least_compute = min(self.compute[n] for n in used)
        self.least_link = min((self.costs[a][b] for a in used for b in used if a != b), default=0.0)
        self._known: dict[tuple[int, float, Forbidden], Route | None] = {}
        self.expanded = 0

    def best(self, start: int, offset: float = 0.0, forbidden: Forbidden | None = None) -> Route | None:
        """The route that is back first, or None where no legal path is left.

        Args:
            start: the data node.
            offset: seconds before it starts.
        """
        key = (start, offset, forbidden or Forbidden())
        if key not in self._known:
            self._known[key] = self._search(*key)
        return self._known[key]

    def _search(self, start: int, offset: float, forbidden: Forbidden) -> Route | None:
        busy: dict[int, list[Visit]] = {}
        for visit in forbidden.busy:
            busy.setdefault(visit[0], []).append(visit)
        # (lower bound of the end, path, when its last node is done, seconds of the way back without waiting, route)
        begin = self._free(busy, start, offset, self.compute[start])
        done = begin + self.compute[start]
        heap: list[tuple[float, Path, float, float, Route | None]] = []
        heapq.heappush(heap, (self._bound((start,), done, 1.5 * self.compute[start]), (start,), done,
                              1.5 * self.compute[start], None))  # fmt: skip
        while heap:
            _, path, done, back, route = heapq.heappop(heap)
            if route is not None:
                return route
            self.expanded += 1
            if len(path) == self.rules.length:
                route = self._timed(path, offset, busy)
                heapq.heappush(heap, (route.seconds, path, done, back, route))
                continue
            for node in self._next(path, forbidden):
                link = self.costs[path[-1]][node]
                enter = self._free(busy, node, done + link, self.compute[node])
                later, way = enter + self.compute[node], back + link + 1.5 * self.compute[node]
                heapq.heappush(heap, (self._bound((*path, node), later, way), (*path, node), later, way, None))
        return None

    def _bound(self, path: Path, done: float, back: float) -> float:
        """Admissible: the hops that are left at the least cost there is, and no waiting."""
        left = self.rules.length - len(path)
        home = self.costs[path[-1]][path[0]] if left == 0 else self.least_link * (self.rules.length > 1)
        hops = left * (2.5 * self.least_compute + 2 * self.least_link)
        return done + back + hops + 2 * home + self.compute[path[0]] / 4

    def _next(self, path: Path, forbidden: Forbidden) -> Iterator[int]:
        order = [self.stage_of[node] for node in path]
        frontier, swapped, highest = 0, 0, 0
        for stage in order:
            frontier = max(frontier, stage)
            swapped += frontier - stage
        seen, highest = set(order), len(self.stages) - 1
        left = self.rules.length - len(path)
        for stage in range(max(1, frontier - 1), min(highest, frontier + self.rules.jump) + 1):
            if stage in seen or stage in forbidden.stages:
                continue
            if stage < frontier and swapped + 1 > self.rules.swaps:
                continue
            if left > len(self.stages) - len(seen):
                return
            yield from (node for node in self.stages[stage] if node not in forbidden.nodes)

    @staticmethod
    def _free(busy: dict[int, list[Visit]], node: int, at: float, seconds: float) -> float:
        """The earliest start from ``at`` at which the node is nobody else's for so long."""
        for _, enter, leave in sorted(busy.get(node, ()), key=lambda visit: visit[1]):
            if at < leave and at + seconds > enter:
                at = leave
        return at

    def _timed(self, path: Path, offset: float, busy: dict[int, list[Visit]]) -> Route:
        visits: list[Visit] = []
        at = offset
        tasks = [(node, self.compute[node]) for node in path] + [(path[0], self.compute[path[0]] / 4)]
        tasks += [(node, 1.5 * self.compute[node]) for node in reversed(path)]
        for index, (node, seconds) in enumerate(tasks):
            if index:
                at += self.costs[tasks[index - 1][0]][node]
            at = self._free(busy, node, at, seconds)
            visits.append((node, at, at + seconds))
            at += seconds
        return Route(path, at, tuple(visits))
