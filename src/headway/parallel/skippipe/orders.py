"""Which stages a micro-batch visits, in which order, without a cluster: all legal orders, and draws among them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

from headway.parallel.skippipe.cluster import Rules, ScheduleError, visits
from headway.parallel.skippipe.constraints import order_violations

Order = tuple[int, ...]


@cache
def legal_orders(stages: int, length: int, swaps: int = 2) -> tuple[Order, ...]:
    """Every order of ``length`` of ``stages`` that breaks no convergence constraint.

    Args:
        swaps: 0 keeps the stages in order.

    Raises:
        ScheduleError: there is none, or some stage is in none.
    """
    if not 2 <= length <= stages:
        raise ScheduleError("path_length", got=length, expected=f"2 to {stages}, the number of stages")
    rules = Rules(length, swaps)
    found: list[Order] = []
    open_: list[Order] = [(0,)]
    while open_:
        order = open_.pop()
        if len(order) == length:
            if not order_violations(order, stages, rules):
                found.append(order)
            continue
        highest = max(order)
        near = range(max(1, highest - 1), min(stages - 1, highest + rules.jump) + 1)
        open_ += [(*order, stage) for stage in near if stage not in order]
    found.sort()
    unseen = [stage for stage, count in enumerate(visits(found, stages)) if not count]
    if unseen:
        raise ScheduleError("path_length", f"of {length} of {stages} stages leaves stage {unseen[0]} unvisited, as "
                            f"paths jump {rules.jump} stages at most", hint="make paths longer")  # fmt: skip
    return tuple(found)


def draw_orders(
    micro_batches: int, stages: int, length: int, swaps: int, rng: random.Random, balanced: bool = True
) -> tuple[Order, ...]:
    """An order for every micro-batch.

    Args:
        balanced: let every stage after the first have about as many visits, so that all learn as much; else every
            micro-batch draws for itself.
    """
    orders = legal_orders(stages, length, swaps)
    if not balanced:
        return tuple(rng.choice(orders) for _ in range(micro_batches))
    counts, drawn = [0] * stages, []
    for _ in range(micro_batches):
        # The stages with the fewest visits; among orders that serve them alike, chance decides.
        order = min(orders, key=lambda o: (sum(counts[s] for s in o), max(counts[s] for s in o[1:]), rng.random()))
        drawn.append(order)
        for stage in order:
            counts[stage] += 1
    return tuple(drawn)


def check_visited(orders: Sequence[Order], stages: int, where: str) -> None:
    """Refuse orders that are used for a whole run and never visit some stage.

    Raises:
        ScheduleError: naming it.
    """
    unseen = [stage for stage, count in enumerate(visits(orders, stages)) if not count]
    if unseen:
        raise ScheduleError(where, f"{len(orders)} micro-batches a step on one schedule leave stage {unseen[0]} of "
                            f"{stages} unvisited", hint="take more micro-batches, longer paths or "
                            "resample: every-step")  # fmt: skip
