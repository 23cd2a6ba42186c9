"""A ring of host memory that tensors pass through on their way to the disk, the first in the first out."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass


@dataclass
class _Span:
    start: int
    size: int
    """Bytes given out, and those skipped at the end of the ring so as not to wrap inside."""
    free: bool = False


class Ring:
    """Hands out contiguous spans of ``size`` bytes.

    A span never wraps: if the gap at the end is too small, it is skipped. Spans may be given back in any order, and
    are free for others once all older ones are. Safe between threads.

    Source: Maurya et al. 2024, section 5 (the pinned host buffer).
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._spans: deque[_Span] = deque()
        self._used = 0
        self._head = 0
        self._changed = threading.Condition()

    def take(self, nbytes: int, wait: bool = True) -> int | None:
        """The offset of ``nbytes`` contiguous bytes; waits until older spans are given back, or gives None.

        Raises:
            ValueError: the ring is smaller than that.
        """
        if not 0 < nbytes <= self.size:
            raise ValueError(f"{nbytes} bytes do not fit a ring of {self.size}")
        with self._changed:
            while (start := self._fit(nbytes)) is None:
                if not wait:
                    return None
                self._changed.wait()
            return start

    def _fit(self, nbytes: int) -> int | None:
        if not self._spans:
            self._head = 0
        skipped = self.size - self._head if self._head + nbytes > self.size else 0
        if self._used + skipped + nbytes > self.size:
            return None
        start = 0 if skipped else self._head
        self._spans.append(_Span(start, skipped + nbytes))
        self._used += skipped + nbytes
        self._head = (start + nbytes) % self.size
        return start

    def give(self, start: int) -> None:
        """Give back the span that begins at ``start``."""
        with self._changed:
            next(span for span in self._spans if span.start == start and not span.free).free = True
            while self._spans and self._spans[0].free:
                self._used -= self._spans.popleft().size
            self._changed.notify_all()

    @property
    def empty(self) -> bool:
        """Whether nothing is on its way."""
        with self._changed:
            return not self._spans
