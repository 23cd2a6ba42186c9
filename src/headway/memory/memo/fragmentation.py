"""A model of torch's caching allocator: how much it reserves for what a trace allocates.

Source: torch, c10/cuda/CUDACachingAllocator.cpp, with its default settings and one stream: sizes are rounded to 512
bytes; up to 1 MiB they come from segments of 2 MiB, below 10 MiB from segments of 20 MiB, above from segments of their
own size rounded to 2 MiB; the smallest free block that is large enough is taken, and split when what remains is 512
bytes at least in the small pool, more than 1 MiB in the large one; freed blocks merge with free neighbours; segments go
back to the device only when it has no memory left.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

from headway.memory.memo.trace import Allocation

ROUND, SMALL, SMALL_SEGMENT, LARGE_SEGMENT, LARGE, ROUND_SEGMENT = 512, 1 << 20, 2 << 20, 20 << 20, 10 << 20, 2 << 20


@dataclass(frozen=True)
class Fragmentation:
    """What the allocator did with a trace."""

    allocated: int
    """Highest number of bytes in use."""
    reserved: int
    """Highest number of bytes held from the device."""
    segments: int
    """Requests to the device."""
    retries: int
    """Requests that were refused, so that everything unused was given back first."""
    failed: int
    """Allocations that could not be served even then; they are left out."""

    @property
    def ratio(self) -> float:
        """Reserved over allocated."""
        return self.reserved / self.allocated if self.allocated else 1.0


@dataclass(eq=False)
class _Block:
    segment: int
    """Number of the segment."""
    offset: int
    size: int
    small: bool
    free: bool = False
    before: _Block | None = field(default=None, repr=False)
    after: _Block | None = field(default=None, repr=False)

    @property
    def key(self) -> tuple[int, int, int]:
        return self.size, self.segment, self.offset


class CachingAllocator:
    """The allocator itself.

    Args:
        capacity: bytes of the device; None: without end.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.allocated = self.reserved = self.segments = self.retries = 0
        self.most_allocated = self.most_reserved = 0
        self._free: dict[bool, list[tuple[tuple[int, int, int], _Block]]] = {True: [], False: []}

    def allocate(self, size: int) -> _Block | None:
        """A block for ``size`` bytes; None when there is no memory."""
        size = max(ROUND, -(-size // ROUND) * ROUND)
        small = size <= SMALL
        pool = self._free[small]
        at = bisect.bisect_left(pool, (size, -1, -1), key=lambda entry: entry[0])
        if at < len(pool):
            block = pool.pop(at)[1]
        else:
            found = self._segment(size, small)
            if found is None:
                return None
            block = found
        remaining = block.size - size
        if remaining >= ROUND if small else remaining > SMALL:
            rest = _Block(block.segment, block.offset + size, remaining, small, True, block, block.after)
            if block.after is not None:
                block.after.before = rest
            block.after, block.size = rest, size
            self._put(rest)
        block.free = False
        self.allocated += block.size
        self.most_allocated = max(self.most_allocated, self.allocated)
        return block

    def _segment(self, size: int, small: bool) -> _Block | None:
        wanted = (
            SMALL_SEGMENT if small else LARGE_SEGMENT if size < LARGE else -(-size // ROUND_SEGMENT) * ROUND_SEGMENT
        )
        if self.capacity is not None and self.reserved + wanted > self.capacity:
            self.retries += 1
            self._release_unused()
            if self.reserved + wanted > self.capacity:
                return None
        self.segments += 1
        self.reserved += wanted
        self.most_reserved = max(self.most_reserved, self.reserved)
        return _Block(self.segments, 0, wanted, small)

    def _release_unused(self) -> None:
        for pool in self._free.values():
            for entry in list(pool):
                block = entry[1]
                if block.before is None and block.after is None:
                    pool.remove(entry)
                    self.reserved -= block.size

    def free(self, block: _Block) -> None:
        """Give a block back."""
        self.allocated -= block.size
        block.free = True
        for other in (block.before, block.after):
            if other is None or not other.free:
                continue
            pool = self._free[block.small]
            del pool[bisect.bisect_left(pool, other.key, key=lambda entry: entry[0])]
            if other is block.before:
                block.offset, block.before = other.offset, other.before
                if other.before is not None:
                    other.before.after = block
            else:
                block.after = other.after
                if other.after is not None:
                    other.after.before = block
            block.size += other.size
        self._put(block)

    def _put(self, block: _Block) -> None:
        bisect.insort(self._free[block.small], (block.key, block), key=lambda entry: entry[0])


def fragmentation(*traces: Sequence[Allocation], capacity: int | None = None) -> Fragmentation:
    """Replay traces, one step after the other, with what the steps before left in the allocator's cache.

    Args:
        traces: of `trace.record_trace`.
        capacity: bytes of the device; None: without end.
    """
    allocator, failed = CachingAllocator(capacity), 0
    for trace in traces:
        events = sorted(
            (time, kind, one.id, one.size) for one in trace for time, kind in ((one.start, 1), (one.end, 0))
        )
        blocks: dict[int, _Block] = {}
        for _, kind, number, size in events:
            if kind:
                block = allocator.allocate(size)
                failed += block is None
                if block is not None:
                    blocks[number] = block
            elif number in blocks:
                allocator.free(blocks.pop(number))
    return Fragmentation(
        allocator.most_allocated, allocator.most_reserved, allocator.segments, allocator.retries, failed
    )
