"""All paths together: conflict-based search over quotas of stages, memories of nodes, and times at nodes.

Source: the paper's section on path finding; conflict-based search is Sharon et al., Artificial Intelligence 219 (2015).
The agents are micro-batches; the low level is `paths.PathFinder`.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from headway.parallel.skippipe.cluster import Path, Rules
from headway.parallel.skippipe.paths import Forbidden, PathFinder, Route

BRANCHES = 3
"""Ways out of a conflict that a search with a budget follows."""
PENALTY = 1e-3
"""Seconds that each visit too many counts, so that of equals the one nearer to a solution comes first."""
GAIN = 0.12
"""A solution better than the first by this share is good enough."""

Agent = tuple[int, float]
"""A micro-batch: its data node and when it starts there, in seconds."""


@dataclass(frozen=True)
class Conflict:
    """What is wrong with a set of routes, and who could give way."""

    kind: Literal["stage", "node", "time"]
    where: int
    agents: tuple[int, ...]
    excess: int = 1
    spans: tuple[tuple[int, float, float], ...] = ()
    """Of a conflict in time: each agent's visit."""


@dataclass(frozen=True)
class Budget:
    """When a search ends."""

    nodes: int = 400
    seconds: float = 60.0
    """Of processor time, so that a search gives the same on a busy machine as far as it is not cut off."""
    exhaustive: bool = False
    """Follow every way out of every conflict: the best there is, for a handful of micro-batches."""


@dataclass(frozen=True)
class Found:
    """A solution: routes without the conflicts that were looked for."""

    routes: tuple[Route, ...]
    value: float
    """What was to be made small: the simulated time, or the planned end."""
    bound: float
    """No solution's slowest micro-batch is done before; in seconds of the plan."""
    complete: bool
    """The search ended by itself."""
    solutions: int
    nodes: int

    @property
    def paths(self) -> tuple[Path, ...]:
        """The paths, agent by agent."""
        return tuple(route.path for route in self.routes)

    @property
    def planned(self) -> float:
        """When the slowest micro-batch is back, by the plan."""
        return max(route.seconds for route in self.routes)

    @property
    def gap(self) -> float:
        """How far the plan may be above the best, as a share."""
        return self.planned / self.bound - 1


