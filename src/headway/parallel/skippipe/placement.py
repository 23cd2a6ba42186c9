"""Which node holds which stage: a genetic search with a local search of cyclic moves (GCMA).

Source: the paper's section on scheduling; the search itself is from Yuan et al., Decentralized Training of Foundation
Models in Heterogeneous Environments (DT-FM), arXiv 2206.01288.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching

from headway.parallel.skippipe.cluster import Cluster, ScheduleError, Stages


def bottleneck_matching(costs: NDArray[np.float64]) -> tuple[float, list[tuple[int, int]]]:
    """The matching of the smaller side of ``costs`` [R, C] whose highest cost is least; among those, the cheapest.

    Source: binary search over the costs with Hopcroft and Karp's matching.
    """
    wanted, values = min(costs.shape), np.unique(costs)
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        matched = maximum_bipartite_matching(csr_matrix(costs <= values[middle]), perm_type="column")
        if int((matched >= 0).sum()) == wanted:
            high = middle
        else:
            low = middle + 1
    highest = float(values[low])
    rows, columns = linear_sum_assignment(np.where(costs <= highest, costs, 1e6 * (1 + values[-1])))
    return highest, [(int(r), int(c)) for r, c in zip(rows, columns)]


def _bottleneck(costs: NDArray[np.float64]) -> float:
    """The highest cost of the bottleneck matching; small sides by trying all, which is faster."""
    costs = costs if costs.shape[0] <= costs.shape[1] else costs.T
    rows, columns = costs.shape
    if math.perm(columns, rows) > 500:
        return bottleneck_matching(costs)[0]
    return float(costs[np.arange(rows), _assignments(rows, columns)].max(1).min())


@cache
def _assignments(rows: int, columns: int) -> NDArray[np.int64]:
    return np.array(list(itertools.permutations(range(columns), rows)))


def open_tour(costs: NDArray[np.float64]) -> tuple[float, list[int]]:
    """The cheapest way from 0 through all of ``costs`` [S, S], without return (Held and Karp)."""
    n = len(costs)
    best: dict[tuple[int, int], tuple[float, int]] = {(1, 0): (0.0, -1)}
    for size in range(2, n + 1):
        for others in itertools.combinations(range(1, n), size - 1):
            mask = 1 | sum(1 << i for i in others)
            for last in others:
                before = mask & ~(1 << last)
                steps = ((best[before, i][0] + costs[i, last], i) for i in (0, *others) if (before, i) in best)
                best[mask, last] = min(steps)
    mask = (1 << n) - 1
    last = min((i for i in range(n) if (mask, i) in best), key=lambda i: best[mask, i][0])
    seconds, tour = best[mask, last][0], []
    while last >= 0:
        tour.append(last)
        mask, last = mask & ~(1 << last), best[mask, last][1]
    return float(seconds), tour[::-1]


@dataclass
class Placer:
    """Searches placements of one cluster."""

    cluster: Cluster
    sizes: Sequence[int]
    """Nodes of each stage; together, all nodes."""
    factor: float = 1.0
    """Bytes that a stage's replicas exchange, in units of a micro-batch's activations."""
    seed: int = 0
    _links: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if sum(self.sizes) != len(self.cluster.compute) or min(self.sizes) < 1:
            raise ScheduleError("replicas", f"are {list(self.sizes)} for {len(self.cluster.compute)} nodes",
                                expected="at least one a stage, all nodes in sum")  # fmt: skip
        self.rng = np.random.default_rng(self.seed)

    def score(self, stages: Stages) -> float:
        """Highest link inside a stage, plus twice the tour through the stages along bottleneck matchings."""
        costs = self.cluster.costs
        within = max(float(costs[np.ix_(stage, stage)].max()) for stage in stages)
        return within + 2 * open_tour(self._between(stages))[0]

    def _between(self, stages: Stages) -> NDArray[np.float64]:
        between = np.zeros((len(stages), len(stages)))
        for i, j in itertools.combinations(range(len(stages)), 2):
            a, b = sorted((tuple(sorted(stages[i])), tuple(sorted(stages[j]))))
            if (a, b) not in self._links:
                self._links[a, b] = _bottleneck(self.cluster.costs[np.ix_(a, b)])
            between[i, j] = between[j, i] = self._links[a, b]
        return between

    def _grouped(self, genes: NDArray[np.int64]) -> Stages:
        return tuple(tuple(n for n, s in enumerate(genes) if s == stage) for stage in range(len(self.sizes)))

    def _crossed(self, mother: NDArray[np.int64], father: NDArray[np.int64]) -> NDArray[np.int64]:
        child = father.copy()
        points = self.rng.permutation(len(child))[:5]
        child[points] = mother[points]
        for stage, size in enumerate(self.sizes):  # who is too many moves to where somebody is missing
            for node in self.rng.permutation(np.flatnonzero(child == stage))[size:]:
                counts = np.bincount(child, minlength=len(self.sizes))
                child[node] = next(s for s, wanted in enumerate(self.sizes) if counts[s] < wanted)
        return child

    def _cycle(self, genes: NDArray[np.int64]) -> NDArray[np.int64]:
        """One cycle of moves between stages: each brings the node with the best gain to the next stage."""
        costs, stages = self.cluster.costs, len(self.sizes)
        genes = genes.copy()
        start = current = int(self.rng.integers(stages))
        moved: list[int] = []
        for _ in range(stages):
            gains: list[tuple[float, int, int]] = []
            for node in np.flatnonzero(genes == current):
                if int(node) in moved:
                    continue
                own = costs[node][genes == current].sum() * (self.factor - 1)
                for to in range(stages):
                    if to != current:
                        gains.append((own - costs[node][genes == to].sum() * (self.factor - 1), int(node), to))
            if not gains:
                break
            _, best, to = max(gains)
            genes[best], current = to, to
            moved.append(best)
            if current == start:
                break
        if current != start:  # close the cycle, so that sizes are kept
            candidates = [int(n) for n in np.flatnonzero(genes == current) if int(n) not in moved]
            genes[min(candidates or moved[-1:], key=lambda n: costs[n][genes == start].sum())] = start
        return genes

    def search(self, population: int = 40, trials: int = 400) -> Stages:
        """The best placement found, its replicas in the order of the matchings along the tour."""
        first = np.repeat(np.arange(len(self.sizes)), self.sizes)
        genes = [self.rng.permutation(first) for _ in range(population)]
        scores = [self.score(self._grouped(g)) for g in genes]
        for _ in range(trials):
            a, b = self.rng.integers(population, size=2)
            child = self._cycle(self._crossed(genes[a], genes[b]))
            if list(np.bincount(child, minlength=len(self.sizes))) != list(self.sizes):
                continue
            score, worse = self.score(self._grouped(child)), a if scores[a] > scores[b] else b
            if score <= scores[worse]:
                genes[worse], scores[worse] = child, score
        return self.arranged(self._grouped(genes[int(np.argmin(scores))]))

    def arranged(self, stages: Stages) -> Stages:
        """Stages in the order of the tour, each one's replicas beside those they are matched with."""
        tour = open_tour(self._between(stages))[1]
        if len({self.sizes[s] for s in tour[1:]}) > 1:  # stages of unlike sizes keep the places that sizes name
            tour = list(range(len(stages)))
        arranged: list[tuple[int, ...]] = [stages[tour[0]]]
        for stage in tour[1:]:
            before, members = arranged[-1], stages[stage]
            pairs = dict(bottleneck_matching(self.cluster.costs[np.ix_(before, members)])[1])
            matched = [members[pairs[i]] for i in range(len(before)) if i in pairs]
            arranged.append((*matched, *(n for n in members if n not in matched)))
        return tuple(arranged)
