"""The ring against a slow allocator that marks bytes: no two spans overlap, and what fits is given.

Needs: nothing.
Run: pytest tests/resilience/test_ring.py
"""

import random
import threading

import pytest

from headway.resilience.ring import Ring


class Reference:
    """Every byte is free or belongs to a span; spans come back to use in the order in which they were taken."""

    def __init__(self, size):
        self.size, self.spans, self.head = size, [], 0

    def take(self, n):
        occupied = {i % self.size for start, length, _ in self.spans for i in range(start, start + length)}
        if not self.spans:
            self.head = 0
        for start, skip in ((self.head, 0), (0, self.size - self.head)):
            if start + n <= self.size and (not skip or self.head + n > self.size):
                span = set(range(self.head, self.head + skip)) | set(range(start, start + n))
                if span & occupied or len(span) + len(occupied) > self.size:
                    return None
                self.spans.append((self.head if skip else start, skip + n, start))
                self.head = (start + n) % self.size
                return start
        return None


@pytest.mark.parametrize("seed", range(30))
def test_against_the_reference_in_order(seed):
    rng = random.Random(seed)
    size = rng.choice([7, 64, 100])
    ring, reference, taken = Ring(size), Reference(size), []
    for _ in range(600):
        if taken and rng.random() < 0.5:
            start = taken.pop(0)
            ring.give(start)
            reference.spans.pop(0)
        else:
            n = rng.randint(1, size)
            got = ring.take(n, wait=False)
            assert got == reference.take(n)
            if got is not None:
                taken.append(got)


@pytest.mark.parametrize("seed", range(30))
def test_given_back_in_any_order_nothing_overlaps(seed):
    rng = random.Random(seed)
    ring, taken, order = Ring(50), {}, []
    for _ in range(600):
        if taken and rng.random() < 0.5:
            start = rng.choice(list(taken))
            ring.give(start)
            del taken[start]
        else:
            n = rng.randint(1, 20)
            start = ring.take(n, wait=False)
            if start is not None:
                assert start + n <= 50
                assert all(start + n <= s or s + m <= start for s, m in taken.items())
                taken[start] = n
                order.append(start)
    for start in list(taken):
        ring.give(start)
    assert ring.empty and ring.take(50, wait=False) == 0 and len(order) > 50


def test_waits_for_the_oldest():
    ring = Ring(10)
    first, second = ring.take(6), ring.take(4)
    got = []
    waiter = threading.Thread(target=lambda: got.append(ring.take(5)))
    waiter.start()
    ring.give(second)  # younger than the first: of no use yet
    waiter.join(0.05)
    assert waiter.is_alive()
    ring.give(first)
    waiter.join(5)
    assert got == [0]


def test_what_never_fits():
    with pytest.raises(ValueError, match="11 bytes do not fit a ring of 10"):
        Ring(10).take(11)
