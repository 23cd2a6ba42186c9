"""Attention on a CPU: a block of queries against the keys it may see, as batched matrix products.

torch's fused CPU kernel runs bf16 matrix products far below the speed of oneDNN's. Here every product is one batched
oneDNN call; the blocks that a causal or windowed mask hides altogether are never computed; and the softmax and its
gradient are torch's row kernels, which work in fp32 inside. Scores and probabilities are rounded to the dtype of the
inputs, as in attention written out in bf16. At most a block of rows of the score matrix exists at a time; the
backward pass computes it again unless the sequences are short.

Both passes are custom operators, so that ``torch.compile`` takes them as they are instead of tracing the blocks.

Shapes: B batch, T queries, S keys, H heads, Hkv key heads, G = H / Hkv, n = B * Hkv, t queries and w keys of a block.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
    trained = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    keep = trained and k.shape[2] <= _KEEP * k.shape[3]
    out: Tensor = _forward(q, k, v, segments, window, causal, scale, offset, block, keep)[0]
    return out


def blocked_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segments: Tensor | None = None,
    window: int | None = None,
    causal: bool = True,
    scale: float = 1.0,
    block: int = _BLOCK,
) -> Tensor:
    """As ``blocked_attention`` where nobody wants a gradient: for those who call ``blocked_attention_backward``."""
    out: Tensor = _forward(q, k, v, segments, window, causal, scale, 0, block, False)[0]
    return out


def blocked_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segments: Tensor | None = None,
    window: int | None = None,
    causal: bool = True,
    scale: float = 1.0,
    block: int = _BLOCK,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v`` from that of the output, for those who kept or recomputed the three."""
    blocks = _Blocks(q.shape, k.shape[1], k.shape[2], segments, window, causal, scale, 0, block)
    flat = (x.contiguous().flatten(0, 1) for x in (k, v))
    gradients: tuple[Tensor, Tensor, Tensor] = _backward(
        grad, blocks.fold(q), *flat, q.new_empty(0), segments, window, causal, scale, 0, block
    )
    return gradients


class _Range(NamedTuple):
    """A block: queries ``i0`` to ``i1``, the keys ``j0`` to ``j1`` that any of them may see."""

    i0: int
    i1: int
    j0: int
    j1: int


