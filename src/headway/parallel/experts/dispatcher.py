"""Tokens sent to the experts that they chose, wherever those are, and the answers brought back.

An MoE layer sees a bag of tokens on each rank; it makes no difference what attention used the ranks for. The backward
pass is the mirror: exchanges go the other way, gathers become sums. Source: arXiv 2504.14960, section 3.3.

Shapes: n tokens of this rank, k choices each, D channels, E experts, Em on this rank, ep expert ranks, et
expert_tensor ranks, R rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.core.errors import MethodError
from headway.layers.capacity import Capacity, kept
from headway.layers.experts import Experts
from headway.layers.permute import Permutation, combine, permute, plan
from headway.layers.router import Routing
from headway.parallel.experts.exchange import Link, Traffic, exchange, gather, scatter_sum


@dataclass(frozen=True)
class Load:
    """How the last call went on this rank."""

    choices: int
    """n k."""
    dropped: float
    """Share of the choices that no expert computed; exactly 0 without a capacity."""
    received: tuple[int, ...]
    """Rows of each expert on this rank, [Em]."""

    @property
    def imbalance(self) -> float:
        """Rows of the busiest expert on this rank, as a multiple of its mean."""
        return max(self.received) * len(self.received) / max(sum(self.received), 1)


class Dispatcher(ABC):
    """What both dispatchers share; an instance takes the place of ``MoE.dispatch``.

    Args:
        experts: their number E, over all ranks.
        expert: the ranks that hold different experts; None: this rank alone.
        expert_tensor: the ranks that hold parts of the same experts.
        capacity: a limit on the rows of an expert while training; None: nothing is dropped. With its ``pad``, all ranks
            have the same number of tokens in every call.
        sequence: decide what is dropped over the tokens of these ranks, which share sequences; None: this rank's alone.
        node: ranks per node, for the count of bytes that leave it.
    """

    def __init__(
        self,
        experts: int,
        expert: dist.ProcessGroup | None = None,
        expert_tensor: dist.ProcessGroup | None = None,
        *,
        capacity: Capacity | None = None,
        sequence: dist.ProcessGroup | None = None,
        node: int | None = None,
    ) -> None:
        self.traffic = Traffic(node)
        self.expert = Link("expert", expert, self.traffic)
        self.expert_tensor = Link("expert_tensor", expert_tensor, self.traffic)
        self.sequence = Link("sequence", sequence, self.traffic)
        self.experts, self.capacity = experts, capacity
        self.mine = experts // self.expert.size
        """Experts on this rank."""
        self.load = Load(0, 0.0, (0,) * self.mine)
        self._agreed = False  # whether ranks have compared the rows that they pad to

    @abstractmethod
    def __call__(self, rows: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """[n, D] -> [n, D]: the weighted sum of what each token's experts make of it."""

    def _keep(self, routing: Routing, training: bool) -> tuple[Tensor | None, int | None]:
        """The choices that stay, bool [n, k], and the rows to pad to; None: all, and none."""
        limit, indices, weights = self.capacity, routing.indices, routing.weights.detach()
        if limit is None or not training:
            return None, None
        if self.sequence.size == 1:
            rows = limit.rows(len(indices), indices.shape[1], self.experts)
            return kept(indices, weights, self.experts, rows, limit.keep), rows if limit.pad else None
        sizes = [len(indices)] * self.sequence.size
        every, heights = self.sequence.all_gather(indices, sizes), self.sequence.all_gather(weights, sizes)
        stays = kept(every, heights, self.experts, limit.rows(len(every), every.shape[1], self.experts), limit.keep)
        return stays.chunk(self.sequence.size)[self.sequence.rank], None

    def _note(self, routing: Routing, keep: Tensor | None, received: list[int]) -> None:
        dropped = 0.0 if keep is None else 1 - float(keep.sum()) / max(keep.numel(), 1)
        self.load = Load(routing.indices.numel(), dropped, tuple(received))


