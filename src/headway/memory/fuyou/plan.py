"""How many activation bytes to swap instead of recompute, and what a step takes: pure arithmetic, no torch.

A block's matrix products are its units. Swapping one costs its bytes twice over the links; recomputing it costs its
FLOPs once more. All that is no matrix product is recomputed anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from headway.core.units import human, human_seconds


@dataclass(frozen=True)
class Unit:
    """The output of one matrix product of one block."""

    kind: str
    """Which product: the same name in every block."""
    layer: int
    nbytes: float
    flops: float
    """To compute it."""
    width: int = 0
    """Elements per token: ties of benefit go to the narrower."""

    @property
    def benefit(self) -> float:
        """FLOPs saved per byte swapped."""
        return self.flops / self.nbytes if self.nbytes else float("inf")


def in_order(units: Sequence[Unit]) -> list[Unit]:
    """By benefit, the best first; among equals the narrowest kind first, and a kind in all layers before the next.

    For a GPT block of width h: MLP down (4h FLOPs per byte in 16 bits), then attention projection (h elements), QKV
    (3h), MLP up (4h), which save h FLOPs per byte each.

    Source: Fuyou, arXiv 2403.06504, section on activation swapping; the artifact's order.
    """
    return sorted(units, key=lambda unit: (-unit.benefit, unit.width, unit.kind, unit.layer))


def gpt_units(hidden: int, layers: int, tokens: int, width: int = 2) -> list[Unit]:
    """The units of GPT blocks: QKV 3h, attention projection h, MLP up 4h, MLP down h.

    Args:
        tokens: in the batch.
        width: bytes of an element.
    """
    sizes = {"qkv": (1, 3), "projection": (1, 1), "up": (1, 4), "down": (4, 1)}  # (input, output) in units of h
    return [
        Unit(kind, layer, tokens * out * hidden * width, 2 * tokens * into * hidden * out * hidden, out * hidden)
        for layer in range(layers)
        for kind, (into, out) in sizes.items()
    ]


@dataclass(frozen=True)
class Profile:
    """What one training step computes and moves."""

    parameters: float
    forward_flops: float
    units: tuple[Unit, ...] = ()
    checkpoint_bytes: float = 0.0
    """Block inputs, which always leave (A0)."""
    recomputed_flops: float | None = None
    """When nothing is swapped; default: a whole forward pass."""
    weight_bytes: float = 2.0
    """Per parameter, of the working weights that come in for each pass; 0 where they stay in memory."""
    state_read: float = 12.0
    """Bytes per parameter that an update reads: master and two moments in fp32."""
    state_written: float = 14.0
    """And writes: these, and the 16-bit weights."""


@dataclass(frozen=True)
class Tiers:
    """What there is to do it with: rates in FLOP/s and bytes per second."""

    flops: float
    """That the device reaches."""
    to_host: float
    to_device: float
    read: float
    """Of the disk."""
    write: float
    host: float = 0.0
    """Bytes of activations that fit into host memory; only what does not goes to disk."""
    shared: bool = True
    """Reads and writes take turns on the disk; otherwise they run beside each other."""


@dataclass(frozen=True)
class Times:
    """Seconds of the four things that happen at once in one half of a step."""

    compute: float
    to_host: float
    to_device: float
    disk: float

    @property
    def seconds(self) -> float:
        """The slowest of them."""
        return max(self.compute, self.to_host, self.to_device, self.disk)

    @property
    def binding(self) -> str:
        """Which one that is."""
        names = {"compute": self.compute, "device to host": self.to_host, "host to device": self.to_device,
                 "disk": self.disk}  # fmt: skip
        return max(names, key=lambda name: names[name])


def step_times(
    profile: Profile, tiers: Tiers, swapped_bytes: float = 0.0, saved_flops: float = 0.0
) -> tuple[Times, Times]:
    """T_f and T_b: forward, and backward with the update under it.

    ``T_f = max(F/R, (A0+D)/b_down, 2P/b_up, 2P/r + aD'/w)`` and ``T_b = max((2F + FLOP_r)/R, 2P/b_down, (2P+A0+D)/b_up,
    (14P + aD')/r + 14P/w)``, D' = A0 + D, of which aD' does not fit into the host's memory.

    Args:
        swapped_bytes: D, beyond the block inputs.
        saved_flops: recomputation that they save.

    Source: Fuyou, arXiv 2403.06504, cost model; the disk's share as a sum, since one drive serves both directions.
    """
    P = profile.parameters
    weights, moved = profile.weight_bytes * P, profile.checkpoint_bytes + swapped_bytes
    spilled = max(0.0, moved - tiers.host)
    full = profile.forward_flops if profile.recomputed_flops is None else profile.recomputed_flops
    both = sum if tiers.shared else max
    forward = Times(
        profile.forward_flops / tiers.flops,
        moved / tiers.to_host,
        weights / tiers.to_device,
        both((weights / tiers.read, spilled / tiers.write)),
    )
    backward = Times(
        (2 * profile.forward_flops + max(0.0, full - saved_flops)) / tiers.flops,
        weights / tiers.to_host,
        (weights + moved) / tiers.to_device,
        both(((weights + profile.state_read * P + spilled) / tiers.read, profile.state_written * P / tiers.write)),
    )
    return forward, backward


@dataclass(frozen=True)
class Plan:
    """What was decided, and what it is expected to take."""

    swapped: tuple[Unit, ...]
    units: tuple[Unit, ...]
    """All, in the order in which they are taken."""
    forward: Times
    backward: Times

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.forward.seconds + self.backward.seconds

    @property
    def swapped_bytes(self) -> float:
        """D."""
        return sum(unit.nbytes for unit in self.swapped)

    def explain(self) -> str:
        """T_f, T_b, what binds each, and the swap list."""
        kinds: dict[str, list[int]] = {}
        for unit in self.units:
            kinds.setdefault(unit.kind, [0, 0])
            kinds[unit.kind][1] += 1
        for unit in self.swapped:
            kinds[unit.kind][0] += 1
        listed = ", ".join(f"{kind} in {done} of {of} blocks" for kind, (done, of) in kinds.items() if done)
        return (
            f"forward {human_seconds(self.forward.seconds)}, bound by {self.forward.binding}; "
            f"backward {human_seconds(self.backward.seconds)}, bound by {self.backward.binding}; "
            f"swapped: {listed or 'nothing'} ({human(self.swapped_bytes, 'B')}), all else recomputed"
        )


def plan_tiers(profile: Profile, tiers: Tiers) -> Plan:
    """Swap units, the best first, for as long as that shortens the step.

    The step's time is convex in the swapped bytes, since the best units come first, so the first minimum is the least.
    """
    units = in_order(profile.units)
    best = step_times(profile, tiers)
    count, swapped, saved = 0, 0.0, 0.0
    for index, unit in enumerate(units):
        swapped, saved = swapped + unit.nbytes, saved + unit.flops
        times = step_times(profile, tiers, swapped, saved)
        if sum(t.seconds for t in times) >= sum(t.seconds for t in best):
            break
        best, count = times, index + 1
    return Plan(tuple(units[:count]), tuple(units), *best)


def break_even(profile: Profile, tiers: Tiers) -> float:
    """The disk's rate, in both directions, from which on computing binds the step; nothing is swapped.

    Below it the drive does.
    """
    free = replace(tiers, read=1.0, write=1.0)
    forward, backward = step_times(profile, free)
    return max(half.disk / half.compute if half.compute else 0.0 for half in (forward, backward))
