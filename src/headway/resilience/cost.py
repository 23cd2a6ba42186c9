"""What a checkpoint costs a training, by how it is saved: the model behind the choice of `lazy`.

Plain arithmetic over one process's share of the state and the rates of its links; no torch, nothing measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Engine = Literal["blocking", "staged", "pinned", "lazy"]
ENGINES: tuple[Engine, ...] = ("blocking", "staged", "pinned", "lazy")
"""blocking: to host and to disk while training waits. staged: to host while it waits, to disk behind its back
(TorchSnapshot, DCP's async_save). pinned: to host behind the forward and backward pass, into memory for all of it
(CheckFreq). lazy: the same through a ring that may be smaller, piece by piece."""


@dataclass(frozen=True)
class Load:
    """One process's checkpoint and the training around it."""

    state: float
    """Bytes to save."""
    to_host: float
    """Bytes per second from the device to host memory."""
    to_disk: float
    """Bytes per second to the file system."""
    window: float
    """Seconds of forward and backward pass, in which the state does not change."""
    step: float
    """Seconds of a whole step without checkpoints."""
    every: int = 1
    """Steps between checkpoints."""
    ring: float = float("inf")
    """Bytes of host memory for copies."""


def stall(engine: Engine, load: Load) -> float:
    """Seconds for which one checkpoint stops training, when the disk is idle as it begins.

    Source: Maurya et al. 2024, sections 4 and 5; the cases of the ring follow from its first-in, first-out release.
    """
    copy, write = load.state / load.to_host, load.state / load.to_disk
    if engine == "blocking":
        return copy + write
    if engine == "staged":
        return copy
    if engine == "pinned" or load.state <= load.ring:
        return max(0.0, copy - load.window)
    through = load.ring / load.to_host + (load.state - load.ring) / load.to_disk  # the rest moves at the disk's speed
    return max(0.0, max(copy, through) - load.window)


def back_pressure(engine: Engine, load: Load) -> float:
    """Seconds more for every checkpoint, for which training waits because the disk still writes the last one."""
    if engine == "blocking":
        return 0.0
    free = load.every * load.step + stall(engine, load)
    return max(0.0, load.state / load.to_disk - free)


def time_per_step(engine: Engine, load: Load) -> float:
    """Seconds of a step, the checkpoints' share included."""
    return load.step + (stall(engine, load) + back_pressure(engine, load)) / load.every


@dataclass(frozen=True)
class Cluster:
    """Processes that train one model and save it together, each its share."""

    parameters: float
    devices: int
    tokens: float
    """Per step, over all devices."""
    flops: float = 120e12
    """FLOP per second that a device reaches."""
    to_host: float = 20e9
    """Bytes per second from each device to its host: pinned, PCIe 4."""
    to_disk: float = 2e9
    """Bytes per second that each device gets of the file system."""
    bytes_per_parameter: float = 14.0
    """bf16 weights, fp32 masters and two moments."""
    update: float = 0.03
    """Share of the step in which the state changes."""
    ring: float = 16e9

    def load(self, every: int) -> Load:
        """One device's checkpoint, with one every ``every`` steps."""
        step = 6 * self.parameters * self.tokens / (self.flops * self.devices)
        state = self.bytes_per_parameter * self.parameters / self.devices
        return Load(state, self.to_host, self.to_disk, step * (1 - self.update), step, every, self.ring)


PAPER: dict[str, Cluster] = {
    "3B": Cluster(3e9, 4, 64e3),
    "7B": Cluster(7e9, 8, 64e3),
    "13B": Cluster(13e9, 16, 64e3),
    "33B": Cluster(33e9, 32, 128e3),
    "70B": Cluster(70e9, 80, 256e3),
}
"""Models of the paper's sizes on as many 40 GB devices as they need; devices and tokens are ours, for the order of
magnitude."""


def bars(every: int) -> dict[str, dict[Engine, float]]:
    """Model -> engine -> time of a step over that of a step without checkpoints, as the paper's figures have it."""
    table: dict[str, dict[Engine, float]] = {}
    for name, cluster in PAPER.items():
        load = cluster.load(every)
        table[name] = {engine: time_per_step(engine, load) / load.step for engine in ENGINES}
    return table
