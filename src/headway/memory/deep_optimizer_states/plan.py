"""Which subgroups the device updates: the stride, from rates, by a closed form and by simulating a step.

All rates are in parameters per second. Source: Maurya et al. 2024, section 4; the closed form is derived from the same
balance of the lanes.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Place = Literal["host", "device", "resident"]
Stride = int | None
"""Every how many subgroups one goes to the device; None: none does."""

MOST = 16
"""Largest stride that is tried before none."""


@dataclass(frozen=True)
class Rates:
    """How fast the lanes of one machine are, in parameters per second."""

    to_device: float
    """fp32 numbers per second from host to device (bytes per second / 4)."""
    to_host: float
    """fp32 numbers per second from device to host."""
    host: float
    """Parameters that the host's Adam updates."""
    device: float
    """Parameters that the device's Adam updates."""
    cast: float = math.inf
    """Parameters that the host rounds to the training type; infinite where that is fp32 and nothing is rounded."""


@dataclass(frozen=True)
class Unit:
    """One subgroup of a step."""

    numel: int
    place: Place
    words: float = 3.0
    """fp32 numbers per parameter that are staged: parameter and two moments, and the gradient where it is on the
    host."""


@dataclass(frozen=True)
class Timeline:
    """A simulated step."""

    seconds: float
    busy: dict[str, float] = field(default_factory=dict)
    """Seconds of work per lane: host, cast, to_device, to_host, device."""


@dataclass(frozen=True)
class Placement:
    """The choice that was made, and what it should take."""

    k: Stride
    predicted_seconds: float
    busy: dict[str, float]
    closed_form: Stride
    """What the closed form alone gives."""
    candidates: dict[str, float]
    """Predicted seconds of every stride tried (``inf``: none goes to the device)."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a report."""
        return asdict(self)


def stride(link: float, host: float, device: float, cast: float = math.inf, push: float = 0.5) -> Stride:
    """The smallest stride at which the host's updates hide one round of staging.

    The host's ``k - 1`` subgroups take ``(k-1)(1/host + 1/cast)`` per parameter; meanwhile the link brings one subgroup
    (three fp32 numbers per parameter), the device updates it, and the link takes the ``k - 1`` results:
    ``3/link + 1/device + (k-1) push/link``.

    Args:
        link: fp32 numbers per second in one direction.
        host: parameters per second of the host's update.
        device: of the device's.
        cast: of rounding on the host.
        push: fp32 words per parameter that bring a result to the device: 1/2 in 16 bit, 1 in fp32.

    Returns:
        2 or more; None (no subgroup on the device) where pushing alone keeps the link as busy as the host.
    """
    spare = 1 / host + 1 / cast - push / link
    if not spare > 0:
        return None
    rounds = (3 / link + 1 / device) / spare
    return max(2, 1 + math.ceil(rounds - 1e-12))


def places(count: int, k: Stride) -> list[Place]:
    """Where each of ``count`` subgroups is updated: ``x`` on the device where ``(x + 1) % k == 0``."""
    return ["device" if k is not None and (x + 1) % k == 0 else "host" for x in range(count)]


def slots(k: Stride, staged: int = 3) -> int:
    """Staging buffers: one being filled while another is updated or flushed; a third where nothing else is done."""
    return min(staged, 3 if k == 1 else 2)


def staging_bytes(numel: int, buffers: int, words: float = 4.0) -> int:
    """Device memory of ``buffers`` staged subgroups: parameter, two moments and a gradient in fp32."""
    return int(numel * words * 4) * buffers


