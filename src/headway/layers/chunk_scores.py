"""Scores within the chunks of linear attention: ``q_r . (decay from s to r) k_s`` for every pair ``s <= r``.

The factors ``exp(G_r)`` and ``exp(-G_s)`` of a decay cannot be applied apart, since the second overflows. With one
decay per token the difference is taken first. With a decay per channel a chunk is halved again and again: all pairs
from a first to a second half meet at the border between them, so that both factors are at most one.

Shapes: B batch, H heads, N chunks, C tokens of a chunk (a power of two), dk channels of keys.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def chunk_scores(q: Tensor, k: Tensor, logs: Tensor, same: Tensor | None = None) -> Tensor:
    """The scores of all pairs within each chunk.

    Args:
        q: [B, H, N, C, dk].
        k: [B, H, N, C, dk].
        logs: [B or 1, H or 1, N, C, dk or 1], sum of the logarithmic decays from the chunk's first token to each,
            that one included.
        same: bool [B, 1, N, C, C], pairs of one document.

    Returns:
        [B, H, N, C, C], zero where ``s > r`` and between documents.
    """
    if logs.shape[-1] == 1:
        return (q @ k.mT).mul_(_decays(logs, same))
    scores = q.new_zeros(*q.shape[:-1], q.shape[-2])
    scores.diagonal(dim1=-2, dim2=-1).copy_((q * k).sum(-1))
    for half, to_second, to_first in _borders(logs):
        queries, keys = _second(q, half) * to_second, _first(k, half) * to_first
        _blocks(scores, half).copy_(queries @ keys.mT)
    return scores if same is None else scores.mul_(same)


def chunk_scores_backward(
    grad: Tensor, q: Tensor, k: Tensor, logs: Tensor, same: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of ``q`` and ``k`` from that of the scores; what it holds of pairs without a score is ignored.

    Args:
        grad: [B, H, N, C, C]; may be overwritten.
    """
    if logs.shape[-1] == 1:
        grad = grad.mul_(_decays(logs, same))
        return grad @ k, grad.mT @ q
    if same is not None:
        grad = grad.mul_(same)
    own = grad.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    grad_q, grad_k = own * k, own * q
    for half, to_second, to_first in _borders(logs):
        queries, keys = _second(q, half) * to_second, _first(k, half) * to_first
        block = _blocks(grad, half).contiguous()
        _second(grad_q, half).add_((block @ keys).mul_(to_second))
        _first(grad_k, half).add_((block.mT @ queries).mul_(to_first))
    return grad_q, grad_k


def _decays(logs: Tensor, same: Tensor | None) -> Tensor:
    """[B, H, N, C, C], the decay from each token to each later one; logs [.., C, 1]."""
    C = logs.shape[-2]
    seen = torch.ones(C, C, dtype=torch.bool, device=logs.device).tril()
    seen = seen if same is None else seen & same
    # Masked before the exponential: above the diagonal the difference is positive and may overflow.
    return (logs - logs.mT).masked_fill(~seen, -torch.inf).exp_()


def _borders(logs: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Size of the halves, decay from the border to each token of a second half, and from each of a first to it."""
    half = logs.shape[-2] // 2
    while half:
        first = _first(logs, half)
        border = first[..., -1:, :]
        yield half, (_second(logs, half) - border).exp_(), (border - first).exp_()
        half //= 2


def _first(x: Tensor, half: int) -> Tensor:
    """[.., C, d] -> [.., C / (2 half), half, d], a view."""
    return x.unflatten(-2, (-1, 2, half))[..., 0, :, :]


def _second(x: Tensor, half: int) -> Tensor:
    return x.unflatten(-2, (-1, 2, half))[..., 1, :, :]


def _blocks(scores: Tensor, half: int) -> Tensor:
    """[.., C, C] -> [.., C / (2 half), half, half]: second halves against the first halves beside them, a view."""
    parts = scores.unflatten(-1, (-1, 2, half)).unflatten(-4, (-1, 2, half))  # [.., n, 2, h, n, 2, h]
    return parts[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