class _Blocks:
    """The cut of queries into blocks, and what is done with one.

    Query-like tensors are *folded*: block after block in one piece of memory, each [n, G t, hd], so that every block
    is what oneDNN takes without copying.
    """

    def __init__(
        self,
        shape: torch.Size,  # of the queries
        kv_heads: int,
        keys: int,
        segments: Tensor | None,
        window: int | None,
        causal: bool,
        scale: float,
        offset: int,
        block: int,
    ) -> None:
        self.batch, self.heads, self.queries, self.width = shape
        self.kv_heads, self.keys = kv_heads, keys
        self.rows = self.batch * self.heads  # n G
        self.segments, self.window, self.causal, self.scale, self.offset = segments, window, causal, scale, offset
        self.ranges = [self._range(i0, min(i0 + block, self.queries)) for i0 in range(0, self.queries, block)]
        self.triangles: dict[int, Tensor] = {}

    def _range(self, i0: int, i1: int) -> _Range:
        j0, j1 = 0, self.keys
        if self.causal:
            j1 = min(j1, self.offset + i1)
        if self.window is not None:
            j0 = max(j0, self.offset + i0 - self.window + 1)
            if not self.causal:
                j1 = min(j1, self.offset + i1 - 1 + self.window)
        return _Range(i0, i1, j0, j1)

    def fold(self, x: Tensor) -> Tensor:
        """[B, H, T, hd] -> folded."""
        out = x.new_empty(x.numel())
        for at in self.ranges:
            self.block(out, at).view(self.batch, self.heads, -1, self.width).copy_(x[:, :, at.i0 : at.i1])
        return out

    def block(self, folded: Tensor, at: _Range) -> Tensor:
        """One block of a folded tensor, [n, G t, hd]."""
        size = self.rows * self.width
        part = folded[size * at.i0 : size * at.i1]
        return part.view(self.batch * self.kv_heads, -1, self.width)

    def unfolded(self) -> tuple[int, int, int, int]:
        """The shape in which a result is made: token-major, so that a projection sees [B, T, H hd] without a copy."""
        return self.batch, self.queries, self.heads, self.width

    def unfold(self, block: Tensor, at: _Range, out: Tensor) -> None:
        """Write a block [n, G t, hd] to its place in ``out`` [B, T, H, hd]."""
        out[:, at.i0 : at.i1] = block.view(self.batch, self.heads, -1, self.width).transpose(1, 2)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """``scale * a b``, scaled before it is rounded."""
        return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=self.scale)

    def probabilities(self, q: Tensor, k: Tensor, at: _Range, out: Tensor | None = None) -> Tensor:
        """``softmax(scale q k^T)`` of a block [n, G t, hd] and its keys [n, w, hd]: [n, G t, w], in ``out``."""
        scores = self.product(q, k.transpose(1, 2))
        t, w, shift = at.i1 - at.i0, at.j1 - at.j0, self.offset + at.i0 - at.j0
        if self.segments is None and self.window is None:
            if self.causal:
                corner = scores.view(-1, t, w)[:, :, shift:]  # every row sees the keys before
                corner += self._triangle(t, scores)
        else:
            segments = None if self.segments is None else self.segments[:, at.j0 : at.j1]
            mask = attention_mask(
                t, w, segments=segments, window=self.window, causal=self.causal, offset=shift, device=scores.device
            )
            assert mask is not None
            # one bias for all heads: adding it is several times faster than filling by a mask that is broadcast
            scores.view(self.batch, self.heads, t, w).add_(torch.where(mask, 0.0, -math.inf).to(scores.dtype))
        return torch.softmax(scores, -1, out=out)

    def _triangle(self, t: int, like: Tensor) -> Tensor:
        """0 at and below the diagonal, -inf above: [t, t]."""
        if t not in self.triangles:
            self.triangles[t] = torch.full((t, t), -math.inf, dtype=like.dtype, device=like.device).triu_(1)
        return self.triangles[t]

    def kept(self, flat: Tensor) -> dict[_Range, Tensor]:
        """The places of each block's probabilities [n, G t, w] in one piece of memory."""
        sizes = [self.rows * (at.i1 - at.i0) * (at.j1 - at.j0) for at in self.ranges]
        shape = (self.batch * self.kv_heads, -1)
        return {at: p.view(*shape, at.j1 - at.j0) for at, p in zip(self.ranges, flat.split(sizes), strict=True)}

    def kept_size(self) -> int:
        """Elements that ``kept`` needs."""
        return sum(self.rows * (at.i1 - at.i0) * (at.j1 - at.j0) for at in self.ranges)


