"""Ulysses: before attention, ranks give a part of the sequence with all heads for all of it with a part of the heads.

Shapes: P ranks, B batch, T tokens of the sequence, H query heads, Hkv key and value heads, hd head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from headway.core.errors import ModelError
from headway.layers.attention import attention
from headway.parallel.sequence.exchange import Link, Split, exchange, link_of

WHERE = "parallel.sequence"


@dataclass(frozen=True)
class Heads:
    """Who attends with which heads: query heads in runs of equal length, one longer for the first few where P does not
    divide H, and the key heads that each run needs."""

    queries: tuple[range, ...]
    keys: tuple[range, ...]
    """A key head whose queries lie on several ranks goes to each of them."""
    group: int
    """Query heads per key head."""

    @property
    def repeated(self) -> bool:
        """Whether a key head goes to several ranks."""
        return any(a and b and a[-1] >= b[0] for a, b in pairwise(self.keys))

    def sent_keys(self) -> list[int]:
        """The key heads in the order in which they are sent."""
        return [head for of in self.keys for head in of]

    def expansion(self, rank: int) -> list[int] | None:
        """Which of a rank's key heads each equal run of its query heads uses; None: the heads as they are."""
        queries, keys = self.queries[rank], self.keys[rank]
        runs = [sum(query // self.group == key for query in queries) for key in keys]
        if len(set(runs)) <= 1:
            return None
        run = math.gcd(*runs)
        return [i for i, length in enumerate(runs) for _ in range(length // run)]


@lru_cache
def share_heads(heads: int, kv_heads: int, ranks: int) -> Heads:
    """Query heads as evenly as may be, in their order, and the key heads they need.

    Raises:
        ModelError: the query heads are not a multiple of the key heads.
    """
    if heads % kv_heads:
        raise ModelError(WHERE, f"cannot share {heads} query heads of {kv_heads} key heads: they make no equal groups")
    group, (least, more) = heads // kv_heads, divmod(heads, ranks)
    starts = [rank * least + min(rank, more) for rank in range(ranks + 1)]
    queries = tuple(range(a, b) for a, b in pairwise(starts))
    keys = tuple(range(q.start // group, -(-q.stop // group) if q else q.start // group) for q in queries)
    return Heads(queries, keys, group)


def ulysses_attention(
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
    attend: Callable[..., Tensor] = attention,
) -> Tensor:
    """``layers.attention.attention`` over a sequence whose stretches lie on the ranks of a group, in their order.

    Any number of heads works with any number of ranks: a rank more than there are heads has nothing to attend to.

    Args:
        q: [B, H, T/P, hd], this rank's stretch; stretches are equal.
        k: [B, Hkv, T/P, hd].
        v: [B, Hkv, T/P, hd].
        group: the ranks, by default all; or a link to them, which counts what is sent.
        segments: integer [B, T], the document of each token of the whole sequence.
        window: see ``attention``.
        causal: see ``attention``.
        scale: 1/sqrt(hd) by default.
        offset: 0; there is no cache of keys here.
        attend: what each rank does with its heads, [B, H/P, T, hd].

    Returns:
        [B, H, T/P, hd]; gradients are exact.

    Raises:
        ModelError: there is a cache of keys.

    Source: Jacobs et al. 2023 (DeepSpeed Ulysses), section 3.1; key heads shared by several ranks are sent to each.
    """
    link = link_of(group)
    if offset or q.shape[2] != k.shape[2]:
        raise ModelError(WHERE, f"shares sequences among {link.size} ranks and cannot generate with a cache")
    heads = share_heads(q.shape[1], k.shape[1], link.size)
    if heads.repeated:
        order = torch.tensor(heads.sent_keys(), device=k.device)
        k, v = k.index_select(1, order), v.index_select(1, order)  # its gradient sums over the copies
    stretch = [q.shape[2]] * link.size
    shares = [len(of) for of in heads.queries]
    keys = Split([len(of) for of in heads.keys], stretch)
    q, k, v = exchange((q, k, v), (Split(shares, stretch), keys, keys), scatter_dim=1, gather_dim=2, link=link)
    if q.shape[1]:
        expansion = heads.expansion(link.rank)
        if expansion is not None:
            each = torch.tensor(expansion, device=k.device)
            k, v = k.index_select(1, each), v.index_select(1, each)
        y = attend(q, k, v, segments=segments, window=window, causal=causal, scale=scale)  # [B, H/P, T, hd]
    else:
        # Of nothing, but it keeps a tensor as attention does: where that is recomputed, all ranks exchange heads again.
        y = q * q
    return exchange((y,), (Split(stretch, shares),), scatter_dim=2, gather_dim=1, link=link)[0]
