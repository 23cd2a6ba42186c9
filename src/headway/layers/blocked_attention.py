"""Attention on a CPU: a block of queries against the keys it may see, as batched matrix products.

torch's fused CPU kernel runs bf16 matrix products far below the speed of oneDNN's. Here every product is one batched
oneDNN call; the blocks that a causal or windowed mask hides altogether are never computed; and the softmax and its
gradient are torch's row kernels, which work in fp32 inside. Scores and probabilities are rounded to the dtype of the
inputs, as in attention written out in bf16. At most a block of rows of the score matrix exists at a time; the
backward pass computes it again unless the sequences are short.

Shapes: B batch, T queries, S keys, H heads, Hkv key heads, G = H / Hkv, n = B * Hkv, t queries and w keys of a block.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.layers.masks import attention_mask

_BLOCK = 128
_MIN_QUERIES = 16  # below, one fused call costs less than the Python of the blocks
_KEEP = 8  # keys per channel of a head up to which probabilities are kept for the backward pass: memory of 4 queries


def can_block(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether ``blocked_attention`` is the faster way for these tensors."""
    return (
        q.device.type == "cpu"
        and q.dtype in (torch.bfloat16, torch.float32, torch.float64)
        and q.dtype == k.dtype == v.dtype
        and q.shape[2] >= _MIN_QUERIES
    )


def blocked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segments: Tensor | None = None,
    window: int | None = None,
    causal: bool = True,
    scale: float = 1.0,
    offset: int = 0,
    block: int = _BLOCK,
) -> Tensor:
    """As ``layers.attention.attention``; ``block`` is the number of queries that go together.

    First derivatives only.
    """
    keep = k.shape[2] <= _KEEP * k.shape[3] and torch.is_grad_enabled()
    return _BlockedAttention.apply(q, k, v, segments, window, causal, scale, offset, block, keep)