class ConflictSearch:
    """One search over one cluster's agents.

    Args:
        value: of a solution's routes; least is best. None: the planned end.
        times: also let no two micro-batches be at a node at once (TC2).
    """

    def __init__(
        self,
        finder: PathFinder,
        agents: Sequence[Agent],
        rules: Rules,
        times: bool,
        value: Callable[[Sequence[Route]], float] | None = None,
        budget: Budget | None = None,
        branches: int = BRANCHES,
        penalty: float = PENALTY,
    ) -> None:
        self.finder, self.agents, self.rules, self.times = finder, list(agents), rules, times
        self.value = value or (lambda routes: max(route.seconds for route in routes))
        self.budget, self.branches, self.penalty = budget or Budget(), branches, penalty
        self.quotas = self._shares()
        self.seen: set[tuple[Forbidden, ...]] = set()
        self.best: Found | None = None
        self.solutions = self.nodes = 0
        self.first = self.bound = 0.0

    def run(self) -> Found | None:
        """The best solution within the budget; None if there is none, or none was found in time."""
        nobody = tuple(Forbidden() for _ in self.agents)
        routes = self._routes(nobody)
        if routes is None:
            return None
        self.bound = max(route.seconds for route in routes)
        counter = itertools.count()
        heap = [(self._key(routes), next(counter), nobody, routes)]
        began, complete = time.process_time(), True
        while heap:
            if self._spent(began):
                complete = False
                break
            key, _, forbidden, routes = heapq.heappop(heap)
            if self.budget.exhaustive:
                self.bound = max(self.bound, key)  # what is open is no better
                if self.best is not None and self.best.planned <= self.bound:
                    break
            self.nodes += 1
            conflict = self._hard(routes)
            if conflict is None and self._note(routes):
                complete = self.budget.exhaustive
                break
            conflict = conflict or (self._overlap(routes) if self.times else None)
            if conflict is None:
                continue
            for child in self._children(conflict, forbidden, routes):
                heapq.heappush(heap, (self._key(child[1]), next(counter), *child))
        if self.best is None:
            return None
        done = complete and self.budget.exhaustive
        bound = self.best.planned if done else min(self.bound, self.best.planned)
        return replace(self.best, bound=bound, complete=complete, solutions=self.solutions, nodes=self.nodes)

    def _spent(self, began: float) -> bool:
        budget = self.budget
        if self.best is None:  # the first solution is worth more time
            return self.nodes >= max(1000, 10 * budget.nodes) or time.process_time() - began > 4 * budget.seconds
        return self.nodes >= self.best.nodes + budget.nodes or time.process_time() - began > budget.seconds

    def _routes(self, forbidden: Sequence[Forbidden]) -> tuple[Route, ...] | None:
        found = [self.finder.best(start, offset, f) for (start, offset), f in zip(self.agents, forbidden)]
        return tuple(route for route in found if route is not None) if None not in found else None

    def _key(self, routes: Sequence[Route]) -> float:
        worst = max(route.seconds for route in routes)
        return worst if self.budget.exhaustive else worst + self.penalty * self._too_many(routes)

    def _counts(self, routes: Sequence[Route]) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        stages: dict[int, list[int]] = {}
        nodes: dict[int, list[int]] = {}
        for agent, route in enumerate(routes):
            for node in route.path:
                nodes.setdefault(node, []).append(agent)
                stages.setdefault(self.finder.stage_of[node], []).append(agent)
        return stages, nodes

    def _shares(self) -> list[int]:
        """Quotas: each stage has its replicas' share of the visits, so that all learn alike; at most what it holds, and
        one visit of every micro-batch."""
        replicas = [len(nodes) for nodes in self.finder.stages]
        caps = [min(len(self.agents), r * self.rules.memory) for r in replicas]
        given = [0] * len(replicas)
        for _ in range(len(self.agents) * (self.rules.length - 1)):
            open_ = [s for s in range(1, len(caps)) if given[s] < caps[s]]
            if open_:
                stage = min(open_, key=lambda s: given[s] / replicas[s])
                given[stage] += 1
        level = max(g / r for g, r in zip(given, replicas))
        return [caps[0], *(min(cap, math.ceil(level * r)) for cap, r in zip(caps[1:], replicas[1:]))]

    def _too_many(self, routes: Sequence[Route]) -> int:
        stages, nodes = self._counts(routes)
        over = sum(max(0, len(a) - self.quotas[s]) for s, a in stages.items() if s)
        return 10 * over + sum(max(0, len(a) - self.rules.memory) for a in nodes.values())

    def _hard(self, routes: Sequence[Route]) -> Conflict | None:
        """The first stage over its quota, or without a visit, then the first node over its memory."""
        stages, nodes = self._counts(routes)
        for stage, agents in sorted(stages.items()):
            if stage and (over := len(agents) - self.quotas[stage]) > 0:
                return Conflict("stage", stage, tuple(agents), over)
        if len(stages) < len(self.finder.stages):  # a stage without visits: the most visited one gives one up
            stage = max((s for s in stages if s), key=lambda s: (len(stages[s]), s))
            return Conflict("stage", stage, tuple(stages[stage]))
        for node, agents in sorted(nodes.items()):
            if (over := len(agents) - self.rules.memory) > 0:
                return Conflict("node", node, tuple(agents), over)
        return None

    def _overlap(self, routes: Sequence[Route]) -> Conflict | None:
        """The first time at which two micro-batches want one node, those of the slowest first."""
        rank = sorted(range(len(routes)), key=lambda a: -routes[a].seconds)
        for a, b in itertools.combinations(rank, 2):
            for one in routes[a].visits:
                for other in routes[b].visits:
                    if one[0] == other[0] and one[1] < other[2] - 1e-9 and other[1] < one[2] - 1e-9:
                        return Conflict("time", one[0], (a, b), 1, (one, other))
        return None

    def _children(
        self, conflict: Conflict, forbidden: tuple[Forbidden, ...], routes: tuple[Route, ...]
    ) -> list[tuple[tuple[Forbidden, ...], tuple[Route, ...]]]:
        """Every way out, the cheapest first."""
        exhaustive = self.budget.exhaustive
        ways: list[tuple[float, int, Forbidden, Route]] = []
        for index, agent in enumerate(conflict.agents):
            ruled = self._ruled(conflict, index, forbidden[agent])
            route = self.finder.best(*self.agents[agent], ruled)
            if route is not None:
                ways.append((route.seconds, agent, ruled, route))
        ways.sort(key=lambda way: way[:2])
        one = exhaustive or conflict.kind == "time" or self.branches > BRANCHES
        together = 1 if one else conflict.excess
        found = []
        for combination in itertools.combinations(ways, together):
            rules, changed = list(forbidden), list(routes)
            for _, agent, ruled, route in combination:
                rules[agent], changed[agent] = ruled, route
            if tuple(rules) not in self.seen:
                self.seen.add(tuple(rules))
                found.append((tuple(rules), tuple(changed)))
            if len(found) >= self.branches and not exhaustive:
                break
        return found

    @staticmethod
    def _ruled(conflict: Conflict, index: int, before: Forbidden) -> Forbidden:
        if conflict.kind == "stage":
            return replace(before, stages=before.stages | {conflict.where})
        if conflict.kind == "node":
            return replace(before, nodes=before.nodes | {conflict.where})
        return replace(before, busy=before.busy | {conflict.spans[1 - index]})

    def _note(self, routes: tuple[Route, ...]) -> bool:
        """Value routes that keep quotas and memories; whether that is enough."""
        if self.budget.exhaustive and self.times and self._overlap(routes) is not None:
            return False
        value = self.value(routes)
        self.solutions += 1
        self.first = self.first or value
        if self.best is None or value < self.best.value:
            self.best = Found(routes, value, self.bound, False, self.solutions, self.nodes)
        if self.budget.exhaustive:
            return False
        return not self.times or self.best.value <= (1 - GAIN) * self.first
