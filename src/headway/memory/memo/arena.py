"""Addresses for the allocations of a step: offline dynamic storage allocation, in two levels.

Level 1: what is born and dies within one block's forward or backward pass gets addresses in an arena of its own, once
for all passes that do the same. Level 2: each such pass is one piece of its arena's size, placed among all the rest.

Source: MEMO, arXiv 2407.12117, section 4.3 (the program, and the two levels).
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headway.memory.memo.trace import Allocation

MOST_PAIRS = 4000
"""Pairs of allocations that live at the same time, beyond which the program is not tried."""
MOST_AT_ONCE = 5000
"""Allocations beyond which best fit is not tried on all of them at once, as it takes the square of their number."""


@dataclass(frozen=True)
class MemoryPlan:
    """Where every allocation of a trace lies."""

    addresses: dict[int, int]
    """Allocation -> offset of its first byte in the arena."""
    peak: int
    """Bytes of the arena."""
    lower_bound: int
    """No plan, of one level or two, needs less than this."""
    optimal: bool
    """Whether every level's peak is proved to be as low as it can be. False: best fit, or a program that ran out of
    time, came no closer."""
    levels: int
    """2; or 1, where best fit on all allocations at once came lower, or was asked for."""
    solved: int
    """Arenas that were laid out: the model's, and one for every kind of pass."""
    seconds: float


@dataclass(frozen=True)
class Placement:
    """The solution of one level: offsets, the peak, a bound on it from below."""

    offsets: list[int]
    peak: int
    bound: int


def lower_bound(items: Sequence[Allocation]) -> int:
    """The highest number of bytes that live at a time."""
    events = sorted(
        (t, sign, size) for one in items for t, sign, size in ((one.start, 1, one.size), (one.end, 0, one.size))
    )
    live = most = 0
    for _, sign, size in events:
        live += size if sign else -size
        most = max(most, live)
    return most


def plan_memory(trace: Sequence[Allocation], *, levels: int = 2, time_limit: float = 10.0) -> MemoryPlan:
    """Addresses such that no two allocations that live at the same time overlap, with a low peak.

    Args:
        trace: of `trace.record_trace`.
        levels: 2; or 1, to place all of them at once, where few live at the same time.
        time_limit: seconds for the mixed-integer program of each arena, where best fit is not optimal already.
    """
    begun = time.perf_counter()
    passes: dict[str, list[Allocation]] = {}
    rest: Sequence[Allocation] = trace
    if levels == 2:
        passes, rest = _split(trace)
    known: dict[Any, tuple[list[Allocation], Placement]] = {}
    inside: dict[int, tuple[list[Allocation], Placement]] = {}
    number = max((one.id for one in trace), default=-1)
    pieces = list(rest)
    optimal = True
    for items in passes.values():
        signature = _signature(items)
        if signature not in known:
            known[signature] = (items, _solve(items, time_limit))
        placement = known[signature][1]
        number += 1
        inside[number] = (items, placement)
        pieces.append(Allocation(number, placement.peak, min(i.start for i in items), max(i.end for i in items)))
    whole = _solve(pieces, time_limit)
    for placement in (whole, *(placement for _, placement in known.values())):
        optimal = optimal and placement.peak <= placement.bound
    addresses: dict[int, int] = {}
    for piece, offset in zip(pieces, whole.offsets, strict=True):
        if piece.id in inside:
            items, placement = inside[piece.id]
            addresses.update({one.id: offset + o for one, o in zip(items, placement.offsets, strict=True)})
        else:
            addresses[piece.id] = offset
    bound, peak = lower_bound(trace), whole.peak
    if levels == 2 and peak > bound and len(trace) <= MOST_AT_ONCE:
        at_once = _solve(trace, 0.0)
        if at_once.peak < peak:
            peak, levels, optimal = at_once.peak, 1, at_once.peak == bound
            addresses = {one.id: offset for one, offset in zip(trace, at_once.offsets, strict=True)}
    seconds = time.perf_counter() - begun
    return MemoryPlan(addresses, peak, bound, optimal, levels, 1 + len(known), seconds)


def _split(trace: Sequence[Allocation]) -> tuple[dict[str, list[Allocation]], list[Allocation]]:
    """What lives within one pass of one block, by pass, and the rest."""
    spans: dict[str, tuple[int, int]] = {}
    for one in trace:
        if one.scope:
            first, last = spans.get(one.scope, (one.start, one.start))
            spans[one.scope] = (min(first, one.start), max(last, one.start))
    passes: dict[str, list[Allocation]] = defaultdict(list)
    rest: list[Allocation] = []
    for one in sorted(trace, key=lambda one: one.start):
        # what is freed after the last allocation of a pass may be its result: it is left to the model's level
        (passes[one.scope] if one.scope and one.end <= spans[one.scope][1] else rest).append(one)
    return passes, rest


def _signature(items: Sequence[Allocation]) -> Any:
    """The same for passes that allocate and free the same sizes in the same order."""
    order = sorted((t, k, i) for i, one in enumerate(items) for t, k in ((one.start, 1), (one.end, 0)))
    return tuple((k, i, items[i].size) for _, k, i in order)


