"""What passes states between the ranks that share a sequence: messages to a neighbour, a gather, and their bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from headway.core.errors import HeadwayError

Wait = Callable[[], Any]


class NeighbourLost(HeadwayError):
    """Another rank of the sequence did not answer in time, or died."""


class Links:
    """One rank's links to the others of its sequence group; rank ``r`` of the group holds the ``r``-th part.

    Args:
        group: the ranks that share a sequence, in its order; by default all.
        where: names the layer in errors.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, where: str = "linear attention") -> None:
        self.group, self.where = group, where
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.sent: Counter[str] = Counter()
        """Bytes by what they are: ``state``, ``decay``, ``document``."""
        self.received: Counter[str] = Counter()
        self.messages = 0
        """Sends, and steps of gathers, of this rank."""

    def peer(self, rank: int) -> int:
        """The number of a rank of the group among all ranks, which is what torch's messages are addressed to."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def send(self, x: Tensor, to: int, what: str = "state") -> Wait:
        """Start to send a contiguous tensor to a rank of the group; keep ``x`` until the wait is over."""
        self.sent[what] += x.nbytes
        self.messages += 1
        return self._guarded(dist.isend(x, self.peer(to), group=self.group), f"rank {self.peer(to)} to take")

    def receive(self, x: Tensor, source: int, what: str = "state") -> Wait:
        """Start to receive into a contiguous tensor."""
        self.received[what] += x.nbytes
        return self._guarded(dist.irecv(x, self.peer(source), group=self.group), f"rank {self.peer(source)} to send")

    def gather(self, x: Tensor, what: str = "state") -> Callable[[], list[Tensor]]:
        """Start to gather a tensor of the same shape from every rank; the wait gives them by rank."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self.sent[what] += x.nbytes * (self.size - 1)
        self.received[what] += x.nbytes * (self.size - 1)
        self.messages += self.size - 1
        work = dist.all_gather(parts, x.contiguous(), group=self.group, async_op=True)
        wait = self._guarded(work, "every rank to send")

        def gathered() -> list[Tensor]:
            wait()
            return parts

        return gathered

    def _guarded(self, work: Any, whom: str) -> Wait:
        def wait() -> None:
            try:
                work.wait()
            except RuntimeError as error:
                raise NeighbourLost(
                    f"rank {dist.get_rank()}, {self.where}",
                    f"waited in vain for {whom} a state ({str(error).splitlines()[0][:120]})",
                    hint="that rank has died or fallen behind: see its own message",
                ) from error

        return wait


def links_of(group: dist.ProcessGroup | Links | None) -> Links:
    """``group`` itself if it is links already."""
    return group if isinstance(group, Links) else Links(group)


def document_before(segments: Tensor, links: Links) -> Tensor | None:
    """The document [B] of the last token on the rank to the left; ``None`` on the first rank.

    Args:
        segments: integer [B, T], this rank's part.
    """
    waits = []
    if links.rank + 1 < links.size:
        last = segments[:, -1].long().contiguous()
        waits.append(links.send(last, links.rank + 1, "document"))
    before = None
    if links.rank:
        before = torch.empty(len(segments), dtype=torch.long, device=segments.device)
        waits.append(links.receive(before, links.rank - 1, "document"))
    for wait in waits:
        wait()
    return before
