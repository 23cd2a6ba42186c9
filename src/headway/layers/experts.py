"""A feed-forward block of many experts, of which each token visits a few.

Shapes: B batch, T tokens, n = B T, D channels, F channels inside an expert, E experts, k choices per token, R rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.layers.capacity import Capacity, kept
from headway.layers.permute import combine, permute, plan
from headway.layers.router import Router, Routing
from headway.layers.swiglu import swiglu

__all__ = ["Dispatch", "Experts", "LimitedDispatch", "MoE", "grouped_linear", "local_dispatch", "moe_reference"]

Dispatch = Callable[[Tensor, Routing, "Experts"], Tensor]
"""``(rows [n, D], routing, experts) -> [n, D]``: takes tokens to their experts and adds up the weighted answers."""


class Experts(nn.Module):
    """SwiGLU networks of one shape, their matrices stacked: ``gate`` and ``up`` [E, F, D], ``down`` [E, D, F]."""

    def __init__(self, hidden: int, width: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(experts, width, hidden))
        self.up = nn.Parameter(torch.empty(experts, width, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, width))
        for parameter in (self.gate, self.up, self.down):
            nn.init.normal_(parameter, std=0.02)

    @property
    def count(self) -> int:
        """How many experts are here."""
        return self.gate.shape[0]

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Every expert on its rows.

        Args:
            rows: [R, D], those of the first expert first.
            counts: int64 [E], rows per expert; their sum is R. They may be zero.

        Returns:
            [R, D].
        """
        gate, up, down = (_held(weight) for weight in (self.gate, self.up, self.down))
        inner = swiglu(grouped_linear(rows, gate, counts), grouped_linear(rows, up, counts))  # [R, F]
        return grouped_linear(inner, down, counts)


def _held(weight: Tensor) -> Tensor:
    """The part of the weight that this rank holds, where expert parallelism has divided it (a DTensor)."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """``rows @ weight[e].T`` for the rows of each expert e.

    One call of torch's grouped product, which asks the device for no number, where it can do it: in fp32, bf16 and
    fp16 (compiled, in bf16) with rows of a multiple of 16 bytes. Else a loop over experts. On a CPU the two cost the
    same.

    Args:
        rows: [R, I], those of the first expert first.
        weight: [E, O, I].
        counts: int64 [E], rows per expert; their sum is R.

    Returns:
        [R, O].
    """
    if _grouped(rows, weight):
        offsets = counts.cumsum(0).to(torch.int32)
        products = torch._grouped_mm(rows.contiguous(), weight.transpose(1, 2), offs=offsets)
        return _ContiguousGradient.apply(products)
    parts = rows.split(counts.tolist())
    # One unbind, not E indexings: the gradient of each of those would be a whole [E, O, I] of zeros but for one slice.
    return torch.cat([part @ matrix.T for part, matrix in zip(parts, weight.unbind(), strict=True)])


class _ContiguousGradient(torch.autograd.Function):
    """The grouped product's gradient refuses what a sum or a transposition hands back: strides of 0, or other order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def _grouped(rows: Tensor, weight: Tensor) -> bool:
    aligned = all(width * rows.element_size() % 16 == 0 for width in weight.shape[1:])
    # What the compiler knows of the product takes bf16 alone.
    known = (torch.bfloat16,) if torch.compiler.is_compiling() else (torch.float32, torch.bfloat16, torch.float16)
    return rows.dtype in known and rows.dtype == weight.dtype and aligned


def local_dispatch(rows: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """All experts are here and take whatever comes: [n, D] -> [n, D]."""
    permutation = plan(routing.indices, experts.count)
    answers = experts(permute(rows, permutation), permutation.counts)
    return combine(answers, routing.weights, permutation)


class LimitedDispatch:
    """All experts are here and, while training, take no more than their capacity; in evaluation nothing is dropped.

    A choice that is dropped adds nothing; the weights of the token's other choices stay as they are.
    """

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self.dropped: Tensor | None = None
        """The share of the last choices that was dropped, a scalar on the device."""

    def __call__(self, rows: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """[n, D] -> [n, D]."""
        if not experts.training:
            return local_dispatch(rows, routing, experts)
        (tokens, choices), capacity = routing.indices.shape, self.capacity
        limit = capacity.rows(tokens, choices, experts.count)
        keep = kept(routing.indices, routing.weights, experts.count, limit, capacity.keep)
        self.dropped = 1 - keep.float().mean()
        permutation = plan(routing.indices, experts.count, keep, limit if capacity.pad else None)
        return combine(experts(permute(rows, permutation), permutation.counts), routing.weights, permutation)


class MoE(nn.Module):
    """A router, experts, and perhaps a shared network that every token visits.

    Args:
        hidden: channels D.
        width: channels inside an expert F.
        experts: their number E.
        router: decides; its ``top_k`` is k.
        shared: a module [B, T, D] -> [B, T, D] whose answer is added, or None.
        capacity: limit of an expert while training; None: nothing is ever dropped.

    Source: Shazeer et al. 2017, "Outrageously Large Neural Networks", equations 1 to 5, without their noise.
    """

    def __init__(
        self,
        hidden: int,
        width: int,
        experts: int,
        router: Router,
        *,
        shared: nn.Module | None = None,
        capacity: Capacity | None = None,
    ) -> None:
        super().__init__()
        self.router, self.experts, self.shared = router, Experts(hidden, width, experts), shared
        self.capacity = capacity
        # Expert parallelism puts its own here.
        self.dispatch: Dispatch = local_dispatch if capacity is None else LimitedDispatch(capacity)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        rows = x.flatten(0, 1)  # [n, D]
        y = self.dispatch(rows, self.router(rows), self.experts).view_as(x)
        return y if self.shared is None else y + self.shared(x)


def moe_reference(layer: MoE, x: Tensor) -> Tensor:
    """The same function without a capacity: every expert sees every token, and most of it is multiplied by zero."""
    rows = x.flatten(0, 1)
    routing, experts = layer.router(rows), layer.experts
    y = torch.zeros_like(rows, dtype=torch.promote_types(x.dtype, torch.float32))
    for e in range(experts.count):
        weight = (routing.weights * (routing.indices == e)).sum(1, keepdim=True)  # [n, 1]
        inner = F.silu(rows @ experts.gate[e].T) * (rows @ experts.up[e].T)
        y = y + weight * (inner @ experts.down[e].T)
    y = y.to(x.dtype).view_as(x)
    return y if layer.shared is None else y + layer.shared(x)
