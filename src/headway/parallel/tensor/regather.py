"""Products with gathered tokens that keep only this rank's tokens, and gather the others once more for the gradient.

Source: Korthikanti et al. (arXiv 2205.05198), section 4.2.2: "we only store the Y_i^s part ... and perform an extra
all-gather in the backward pass".
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.parallel.tensor.collectives import all_gather


class Gathered:
    """The tokens that went into one region, for the products that begin there.

    Args:
        mine: [B, T / t, D], this rank's.
        whole: [B, T, D], everyone's; not kept.
        dim: of the tokens.
        size: of the group.
        group: its name.
    """

    def __init__(self, mine: Tensor, whole: Tensor, dim: int, size: int, group: str) -> None:
        self.mine: Tensor | None = mine  # until the region is left: from then on autograd keeps it
        self._whole = weakref.ref(whole)
        self._how = (dim, size, group)
        self._products = self._done = 0
        self._again: Tensor | None = None

    def is_whole(self, x: Tensor) -> bool:
        """Whether ``x`` is what was gathered here."""
        return self.mine is not None and self._whole() is x

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``F.linear(x, weight, bias)`` for the gathered ``x``."""
        self._products += 1
        product: Tensor = _Product.apply(x, weight, bias, self.mine, self)
        return product

    def again(self, mine: Tensor) -> Tensor:
        """Everyone's tokens in the backward pass; the last of the products lets go of them."""
        if self._again is None:
            self._again = all_gather(mine, *self._how)
        whole, self._done = self._again, self._done + 1
        if self._done == self._products:
            self._again, self._done = None, 0
        return whole


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, mine: Tensor, gathered: Gathered) -> Tensor:
        ctx.save_for_backward(mine.detach(), weight)
        ctx.gathered = gathered
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mine, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        flat = grad.flatten(0, -2)  # [B T, out]
        x = ctx.gathered.again(mine)  # also where it is not needed: it counts the products
        return (
            grad @ weight if need_x else None,
            flat.T @ x.flatten(0, -2) if need_weight else None,
            flat.sum(0) if need_bias else None,
            None,
            None,
        )
