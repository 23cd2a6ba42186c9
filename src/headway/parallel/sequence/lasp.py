"""The three ways in which linear attention's state comes to a rank, with one interface.

- ``zeco``: All-Scan, started before the work within chunks and waited for after it.
- ``lasp1``: a ring; each rank waits for the whole state, adds its own and passes it on. Time grows with the ranks.
- ``lasp2``: every rank gathers the states of all and adds up those before it. Bytes grow with the ranks.

Source: Sun et al., Linear Attention Sequence Parallelism, arXiv 2404.02882; Sun et al., LASP-2, arXiv 2502.07563;
Chou et al., ZeCO, arXiv 2507.01004.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from headway.core.errors import HeadwayError, nearest
from headway.parallel.sequence.all_scan import all_scan
from headway.parallel.sequence.links import Links

ScanMethod = Literal["zeco", "lasp1", "lasp2"]


def fetched_before(carry: StateCarry) -> Tensor | None:
    """The state that ``carry`` fetched in the forward pass of which this is a recomputation; ``None`` if it is none.

    A recomputation runs within the backward pass, when something that a block saved is asked for. From there the graph
    leads to the node of the first forward pass, which has the state, and to no other micro-batch's: graphs of several
    that are on their way meet in their loss alone. A state is not looked up by what this rank adds to it, since
    micro-batches that are alike here may differ to the left.
    """
    if torch._C._current_graph_task_id() == -1:  # no backward pass is going on
        return None
    waiting: deque[Any] = deque([torch._C._current_autograd_node()])
    seen = set(waiting)
    while waiting:
        node = waiting.popleft()
        if getattr(node, "carry", None) is carry:
            kept: Tensor = node.kept
            return kept
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return None


class StateCarry:
    """A ``headway.layers.linear_attention.Carry`` over the ranks of a sequence.

    Args:
        links: to those ranks.
        method: how states travel.
        blocks: of All-Scan.
        layer: it carries the states of one layer, and recomputation gets them without asking again.
    """

    def __init__(self, links: Links, method: ScanMethod = "zeco", blocks: int = 4, layer: bool = False) -> None:
        if method not in get_args(ScanMethod):
            raise HeadwayError("method", got=method, expected=" or ".join(get_args(ScanMethod)),
                               hint=nearest(str(method), get_args(ScanMethod)))  # fmt: skip
        self.links, self.method, self.blocks, self.layer = links, method, blocks, layer

    def forward(self, state: Tensor, decay: Tensor) -> Callable[[], Tensor]:
        """Start to fetch the state before this rank's first token."""
        found = fetched_before(self) if self.layer else None
        return self._fetch(state, decay, reverse=False) if found is None else lambda: found

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
