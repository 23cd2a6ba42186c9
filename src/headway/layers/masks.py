"""Which keys a query may see."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_mask(
    queries: int,
    keys: int,
    *,
    segments: Tensor | None = None,
    window: int | None = None,
    causal: bool = True,
    offset: int = 0,
    device: torch.device | str | None = None,
) -> Tensor | None:
    """True where a query may see a key; ``None`` if it may see all of them.

    Args:
        queries: T, the first of which is at position ``offset``.
        keys: S, at positions 0 to S - 1.
        segments: integer [B, S], the document of each position.
        window: see keys at distance less than this only.
        causal: see no later keys.

    Returns:
        bool [T, S], or [B, 1, T, S] where ``segments`` are given.
    """
    i = torch.arange(offset, offset + queries, device=device)[:, None]
    j = torch.arange(keys, device=device)[None, :]
    mask: Tensor | None = None
    if causal:
        mask = j <= i
    if window is not None:
        near = (i - j < window) if causal else (i - j).abs() < window
        mask = near if mask is None else mask & near
    if segments is not None:
        same = segments[:, None, offset : offset + queries, None] == segments[:, None, None, :]  # [B, 1, T, S]
        mask = same if mask is None else same & mask
    return mask
