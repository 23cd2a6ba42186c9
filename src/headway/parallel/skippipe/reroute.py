"""Going on without a node: another replica takes its micro-batches, or they visit another stage instead."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from headway.parallel.skippipe.cluster import Cluster, Path, Rules, Schedule, ScheduleError
from headway.parallel.skippipe.constraints import order_violations, violations
from headway.parallel.skippipe.paths import Forbidden, PathFinder


def reroute(schedule: Schedule, lost: int, rules: Rules, cluster: Cluster | None = None) -> Schedule:
    """The schedule without node ``lost``.

    A micro-batch that would have visited it goes to the least loaded replica of the same stage that has memory; where
    there is none, it visits another stage in its place, if every constraint on its path still holds.

    Args:
        cluster: given, the cheapest path decides; else the first legal one.

    Raises:
        ScheduleError: neither is possible; it names the constraint that would be violated.
    """
    stages = tuple(tuple(node for node in nodes if node != lost) for nodes in schedule.stages)
    where = f"node {lost}"
    stage = next((s for s, nodes in enumerate(schedule.stages) if lost in nodes), None)
    if stage is None:
        raise ScheduleError(where, "is in no stage of the schedule")
    load = Counter(node for path in schedule.paths if lost not in path for node in path)
    paths: list[Path] = []
    for path in schedule.paths:
        if lost in path:
            path = _sibling(path, lost, stages[stage], load, rules) or _other(
                path, lost, schedule, stages, load, rules, cluster
            )
            load.update(path)
        paths.append(path)
    found = replace(schedule, stages=stages, paths=tuple(paths), label=f"{schedule.label}; without {where}", extra={})
    wrong = violations(found, rules)
    if wrong:
        raise ScheduleError(where, f"is lost and cannot be gone round: {wrong[0]}",
                            hint="bring a replica of its stage, or stop")  # fmt: skip
    return found


def _sibling(path: Path, lost: int, siblings: tuple[int, ...], load: Counter[int], rules: Rules) -> Path | None:
    able = [node for node in siblings if load[node] < rules.memory and node not in path]
    if not able:
        return None
    to = min(able, key=lambda node: (load[node], node))
    return tuple(to if node == lost else node for node in path)


def _other(
    path: Path,
    lost: int,
    schedule: Schedule,
    stages: tuple[tuple[int, ...], ...],
    load: Counter[int],
    rules: Rules,
    cluster: Cluster | None,
) -> Path:
    """The stage is skipped: the path goes through other stages, and none of the nodes that are full."""
    of = schedule.stage_of()
    if path[0] == lost:
        raise ScheduleError(f"node {lost}", "is a data node, and no other has memory for its micro-batches: "
                            "CC1: every path starts at stage 0")  # fmt: skip
    if cluster is not None:
        full = frozenset(node for node, count in load.items() if count >= rules.memory and node != path[0])
        finder = PathFinder(cluster, tuple(nodes or (-1,) for nodes in stages), rules) if all(stages) else None
        route = finder.best(path[0], 0.0, Forbidden(frozenset((of[lost],)), full)) if finder else None
        if route is not None:
            return route.path
    for stage, nodes in enumerate(stages):
        free = [node for node in nodes if load[node] < rules.memory]
        if not free or stage in [of[node] for node in path]:
            continue
        kept = [node for node in path if node != lost]
        for place in range(1, len(kept) + 1):
            candidate = (*kept[:place], free[0], *kept[place:])
            if not order_violations([of[node] for node in candidate], len(stages), rules):
                return tuple(candidate)
    shorter = [of[node] for node in path if node != lost]
    broken = order_violations(shorter, len(stages), rules) or ["TC1: no other stage has memory left"]
    raise ScheduleError(f"node {lost}", f"is lost, and a micro-batch cannot leave out stage {of[lost]}: {broken[0]}",
                        hint="bring a replica of its stage, or stop")  # fmt: skip