@torch.library.custom_op("headway::blocked_attention", mutates_args=())
def _forward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, and what the backward pass needs: folded queries, keys and values [n, S, hd], probabilities."""
    blocks = _Blocks(q.shape, k.shape[1], k.shape[2], segments, window, causal, scale, offset, block)
    q_folded = blocks.fold(q)
    k_flat, v_flat = (x.new_empty(x.shape).copy_(x).flatten(0, 1) for x in (k, v))
    kept = q.new_empty(blocks.kept_size() if keep else 0)
    places = blocks.kept(kept) if keep else {}
    out = q.new_empty(blocks.unfolded())
    for at in blocks.ranges:
        # copies of the keys and values are cheap; oneDNN would make slower ones of its own
        k_seen, v_seen = k_flat[:, at.j0 : at.j1].contiguous(), v_flat[:, at.j0 : at.j1].contiguous()
        p = blocks.probabilities(blocks.block(q_folded, at), k_seen, at, out=places.get(at))
        blocks.unfold(torch.bmm(p, v_seen), at, out)
    return out.transpose(1, 2), q_folded, k_flat, v_flat, kept


@_forward.register_fake
def _(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    blocks = _Blocks(q.shape, k.shape[1], k.shape[2], None, window, causal, scale, offset, block)
    flat = (k.shape[0] * k.shape[1], k.shape[2], k.shape[3])
    return (
        q.new_empty(blocks.unfolded()).transpose(1, 2),
        q.new_empty(q.numel()),
        k.new_empty(flat),
        v.new_empty(flat),
        q.new_empty(blocks.kept_size() if keep else 0),
    )


@torch.library.custom_op("headway::blocked_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q_folded: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    segments: Tensor | None,
    window: int | None,
    causal: bool,
    scale: float,
    offset: int,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    kv_heads = k.shape[0] // grad.shape[0]
    blocks = _Blocks(grad.shape, kv_heads, k.shape[1], segments, window, causal, scale, offset, block)
    places = blocks.kept(kept) if kept.numel() else {}
    folded = blocks.fold(grad)
    grad_q, grad_k, grad_v = grad.new_empty(blocks.unfolded()), _Sum(k), _Sum(v)
    # from the last block on: with a causal mask it has all the keys, and the sums then need not start from zeros
    for at in reversed(blocks.ranges):
        q, g = blocks.block(q_folded, at), blocks.block(folded, at)
        k_seen, v_seen = k[:, at.j0 : at.j1].contiguous(), v[:, at.j0 : at.j1].contiguous()
        p = places[at] if places else blocks.probabilities(q, k_seen, at)
        grad_v.add(torch.bmm(p.transpose(1, 2), g), at)
        # p * (gp - sum(p * gp)): the gradient of the softmax, in fp32 inside
        gs = torch._softmax_backward_data(torch.bmm(g, v_seen.transpose(1, 2)), p, -1, p.dtype)
        blocks.unfold(blocks.product(gs, k_seen), at, grad_q)
        grad_k.add(blocks.product(gs.transpose(1, 2), q), at)
    shape = (grad.shape[0], kv_heads, k.shape[1], k.shape[2])
    return grad_q.transpose(1, 2), grad_k.value().view(shape), grad_v.value().view(shape)


@_backward.register_fake
def _(
    grad: Tensor,
    q_folded: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    segments: Tensor | None,
    window: int | None,
    causal: bool,
    scale: float,
    offset: int,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, T, hd = grad.shape
    shape = (B, k.shape[0] // B, k.shape[1], hd)
    return grad.new_empty(B, T, H, hd).transpose(1, 2), k.new_empty(shape), v.new_empty(shape)


class _Sum:
    """The gradient of ``x`` [n, S, hd], from contributions [n, w, hd] to ranges of keys; summed in fp32 or better."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.total: Tensor | None = None

    def add(self, part: Tensor, at: _Range) -> None:
        """Add to the keys of the range."""
        if self.total is None and part.shape == self.x.shape:
            self.total = part
            return
        wide = torch.promote_types(part.dtype, torch.float32)
        if self.total is None:
            self.total = torch.zeros_like(self.x, dtype=wide)
        self.total = self.total.to(wide)
        self.total[:, at.j0 : at.j1] += part

    def value(self) -> Tensor:
        """The sum, in the dtype of ``x``."""
        return torch.zeros_like(self.x) if self.total is None else self.total.to(self.x.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    segments, *ctx.options, _keep = inputs[3:]
    ctx.save_for_backward(*output[1:], segments)
    ctx.set_materialize_grads(False)  # zeros for the outputs that only the backward pass sees would be a waste


def _autograd(ctx: Any, grad: Tensor | None, *_unused: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    *saved, segments = ctx.saved_tensors
    return *_backward(grad, *saved, segments, *ctx.options), *(None,) * 7


_forward.register_autograd(_autograd, setup_context=_setup_context)