class AllToAll(Dispatcher):
    """Every row goes only to the rank of its expert, in numbers that the ranks tell each other first.

    Answers are weighted where their tokens live, so that weights need not travel, and the sum over a token's experts
    is the very one of `local_dispatch`.
    """

    @torch.compiler.disable  # the numbers of rows are known only as it runs
    def __call__(self, rows: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """[n, D] -> [n, D]; see ``Dispatcher``."""
        keep, pad = self._keep(routing, experts.training)
        permutation = plan(routing.indices, self.experts, keep, pad)
        counts, copy = self._counts(permutation, pad)
        x = permute(rows, permutation)  # [R, D], while the counts are on their way
        send, each = self._splits(copy)  # [ep], [et][ep][Em]
        receive = [sum(source) for source in each[self.expert_tensor.rank]]  # [ep]
        sizes = [sum(map(sum, member)) for member in each]  # [et]
        _same_rows(sum(send), len(x), "to be sent")
        self._note(routing, keep, [sum(s[e] for member in each for s in member) for e in range(self.mine)])

        (x,) = exchange(self.expert, send, receive, x)
        (x,) = gather(self.expert_tensor, sizes, x)
        _same_rows(sum(sizes), len(x), "received")
        order = self._expert_major(counts, len(x))
        x = x if order is None else reorder(x, order)
        y = experts(x, counts.sum((0, 1)))
        y = y if order is None else reorder(y, order, back=True)
        (y,) = scatter_sum(self.expert_tensor, sizes, y)
        (y,) = exchange(self.expert, receive, send, y)
        return combine(y, routing.weights, permutation)

    def _counts(self, permutation: Permutation, pad: int | None) -> tuple[Tensor, HostCopy]:
        """Rows of each of my experts by expert_tensor member and source, int64 [et, ep, Em]; that and the rows that I
        send to each expert on their way to the host, in one copy.

        The ranks of ``expert`` tell each other only what concerns them; then the expert_tensor ranks share it.
        """
        ep, et, sent = self.expert.size, self.expert_tensor.size, permutation.counts
        if pad is not None:  # known beforehand, and the same on every rank: nothing to tell, nothing to wait for
            if not self._agreed:
                self._check_pad(pad, sent.device)
            every = torch.full((et, ep, self.mine), pad)
            return every.to(sent.device), HostCopy(torch.cat([torch.full((self.experts,), pad), every.flatten()]))
        mine = self.expert.all_to_all(sent.view(ep, self.mine), [1] * ep, [1] * ep)  # [ep, Em]
        every = self.expert_tensor.all_gather(mine.unsqueeze(0), [1] * et)  # [et, ep, Em]
        return every, HostCopy(torch.cat([sent, every.flatten()]))

    def _check_pad(self, pad: int, device: torch.device) -> None:
        """At the first call: ranks that pad to different numbers of rows would wait for each other's for ever."""
        mine = self.expert.all_gather(torch.tensor([pad], device=device), [1] * self.expert.size)
        every = self.expert_tensor.all_gather(mine, [self.expert.size] * self.expert_tensor.size).tolist()
        if len(set(every)) > 1:
            raise MethodError("model.pad", f"needs as many tokens on every rank, and they fill experts to {every} rows",
                              hint="make micro-batches of one size, or pad: false")  # fmt: skip
        self._agreed = True

    def _splits(self, copy: HostCopy) -> tuple[list[int], list[list[list[int]]]]:
        """Rows that I send to each rank, [ep], and that come from each source for each of my experts, [et][ep][Em]."""
        flat, mine, ep = copy.numbers(), self.mine, self.expert.size
        chunks = [flat[i : i + mine] for i in range(0, len(flat), mine)]
        each = [chunks[i : i + ep] for i in range(ep, len(chunks), ep)]
        return [sum(chunk) for chunk in chunks[:ep]], each

    def _expert_major(self, counts: Tensor, rows: int) -> Tensor | None:
        """The order that brings rows of several sources, each sorted by expert, into one sorted by expert, [R]."""
        if counts.numel() == self.mine or self.mine == 1:
            return None
        of = torch.arange(self.mine, device=counts.device).repeat(counts.shape[0] * counts.shape[1])
        return torch.argsort(of.repeat_interleave(counts.flatten(), output_size=rows), stable=True)


class AllGather(Dispatcher):
    """Every rank gets all tokens of its group and computes its own experts': for few expert ranks, or many choices.

    With fewer choices per token than expert ranks an all-to-all sends less.
    """

    @torch.compiler.disable  # the numbers of rows are known only as it runs
    def __call__(self, rows: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """[n, D] -> [n, D]; see ``Dispatcher``."""
        keep, _ = self._keep(routing, experts.training)
        # A choice that is dropped belongs to no expert, on whatever rank.
        indices = routing.indices if keep is None else torch.where(keep, routing.indices, self.experts)
        ep, et = self._sizes(len(rows), rows.device)
        x, w = gather(self.expert, ep, rows, routing.weights)
        x, w = gather(self.expert_tensor, et, x, w)  # [N, D], [N, k]
        indices = self.expert_tensor.all_gather(self.expert.all_gather(indices, ep), et)  # [N, k]
        local = indices - self.expert.rank * self.mine
        here = (local >= 0) & (local < self.mine)
        permutation = plan(local.clamp(min=0), self.mine, here)
        z = combine(experts(permute(x, permutation), permutation.counts), w, permutation)  # [N, D]
        (z,) = scatter_sum(self.expert_tensor, et, z)
        (z,) = scatter_sum(self.expert, ep, z)
        self._note(routing, keep, permutation.counts.tolist())
        return z

    def _sizes(self, tokens: int, device: torch.device) -> tuple[list[int], list[int]]:
        """Tokens of each rank of ``expert``, and of each rank of ``expert_tensor`` with those of its expert ranks."""
        ep, et = self.expert.size, self.expert_tensor.size
        sizes = self.expert.all_gather(torch.tensor([tokens], device=device), [1] * ep)
        sums = self.expert_tensor.all_gather(sizes.sum().view(1), [1] * et)
        return sizes.tolist(), sums.tolist()


class HostCopy:
    """Numbers on their way from a device to the host, awaited where they are used."""

    def __init__(self, numbers: Tensor) -> None:
        self._event: Any = None
        self._numbers = numbers
        if numbers.is_cuda:
            # On a stream of its own the copy does not wait for what the compute stream is given meanwhile.
            stream = torch.cuda.Stream(numbers.device)
            stream.wait_stream(torch.cuda.current_stream(numbers.device))
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            with torch.cuda.stream(stream):
                self._numbers.copy_(numbers, non_blocking=True)
                self._event = stream.record_event()
            numbers.record_stream(stream)

    def numbers(self) -> list[int]:
        """The numbers."""
        if self._event is not None:
            self._event.synchronize()
        return self._numbers.tolist()


def reorder(x: Tensor, order: Tensor, back: bool = False) -> Tensor:
    """``x[order]``, or with ``back`` what undoes it; ``order`` is a permutation of the rows, int64 [R]."""
    return _Reorder.apply(x, order, back)


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: bool) -> Tensor:
        ctx.save_for_backward(order)
        ctx.back = back
        return _ordered(x, order, back)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return _ordered(grad, order, not ctx.back), None, None


def _ordered(x: Tensor, order: Tensor, back: bool) -> Tensor:
    return torch.empty_like(x).index_copy_(0, order, x) if back else x.index_select(0, order)


def _same_rows(told: int, rows: int, what: str) -> None:
    if told != rows:
        raise RuntimeError(f"{rows} rows are {what} where the ranks told each other {told}: counts were read too early")


DISPATCHERS: dict[str, type[Dispatcher]] = {"all-to-all": AllToAll, "all-gather": AllGather}
