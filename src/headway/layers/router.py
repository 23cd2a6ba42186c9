"""Which experts each token goes to, and with which weights. Shapes: n tokens, E experts, k choices per token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Routing:
    """What a router decided."""

    probs: Tensor
    """[n, E], fp32 or better: softmax over all experts, or the sigmoids divided by their sum."""
    indices: Tensor
    """int64 [n, k]: the experts of each token, the most probable first."""
    weights: Tensor
    """[n, k], fp32 or better: with what each answer is multiplied."""
    logits: Tensor
    """[n, E], fp32 or better."""


class Router(nn.Module):
    """Scores each token for each expert by one matrix product, and takes the best ``top_k``.

    Scores are made in fp32 (or fp64) whatever the tokens' dtype: rounded to bf16, ties and near-ties would send tokens
    to experts that did not win.

    Args:
        hidden: channels D.
        experts: their number E.
        top_k: experts per token.
        score: ``softmax`` over all experts, or each expert's own ``sigmoid`` (DeepSeek-V3).
        normalize: divide the weights of a token by their sum.
    """

    def __init__(
        self,
        hidden: int,
        experts: int,
        top_k: int,
        *,
        score: Literal["softmax", "sigmoid"] = "softmax",
        normalize: bool = True,
    ) -> None:
        super().__init__()
        self.top_k, self.score, self.normalize = top_k, score, normalize
        self.weight = nn.Parameter(torch.empty(experts, hidden))
        nn.init.normal_(self.weight, std=0.02)
        self.register_buffer("bias", None)
        self.bias: Tensor | None
        """[E], fp32: added to the scores where experts are chosen, not to their weights. Nothing learns it; balancing
        without a loss moves it."""
        self.balance: Callable[[Routing], Routing] | None = None
        """Sees every routing and may hand on another; a balancing loss puts itself here."""

    @property
    def experts(self) -> int:
        """Their number E."""
        return self.weight.shape[0]

    def use_bias(self) -> None:
        """Have a ``bias``, of zeros."""
        self.bias = torch.zeros(self.experts, device=self.weight.device)

    def forward(self, rows: Tensor) -> Routing:
        """[n, D] -> the routing of n tokens."""
        wide = torch.promote_types(rows.dtype, torch.float32)
        with torch.autocast(rows.device.type, enabled=False):
            logits = F.linear(rows.to(wide), self.weight.to(wide))  # [n, E]
        if self.score == "softmax":
            scores = probs = logits.softmax(-1)
        else:
            scores = logits.sigmoid()
            probs = scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)
        choose = scores.detach() if self.bias is None else scores.detach() + self.bias
        indices = choose.topk(self.top_k, dim=-1).indices  # [n, k]
        weights = scores.gather(-1, indices)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
        routing = Routing(probs, indices, weights, logits)
        return routing if self.balance is None else self.balance(routing)
