"""Every way of laying a model out on a cluster that the runtime would accept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from headway.parallel.mesh import Layout
from headway.plan.cluster.choice import Choice
from headway.plan.cluster.hardware import Cluster
from headway.plan.cluster.shape import Shape

CHUNKS = (2, 3, 4, 6, 8)
"""Stages per rank that are tried with interleaving."""
MOST_MICRO = 64
"""Sequences."""


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def choices(
    shape: Shape, cluster: Cluster, batch: int, *, micro: int | None = None, across_nodes: bool = False
) -> Iterator[Choice]:
    """All that use every device: tensor ranks within a node, then pipeline, then data.

    Args:
        batch: sequences of a step.
        micro: the only micro-batch to try; by default all that divide a rank's share.
        across_nodes: tensor ranks may be of several nodes.
    """
    world = cluster.devices
    for tensor in tensor_degrees(shape, world if across_nodes else cluster.node):
        if world % tensor:
            continue
        for pipeline in divisors(world // tensor):
            data = world // tensor // pipeline
            if pipeline > shape.layers or batch % data:
                continue
            for shard, replicate in data_splits(data, tensor, cluster.node):
                layout = Layout(pipeline=pipeline, replicate=replicate, shard=shard, tensor=tensor)
                yield from schedules(shape, layout, batch // data, micro)


def tensor_degrees(shape: Shape, most: int) -> list[int]:
    """Degrees up to ``most`` that divide heads, channels and the tokens of a sequence."""
    parts = (shape.heads, shape.kv_heads, shape.intermediate, shape.sequence, most)
    return [t for t in divisors(most) if all(part % t == 0 for part in parts)]


def data_splits(data: int, tensor: int, node: int) -> list[tuple[int, int]]:
    """(shard, replicate): all shards, shards within a node and copies beyond it, whole copies."""
    inside = max(d for d in divisors(data) if d * tensor <= node)
    return list(dict.fromkeys([(data, 1), (inside, data // inside), (1, data)]))


def schedules(shape: Shape, layout: Layout, share: int, micro: int | None = None) -> Iterator[Choice]:
    """Every micro-batch, schedule and use of recomputation for ``share`` sequences per pipeline."""
    p = layout.pipeline
    sizes: Sequence[int] = divisors(share) if micro is None else [micro] if share % micro == 0 else []
    for size in sizes:
        count = share // size
        if size > MOST_MICRO or count < p:
            continue
        for recompute in (False, True):
            yield Choice(layout, size, recompute=recompute)
            if p > 1 and count % p == 0:
                for chunks in (c for c in CHUNKS if p * c <= shape.layers):
                    yield Choice(layout, size, "interleaved-1f1b", chunks, recompute)
