"""What the kinds of sequence parallelism send, and how long that takes: formulas, to choose between them.

Shapes: P ranks, N tokens of a sequence, H query heads, Hkv key and value heads, hd head width, h = H hd, h_kv = Hkv hd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from headway.parallel.sequence.batch import ring_size
from headway.parallel.sequence.ulysses import share_heads

SpKind = Literal["ulysses", "ring", "usp", "megatron"]


@dataclass(frozen=True)
class SpBytes:
    """Bytes that one rank sends to others for one layer and micro-batch."""

    forward: dict[str, int]
    """By ``all-to-all``, ``ring`` and ``all-gather``."""
    backward: dict[str, int]

    @property
    def total(self) -> int:
        """Of both passes."""
        return sum(self.forward.values()) + sum(self.backward.values())


def estimate_sp_bytes(
    kind: SpKind,
    *,
    tokens: int,
    degree: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    batch: int = 1,
    itemsize: int = 2,
    ring: int | None = None,
    rank: int = 0,
) -> SpBytes:
    """What a rank sends for one layer; what ``Link.sent`` counts, to the byte.

    ``ulysses`` sends (2 H + 2 Hkv)/H N h/P (P-1)/P elements in the forward pass where P divides both numbers of heads,
    and as many in the backward pass. ``ring`` sends 2 N h_kv (P-1)/P, and in the backward pass that again and as many
    gradients, in fp32 or better. ``megatron`` is the sequence form of tensor parallelism: two gathers and two
    scattered sums of the whole sequence, 4 N h (P-1)/P, each way.

    Args:
        kind: ``usp`` has both ``all-to-all`` and ``ring``.
        tokens: N, a multiple of P; without a window.
        degree: P.
        heads: H.
        kv_heads: Hkv.
        head_dim: hd.
        batch: sequences.
        itemsize: bytes of an element.
        ring: with ``usp``, ranks in each ring.
        rank: place in the group; ranks differ where heads do not divide.

    Source: Jacobs et al. 2023 (DeepSpeed Ulysses), section 3.2.
    """
    if kind == "megatron":
        sent = 4 * batch * tokens // degree * (degree - 1) * heads * head_dim * itemsize
        return SpBytes({"all-gather": sent}, {"all-gather": sent})
    rings = ring_size(kind, degree, ring)
    row = degree // rings
    own, place = tokens // degree * batch * head_dim, rank % row
    forward, backward = {}, {}
    shares = share_heads(heads, kv_heads, row)
    if row > 1:
        away = sum(len(shares.queries[p]) + 2 * len(shares.keys[p]) for p in range(row) if p != place)
        back = len(shares.queries[place]) * (row - 1)
        forward["all-to-all"] = (away + back) * own * itemsize
        # Backwards a rank sends the gradients of what it received, and receives those of its output.
        there = (len(shares.queries[place]) + 2 * len(shares.keys[place])) * (row - 1)
        output = sum(len(shares.queries[p]) for p in range(row) if p != place)
        backward["all-to-all"] = (there + output) * own * itemsize
    if rings > 1:
        expansion = shares.expansion(place) if row > 1 else None
        held = len(expansion) if expansion is not None else len(shares.keys[place])
        elements = 2 * held * own * row * (rings - 1)
        forward["ring"] = elements * itemsize
        backward["ring"] = elements * (itemsize + max(itemsize, 4))
    return SpBytes(forward, backward)


@dataclass(frozen=True)
class Machines:
    """Ranks on machines, and what their links do."""

    flops: float = 400e12
    """Floating-point operations per second that a rank reaches."""
    per_node: int = 8
    latency: float = 20e-6
    """Seconds per message."""
    inside: float = 300e9
    """Bytes per second between ranks of a machine,"""
    between: float = 40e9
    """and of each rank to another machine."""


def estimate_sp_time(
    kind: SpKind,
    machines: Machines,
    *,
    tokens: int,
    degree: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    batch: int = 1,
    itemsize: int = 2,
    ring: int | None = None,
) -> float:
    """Seconds that attention with its messages takes in one layer, forward and backward, by latency and rate of links.

    Messages of an all-to-all and of Megatron's gathers are waited for; those of a ring go along with the work, and the
    longer of the two counts in each step. Causal attention of balanced ranks; a rank waits for the one with most heads.
    """
    P = degree
    sent = estimate_sp_bytes(kind, tokens=tokens, degree=P, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
                             batch=batch, itemsize=itemsize, ring=ring)  # fmt: skip
    rings = 1 if kind == "megatron" else ring_size(kind, P, ring)
    row = P // rings
    # forward 4, backward 8 operations per pair and channel, half of the pairs
    most = -(-heads // row)
    work = 6.0 * batch * tokens * tokens * head_dim * most / rings / machines.flops
    rate = machines.inside if row <= machines.per_node else machines.between
    seconds = 0.0
    waited = [part.get(name, 0) for part in (sent.forward, sent.backward) for name in ("all-to-all", "all-gather")]
    if row > 1:
        messages = 8 * (row - 1) if kind == "megatron" else 4 * min(row - 1, machines.per_node)
        seconds += messages * machines.latency + sum(waited) / rate
    if rings == 1:
        return seconds + work
    hop = machines.inside if machines.per_node >= P else machines.between
    for part, share in ((sent.forward, 1 / 3), (sent.backward, 2 / 3)):
        step = part["ring"] / (rings - 1) / hop + machines.latency
        seconds += work * share / rings + (rings - 1) * max(step, work * share / rings)
    return seconds
