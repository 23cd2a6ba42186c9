"""Ring attention: every rank keeps its queries, keys and values go round, and partial softmaxes are merged.

Shapes: P ranks, B batch, T tokens of the sequence, n = T/P, H query heads, Hkv key and value heads, G = H/Hkv, hd head
width; t queries and w keys of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.core.errors import ModelError
from headway.parallel.sequence.batch import Layout
from headway.parallel.sequence.exchange import Link, link_of

WHERE = "parallel.sequence"
_TILE = 256  # queries whose scores exist at a time


class Tile(NamedTuple):
    """Queries and keys of two stretches, from and to, in the places where a rank holds them and in the sequence."""

    q: slice
    k: slice
    q_at: int
    """Position of the first query in the sequence,"""
    k_at: int
    """and of the first key."""


@dataclass(frozen=True)
class Course:
    """Who holds what, and which keys a rank's queries may see.

    A window shorter than a stretch ends the round early: nobody needs the keys of ranks further on.
    """

    ranks: int
    own: int
    """n, tokens of each rank."""
    layout: Layout
    causal: bool
    window: int | None

    def stretches(self, rank: int) -> list[tuple[int, int]]:
        """Position and length of each run of consecutive tokens that a rank holds."""
        if self.layout == "contiguous":
            return [(rank * self.own, self.own)]
        half = self.own // 2
        return [(rank * half, half), ((2 * self.ranks - 1 - rank) * half, half)]

    def tiles(self, rank: int, source: int) -> Iterator[Tile]:
        """The tiles of a rank's queries with the keys of another that are not hidden altogether."""
        q_place = 0
        for q_at, q_length in self.stretches(rank):
            k_place = 0
            for k_at, k_length in self.stretches(source):
                for start in range(0, q_length, _TILE):
                    stop = min(start + _TILE, q_length)
                    low, high = self._seen(q_at + start, q_at + stop)
                    low, high = max(low, k_at), min(high, k_at + k_length)
                    if low < high:
                        keys = slice(k_place + low - k_at, k_place + high - k_at)
                        yield Tile(slice(q_place + start, q_place + stop), keys, q_at + start, low)
                k_place += k_length
            q_place += q_length

    def _seen(self, start: int, stop: int) -> tuple[int, int]:
        """The keys that any of these queries may see, from and to."""
        low, high = 0, self.ranks * self.own
        if self.causal:
            high = stop
        if self.window is not None:
            low = max(0, start - self.window + 1)
            if not self.causal:
                high = min(high, stop - 1 + self.window)
        return low, high

    def steps(self) -> int:
        """How many ranks on keys and values have to be handed: P - 1, or fewer with a window."""
        sees = [s for s in range(self.ranks) for r in range(self.ranks) if any(self.tiles(r, (r - s) % self.ranks))]
        return max(sees)

    def hidden(self, tile: Tile, segments: Tensor | None, device: torch.device) -> Tensor | None:
        """True where a query may not see a key, [1 or B, 1, 1, t, w]; None where all may see all."""
        t, w = tile.q.stop - tile.q.start, tile.k.stop - tile.k.start
        ahead = tile.k_at + w - 1 - tile.q_at  # of the first query, the furthest key
        behind = tile.q_at + t - 1 - tile.k_at
        near = self.window is None or (behind < self.window and (self.causal or ahead < self.window))
        inside = near and (not self.causal or ahead <= 0)
        if segments is None and inside:
            return None
        seen: Tensor | None = None
        if not inside:
            i = torch.arange(tile.q_at, tile.q_at + t, device=device)[:, None]
            j = torch.arange(tile.k_at, tile.k_at + w, device=device)
            seen = j <= i if self.causal else torch.ones(t, w, dtype=torch.bool, device=device)
            if self.window is not None:
                seen = seen & ((i - j).abs() < self.window)
            seen = seen[None]
        if segments is not None:
            q, k = segments[:, tile.q_at : tile.q_at + t, None], segments[:, None, tile.k_at : tile.k_at + w]
            seen = q == k if seen is None else seen & (q == k)
        assert seen is not None
        return ~seen[:, None, None]


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | Link | None = None,
    segments: Tensor | None = None,
    window: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    offset: int = 0,
    layout: Layout = "zigzag",
) -> Tensor:
    """``layers.attention.attention`` over a sequence that lies on many ranks, with messages to neighbours only.

    Scores and sums are in fp32 or better. Tiles that a mask of order or window hides altogether are never computed:
    with ``zigzag`` causal attention costs every rank the same.

    Args:
        q: [B, H, n, hd], the queries of this rank's tokens, see ``own_positions``; even n with ``zigzag``.
        k: [B, Hkv, n, hd].
        v: [B, Hkv, n, hd].
        group: the ranks, by default all; or a link to them, which counts what is sent.
        segments: integer [B, T], the document of each token of the whole sequence, in its order.
        window: see ``attention``; one shorter than a stretch needs fewer messages.
        causal: see ``attention``.
        scale: 1/sqrt(hd) by default.
        offset: 0; there is no cache of keys here.
        layout: how the sequence is cut.

    Returns:
        [B, H, n, hd]; gradients are exact.

    Raises:
        ModelError: there is a cache of keys; ``zigzag`` with an odd number of tokens.

    Source: Liu et al. 2023 (Ring Attention), section 3; the merge is Dao 2023 (FlashAttention-2), section 3.1.
    """
    link = link_of(group)
    if offset or q.shape[2] != k.shape[2]:
        raise ModelError(WHERE, f"shares sequences among {link.size} ranks and cannot generate with a cache")
    if layout == "zigzag" and q.shape[2] % 2:
        raise ModelError(f"{WHERE}.layout", f"is zigzag, and the {q.shape[2]} tokens of each rank have no two halves",
                         hint="pad with shard_batch, or take contiguous")  # fmt: skip
    course = Course(link.size, q.shape[2], layout, causal, window)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return _Ring.apply(q, k, v, segments, course, scale, link)  # type: ignore[no-any-return]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, course: Course, scale: float, link: Link
    ) -> Tensor:
        part = _Part(q, k.shape[1], segments, course, scale, link.rank)
        for source, kv in _round(torch.stack([k, v]), course.steps(), link):
            part.add(source, kv)
        out = part.out.to(q.dtype).view(q.shape)
        ctx.save_for_backward(q, k, v, segments, out, part.lse)
        ctx.course, ctx.scale, ctx.link = course, scale, link
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, segments, out, lse = ctx.saved_tensors
        link, steps = ctx.link, ctx.course.steps()
        part = _Part(q, k.shape[1], segments, ctx.course, ctx.scale, link.rank)
        part.lse = lse
        part.begin_backward(out, grad)
        own = travelling = None
        arrives: Callable[[], Tensor] | None = None
        for step, (source, kv) in enumerate(_round(torch.stack([k, v]), steps, link)):
            found = part.gradient(source, kv)
            if step == 0:
                own = found
                continue
            travelling = found if arrives is None else found.add_(arrives())
            # The last to add to a block's gradient sends it home; the others hand it on with the block.
            arrives = _shift(travelling, 1 if step < steps else -steps, link)
        assert own is not None
        if arrives is not None:
            own = own + arrives()
        return part.grad_q.to(q.dtype).view(q.shape), own[0].to(k.dtype), own[1].to(v.dtype), None, None, None, None