def _solve(items: Sequence[Allocation], time_limit: float) -> Placement:
    """One level: best fit in several orders, then the program if that is not proved to be optimal."""
    bound = lower_bound(items)
    best = Placement([], 0, bound)
    if not items:
        return best
    overlaps = _overlaps(items)
    orders: list[Callable[[Allocation], Any]] = [
        lambda one: (-one.size, one.start),
        lambda one: (-(one.size * (one.end - one.start)), one.start),
        lambda one: (one.start - one.end, -one.size),
        lambda one: (one.start, -one.size),
        lambda one: (-one.end, -one.size),
    ]
    for index, order in enumerate(orders):
        offsets = _best_fit(items, overlaps, sorted(range(len(items)), key=lambda i, order=order: order(items[i])))  # type: ignore[misc]
        peak = max(o + one.size for o, one in zip(offsets, items, strict=True))
        if index == 0 or peak < best.peak:
            best = Placement(offsets, peak, bound)
        if peak == bound:
            return best
    pairs = [(i, j) for i in range(len(items)) for j in overlaps[i] if i < j]
    return _program(items, pairs, best, time_limit) if time_limit and len(pairs) <= MOST_PAIRS else best


def _overlaps(items: Sequence[Allocation]) -> list[list[int]]:
    """For each, those that live at the same time."""
    found: list[list[int]] = [[] for _ in items]
    live: list[int] = []
    for i in sorted(range(len(items)), key=lambda i: items[i].start):
        live = [j for j in live if items[j].end > items[i].start]
        for j in live:
            found[i].append(j)
            found[j].append(i)
        live.append(i)
    return found


def _best_fit(items: Sequence[Allocation], overlaps: list[list[int]], order: list[int]) -> list[int]:
    """One after the other, each into the narrowest gap that it fits among those it lives with, or above them."""
    offsets = [-1] * len(items)
    for i in order:
        taken = sorted((offsets[j], offsets[j] + items[j].size) for j in overlaps[i] if offsets[j] >= 0)
        end, place, narrowest = 0, -1, math.inf
        for low, high in taken:
            gap = low - end
            if items[i].size <= gap < narrowest:
                place, narrowest = end, gap
            end = max(end, high)
        offsets[i] = place if place >= 0 else end
    return offsets


def _program(
    items: Sequence[Allocation], pairs: list[tuple[int, int]], best: Placement, time_limit: float
) -> Placement:
    """The mixed-integer program, by HiGHS: minimise M with ``A_i + S_i <= M``, and of every pair that lives at the
    same time one below the other, ``A_i + S_i <= A_j + z C`` and ``A_j + S_j <= A_i + (1 - z) C``."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    unit = math.gcd(*(one.size for one in items)) or 1
    sizes = np.array([one.size // unit for one in items], dtype=float)
    n, m = len(items), len(pairs)
    cap = float(best.peak // unit)  # no optimum is above what is known already
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    limits: list[float] = []

    def at_most(terms: list[tuple[int, float]], limit: float) -> None:
        for column, value in terms:
            rows.append(len(limits))
            columns.append(column)
            values.append(value)
        limits.append(limit)

    for i in range(n):
        at_most([(i, 1.0), (n, -1.0)], -sizes[i])
    for p, (i, j) in enumerate(pairs):
        at_most([(i, 1.0), (j, -1.0), (n + 1 + p, -cap)], -sizes[i])
        at_most([(j, 1.0), (i, -1.0), (n + 1 + p, cap)], cap - sizes[j])
    matrix = csr_array((values, (rows, columns)), shape=(len(limits), n + 1 + m))
    cost = np.zeros(n + 1 + m)
    cost[n] = 1.0
    low = np.zeros(n + 1 + m)
    low[n] = best.bound / unit
    high = np.concatenate([cap - sizes, [cap], np.ones(m)])
    kinds = np.concatenate([np.zeros(n + 1), np.ones(m)])
    found = milp(
        cost,
        integrality=kinds,
        bounds=Bounds(low, high),
        constraints=LinearConstraint(matrix, -np.inf, limits),
        options={"time_limit": time_limit, "mip_rel_gap": 0.0},
    )
    bound = best.bound
    dual = getattr(found, "mip_dual_bound", None)
    if dual is not None and math.isfinite(dual):
        bound = max(bound, min(math.ceil(dual - 1e-6 * max(1.0, dual)) * unit, best.peak))
    if found.x is not None:
        above = [(i, j) if found.x[n + 1 + p] < 0.5 else (j, i) for p, (i, j) in enumerate(pairs)]
        offsets = _settled([one.size for one in items], above)
        if offsets is not None:
            peak = max(o + one.size for o, one in zip(offsets, items, strict=True))
            if peak < best.peak:
                return Placement(offsets, peak, bound)
    return Placement(best.offsets, best.peak, bound)


def _settled(sizes: list[int], below: list[tuple[int, int]]) -> list[int] | None:
    """The lowest exact offsets with, for each pair, the first below the second; None if that goes in circles.

    The program knows bytes to its own tolerance only.
    """
    after: list[list[int]] = [[] for _ in sizes]
    count = [0] * len(sizes)
    for i, j in below:
        after[i].append(j)
        count[j] += 1
    ready = [i for i, c in enumerate(count) if not c]
    offsets = [0] * len(sizes)
    done = 0
    while ready:
        i = ready.pop()
        done += 1
        for j in after[i]:
            offsets[j] = max(offsets[j], offsets[i] + sizes[i])
            count[j] -= 1
            if not count[j]:
                ready.append(j)
    return offsets if done == len(sizes) else None
