"""USP: a grid of ranks; heads are exchanged along its rows, keys and values go round along its columns.

Ranks of a row are neighbours, most likely on one machine: they talk most.
"""

from __future__ import annotations

from collections import Counter
from functools import partial

import torch.distributed as dist
from torch import Tensor

from headway.parallel.sequence.batch import Layout
from headway.parallel.sequence.exchange import Link
from headway.parallel.sequence.ring import ring_attention
from headway.parallel.sequence.ulysses import ulysses_attention


def usp_links(group: dist.ProcessGroup | None, ring: int, sent: Counter[str] | None = None) -> tuple[Link, Link]:
    """The row and the column of this rank in a grid of ``ring`` rows; every rank of the group has to call it.

    Args:
        group: the ranks that share a sequence, by default all.
        ring: ranks of each column; a divisor of the group's size.
        sent: counts what both send.

    Returns:
        The links for ``ulysses`` and for ``ring``.
    """
    ranks = dist.get_process_group_ranks(group) if group is not None else list(range(dist.get_world_size()))
    row_size, sent = len(ranks) // ring, Counter() if sent is None else sent
    place, inner = divmod(dist.get_rank(group), row_size)
    row, column = ranks[place * row_size : (place + 1) * row_size], ranks[inner::row_size]
    # Rows first on every rank: groups that only their members make have to be made in one order.
    made = [dist.new_group(members, use_local_synchronization=True) for members in (row, column)]
    return Link(made[0], sent), Link(made[1], sent)


def usp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rows: Link,
    columns: Link,
    segments: Tensor | None = None,
    window: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    offset: int = 0,
    layout: Layout = "zigzag",
) -> Tensor:
    """Ulysses in rows, with ring attention over columns for what each rank then holds; arguments as for the two.

    Args:
        q: [B, H, T/P, hd], the tokens that ``own_positions`` names for ``usp``.
        k: [B, Hkv, T/P, hd].
        v: [B, Hkv, T/P, hd].
        rows: from ``usp_links``.
        columns: from ``usp_links``.
        segments: integer [B, T], whole.
        window: see ``attention``.
        causal: see ``attention``.
        scale: 1/sqrt(hd) by default.
        offset: 0.
        layout: how columns cut the sequence.

    Returns:
        [B, H, T/P, hd].

    Source: Fang and Zhao 2024 (USP), arXiv 2405.07719, section 3.
    """
    attend = partial(ring_attention, group=columns, layout=layout)
    return ulysses_attention(q, k, v, group=rows, segments=segments, window=window, causal=causal, scale=scale,
                             offset=offset, attend=attend)  # fmt: skip
