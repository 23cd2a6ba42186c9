"""An all-to-all that turns one cut of tensors into another: scattered along one dimension, gathered along the other.

Shapes: P ranks of a group, in its order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass
class Link:
    """The ranks that share a sequence, as one of them sees them, with a count of what it sends.

    Args:
        group: in the order of the sequence; by default all ranks.
    """

    group: dist.ProcessGroup | None = None
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes to other ranks, by ``all-to-all`` and ``ring``."""

    @property
    def rank(self) -> int:
        """This rank's place in the group."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Ranks in the group."""
        return dist.get_world_size(self.group)


def link_of(group: dist.ProcessGroup | Link | None) -> Link:
    """A link to the ranks of a group, or the link itself."""
    return group if isinstance(group, Link) else Link(group)


@dataclass(frozen=True)
class Split:
    """How one tensor goes through an exchange: what each rank is given of it, and gives."""

    scatter: Sequence[int]
    """Entries along the scattered dimension for each rank; they make up the tensor."""
    gather: Sequence[int]
    """Entries along the gathered dimension from each rank."""

    def inverse(self) -> Split:
        """Of the exchange back."""
        return Split(self.gather, self.scatter)


def exchange(
    tensors: Sequence[Tensor], splits: Sequence[Split], *, scatter_dim: int, gather_dim: int, link: Link
) -> tuple[Tensor, ...]:
    """Give each rank its part along ``scatter_dim`` and join what comes along ``gather_dim``, in a single message.

    Args:
        tensors: of one dtype. Tensor ``i`` has ``sum(splits[i].scatter)`` entries along ``scatter_dim`` and
            ``splits[i].gather[rank]`` along ``gather_dim``.
        splits: one for each tensor; the parts may be uneven, and empty.

    Returns:
        The tensors, with ``splits[i].scatter[rank]`` entries along ``scatter_dim`` and ``sum(splits[i].gather)`` along
        ``gather_dim``. The gradient is the exchange back.

    Source: Jacobs et al. 2023 (DeepSpeed Ulysses), section 3.1.
    """
    return _Exchange.apply(link, scatter_dim, gather_dim, tuple(splits), *tensors)  # type: ignore[no-any-return]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, link: Link, scatter_dim: int, gather_dim: int, splits: tuple[Split, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.link, ctx.dims, ctx.splits = link, (scatter_dim, gather_dim), splits
        return _exchange(tensors, splits, scatter_dim, gather_dim, link)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        scatter_dim, gather_dim = ctx.dims
        inverse = [split.inverse() for split in ctx.splits]
        return None, None, None, None, *_exchange(grads, inverse, gather_dim, scatter_dim, ctx.link)


def _exchange(
    tensors: Sequence[Tensor], splits: Sequence[Split], scatter_dim: int, gather_dim: int, link: Link
) -> tuple[Tensor, ...]:
    rank, ranks = link.rank, range(link.size)
    pieces = [x.split(list(split.scatter), scatter_dim) for x, split in zip(tensors, splits, strict=True)]
    outgoing = [sum(parts[p].numel() for parts in pieces) for p in ranks]
    send = torch.cat([parts[p].reshape(-1) for p in ranks for parts in pieces])
    shapes = []  # by tensor and rank, of what comes
    for x, split in zip(tensors, splits, strict=True):
        shape = list(x.shape)
        shape[scatter_dim] = split.scatter[rank]
        shapes.append([[*shape[:gather_dim], n, *shape[gather_dim + 1 :]] for n in split.gather])
    sizes = [[torch.Size(shape).numel() for shape in of] for of in shapes]
    incoming = [sum(of[p] for of in sizes) for p in ranks]
    received = send.new_empty(sum(incoming))
    dist.all_to_all_single(received, send, incoming, outgoing, group=link.group)
    link.sent["all-to-all"] += (send.numel() - outgoing[rank]) * send.element_size()
    flat = received.split([of[p] for p in ranks for of in sizes])  # by rank, then tensor
    count = len(splits)
    return tuple(torch.cat([flat[p * count + t].view(shapes[t][p]) for p in ranks], gather_dim) for t in range(count))
