"""The three ways in which linear attention's state comes to a rank, with one interface.

- ``zeco``: All-Scan, started before the work within chunks and waited for after it.
- ``lasp1``: a ring; each rank waits for the whole state, adds its own and passes it on. Time grows with the ranks.
- ``lasp2``: every rank gathers the states of all and adds up those before it. Bytes grow with the ranks.

Source: Sun et al., Linear Attention Sequence Parallelism, arXiv 2404.02882; Sun et al., LASP-2, arXiv 2502.07563;
Chou et al., ZeCO, arXiv 2507.01004.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from headway.core.errors import HeadwayError, nearest
from headway.parallel.sequence.all_scan import all_scan
from headway.parallel.sequence.links import Links

ScanMethod = Literal["zeco", "lasp1", "lasp2"]


class KeptStates:
    """States that a layer has fetched and whose backward pass is still to come.

    Where activations are recomputed, the forward pass runs once more within the backward pass: the state is taken from
    here then instead of being sent again. The graph of the first forward pass keeps it alive, this only finds it.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[weakref.ref[Tensor], Tensor]] = []

    def add(self, fetched: Tensor, own: Tensor) -> None:
        """Remember ``fetched`` as what belongs to a rank's own state ``own``."""
        self._entries = [entry for entry in self._entries if entry[0]() is not None]
        self._entries.append((weakref.ref(fetched), _digest(own)))

    def find(self, own: Tensor) -> Tensor | None:
        """The state fetched before, if this is a recomputation."""
        if torch._C._current_graph_task_id() == -1:  # no backward pass is going on
            return None
        alive = [(state, digest) for reference, digest in self._entries if (state := reference()) is not None]
        if len(alive) < 2:
            return alive[0][0] if alive else None
        # Several micro-batches are on their way: it is the one whose own state was this one.
        here = _digest(own)
        return min(alive, key=lambda entry: float((entry[1] - here).abs()))[0]


def _digest(state: Tensor) -> Tensor:
    return state.double().square().sum()


class StateCarry:
    """A ``headway.layers.linear_attention.Carry`` over the ranks of a sequence.

    Args:
        links: to those ranks.
        method: how states travel.
        blocks: of All-Scan.
        kept: where recomputation finds the states of its first forward pass.
    """

    def __init__(self, links: Links, method: ScanMethod = "zeco", blocks: int = 4, kept: KeptStates | None = None):
        if method not in get_args(ScanMethod):
            raise HeadwayError("method", got=method, expected=" or ".join(get_args(ScanMethod)),
                               hint=nearest(str(method), get_args(ScanMethod)))  # fmt: skip
        self.links, self.method, self.blocks, self.kept = links, method, blocks, kept

    def forward(self, state: Tensor, decay: Tensor) -> Callable[[], Tensor]:
        """Start to fetch the state before this rank's first token."""
        found = self.kept.find(state) if self.kept is not None else None
        if found is not None:
            return lambda: found
        fetch = self._fetch(state, decay, reverse=False)

        def wait() -> Tensor:
            fetched = fetch()
            if self.kept is not None:
                self.kept.add(fetched, state)
            return fetched

        return wait

    def backward(self, grad: Tensor, decay: Tensor) -> Callable[[], Tensor]:
        """Start to fetch the gradient of the state after this rank's last token."""
        return self._fetch(grad, decay, reverse=True)

    def _fetch(self, state: Tensor, decay: Tensor, reverse: bool) -> Callable[[], Tensor]:
        links = self.links
        if self.method == "lasp2":
            return _gathered(links, state, decay, reverse)
        if self.method == "lasp1":  # as published: a rank takes the state when it has done everything else
            return lambda: all_scan(state, decay, links, 1, reverse)[0]
        pending = all_scan(state, decay, links, self.blocks, reverse, async_op=True)
        return lambda: pending.wait()[0]


def _gathered(links: Links, state: Tensor, decay: Tensor, reverse: bool) -> Callable[[], Tensor]:
    states, decays = links.gather(state), links.gather(decay.contiguous(), "decay")

    def wait() -> Tensor:
        total = torch.zeros_like(state)
        others = range(links.size - 1, links.rank, -1) if reverse else range(links.rank)
        parts, factors = states(), decays()
        for rank in others:
            total = torch.addcmul(parts[rank], factors[rank].unsqueeze(-1), total)
        return total

    return wait
