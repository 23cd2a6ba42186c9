"""What a legal schedule is, checked from the schedule alone; shares no code with the search."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from headway.parallel.skippipe.cluster import Cluster, Rules, Schedule


def order_violations(order: Sequence[int], stages: int, rules: Rules) -> list[str]:
    """Convergence constraints (CC) that one path's order of stages breaks, as sentences.

    The frontier is the highest stage so far; a visit below it is a swap of distance ``frontier - stage``.
    """
    found = []
    if not order or order[0] != 0:
        found.append(f"CC1: the path {list(order)} does not start at stage 0")
    if len(set(order)) < len(order):
        found.append(f"CC2: the path {list(order)} visits a stage twice")
    if len(order) != rules.length:
        found.append(f"CC3: the path {list(order)} has {len(order)} stages, not {rules.length}")
    if any(not 0 <= stage < stages for stage in order):
        found.append(f"CC: the path {list(order)} names a stage that is none of {stages}")
    frontiers = [max(order[: i + 1]) for i in range(len(order))]
    swaps = [frontier - stage for frontier, stage in zip(frontiers, order) if stage < frontier]
    if any(distance > 1 for distance in swaps):
        found.append(f"CC4: the path {list(order)} goes back by {max(swaps)} stages, more than 1")
    if sum(swaps) > rules.swaps or len(swaps) > rules.swaps:
        found.append(f"CC5: the path {list(order)} swaps {len(swaps)} times, over {sum(swaps)} stages, "
                     f"more than {rules.swaps}")  # fmt: skip
    ahead = [stage - frontier for frontier, stage in zip(frontiers, order[1:])]
    if any(jump > rules.jump for jump in ahead):
        found.append(f"CC6: the path {list(order)} jumps {max(ahead)} stages ahead, more than {rules.jump}")
    return found


def violations(schedule: Schedule, rules: Rules, cluster: Cluster | None = None, tc2: bool = False) -> list[str]:
    """Every constraint that a schedule breaks, as sentences; none: it is legal.

    Args:
        cluster: given, its nodes must be those of the schedule.
        tc2: also that no two micro-batches want a node at overlapping times, by ``schedule.extra["visits"]``.
    """
    nodes = [node for stage in schedule.stages for node in stage]
    found = [f"node {node} is in two stages" for node, count in Counter(nodes).items() if count > 1]
    if cluster is not None and max(nodes) >= len(cluster.compute):
        found.append(f"node {max(nodes)} is none of {len(cluster.compute)}")
    of = {node: stage for stage, members in enumerate(schedule.stages) for node in members}
    for path in schedule.paths:
        strangers = [node for node in path if node not in of]
        if strangers:
            found.append(f"CC: the path {list(path)} visits node {strangers[0]}, which is in no stage")
            continue
        found += order_violations([of[node] for node in path], len(schedule.stages), rules)
    by_node = Counter(node for path in schedule.paths for node in path)
    by_stage: Counter[int] = Counter()
    for node, count in by_node.items():
        by_stage[of.get(node, -1)] += count
        if count > rules.memory:
            found.append(f"TC1: node {node} has {count} micro-batches, more than its memory holds ({rules.memory})")
    for stage, members in enumerate(schedule.stages):
        if by_stage[stage] > len(members) * rules.memory:
            found.append(f"TC1: stage {stage} has {by_stage[stage]} micro-batches, more than its {len(members)} nodes "
                         f"hold ({len(members) * rules.memory})")  # fmt: skip
        if not by_stage[stage]:
            found.append(f"TC1: stage {stage} has no micro-batch, so it would learn nothing")
    if tc2:
        found += overlaps(schedule.extra["visits"])
    return found


def overlaps(times: Sequence[Sequence[tuple[int, float, float]]], slack: float = 1e-9) -> list[str]:
    """TC2: pairs of micro-batches at a node at once, from ``(node, enter, leave)`` for each micro-batch."""
    by_node: dict[int, list[tuple[float, float, int]]] = {}
    for micro_batch, spans in enumerate(times):
        for node, enter, leave in spans:
            by_node.setdefault(node, []).append((enter, leave, micro_batch))
    found = []
    for node, spans_here in by_node.items():
        spans_here.sort()
        for (_, leave, a), (enter, _, b) in pairwise(spans_here):
            if enter < leave - slack:
                found.append(f"TC2: micro-batches {a} and {b} are at node {node} together from {enter:.3f} s")
    return found
