"""Token embedding whose gradient is summed in fp32.

torch's CPU kernel adds up the gradients of a token's occurrences in the dtype of the weight. In bf16 a sum stops
growing once its terms fall below 1/256 of it: a token that makes up a few per cent of a batch, such as the space of a
byte-level tokenizer, loses a good part of its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows of ``weight``.

    Args:
        tokens: integer [...], each below V.
        weight: [V, D].

    Returns:
        [..., D]. The gradient is summed in fp32 or better and rounded once; first derivatives only.
    """
    if weight.dtype in (torch.bfloat16, torch.float16) and weight.device.type == "cpu":
        looked_up: Tensor = _Embedding.apply(tokens, weight)
        return looked_up
    return F.embedding(tokens, weight)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.shape = weight.shape
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (tokens,) = ctx.saved_tensors
        total = torch.zeros(ctx.shape, dtype=torch.float32, device=grad.device)
        total.index_add_(0, tokens.flatten(), grad.reshape(-1, ctx.shape[1]).float())
        return None, total.to(grad.dtype)


class Embedding(nn.Embedding):
    """``nn.Embedding`` that looks up with ``embedding``."""

    def forward(self, input: Tensor) -> Tensor:
        """``input`` integer [...] -> [..., D]."""
        return embedding(input, self.weight)