class _Blocks:
    """The cut of queries into blocks, and the scores of one."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        segments: Tensor | None,
        window: int | None,
        causal: bool,
        scale: float,
        offset: int,
        block: int,
    ) -> None:
        self.batch, heads, self.queries, self.width = q.shape
        self.kv_heads, self.keys = k.shape[1], k.shape[2]
        self.groups = heads // self.kv_heads
        self.segments, self.window, self.causal = segments, window, causal
        self.scale, self.offset, self.block = scale, offset, block
        self.triangles: dict[int, Tensor] = {}

    def ranges(self) -> list[tuple[int, int, int, int]]:
        """``(first query, end, first key, end)`` of each block."""
        out = []
        for i0 in range(0, self.queries, self.block):
            i1 = min(i0 + self.block, self.queries)
            j0, j1 = 0, self.keys
            if self.causal:
                j1 = min(j1, self.offset + i1)
            if self.window is not None:
                j0 = max(j0, self.offset + i0 - self.window + 1)
                if not self.causal:
                    j1 = min(j1, self.offset + i1 - 1 + self.window)
            out.append((i0, i1, j0, j1))
        return out

    def fold(self, x: Tensor, i0: int, i1: int, factor: float = 1.0) -> Tensor:
        """Rows of a query-like tensor [B, H, T, hd], as [n, G t, hd] in one piece of memory, times ``factor``."""
        rows = x[:, :, i0:i1].unflatten(1, (self.kv_heads, self.groups))  # [B, Hkv, G, t, hd]
        out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        if factor == 1.0:
            out.copy_(rows)
        else:
            torch.mul(rows, factor, out=out)
        return out.view(self.batch * self.kv_heads, -1, self.width)

    def unfold(self, x: Tensor, i0: int, i1: int) -> Tensor:
        """The inverse, as a view [B, H, t, hd]."""
        return x.view(self.batch, self.kv_heads * self.groups, i1 - i0, self.width)

    def probabilities(self, q: Tensor, k: Tensor, i0: int, i1: int, j0: int, j1: int) -> Tensor:
        """``softmax(q k^T)`` of folded, scaled queries [n, G t, hd] and keys [n, w, hd]: [n, G t, w]."""
        scores = torch.bmm(q, k.transpose(1, 2))
        t = i1 - i0
        if self.segments is None and self.window is None:
            if self.causal:
                corner = scores.view(-1, t, j1 - j0)[:, :, self.offset + i0 - j0 :]  # the rest is seen by all rows
                corner += self._triangle(t, scores)
        else:
            mask = attention_mask(
                t,
                j1 - j0,
                segments=None if self.segments is None else self.segments[:, j0:j1],
                window=self.window,
                causal=self.causal,
                offset=self.offset + i0 - j0,
                device=scores.device,
            )
            if mask is not None:
                scores.view(self.batch, -1, t, j1 - j0).masked_fill_(~mask, -math.inf)
        return torch.softmax(scores, -1)

    def _triangle(self, t: int, like: Tensor) -> Tensor:
        """0 at and below the diagonal, -inf above: [t, t]."""
        if t not in self.triangles:
            self.triangles[t] = torch.full((t, t), -math.inf, dtype=like.dtype, device=like.device).triu_(1)
        return self.triangles[t]


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: Tensor | None,
        window: int | None,
        causal: bool,
        scale: float,
        offset: int,
        block: int,
        keep: bool,
    ) -> Tensor:
        blocks = _Blocks(q, k, segments, window, causal, scale, offset, block)
        k_flat, v_flat = k.reshape(-1, *k.shape[2:]), v.reshape(-1, *v.shape[2:])  # [n, S, hd]
        # token-major memory, so that the output projection sees [B, T, H hd] without a copy
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        folded, kept = [], []
        for i0, i1, j0, j1 in blocks.ranges():
            rows = blocks.fold(q, i0, i1, scale)
            p = blocks.probabilities(rows, k_flat[:, j0:j1].contiguous(), i0, i1, j0, j1)
            out[:, :, i0:i1] = blocks.unfold(torch.bmm(p, v_flat[:, j0:j1].contiguous()), i0, i1)
            folded.append(rows)
            if keep:
                kept.append(p)
        ctx.blocks = blocks
        ctx.save_for_backward(k_flat, v_flat, *folded, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        blocks: _Blocks = ctx.blocks
        ranges = blocks.ranges()
        k, v, *rest = ctx.saved_tensors
        folded, kept = rest[: len(ranges)], rest[len(ranges) :]
        B, T, hd = blocks.batch, blocks.queries, blocks.width
        grad_q = k.new_empty(B, T, blocks.kv_heads * blocks.groups, hd).transpose(1, 2)
        grad_k, grad_v = _Sum(k), _Sum(v)
        # from the last block on: with a causal mask it has all the keys, and sums then need not start from zeros
        for index, (i0, i1, j0, j1) in reversed(list(enumerate(ranges))):
            # the copies are cheap; oneDNN would make slower ones of its own
            q, k_seen, v_seen = folded[index], k[:, j0:j1].contiguous(), v[:, j0:j1].contiguous()
            p = kept[index] if kept else blocks.probabilities(q, k_seen, i0, i1, j0, j1)
            g = blocks.fold(grad_out, i0, i1)
            grad_v.add(torch.bmm(p.transpose(1, 2), g), j0, j1)
            # p * (gp - sum(p * gp)): the gradient of the softmax, in fp32 inside
            gs = torch._softmax_backward_data(torch.bmm(g, v_seen.transpose(1, 2)), p, -1, p.dtype)
            torch.mul(blocks.unfold(torch.bmm(gs, k_seen), i0, i1), blocks.scale, out=grad_q[:, :, i0:i1])
            grad_k.add(torch.bmm(gs.transpose(1, 2), q), j0, j1)
        shape = (B, blocks.kv_heads, blocks.keys, hd)
        return grad_q, grad_k.value().view(shape), grad_v.value().view(shape), *(None,) * 7


class _Sum:
    """The gradient of ``x`` [n, S, hd], from contributions [n, w, hd] to ranges of keys; summed in fp32 or better."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.total: Tensor | None = None

    def add(self, part: Tensor, j0: int, j1: int) -> None:
        """Add to the keys from ``j0`` to ``j1``."""
        if self.total is None and part.shape == self.x.shape:
            self.total = part
            return
        wide = torch.promote_types(part.dtype, torch.float32)
        if self.total is None:
            self.total = torch.zeros_like(self.x, dtype=wide)
        self.total = self.total.to(wide)
        self.total[:, j0:j1] += part

    def value(self) -> Tensor:
        """The sum, in the dtype of ``x``."""
        return torch.zeros_like(self.x) if self.total is None else self.total.to(self.x.dtype)
