"""Preference and policy losses on streamed log-probabilities: the logits never whole, the gradients exact.

The published code streams each loss by hand. Here the head is streamed once, as log-probabilities per token
(`layers.linear_log_probs`), and each loss is its own formula on top.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.layers.linear_cross_entropy import IGNORE, linear_cross_entropy
from headway.layers.linear_log_probs import linear_log_probs


def chunked_lm_loss(hidden: Tensor, head: Tensor, targets: Tensor, *, chunk: int = 128) -> Tensor:
    """Mean cross-entropy over the targets that count.

    Args:
        hidden: [B, T, D].
        head: [V, D].
        targets: int64 [B, T], the next tokens; -100 does not count.
        chunk: positions whose logits exist at a time.
    """
    loss, count = linear_cross_entropy(hidden.flatten(0, -2), head, targets.flatten(), chunk=chunk)
    return loss / count.clamp(min=1)


def chunked_dpo_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, reference: Tensor, *, beta: float = 0.1, chunk: int = 128
) -> Tensor:
    """Direct preference optimisation, mean over pairs.

    Args:
        hidden: [2 P, T, D] of the policy: first the P chosen responses, then the P rejected ones, in the same order.
        head: [V, D].
        targets: int64 [2 P, T]; -100 on prompts and padding.
        reference: [2 P], summed log-probabilities of the responses under the reference model.
        beta: strength of the tie to the reference.
        chunk: positions whose logits exist at a time.

    Source: Rafailov et al. (arXiv 2305.18290), equation 7.
    """
    sums = _log_probs(hidden, head, targets, chunk).sum(-1)  # [2 P]
    chosen, rejected = (sums - reference).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def chunked_grpo_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    old: Tensor,
    advantages: Tensor,
    *,
    reference: Tensor | None = None,
    clip: float = 0.2,
    beta: float = 0.0,
    normalise: Literal["grpo", "bnpo", "dr_grpo"] = "grpo",
    max_length: int | None = None,
    chunk: int = 128,
) -> Tensor:
    """Group-relative policy optimisation with a clipped ratio.

    Args:
        hidden: [B, T, D] of the policy.
        head: [V, D].
        targets: int64 [B, T]; -100 on prompts and padding.
        old: [B, T], log-probabilities under the policy that wrote the responses.
        advantages: [B].
        reference: [B, T], log-probabilities under the reference model; needed for ``beta`` above 0.
        clip: the ratio is clipped to 1 - clip and 1 + clip.
        beta: weight of the estimated divergence from the reference.
        normalise: by each response's length (``grpo``), by all tokens of the batch (``bnpo``), or by the batch size
        times
            ``max_length`` (``dr_grpo``).
        max_length: for ``dr_grpo``.
        chunk: positions whose logits exist at a time.

    Raises:
        ValueError: an argument that the others need is missing.

    Source: Shao et al. (arXiv 2402.03300), equation 3, and the estimator of equation 4; Liu et al. (arXiv
    2503.20783) for ``dr_grpo``.
    """
    mask = (targets != IGNORE).to(hidden.device)
    log_probs = _log_probs(hidden, head, targets, chunk)  # [B, T]
    ratio = (log_probs - old).exp()
    a = advantages[:, None]
    loss = -torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
    if beta:
        if reference is None:
            raise ValueError("beta > 0 needs the reference's log-probabilities")
        gap = reference - log_probs
        loss = loss + beta * (gap.exp() - gap - 1)
    loss = torch.where(mask, loss, 0.0)
    if normalise == "grpo":
        return (loss.sum(-1) / mask.sum(-1).clamp(min=1)).mean()
    if normalise == "bnpo":
        return loss.sum() / mask.sum().clamp(min=1)
    if max_length is None:
        raise ValueError("dr_grpo needs max_length")
    return loss.sum() / (len(targets) * max_length)


def _log_probs(hidden: Tensor, head: Tensor, targets: Tensor, chunk: int) -> Tensor:
    flat = linear_log_probs(hidden.flatten(0, 1), head, targets.flatten(), chunk=chunk)
    return flat.view_as(targets)
