"""Softmax attention: grouped queries, causal, document and sliding-window masks, a key/value cache."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.layers.blocked_attention import blocked_attention, can_block
from headway.layers.masks import attention_mask


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

    On a CPU, sequences of some length go by blocks of queries (see ``blocked_attention``); everything else is torch's
    ``scaled_dot_product_attention``, which has fused kernels for GPUs.

    Source: Vaswani et al. 2017, equation 1; Ainslie et al. 2023 for grouped queries.
    """
    queries, keys = q.shape[2], k.shape[2]
    if window is not None and window >= keys:
        window = None
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if can_block(q, k, v):
        return blocked_attention(q, k, v, segments=segments, window=window, causal=causal, scale=scale, offset=offset)
    grouped = q.shape[1] != k.shape[1]
    if segments is None and window is None and (not causal or (offset == 0 and queries == keys)):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
    if segments is None and window is None and queries == 1 and offset == keys - 1:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
    mask = attention_mask(
        queries, keys, segments=segments, window=window, causal=causal, offset=offset, device=q.device
    )
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
