"""How many rows an expert takes, and which choices stay. Shapes: n tokens, k choices per token, E experts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Capacity:
    """A limit on the rows of an expert; what does not fit is dropped, and its token goes on without that expert.

    Source: Fedus et al. 2022, "Switch Transformers", section 2.2; the policies are those of Megatron-LM.
    """

    factor: float
    """Rows that an expert takes, as a multiple of the mean ``n k / E``; more than 0."""
    keep: Literal["probs", "position"] = "probs"
    """Which choices stay: those of the largest weights, or the first."""
    pad: bool = False
    """Fill every expert up to its capacity, so that all shapes are known beforehand."""
    minimum: int = 1
    """The least capacity, rows."""

    def rows(self, tokens: int, choices: int, experts: int) -> int:
        """``ceil(n k / E * factor)``, at least ``minimum``, at most ``n``: a token chooses an expert once."""
        wanted = math.ceil(round(tokens * choices * self.factor / experts, 9))
        return min(max(wanted, self.minimum), tokens)


def kept(indices: Tensor, weights: Tensor, experts: int, capacity: int, keep: str) -> Tensor:
    """Which choices stay when each expert takes ``capacity`` rows.

    Args:
        indices: int64 [n, k].
        weights: [n, k].
        keep: ``probs`` keeps those of the largest weights, the earlier of two equals; ``position`` the earliest.

    Returns:
        bool [n, k].
    """
    expert = indices.flatten()
    if keep == "probs":
        first = torch.argsort(weights.detach().flatten(), descending=True, stable=True)
        order = first[torch.argsort(expert[first], stable=True)]
    else:
        order = torch.argsort(expert, stable=True)
    counts = torch.bincount(expert, minlength=experts)
    starts = counts.cumsum(0) - counts
    rank = torch.arange(len(order), device=order.device) - starts[expert[order]]  # place within its expert
    return torch.empty_like(order, dtype=torch.bool).scatter_(0, order, rank < capacity).view_as(indices)
