"""Rows exchanged among a few ranks in unequal numbers, differentiable, every byte counted.

Shapes: P ranks of a group; ``send[p]`` rows go to its rank p, ``receive[p]`` come from there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass
class Counted:
    """What one rank sent in the groups of one name."""

    messages: int = 0
    """Collective operations."""
    bytes: int = 0
    """Bytes to other ranks."""
    crossing: int = 0
    """Bytes to ranks on another node."""


@dataclass
class Traffic:
    """What one rank sent, by the name of the group."""

    node: int | None = None
    """Ranks per node; None: all ranks are on one."""
    by: dict[str, Counted] = field(default_factory=dict)

    def add(self, name: str, me: int, ranks: list[int], sizes: list[int]) -> None:
        """Count an operation of rank ``me`` that sends ``sizes[p]`` bytes to ``ranks[p]``."""
        counted = self.by.setdefault(name, Counted())
        counted.messages += 1
        for rank, size in zip(ranks, sizes, strict=True):
            if rank != me:
                counted.bytes += size
                if self.node is not None and rank // self.node != me // self.node:
                    counted.crossing += size


class Link:
    """A process group that counts; without a group, this rank alone.

    Args:
        name: what its traffic is counted under.
    """

    def __init__(self, name: str, group: dist.ProcessGroup | None, traffic: Traffic) -> None:
        self.name, self.group, self.traffic = name, group, traffic
        self.ranks = [0] if group is None else dist.get_process_group_ranks(group)
        self.size = len(self.ranks)
        self.rank = 0 if group is None else dist.get_rank(group)
        """This rank's place in the group."""
        self.fake = group is not None and dist.get_backend(group) == "fake"
        """Nothing arrives: what others would send is taken to be what this rank sends."""

    def all_to_all(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """[sum(send), ...] -> [sum(receive), ...], in the order of the ranks."""
        if self.size == 1:
            return x
        row = x[0].numel() * x.element_size() if len(x) else 0
        self.traffic.add(self.name, self.ranks[self.rank], self.ranks, [rows * row for rows in send])
        out = x.clone() if self.fake and send == receive else x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), receive, send, group=self.group)
        return out

    def all_gather(self, x: Tensor, sizes: list[int]) -> Tensor:
        """[sizes[rank], ...] -> [sum(sizes), ...] on every rank.

        Unequal sizes go as an all-to-all of the same rows to everyone: gloo gathers equal sizes only.
        """
        if self.size == 1:
            return x
        if len(set(sizes)) > 1:
            return self.all_to_all(x.repeat(self.size, *[1] * (x.ndim - 1)), [len(x)] * self.size, sizes)
        nbytes = x.numel() * x.element_size()
        self.traffic.add(self.name, self.ranks[self.rank], self.ranks, [nbytes] * self.size)
        out = x.repeat(self.size, *[1] * (x.ndim - 1)) if self.fake else x.new_empty(sum(sizes), *x.shape[1:])
        dist.all_gather(list(out.split(sizes)), x.contiguous(), group=self.group)  # into its parts
        return out

    def reduce_scatter(self, x: Tensor, sizes: list[int]) -> Tensor:
        """[sum(sizes), ...] on every rank -> the sum over ranks of rows [sizes[rank], ...].

        As an all-to-all and a sum in fp32 or better: sizes may differ, and the sum is rounded once, in the order of
        the ranks.
        """
        if self.size == 1:
            return x
        parts = self.all_to_all(x, sizes, [sizes[self.rank]] * self.size).view(self.size, -1, *x.shape[1:])
        return parts.sum(0, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)


def exchange(link: Link, send: list[int], receive: list[int], *tensors: Tensor) -> tuple[Tensor, ...]:
    """All-to-all of several tensors with the same rows; the gradient goes the other way."""
    return _Exchange.apply(link, send, receive, *tensors) if link.size > 1 else tensors


def gather(link: Link, sizes: list[int], *tensors: Tensor) -> tuple[Tensor, ...]:
    """All-gather of several tensors of ``sizes[rank]`` rows; the gradient is summed and scattered."""
    return _Gather.apply(link, sizes, *tensors) if link.size > 1 else tensors


def scatter_sum(link: Link, sizes: list[int], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Reduce-scatter of several tensors of ``sum(sizes)`` rows; the gradient is gathered."""
    return _ScatterSum.apply(link, sizes, *tensors) if link.size > 1 else tensors


# One node of the graph for all tensors of an exchange: the order of the messages in the backward pass is then the same
# on every rank.
class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Link, send: list[int], receive: list[int], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.back = link, receive, send
        return tuple(link.all_to_all(x, send, receive) for x in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        link, send, receive = ctx.back
        return None, None, None, *(link.all_to_all(grad, send, receive) for grad in grads)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Link, sizes: list[int], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.back = link, sizes
        return tuple(link.all_gather(x, sizes) for x in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        link, sizes = ctx.back
        return None, None, *(link.reduce_scatter(grad, sizes) for grad in grads)


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Link, sizes: list[int], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.back = link, sizes
        return tuple(link.reduce_scatter(x, sizes) for x in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        link, sizes = ctx.back
        return None, None, *(link.all_gather(grad, sizes) for grad in grads)
