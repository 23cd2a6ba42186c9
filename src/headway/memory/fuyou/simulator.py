"""The published throughputs, from the cost model and the data sheets of the machine they were measured on.

Source of the measured numbers: the raw tables in the artifact of the later version (LoHan, arXiv 2403.06504v2): dual
Xeon 5320, RTX 4090, PCIe 4.0, up to 12 drives of type D7-P5510.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from headway.memory.fuyou.plan import Profile, Tiers, step_times

SEQUENCE = 1024
GPU = 200e12
"""FLOP/s that an RTX 4090 reaches in half precision."""
DRIVE_READ, DRIVE_WRITE = 6.5e9, 4.0e9
"""Bytes per second of one drive."""
CAP = 25e9
"""Of a PCIe 4.0 x16 link, and of the whole array."""
HIDDEN = {13e9: (5120, 40), 70e9: (8192, 80), 175e9: (12288, 96)}
"""Width and blocks by parameters (GPT-3's, Llama's)."""


@dataclass(frozen=True)
class Cell:
    """One measured throughput."""

    parameters: float
    batch: int
    drives: int
    measured: float
    """TFLOP/s, all GPUs together."""
    gpus: int = 1

    @property
    def name(self) -> str:
        """``13B, 12 drives, batch 32``."""
        gpus = f", {self.gpus} GPUs" if self.gpus > 1 else ""
        return f"{self.parameters / 1e9:.0f}B{gpus}, {self.drives} drives, batch {self.batch}"


def _cells(parameters: float, gpus: int, drives: int, rows: dict[int, float]) -> list[Cell]:
    return [Cell(parameters, batch, drives, measured, gpus) for batch, measured in rows.items()]


DRIVES = (1, 2, 3, 6, 12)
BATCH_SWEEP = _cells(13e9, 1, 12, {8: 42.8, 16: 84.3, 32: 143.1, 64: 155.8, 128: 153.8})
DRIVE_SWEEP = [
    Cell(13e9, batch, drives, measured)
    for batch, row in {
        32: (37.5, 64.3, 81.1, 121.7, 142.0),
        48: (53.1, 89.7, 121.7, 146.3, 153.9),
        64: (70.3, 111.7, 136.3, 151.5, 148.2),
    }.items()
    for drives, measured in zip(DRIVES, row, strict=True)
]
FITTED = [*BATCH_SWEEP, *DRIVE_SWEEP]
"""13B on one GPU: the constants above were chosen in view of these."""
PREDICTED = [
    *_cells(175e9, 1, 12, {8: 52.6, 16: 86.9}),
    *_cells(13e9, 2, 12, {16: 55.0, 32: 103.2, 64: 194.7, 128: 278.2}),
    *_cells(13e9, 4, 12, {32: 106.5, 64: 209.7, 128: 358.7, 256: 514.4}),
    *_cells(70e9, 4, 12, {32: 124.8, 64: 249.7, 96: 348.4}),
]
"""Nothing was chosen in view of these."""


def tiers(drives: int, gpus: int = 1) -> Tiers:
    """The machine with some of its drives and GPUs; the array is shared, links are not."""
    return Tiers(
        flops=GPU * gpus,
        to_host=CAP * gpus,
        to_device=CAP * gpus,
        read=min(CAP, DRIVE_READ * drives),
        write=min(CAP, DRIVE_WRITE * drives),
        host=float("inf"),  # 768 GB: block inputs stay there
    )


def simulate(cell: Cell) -> float:
    """TFLOP/s by the model, everything recomputed, counted as 6 FLOPs per parameter and token as the measured ones.

    Each GPU takes its share of the batch and brings in all weights.
    """
    tokens = cell.batch * SEQUENCE
    hidden, layers = HIDDEN[cell.parameters]
    profile = Profile(
        parameters=cell.parameters,
        forward_flops=2 * cell.parameters * tokens,
        checkpoint_bytes=2 * 2.0 * tokens * hidden * layers,
    )
    machine = tiers(cell.drives, cell.gpus)
    # Over g links every GPU brings in all weights: as if one link of a g-th of their joint rate carried them.
    forward, backward = step_times(profile, machine)
    if cell.gpus > 1:
        alone = replace(machine, to_host=CAP, to_device=CAP)
        share = replace(profile, checkpoint_bytes=profile.checkpoint_bytes / cell.gpus)
        links = step_times(share, alone)
        seconds = sum(
            max(half.compute, half.disk, link.to_host, link.to_device)
            for half, link in zip((forward, backward), links, strict=True)
        )
    else:
        seconds = forward.seconds + backward.seconds
    return 6 * cell.parameters * tokens / seconds / 1e12


def error(cell: Cell) -> float:
    """Simulated over measured, less one."""
    return simulate(cell) / cell.measured - 1
