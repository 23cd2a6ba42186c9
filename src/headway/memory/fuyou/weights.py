"""Working weights on disk: a block's are brought in before it runs, forward or backward, and let go of after.

Autograd keeps views of weights (a transpose, say) of its own. So a block's weights live in one storage for ever, whose
memory is given back and taken again; every view of it is right whenever the block runs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from headway.core.errors import MethodError
from headway.memory.fuyou.groups import WEIGHTS
from headway.memory.fuyou.optimizer import TieredOptimizer
from headway.memory.lanes import Job


class Flat:
    """The working weights of one block in one storage, here or away."""

    def __init__(self, optimizer: TieredOptimizer, group: int) -> None:
        self.group, self.params = group, optimizer.groups[group].params
        layout = optimizer.layouts[group]
        dtype = self.params[0].dtype
        self.nbytes = layout.elements * dtype.itemsize
        whole = torch.empty(layout.elements, dtype=dtype, device=self.params[0].device)
        self.storage = whole.untyped_storage()
        self.bytes = whole.view(torch.uint8)
        region = WEIGHTS if layout.weights is not None else "master"
        self.views = layout.views(self.bytes, region, layout.regions[region][0])
        # Whoever looks at weights that are away sees that they are no numbers, and not somebody else's memory.
        self.away = [torch.full((), float("nan"), dtype=dtype, device=p.device).expand(p.shape) for p in self.params]
        self.job: Job | None = None
        self.here = True
        self.leave()

    def come(self, optimizer: TieredOptimizer) -> None:
        """Begin to bring it in."""
        self.storage.resize_(self.nbytes)
        self.job = optimizer.read_weights(self.group, self.bytes)
        self.here = True

    def leave(self) -> None:
        """Give the memory back."""
        for p, nothing in zip(self.params, self.away, strict=True):
            p.data = nothing
        self.storage.resize_(0)
        self.here = False

    def arrive(self) -> None:
        """Let the parameters see it."""
        for p, view in zip(self.params, self.views, strict=True):
            p.data = view


class WeightsOnDisk:
    """Follows which block runs.

    Args:
        blocks: the model's, as they are run (replaced ones included).
        optimizer: made with ``weights_on_disk`` for the groups of these blocks.
        most: blocks whose weights are in memory at the same time: the one that runs, and those that are fetched ahead.

    Raises:
        MethodError: two blocks share a parameter.
    """

    def __init__(self, blocks: Sequence[nn.Module], optimizer: TieredOptimizer, most: int = 2) -> None:
        self.optimizer, self.most = optimizer, most
        seen: set[Tensor] = set()
        for block in blocks:
            own = {p for p in block.parameters() if p.requires_grad}
            if own & seen:
                raise MethodError(optimizer.where, "finds blocks that share weights",
                                  hint="set params: memory")  # fmt: skip
            seen |= own
        self.flats = {g.block: Flat(optimizer, i) for i, g in enumerate(optimizer.groups)
                      if i in optimizer.on_disk and g.block is not None}  # fmt: skip
        self.last = max(self.flats, default=-1)
        self.stall_seconds = 0.0
        self.fetches = 0
        self._hooks: list[Any] = []
        for index, block in enumerate(blocks):
            if index in self.flats:
                self._hooks.append(block.register_forward_pre_hook(self._before(index)))
                self._hooks.append(block.register_forward_hook(self._after(index)))
        optimizer.weights = self

    def _before(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            if not torch.is_grad_enabled() or not _in_backward():
                self.need(index, 1)  # within a backward pass the block's output has asked already

        return hook

    def _after(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            followed = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
            if followed and _in_backward():
                return  # computed again: its own backward pass is next
            if followed:
                followed[0].register_hook(lambda _: self.need(index, -1))
            if not followed or index != self.last:  # the backward pass begins with the last
                self.drop(index)

        return hook

    def need(self, index: int, direction: int) -> None:
        """Have block ``index``; begin to fetch those that follow in this direction, and let go of the ones behind."""
        self.optimizer.check()
        for other, flat in self.flats.items():
            if flat.here and not 0 <= (other - index) * direction < self.most:
                self.drop(other)
        ahead = index
        while ahead in self.flats and sum(f.here for f in self.flats.values()) < self.most:
            if not self.flats[ahead].here:
                self.flats[ahead].come(self.optimizer)
                self.fetches += 1
            ahead += direction
        flat = self.flats[index]
        if flat.job is not None:
            self._finish(flat)
            flat.arrive()

    def _finish(self, flat: Flat) -> None:
        start = time.perf_counter()
        assert flat.job is not None
        flat.job.wait()
        flat.job = None
        self.stall_seconds += time.perf_counter() - start
        self.optimizer.check()

    def drop(self, index: int) -> None:
        """Give a block's memory back."""
        flat = self.flats[index]
        if not flat.here:
            return
        if flat.job is not None:
            self._finish(flat)
        flat.leave()

    def forget(self) -> None:
        """The weights have changed: let go of all that is here."""
        for index in self.flats:
            self.drop(index)

    def close(self) -> None:
        """Bring all weights back for good and take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for flat in self.flats.values():
            if not flat.here:
                flat.come(self.optimizer)
        for flat in self.flats.values():
            if flat.job is not None:
                self._finish(flat)
                flat.arrive()
        self.optimizer.weights = None


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
