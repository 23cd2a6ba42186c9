"""Collective operations with the derivatives that tensor parallelism needs, on plain tensors.

They call torch's functional collectives, which torch.compile traces and any dispatch mode can count.

Source: Shoeybi et al. (arXiv 1909.08053), section 3, f and g; Korthikanti et al. (arXiv 2205.05198), section 4.2.2, for
their halves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ops = torch.ops._c10d_functional


def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum over the group; no derivative."""
    total: Tensor = _ops.wait_tensor(_ops.all_reduce(x.contiguous(), "sum", group))
    return total


def all_gather(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    """The ranks' tensors of one shape, joined along ``dim``; no derivative."""
    dim %= x.ndim
    parts = _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous(), size, group))  # [size * x0, ...]
    # A group's parts come one after the other: move them to where they are joined.
    joined = parts.unflatten(0, (size, x.shape[0])).movedim(0, dim).contiguous()
    shape = (*x.shape[:dim], size * x.shape[dim], *x.shape[dim + 1 :])
    return torch.ops.aten._unsafe_view(joined, shape)  # nobody else has it, and FSDP2 warns of views


def reduce_scatter(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    """This rank's of ``size`` equal parts, along ``dim``, of the sum over the group; no derivative."""
    dim %= x.ndim
    parts = x.unflatten(dim, (size, -1)).movedim(dim, 0).flatten(0, 1)  # [size * x0, ...]
    part: Tensor = _ops.wait_tensor(_ops.reduce_scatter_tensor(parts.contiguous(), "sum", size, group))
    return part


def take(x: Tensor, dim: int, size: int, rank: int) -> Tensor:
    """This rank's of ``size`` equal parts along ``dim``."""
    length = x.shape[dim] // size
    return x.narrow(dim, rank * length, length)


class Copy(torch.autograd.Function):
    """f: the same tensor for all, which each works on in its own way; gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        """The tensor itself."""
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """All-reduce."""
        return all_reduce(grad, ctx.group), None


class Sum(torch.autograd.Function):
    """g: the sum over the group, with which all do the same; gradients are everyone's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        """All-reduce."""
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient itself."""
        return grad, None


class Gather(torch.autograd.Function):
    """f's half: everyone's part, with which each works in its own way; gradients are summed and divided again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, size: int, group: str) -> Tensor:
        """All-gather."""
        ctx.dim, ctx.size, ctx.group = dim, size, group
        return all_gather(x, dim, size, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Reduce-scatter."""
        return reduce_scatter(grad, ctx.dim, ctx.size, ctx.group), None, None, None


class SumScatter(torch.autograd.Function):
    """g's half: this rank's part of the sum over the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, size: int, group: str) -> Tensor:
        """Reduce-scatter."""
        ctx.dim, ctx.size, ctx.group = dim, size, group
        return reduce_scatter(x, dim, size, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """All-gather."""
        return all_gather(grad, ctx.dim, ctx.size, ctx.group), None, None, None


class Join(torch.autograd.Function):
    """Everyone's part, with which all do the same; each keeps its part of the gradient, which is the same for all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, size: int, rank: int, group: str) -> Tensor:
        """All-gather."""
        ctx.dim, ctx.size, ctx.rank = dim, size, rank
        return all_gather(x, dim, size, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        """No communication."""
        return take(grad, ctx.dim, ctx.size, ctx.rank), None, None, None, None