def device_extra(numel: int, total: int, k: Stride, count: int) -> int:
    """Most bytes that a step needs on the device above the training weights: staging, and the gradients that stay.

    Args:
        numel: of the largest subgroup.
        total: parameters that are not resident.
        k: the stride.
        count: subgroups.
    """
    staged = places(count, k).count("device")
    return staging_bytes(numel, slots(k, staged)) + (4 * total * staged // count if count else 0)


def fitting_numel(numel: int, total: int, k: Stride, limit: int) -> int:
    """The largest subgroup of at most ``numel`` parameters with which ``device_extra`` keeps to ``limit``; 0 if none.

    The gradients that stay on the device do not shrink with the subgroup.
    """
    if k is None:
        return numel
    room = limit - 4 * total // k
    return max(0, min(numel, room // (16 * slots(k)))) if room > 0 else 0


def simulate(units: Sequence[Unit], rates: Rates, buffers: int = 2, push: float = 0.5, ring: int = 4) -> Timeline:
    """Seconds of one update, by playing the lanes: each does one thing at a time, in the order in which it was asked.

    Args:
        units: the subgroups in order.
        rates: of the lanes.
        buffers: staged subgroups that the device has room for.
        push: fp32 words per parameter that bring a result to the device; below 1 it is rounded first.
        ring: buffers of rounded results; with all in use the host waits.
    """
    clock = _Clock()
    host, cast, to_device, to_host, device = (clock.lane(n) for n in ("host", "cast", "to_device", "to_host", "device"))
    waiting = [unit for unit in units if unit.place == "device"][::-1]
    own = [unit for unit in units if unit.place == "host"][::-1]
    free = ring
    halted = False

    def stage() -> None:
        if waiting:
            unit = waiting.pop()
            to_device.do(unit.words * unit.numel / rates.to_device, lambda: update(unit))

    def update(unit: Unit) -> None:
        device.do(unit.numel / rates.device, lambda: to_host.do(3 * unit.numel / rates.to_host, stage))

    def step() -> None:
        nonlocal free, halted
        halted = not free
        if not own or halted:
            return
        unit = own.pop()
        if push < 1:
            free -= 1
        host.do(unit.numel / rates.host, lambda: updated(unit))

    def updated(unit: Unit) -> None:
        if push < 1:
            cast.do(unit.numel / rates.cast, lambda: send(unit))
        else:
            send(unit)
        step()

    def send(unit: Unit) -> None:
        to_device.do(push * unit.numel / rates.to_device, sent)

    def sent() -> None:
        nonlocal free
        if push < 1:
            free += 1
            if halted:
                step()

    for unit in units:
        if unit.place == "resident":
            device.do(unit.numel / rates.device, _nothing)
    for _ in range(buffers):
        stage()
    step()
    seconds = clock.run()
    return Timeline(seconds, {lane.name: lane.busy for lane in (host, cast, to_device, to_host, device)})


class _Clock:
    """Simulated time: events in the order in which they end."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def lane(self, name: str) -> _Lane:
        return _Lane(name, self)

    def at(self, when: float, then: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), then))

    def run(self) -> float:
        while self._events:
            self.now, _, then = heapq.heappop(self._events)
            then()
        return self.now


class _Lane:
    def __init__(self, name: str, clock: _Clock) -> None:
        self.name, self.clock = name, clock
        self.free_at = self.busy = 0.0

    def do(self, seconds: float, then: Callable[[], None]) -> None:
        self.free_at = max(self.clock.now, self.free_at) + seconds
        self.busy += seconds
        self.clock.at(self.free_at, then)


def _nothing() -> None:
    """A resident subgroup needs nothing after its update."""


def predict(
    sizes: Sequence[int], k: Stride, rates: Rates, push: float = 0.5, words: float = 3.0, resident: Sequence[int] = ()
) -> Timeline:
    """The simulated step of subgroups of these sizes at stride ``k``; arguments as in `simulate` and `Unit`."""
    where = places(len(sizes), k)
    units = [Unit(size, place, words) for size, place in zip(sizes, where, strict=True)]
    units += [Unit(size, "resident") for size in resident]
    return simulate(units, rates, max(1, slots(k, where.count("device"))), push)


def choose(
    sizes: Sequence[int],
    rates: Rates,
    push: float = 0.5,
    words: float = 3.0,
    resident: Sequence[int] = (),
    allowed: Sequence[Stride] | None = None,
) -> Placement:
    """The stride of the shortest simulated step; of equals (within 1 %) the largest, which needs the least memory.

    Args:
        sizes: parameters of each subgroup that is not resident.
        rates: of the lanes.
        allowed: strides to choose from; default 1 to 16 (or the number of subgroups), and none.
    """
    candidates = list(allowed) if allowed is not None else [*range(1, min(len(sizes), MOST) + 1), None]
    times = {k: predict(sizes, k, rates, push, words, resident) for k in candidates}
    best = min(t.seconds for t in times.values())
    k = max((k for k in candidates if times[k].seconds <= best * 1.01), key=lambda k: math.inf if k is None else k)
    closed = stride(min(rates.to_device, rates.to_host), rates.host, rates.device, rates.cast, push)
    named = {"inf" if c is None else str(c): times[c].seconds for c in candidates}
    return Placement(k, times[k].seconds, times[k].busy, closed, named)
