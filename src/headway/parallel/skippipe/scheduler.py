"""From a cluster to a schedule: placement, then paths, by one of four ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from headway.parallel.skippipe.cluster import Cluster, Path, Rules, Schedule, ScheduleError, Stages
from headway.parallel.skippipe.paths import PathFinder, Route
from headway.parallel.skippipe.placement import Placer
from headway.parallel.skippipe.search import BRANCHES, PENALTY, Budget, ConflictSearch, Found
from headway.parallel.skippipe.simulator import rounds, simulate

Arm = Literal["cbs", "no-tc2", "random", "full"]
RETRIES, MORE_BRANCHES = 8, 30


def skip_paths(
    cluster: Cluster,
    replicas: Sequence[int],
    length: int,
    *,
    micro_batches: int,
    arm: Arm = "cbs",
    swaps: int = 2,
    seed: int = 0,
    stages: Stages | None = None,
    factor: float = 1.0,
    budget: Budget | None = None,
) -> Schedule:
    """Place stages on nodes and give every data node as many paths as it has memory for.

    Args:
        replicas: nodes of every stage, stage 0 (the data nodes) first.
        length: stages that a path visits, stage 0 among them.
        micro_batches: of an iteration; they take the paths in turn.
        arm: ``cbs``: quotas, memories and no two at a node at once, the best by simulation; ``no-tc2``: quotas and
            memories only, by the plan; ``random``: the same on links that all count alike; ``full``: all stages.
        swaps: stages that a path may visit out of order; 0 keeps the order.
        stages: a placement that is there already.
        factor: what the replicas of a stage exchange, in units of a micro-batch's activations.

    Raises:
        ScheduleError: the numbers do not fit, or no legal schedule was found.
    """
    _check(cluster, replicas, length, arm)
    stages = stages or Placer(cluster, replicas, factor, seed).search()
    if arm == "full":
        return full_pipeline(cluster, stages, micro_batches)
    rules = Rules(length, swaps, memory=cluster.memory)

    def simulated(routes: Sequence[Route]) -> float:
        return simulate(cluster, rounds([route.path for route in routes], cluster, micro_batches)).seconds

    tries = range(RETRIES if arm == "random" else 1)  # its plan is a draw, which may have led to no solution
    plans = (_paths(cluster, stages, rules, budget, arm, seed + 1000 * turn, None) for turn in tries)
    plain = next((plan for plan in plans if plan is not None), None)
    found = plain
    if arm == "cbs":
        cut = _paths(cluster, stages, rules, budget, arm, seed, simulated)
        # The plan without times is a candidate too: a search that is cut off early must not end behind it.
        found = cut if cut is not None and (plain is None or cut.value <= simulated(plain.routes)) else plain
    if found is None:
        raise ScheduleError("schedule", f"has none for paths of {length} of {len(replicas)} stages on "
                            f"{list(replicas)} replicas with memory for {cluster.memory} micro-batches",
                            hint="give more memory or replicas, or longer paths")  # fmt: skip
    if arm == "random":
        found = replace(found, bound=found.planned)  # its plan has no seconds to compare
    ended = "the least there is" if found.complete and found.gap <= 0 else "within the budget of the search"
    return Schedule(stages, found.paths, simulated(found.routes), found.gap, f"{arm}: {ended}",
                    {"solutions": found.solutions, "nodes": found.nodes,
                     "visits": [list(route.visits) for route in found.routes]})  # fmt: skip


def full_pipeline(cluster: Cluster, stages: Stages, micro_batches: int) -> Schedule:
    """All stages in order: as many chains as the smallest stage has nodes, each with a slot for all that it holds."""
    chains: list[Path] = list(zip(*stages, strict=False))
    paths = tuple(chain for chain in chains for _ in range(cluster.memory))
    seconds = simulate(cluster, rounds(paths, cluster, micro_batches)).seconds
    return Schedule(stages, paths, seconds, 0.0, "full: all stages in order")


def _check(cluster: Cluster, replicas: Sequence[int], length: int, arm: str) -> None:
    stages = len(replicas)
    if arm not in get_args(Arm):
        raise ScheduleError("scheduler", got=arm, expected=" or ".join(get_args(Arm)))
    if not 2 <= length <= stages:
        raise ScheduleError("path_length", got=length, expected=f"2 to {stages}, the number of stages")
    need = replicas[0] * cluster.memory * (length - 1)
    have = sum(replicas[1:]) * cluster.memory
    if arm != "full" and need > have:
        raise ScheduleError("replicas", f"have room for {have} visits of stages after the first, and "
                            f"{replicas[0] * cluster.memory} paths of {length} make {need}",
                            hint="fewer data nodes, shorter paths or more replicas")  # fmt: skip
    if arm != "full" and need < stages - 1:
        raise ScheduleError("path_length", f"of {length} on {replicas[0] * cluster.memory} paths makes {need} visits "
                            f"to {stages - 1} stages: some would learn nothing", hint="make paths longer")  # fmt: skip


def _paths(
    cluster: Cluster,
    stages: Stages,
    rules: Rules,
    budget: Budget | None,
    arm: Arm,
    seed: int,
    value: Callable[[Sequence[Route]], float] | None,
) -> Found | None:
    seen = cluster
    if arm == "random":  # all links and nodes alike, but for a grain that breaks ties
        grain = np.random.default_rng(seed).random(cluster.costs.shape) * 1e-3
        seen = Cluster((1 + grain + grain.T) * (1 - np.eye(len(grain))), np.ones(len(grain)), cluster.memory)
    finder = PathFinder(seen, stages, rules)
    agents = [(node, k * float(seen.compute[node])) for node in stages[0] for k in range(cluster.memory)]
    times = value is not None
    found = None
    for branches, penalty in ((BRANCHES, PENALTY), (MORE_BRANCHES, 100.0)):  # then whatever leads to a solution
        found = found or ConflictSearch(finder, agents, rules, times, value, budget, branches, penalty).run()
    return found
