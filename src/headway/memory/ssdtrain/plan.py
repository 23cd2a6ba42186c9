"""How much to offload, and what that does to a drive: pure arithmetic on measured numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def needed_rates(volumes: Sequence[float], times: Sequence[float]) -> list[float]:
    """For each module, the rate at which everything up to it can be written and it be read back in time.

    By the time that the backward pass, twice as long as the forward pass, comes back to module n, the modules before it
    and n itself have been written and n has been read: ``(sum V before n + 2 V_n) / (3 T - 2 sum t before n)``.

    Args:
        volumes: bytes that each module saves, in the order of the forward pass.
        times: seconds of each module's forward pass.

    Returns:
        Bytes per second, one for each module.

    Raises:
        ValueError: the two differ in length, or hold something negative.
    """
    if len(volumes) != len(times):
        raise ValueError(f"{len(volumes)} volumes and {len(times)} times")
    if any(not value >= 0 for value in (*volumes, *times)):
        raise ValueError("volumes and times must not be negative")
    total = sum(times)
    before = accumulate(zip(volumes, times, strict=True), lambda a, b: (a[0] + b[0], a[1] + b[1]), initial=(0.0, 0.0))
    rates = []
    for (volume_before, time_before), volume in zip(before, volumes, strict=False):
        bytes_, seconds = volume_before + 2 * volume, 3 * total - 2 * time_before
        rates.append(0.0 if bytes_ == 0 else bytes_ / seconds if seconds > 0 else float("inf"))
    return rates


def plan_amount(volumes: Sequence[float], times: Sequence[float], bandwidth: float) -> int:
    """How many modules, from the first, to offload so that all traffic hides behind the computation.

    The first module whose need exceeds the bandwidth stays in memory, and so do all after it.

    Args:
        volumes: bytes that each module saves, in the order of the forward pass.
        times: seconds of each module's forward pass.
        bandwidth: bytes per second of the link, in both directions together.

    Returns:
        0 to ``len(volumes)``.

    Source: SSDTrain, arXiv 2408.10013, section on adaptive offloading.
    """
    for index, rate in enumerate(needed_rates(volumes, times)):
        if rate > bandwidth:
            return index
    return len(volumes)


def drive_life_days(bytes_per_second: float, rated_bytes: float) -> float:
    """Days until a drive has taken what it is rated for, at this rate of writing; ``inf`` without writes.

    Args:
        bytes_per_second: mean over the run.
        rated_bytes: the maker's "terabytes written" times 10^12.
    """
    return rated_bytes / bytes_per_second / 86400 if bytes_per_second > 0 else float("inf")
