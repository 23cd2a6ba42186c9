"""Softmax attention: grouped queries, causal, document and sliding-window masks, a key/value cache."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
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
    """Which keys a query may see; ``None`` if all of them.

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


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segments: Tensor | None = None,
    window: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    offset: int = 0,
) -> Tensor:
    """``softmax(q k^T scale + mask) v`` with the whole matrix of scores, in fp32 or better; see ``attention``."""
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * scale  # [B, H, T, S]
    mask = attention_mask(
        q.shape[2], k.shape[2], segments=segments, window=window, causal=causal, offset=offset, device=q.device
    )
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) @ v.to(wide)).to(q.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segments: Tensor | None = None,
    window: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    offset: int = 0,
) -> Tensor:
    """Scaled dot-product attention.

    Args:
        q: [B, H, T, hd].
        k: [B, Hkv, S, hd]; H is a multiple of Hkv.
        v: [B, Hkv, S, hd].
        segments: integer [B, S], document of each key; a query sees its own document only. Padding is a document too.
        window: a query at ``i`` sees keys ``j`` with ``0 <= i - j < window``.
        causal: a query sees no later key.
        scale: multiplies the scores; 1/sqrt(hd) by default.
        offset: position of the first query among the keys (with a key/value cache: the tokens already cached).

    Returns:
        [B, H, T, hd] in the dtype of ``q``.

    Source: Vaswani et al. 2017, equation 1; Ainslie et al. 2023 for grouped queries.
    """
    queries, keys = q.shape[2], k.shape[2]
    if window is not None and window >= keys:
        window = None
    grouped = q.shape[1] != k.shape[1]
    if segments is None and window is None and (not causal or (offset == 0 and queries == keys)):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
    if queries == 1 and segments is None and window is None and offset == keys - 1:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
    mask = attention_mask(
        queries, keys, segments=segments, window=window, causal=causal, offset=offset, device=q.device
    )
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
