"""The output head and its loss in one step: the logits of a few tokens at a time, never all of them.

The gradient is computed in the forward pass, while a chunk's logits are there, so that they are neither kept
nor computed twice: three matrix products per chunk in all, as in an ordinary head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100
_CHUNK_BYTES = {"cpu": 8 * 2**20}  # fp32 logits of a chunk: on a CPU they should stay in its cache,
_CHUNK_BYTES_ELSEWHERE = 256 * 2**20  # on a GPU they should occupy it
_MIN_CHUNK = 512  # fewer tokens than this and adding up the weight's gradient costs more than the cache saves


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """All logits at once and autograd; see ``linear_cross_entropy``."""
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32)) * logit_scale  # [N, V]
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum", label_smoothing=label_smoothing)
    kept = targets != IGNORE
    if z_loss:
        loss = loss + z_loss * logits[kept].logsumexp(-1).square().sum()
    return loss, kept.sum()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of the cross-entropy of ``softmax(logit_scale * hidden @ weight.T)``.

    Args:
        hidden: [N, D].
        weight: [V, D].
        targets: int64 [N]; -100 is ignored.
        chunk: tokens whose logits exist at a time; by default as many as suit the device.
        label_smoothing: share of the target's probability that is spread over the vocabulary.
        z_loss: weight of the squared log-partition function (PaLM, section 5), added to each token's loss.
        logit_scale: multiplies the logits.

    Returns:
        The sum (fp32 scalar; fp64 for fp64 input) and the number of tokens it is over (int64 scalar).
        Gradients are exact, in the dtypes of ``hidden`` and ``weight``; there are no second derivatives.
    """
    if chunk is None:
        chunk = default_chunk(weight.shape[0], weight.device)
    grad = torch.is_grad_enabled()
    loss = _LinearCrossEntropy.apply(hidden, weight, targets, chunk, label_smoothing, z_loss, logit_scale, grad)
    return loss, (targets != IGNORE).sum()


def default_chunk(vocabulary: int, device: torch.device) -> int:
    """Tokens whose ``vocabulary`` logits suit the device."""
    budget = _CHUNK_BYTES.get(device.type, _CHUNK_BYTES_ELSEWHERE)
    return max(_MIN_CHUNK, budget // (4 * vocabulary))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk: int,
        label_smoothing: float,
        z_loss: float,
        logit_scale: float,
        grad: bool,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        tokens, vocabulary = hidden.shape[0], weight.shape[0]
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        need_hidden, need_weight = (grad and need for need in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        for start in range(0, tokens, chunk):
            x, y = hidden[start : start + chunk], targets[start : start + chunk]  # [C, D], [C]
            logits = (x @ weight.T).to(wide)  # [C, V]
            if logit_scale != 1.0:
                logits *= logit_scale
            kept = y != IGNORE
            y = torch.where(kept, y, 0)[:, None]  # [C, 1]
            right = logits.gather(1, y)[:, 0]
            mean = logits.mean(-1) if label_smoothing else 0.0
            # The row kernel for the softmax is the one fast exponential on a CPU, but it does not tell the
            # log-partition function: that is the highest logit less the logarithm of the highest probability.
            highest = logits.amax(-1)
            p = torch.softmax(logits, -1)
            z = highest - p.amax(-1).log()  # [C]
            loss_of_token = z - (1 - label_smoothing) * right - label_smoothing * mean + z_loss * z.square()
            loss += torch.where(kept, loss_of_token, 0.0).sum()
            if not (need_hidden or need_weight):
                continue
            # d loss / d logits = (1 + 2 z_loss z) p - (1 - smoothing) onehot - smoothing / V
            if z_loss:
                p *= (1 + 2 * z_loss * z)[:, None]
            p.scatter_add_(1, y, torch.full_like(right, label_smoothing - 1)[:, None])
            if label_smoothing:
                p -= label_smoothing / vocabulary
            # what is ignored is taken out of the narrow factors of the products rather than out of [C, V]
            g, factor = p.to(hidden.dtype), (kept.to(wide) * logit_scale)[:, None]
            if grad_hidden is not None:
                torch.mul(g @ weight, factor, out=grad_hidden[start : start + chunk])
            if grad_weight is not None:
                grad_weight += g.T @ (x * factor).to(x.dtype)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_loss,
            None if grad_weight is None else grad_weight * grad_loss,
            *(None,) * 6,
        )
