"""Measured links between twelve regions, and clusters made of them.

The figures are from gensyn-ai/skippipe (MIT licence, (c) 2025 Nikolay Blagoev), schedulers/communication_costs.py.
"""

from __future__ import annotations

import numpy as np

from headway.parallel.skippipe.cluster import Cluster

REGIONS = ("Belgium", "Canada", "Germany", "Iowa", "Japan", "LA", "NL", "Oregon", "Singapore", "Taiwan", "London",
           "Australia")  # fmt: skip
NL_LONDON = 0.2425
"""MiB/s in the published table: as fast as its neighbours (248 MiB/s) had it not been divided by 1024 twice."""

# Latency in ms, bandwidth in MiB/s.
_LINKS = """
Australia Belgium 129 10.0625; Australia Canada 98 13.5; Australia Germany 125.5 10.7125; Australia Iowa 84 11.5;
Australia Japan 58 14.125; Australia LA 69 15; Australia NL 128 9.75; Australia Oregon 68 15;
Australia Singapore 48 30.5; Australia Taiwan 67 21.5; Australia London 132 9.625; Belgium Canada 41 20.375;
Belgium Germany 4 248.32; Belgium Iowa 49 29; Belgium Japan 112 12; Belgium LA 70 19.875; Belgium NL 3 248.32;
Belgium Oregon 66 21.375; Belgium Singapore 83 16.5; Belgium Taiwan 105 12.75; Belgium London 3.5 248.32;
Canada Germany 44 32.625; Canada Iowa 14 77.5; Canada Japan 74 18.5; Canada LA 35 31.25; Canada NL 42 25.625;
Canada Oregon 30.5 48.25; Canada Singapore 107 12.22499328; Canada Taiwan 89 15.0625; Canada London 38.5 37.25;
Germany Iowa 53.5 27.25; Germany Japan 112 11.35; Germany LA 73 18.6875; Germany NL 3.5 248.32;
Germany Oregon 68 15.275; Germany Singapore 80 12.8; Germany Taiwan 102 12.875; Germany London 6.6 193.28;
Iowa Japan 72.5 14.3125; Iowa LA 23.4 62.9375; Iowa NL 51 28.0625; Iowa Oregon 19.3 92.5; Iowa Taiwan 88 13.1072;
Iowa Singapore 101.5 12.9375; Iowa London 48.1 22.375; Japan LA 50 28.4375; Japan NL 108.5 11.65;
Japan Oregon 46.2 31.1875; Japan Singapore 35.6 39.9375; Japan Taiwan 19.2 78.5625; Japan London 107 9.1;
LA NL 71.5 14.59375; LA Oregon 12.4 121.375; LA Singapore 79.5 17.25; LA Taiwan 64 16.58125; LA London 68 15.275;
NL Oregon 67 20.875; NL Singapore 81.5 16.75; NL Taiwan 105.5 12.25; NL London 4.8 0.2425;
Oregon Singapore 78.5 17.1875; Oregon Taiwan 59.5 23.875; Oregon London 64 21.75; Singapore Taiwan 23.2 63.375;
Singapore London 85 16.0625; Taiwan London 109.5 9.175
"""


def _table() -> dict[frozenset[str], tuple[float, float]]:
    rows = (row.split() for row in _LINKS.replace("\n", " ").split(";"))
    return {frozenset((a, b)): (float(latency), float(rate)) for a, b, latency, rate in rows}


LINKS = _table()
WITHIN = (1.0, 2048.0)
"""Two nodes of one region."""


def link_seconds(a: str, b: str, size: float, overhead: float = 0.35, as_published: bool = False) -> float:
    """Seconds for ``size`` bytes from region ``a`` to ``b``: latency, transfer, and a fixed cost of copies.

    Args:
        as_published: keep the one bandwidth that the table has in another unit.
    """
    latency, rate = LINKS.get(frozenset((a, b)), WITHIN)
    if rate == NL_LONDON and not as_published:
        rate *= 1024
    return latency / 1000 + size / (rate * 2**20) + overhead


def regions_cluster(
    nodes: int = 20,
    *,
    size: float = 2**25,
    compute: float = 1.76,
    memory: int = 3,
    as_published: bool = False,
    regions: tuple[str, ...] = REGIONS,
) -> Cluster:
    """``nodes`` nodes in the twelve regions in turn.

    Args:
        size: bytes of a micro-batch's activations; by default 8 samples of 1,024 tokens of width 1,024 in fp32.
        compute: seconds of a stage's forward pass; by default 4 layers, 8 samples, 0.055 s each.
        as_published: with the table's slip of unit between the Netherlands and London.
    """
    names = tuple(regions[node % len(regions)] for node in range(nodes))
    costs = np.array([[link_seconds(a, b, size, as_published=as_published) for b in names] for a in names])
    np.fill_diagonal(costs, 0.0)
    return Cluster(costs, np.full(nodes, compute), memory, names, units=not as_published)
