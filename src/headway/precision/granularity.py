"""Which elements of a tensor share one scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from headway.core.errors import HeadwayError

Kind = Literal["tensor", "channel", "row", "group", "block"]


@dataclass(frozen=True)
class Granularity:
    """How a tensor is cut into groups; made by `tensor`, `channel`, `row`, `group` and `block`.

    ``pad`` allows a tail group that is shorter than the others; without it such a shape is an error.
    """

    kind: Kind
    dim: int = -1
    size: tuple[int, ...] = ()
    pad: bool = False

    @classmethod
    def tensor(cls) -> Granularity:
        """One scale for the whole tensor."""
        return cls("tensor")

    @classmethod
    def channel(cls, dim: int = 0) -> Granularity:
        """One scale for each index of ``dim``, over all the others: [.., C, ..] has scales [C]."""
        return cls("channel", dim)

    @classmethod
    def row(cls, dim: int = -1) -> Granularity:
        """One scale for each line along ``dim``: [B, T, D] has scales [B, T] for the last dimension."""
        return cls("row", dim)

    @classmethod
    def group(cls, size: int, dim: int = -1, pad: bool = False) -> Granularity:
        """One scale for each ``size`` neighbours along ``dim``: [B, D] has scales [B, D / size]."""
        return cls("group", dim, (_positive(size),), pad)

    @classmethod
    def block(cls, rows: int, columns: int, pad: bool = False) -> Granularity:
        """One scale for each ``rows`` x ``columns`` tile of the last two dimensions."""
        return cls("block", -1, (_positive(rows), _positive(columns)), pad)

    def split(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """``x`` as a view (a copy if padded) with axes inside groups apart, and which axes those are.

        Raises:
            HeadwayError: there is no such dimension, or the groups do not fit and `pad` is off.
        """
        if self.kind == "tensor" or x.dim() == 0:
            if self.kind not in ("tensor", "row", "channel"):
                raise HeadwayError(f"groups of {self.size}", "need a tensor with dimensions", got=tuple(x.shape))
            return x.reshape(-1), (0,)
        if self.kind == "block":
            if x.dim() < 2:
                raise HeadwayError(f"blocks of {self.size}", "need two dimensions or more", got=tuple(x.shape))
            rows, columns = self.size
            x = self._fit(self._fit(x, -1, columns), -2, rows)
            shape = (*x.shape[:-2], x.shape[-2] // rows, rows, x.shape[-1] // columns, columns)
            return x.reshape(shape), (len(shape) - 3, len(shape) - 1)
        if not -x.dim() <= self.dim < x.dim():
            raise HeadwayError(f"granularity {self.kind}", f"has no dimension {self.dim} in shape {tuple(x.shape)}")
        dim = self.dim % x.dim()
        if self.kind == "channel":
            return x, tuple(axis for axis in range(x.dim()) if axis != dim)
        if self.kind == "row":
            return x, (dim,)
        x = self._fit(x, dim, self.size[0])
        shape = (*x.shape[:dim], x.shape[dim] // self.size[0], self.size[0], *x.shape[dim + 1 :])
        return x.reshape(shape), (dim + 1,)

    def join(self, view: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The way back from `split`: ``shape`` again, without the padding."""
        if self.kind in ("group", "block") and view.numel() != _count(shape):
            dims = (-2, -1) if self.kind == "block" else (self.dim,)
            padded = list(shape)
            for dim, size in zip(dims, self.size, strict=True):
                padded[dim] = -(-shape[dim] // size) * size
            view = view.reshape(padded)
            for dim in dims:
                view = view.narrow(dim, 0, shape[dim])
        return view.reshape(shape)

    def _fit(self, x: Tensor, dim: int, size: int) -> Tensor:
        missing = -x.shape[dim] % size
        if not missing:
            return x
        if not self.pad:
            raise HeadwayError(
                f"groups of {size}",
                f"do not divide dimension {dim} of shape {tuple(x.shape)}",
                hint=f"choose a divisor of {x.shape[dim]}, or pad=True for a shorter last group",
            )
        return F.pad(x, [0, 0] * (x.dim() - 1 - dim % x.dim()) + [0, missing])


def _positive(size: int) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise HeadwayError("the size of a group", got=size, expected="a whole number from 1 up")
    return size


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
