"""Tokens brought into the order of their experts, and their experts' answers added up again.

Every sum goes along a dimension in a fixed order, never by atomic addition: the same numbers on every run. Shapes: n
tokens, k choices per token, E experts, R rows (one per choice that is kept, and those of padding), D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Permutation:
    """Which choice each row carries, and which row carries each choice.

    A choice is a place in the flattened [n, k] table of chosen experts.
    """

    choice: Tensor
    """int64 [R]: the choice in each row, rows of one expert together; ``n k`` in rows of padding."""
    row: Tensor
    """int64 [n, k]: the row of each choice; ``R`` where it was dropped."""
    counts: Tensor
    """int64 [E]: rows per expert, padding included."""
    whole: bool
    """Nothing was dropped and nothing padded."""

    @property
    def token(self) -> Tensor:
        """int64 [R]: the token in each row; ``n`` in rows of padding."""
        return self.choice // self.row.shape[1]


def plan(indices: Tensor, experts: int, keep: Tensor | None = None, pad: int | None = None) -> Permutation:
    """Sort choices by expert; within an expert by token.

    Args:
        indices: int64 [n, k], the experts of each token; ``experts`` or more: of no interest here, as if dropped.
        experts: their number E.
        keep: bool [n, k], the choices that are not dropped; None: all.
        pad: rows that each expert gets exactly, some of them empty; ``keep`` must leave no more than that.

    Returns:
        Without ``keep`` and ``pad``, R = n k is known without asking the device.
    """
    expert = indices.flatten()  # [nk]
    if keep is not None:
        expert = torch.where(keep.flatten(), expert, experts)
    expert = expert.clamp(max=experts)
    every = torch.bincount(expert, minlength=experts + 1)  # [E + 1], the last one of dropped choices
    order = torch.argsort(expert, stable=True)  # [nk]
    place = torch.arange(len(order), device=order.device)
    if pad is None:
        rows = len(order) if keep is None else int(every[:experts].sum())
        row = torch.empty_like(order).scatter_(0, order, place.clamp(max=rows))
        return Permutation(order[:rows], row.view_as(indices), every[:experts], whole=keep is None)
    starts = every.cumsum(0) - every
    sorted_expert = expert[order]
    target = sorted_expert * pad + (place - starts[sorted_expert])  # [nk]
    target = torch.where(sorted_expert < experts, target, experts * pad)
    row = torch.empty_like(order).scatter_(0, order, target)
    choice = torch.full((experts * pad + 1,), len(order), device=order.device).scatter_(0, target, order)[:-1]
    return Permutation(choice, row.view_as(indices), torch.full_like(every[:experts], pad), whole=False)


def permute(x: Tensor, permutation: Permutation) -> Tensor:
    """[n, D] -> [R, D]: a copy of its token in every row, zeros in rows of padding.

    The gradient of a token is summed over its rows in fp32 or better.
    """
    return _Permute.apply(x, permutation)


def combine(rows: Tensor, weights: Tensor, permutation: Permutation) -> Tensor:
    """Each token's rows, weighted and added up in fp32 or better.

    Args:
        rows: [R, D], the experts' answers.
        weights: [n, k] of each choice, fp32 or better; that of a dropped choice counts for nothing.

    Returns:
        [n, D] in the dtype of ``rows``; zeros for a token all of whose choices were dropped.
    """
    return _Combine.apply(rows, weights, permutation)


def _take(x: Tensor, index: Tensor, whole: bool) -> Tensor:
    """Rows of ``x``; zeros for an index just past its end, which only occurs where not ``whole``."""
    if not whole:
        x = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    return x.index_select(0, index)


def _by_token(rows: Tensor, permutation: Permutation) -> Tensor:
    """[R, D] -> [n, k, D], zeros for what was dropped."""
    return _take(rows, permutation.row.flatten(), permutation.whole).unflatten(0, permutation.row.shape)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return _take(x, permutation.token, permutation.whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        wide = torch.promote_types(grad.dtype, torch.float32)
        return _by_token(grad, ctx.permutation).sum(1, dtype=wide).to(grad.dtype), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, permutation: Permutation) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.permutation = permutation
        wide = torch.promote_types(rows.dtype, torch.float32)
        return (_by_token(rows, permutation).to(wide) * weights.to(wide)[..., None]).sum(1).to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weights = ctx.saved_tensors
        permutation, wide = ctx.permutation, torch.promote_types(rows.dtype, torch.float32)
        per_row = _take(weights.flatten(), permutation.choice, permutation.whole)[:, None].to(wide)  # [R, 1]
        grads = _take(grad, permutation.token, permutation.whole)  # [R, D]
        of_weights = (rows.to(wide) * grads.to(wide)).sum(1).to(weights.dtype)  # [R]
        return (grads.to(wide) * per_row).to(rows.dtype), _by_token(of_weights, permutation), None
