"""The memory plan: optimum against brute force, bounds, no overlap, two levels, the trace, the caching allocator.

Needs nothing. Run: pytest tests/memory/test_memo_plan.py
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

from headway.core.meters import live_rise
from headway.memory.memo import Allocation, arena, fragmentation, lower_bound, memory_report, plan_memory, record_trace
from headway.memory.memo.fragmentation import CachingAllocator
from headway.memory.memo.trace import from_events
from headway.models.build import build_model
from headway.models.config import LlamaConfig

MiB = 1 << 20


def together(a: Allocation, b: Allocation) -> bool:
    return a.start < b.end and b.start < a.end


def assert_valid(trace: list[Allocation], plan: Any) -> None:
    assert set(plan.addresses) == {one.id for one in trace}
    for a, b in itertools.combinations(trace, 2):
        if together(a, b):
            x, y = plan.addresses[a.id], plan.addresses[b.id]
            assert x + a.size <= y or y + b.size <= x, f"{a} at {x} and {b} at {y}"
    assert all(0 <= plan.addresses[one.id] <= plan.peak - one.size for one in trace)
    assert plan.lower_bound <= plan.peak


def random_trace(count: int, seed: int, scopes: int = 0) -> list[Allocation]:
    rng = random.Random(seed)
    times = list(range(2 * count))
    rng.shuffle(times)
    trace = []
    for i in range(count):
        start, end = sorted(times[2 * i : 2 * i + 2])
        trace.append(Allocation(i, rng.randint(1, 9), start, end, f"forward {rng.randrange(scopes)}" if scopes else ""))
    return sorted(trace, key=lambda one: one.start)


def brute_force(trace: list[Allocation]) -> int:
    """The least peak: some order exists in which putting each as low as it goes gives an optimum."""
    best = sum(one.size for one in trace)
    for order in itertools.permutations(trace):
        placed: list[tuple[Allocation, int]] = []
        for one in order:
            at = 0
            for other, offset in sorted(placed, key=lambda pair: pair[1]):
                if together(one, other) and offset < at + one.size and at < offset + other.size:
                    at = offset + other.size
            placed.append((one, at))
        best = min(best, max(at + one.size for one, at in placed))
    return best


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("count", [1, 4, 6])
def test_optimum_is_that_of_brute_force(count: int, seed: int) -> None:
    trace = random_trace(count, seed)
    plan = plan_memory(trace, levels=1)
    assert_valid(trace, plan)
    assert plan.optimal and plan.peak == brute_force(trace) >= lower_bound(trace)


@pytest.mark.parametrize("seed", range(4))
def test_seven_tensors(seed: int) -> None:
    trace = random_trace(7, 100 + seed)
    plan = plan_memory(trace, levels=1)
    assert plan.optimal and plan.peak == brute_force(trace)


def test_the_program_finds_what_best_fit_does_not() -> None:
    """Among random traces there are some where best fit is not optimal, and the program is."""
    better = 0
    for seed in range(40):
        trace = random_trace(14, 1000 + seed)
        plan = plan_memory(trace, levels=1)
        assert_valid(trace, plan)
        assert plan.optimal
        overlaps = arena._overlaps(trace)
        by_size = sorted(range(len(trace)), key=lambda i: -trace[i].size)
        offsets = arena._best_fit(trace, overlaps, by_size)
        greedy = max(o + one.size for o, one in zip(offsets, trace))
        assert plan.peak <= greedy
        better += plan.peak < greedy
    assert better >= 3


def test_without_time_the_plan_is_valid_and_says_that_it_is_not_proved() -> None:
    plans = [
        (trace, plan_memory(trace, levels=1, time_limit=1e-9)) for trace in (random_trace(40, s) for s in range(8))
    ]
    for trace, plan in plans:
        assert_valid(trace, plan)
    assert not all(plan.optimal for _, plan in plans)


@pytest.mark.parametrize("seed", range(8))
def test_two_levels_are_within_a_tenth_of_one(seed: int) -> None:
    """A small model: each block keeps two tensors, and has temporaries that are the same in every block."""
    rng = random.Random(seed)
    sizes = [rng.randint(2, 12) for _ in range(4)]
    kept = [rng.randint(4, 12) for _ in range(2)]
    events: list[tuple[int, int, int, str]] = []
    clock, address = itertools.count(), itertools.count(1)

    def add(size: int) -> int:
        at = next(address)
        events.append((next(clock), at, size, ""))
        return at

    def drop(at: int) -> None:
        events.append((next(clock), at, -1, ""))

    def transients() -> None:
        a, b = add(sizes[0]), add(sizes[1])
        drop(a)
        c = add(sizes[2])
        drop(b)
        d = add(sizes[3])
        drop(c)
        drop(d)
        add_last = add(1)
        drop(add_last)

    blocks, held = 3, []
    for kind, numbers in (("forward", range(blocks)), ("backward", reversed(range(blocks)))):
        for i in numbers:
            events.append((next(clock), 0, 0, f"+{kind} {i}"))
            if kind == "forward":
                held.append([add(size) for size in kept])
                transients()
            else:
                transients()
                for at in held[i]:
                    drop(at)
            events.append((next(clock), 0, 0, f"-{kind} {i}"))
    trace = from_events(events)
    one, two = plan_memory(trace, levels=1), plan_memory(trace)
    assert_valid(trace, two)
    assert one.optimal
    assert one.peak <= two.peak <= 1.1 * one.peak
    if two.levels == 2:  # all passes have their temporaries at the same places of their arena
        arenas = [[two.addresses[a.id] for a in items] for items in arena._split(trace)[0].values()]
        assert len(arenas) == 6 and len({tuple(x - min(places) for x in places) for places in arenas}) == 1
    assert two.solved == 2, "all passes are alike, so that one of them is solved, and the model"


def test_an_empty_trace() -> None:
    plan = plan_memory([])
    assert plan.peak == plan.lower_bound == 0 and plan.optimal
    assert fragmentation([]).ratio == 1


# The trace.


def test_events_become_allocations() -> None:
    events = [
        (0, 7, 100, ""), (1, 0, 0, "+forward 0"), (2, 8, 50, ""), (3, 9, 10, ""), (4, 9, -10, ""),
        (5, 0, 0, "-forward 0"), (6, 9, 20, ""), (7, 8, -50, ""), (8, 99, -5, ""),
    ]  # fmt: skip
    assert [(a.size, a.start, a.end, a.scope) for a in from_events(events)] == [
        (100, 1, 8, ""), (50, 2, 6, "forward 0"), (10, 3, 4, "forward 0"), (20, 5, 8, ""),
    ]  # fmt: skip


def test_a_scope_that_comes_again_is_another() -> None:
    visit = [(0, 0, 0, "+forward 0"), (0, 8, 50, ""), (0, 8, -50, ""), (0, 0, 0, "-forward 0")]
    assert [a.scope for a in from_events([*visit, *visit])] == ["forward 0", "forward 0, 2"]


def model_and_step() -> tuple[Any, Any]:
    model = build_model(LlamaConfig(hidden=32, layers=4, heads=4, vocab=50, context=64), seed=0)
    tokens = torch.randint(50, (2, 64), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model(tokens).square().mean().backward()

    step()
    return model, step


def test_a_real_trace_has_the_peak_that_is_metered_and_its_plan_is_valid() -> None:
    model, step = model_and_step()
    rise = live_rise(step, torch.device("cpu"))[1]
    trace = record_trace(step, model.blocks)
    assert lower_bound(trace) == pytest.approx(rise, rel=0.02)
    assert {one.scope for one in trace} == {"", *(f"{k} {i}" for k in ("forward", "backward") for i in range(4))}
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)
    plan = plan_memory(trace, time_limit=2.0)
    assert_valid(trace, plan)
    # Four forward passes are alike, and the backward passes but for the first, which finds what the loss left.
    assert plan.solved <= 5
    assert plan.peak <= 1.2 * plan.lower_bound


def test_micro_batches_are_planned_as_passes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "MOST_AT_ONCE", 0)  # two levels or nothing
    model, step = model_and_step()
    trace = record_trace(lambda: (step(), step()), model.blocks)
    plan = plan_memory(trace, time_limit=2.0)
    assert_valid(trace, plan)
    assert plan.levels == 2 and plan.peak <= 1.2 * plan.lower_bound


def test_the_report_of_a_step() -> None:
    model, step = model_and_step()
    report = memory_report(step, model.blocks, time_limit=1.0)
    assert report["allocated"] <= report["reserved"]
    assert report["lower_bound"] <= report["planned"] <= 1.05 * report["lower_bound"]
    assert report["reserved_over_planned"] == report["reserved"] / report["planned"]


def test_under_another_profiler_there_is_no_trace() -> None:
    model, step = model_and_step()
    with pytest.raises(RuntimeError, match="another profiler"):
        live_rise(lambda: record_trace(step, model.blocks), torch.device("cpu"))


# The caching allocator, by hand.


def test_small_and_large_segments() -> None:
    allocator = CachingAllocator()
    allocator.allocate(1)  # 512 bytes of a segment of 2 MiB
    assert (allocator.allocated, allocator.reserved) == (512, 2 * MiB)
    allocator.allocate(MiB)  # fits the same segment
    assert allocator.reserved == 2 * MiB
    allocator.allocate(MiB)  # 1 MiB less 512 are left
    assert allocator.reserved == 4 * MiB
    allocator.allocate(MiB + 1)  # from a segment of 20 MiB
    assert allocator.reserved == 24 * MiB
    allocator.allocate(11 * MiB)  # 18.99 MiB are left there
    assert allocator.reserved == 24 * MiB
    allocator.allocate(11 * MiB)  # a segment of its own
    assert allocator.reserved == 36 * MiB
    assert allocator.segments == 4


def test_a_large_block_is_split_only_if_more_than_a_mebibyte_remains() -> None:
    allocator = CachingAllocator()
    first = allocator.allocate(20 * MiB)
    assert first is not None and first.size == 20 * MiB
    allocator.free(first)
    again = allocator.allocate(19 * MiB)
    assert again is not None and again.size == 20 * MiB and allocator.allocated == 20 * MiB
    allocator.free(again)
    third = allocator.allocate(19 * MiB - 512)
    assert third is not None and third.size == 19 * MiB - 512


def test_freed_neighbours_merge() -> None:
    allocator = CachingAllocator()
    parts = [allocator.allocate(4 * MiB) for _ in range(5)]
    assert allocator.reserved == 20 * MiB
    for index in (1, 3, 2):
        allocator.free(parts[index])
    middle = allocator.allocate(12 * MiB)
    assert middle is not None and middle.offset == 4 * MiB and allocator.reserved == 20 * MiB


def test_fragmentation_and_retries() -> None:
    # two halves of a segment free, but not beside each other: a request for both needs another segment
    trace = [Allocation(i, 5 * MiB, i, 10 if i % 2 else 5) for i in range(4)]
    trace.append(Allocation(4, 9 * MiB, 6, 11))
    found = fragmentation(trace)
    assert (found.reserved, found.segments) == (40 * MiB, 2)
    assert plan_memory(trace).peak == 20 * MiB == lower_bound(trace)
    # what one step leaves in the cache is of no use to one of another length
    small, large = ([Allocation(0, size * MiB, 0, 1)] for size in (30, 40))
    assert fragmentation(small, large).reserved == 70 * MiB
    held = fragmentation(small, large, capacity=60 * MiB)
    assert (held.reserved, held.retries, held.failed) == (40 * MiB, 1, 0)
    assert fragmentation(small, large, capacity=35 * MiB).failed == 1


def test_the_model_of_the_allocator_is_that_of_torch() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.cuda.empty_cache()
    start = torch.cuda.memory_reserved()
    rng, ours, theirs = random.Random(0), CachingAllocator(), {}
    live: dict[int, Any] = {}
    for number in range(500):
        if live and rng.random() < 0.45:
            key = rng.choice(list(live))
            ours.free(live.pop(key))
            del theirs[key]
        else:
            size = int(2 ** rng.uniform(9, 25))
            live[number] = ours.allocate(size)
            theirs[number] = torch.empty(size, dtype=torch.uint8, device="cuda")
    assert torch.cuda.memory_reserved() - start == ours.reserved
