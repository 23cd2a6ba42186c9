"""Log-probabilities of given tokens through the output head, with the logits of a few positions at a time.

What preference and policy losses are made of: any function of these numbers gets exact gradients, and the logits of
the whole sequence never exist. The forward pass keeps nothing but its inputs; the backward pass makes each chunk's
logits once more.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.layers.linear_cross_entropy import IGNORE


def linear_log_probs_reference(hidden: Tensor, weight: Tensor, targets: Tensor, *, logit_scale: float = 1.0) -> Tensor:
    """All logits at once and autograd; see ``linear_log_probs``."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = (hidden @ weight.T).to(wide) * logit_scale  # [N, V]
    return -F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")


def linear_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int = 128, logit_scale: float = 1.0
) -> Tensor:
    """``log softmax(logit_scale * hidden @ weight.T)`` at ``targets``.

    Args:
        hidden: [N, D].
        weight: [V, D].
        targets: int64 [N]; the result is 0 where it is -100.
        chunk: positions whose logits exist at a time.
        logit_scale: multiplies the logits; the inverse of a sampling temperature.

    Returns:
        [N] in fp32 (fp64 for fp64 input). First derivatives only, in the dtypes of ``hidden`` and ``weight``.
    """
    return _LinearLogProbs.apply(hidden, weight, targets, chunk, logit_scale)


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, logit_scale: float) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.chunk, ctx.logit_scale = chunk, logit_scale
        rows = range(0, hidden.shape[0], chunk)
        parts = [
            linear_log_probs_reference(hidden[i : i + chunk], weight, targets[i : i + chunk], logit_scale=logit_scale)
            for i in rows
        ]
        return torch.cat(parts) if parts else hidden.new_zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        for start in range(0, hidden.shape[0], ctx.chunk):
            x, y = hidden[start : start + ctx.chunk], targets[start : start + ctx.chunk]
            kept = y != IGNORE
            g = torch.softmax((x @ weight.T).to(wide) * ctx.logit_scale, -1).neg_()  # [C, V]
            g.scatter_add_(1, torch.where(kept, y, 0)[:, None], torch.ones_like(g[:, :1]))  # onehot - p
            g *= (grad[start : start + ctx.chunk] * kept * ctx.logit_scale)[:, None]
            g = g.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(g, weight, out=grad_hidden[start : start + ctx.chunk])
            if grad_weight is not None:
                grad_weight += g.T @ x
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None