def _shift(x: Tensor, by: int, link: Link) -> Callable[[], Tensor]:
    """Send ``x`` to the rank ``by`` places on and take what comes from as many places before; the wait gives that."""
    received = torch.empty_like(x)
    group = link.group if link.group is not None else dist.group.WORLD
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, x, group=group, group_peer=(link.rank + by) % link.size),
            dist.P2POp(dist.irecv, received, group=group, group_peer=(link.rank - by) % link.size),
        ]
    )
    link.sent["ring"] += x.nbytes

    def arrived() -> Tensor:
        for work in works:
            work.wait()
        return received

    return arrived


def _round(kv: Tensor, steps: int, link: Link) -> Iterator[tuple[int, Tensor]]:
    """Ranks and their keys and values, this one's first; the next ones travel while the caller works."""
    for step in range(steps + 1):
        arrives = _shift(kv, 1, link) if step < steps else None
        yield (link.rank - step) % link.size, kv
        if arrives is not None:
            kv = arrives()


class _Part:
    """One rank's queries: the merged output of the keys that it has seen, or their gradients."""

    def __init__(
        self, q: Tensor, kv_heads: int, segments: Tensor | None, course: Course, scale: float, rank: int
    ) -> None:
        B, H, n, hd = q.shape
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.shape = (B, kv_heads, H // kv_heads, n, hd)
        self.q = q.reshape(self.shape)
        self.segments, self.course, self.scale, self.rank = segments, course, scale, rank
        self.out = q.new_zeros(self.shape, dtype=self.wide)
        self.lse = q.new_full(self.shape[:-1], -math.inf, dtype=self.wide)  # [B, Hkv, G, n]

    def _rows(self, x: Tensor, tile: Tile) -> Tensor:
        """The tile's queries of a tensor like q, [B, Hkv, G t, hd], in the wide dtype."""
        return x[..., tile.q, :].to(self.wide).reshape(*self.shape[:2], -1, self.shape[-1])

    def _scores(self, tile: Tile, k: Tensor) -> Tensor:
        """[B, Hkv, G, t, w]."""
        scores = (self._rows(self.q, tile) @ k.transpose(-1, -2)).mul_(self.scale)
        scores = scores.view(*self.shape[:3], -1, k.shape[2])
        hidden = self.course.hidden(tile, self.segments, k.device)
        return scores if hidden is None else scores.masked_fill_(hidden, -math.inf)

    def add(self, source: int, kv: Tensor) -> None:
        """Merge in the keys and values [2, B, Hkv, n, hd] of a rank."""
        for tile in self.course.tiles(self.rank, source):
            k, v = kv[:, :, :, tile.k].to(self.wide)
            scores = self._scores(tile, k)
            lse = scores.logsumexp(-1)  # [B, Hkv, G, t]; -inf where a query sees none of these keys
            before = self.lse[..., tile.q]
            after = torch.logaddexp(before, lse)
            finite = after.masked_fill(after == -math.inf, 0.0)
            p = scores.sub_(finite[..., None]).exp_()
            new = p.flatten(2, 3) @ v  # [B, Hkv, G t, hd]
            rows = self.out[..., tile.q, :]
            rows.mul_((before - finite).exp()[..., None]).add_(new.view_as(rows))
            self.lse[..., tile.q] = after

    def begin_backward(self, out: Tensor, grad: Tensor) -> None:
        """Take up the gradient of the output."""
        self.grad = grad.reshape(self.shape)
        self.delta = (self.grad.to(self.wide) * out.reshape(self.shape)).sum(-1)  # [B, Hkv, G, n]
        self.grad_q = torch.zeros(self.shape, dtype=self.wide, device=grad.device)

    def gradient(self, source: int, kv: Tensor) -> Tensor:
        """The gradient [2, B, Hkv, n, hd] of a rank's keys and values by these queries, in the wide dtype."""
        total = torch.zeros_like(kv, dtype=self.wide)
        for tile in self.course.tiles(self.rank, source):
            k, v = kv[:, :, :, tile.k].to(self.wide)
            p = self._scores(tile, k).sub_(self.lse[..., tile.q, None]).exp_()
            g = self._rows(self.grad, tile)
            total[1][:, :, tile.k] += p.flatten(2, 3).transpose(-1, -2) @ g
            gs = (g @ v.transpose(-1, -2)).view_as(p).sub_(self.delta[..., tile.q, None]).mul_(p).flatten(2, 3)
            rows = self.grad_q[..., tile.q, :]
            rows.add_((gs @ k).view_as(rows), alpha=self.scale)
            total[0][:, :, tile.k] += (gs.transpose(-1, -2) @ self._rows(self.q, tile)).mul_(self.scale)
        return total
