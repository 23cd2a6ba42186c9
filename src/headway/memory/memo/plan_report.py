"""What fragmentation costs a step, and what planned addresses would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from headway.memory.memo.arena import plan_memory
from headway.memory.memo.fragmentation import fragmentation
from headway.memory.memo.trace import Allocation, record_trace


def memory_report(
    step: Callable[[], Any],
    blocks: Sequence[nn.Module] = (),
    device: torch.device | str = "cpu",
    *,
    time_limit: float = 10.0,
) -> dict[str, Any]:
    """Trace one step, replay it in a model of torch's caching allocator, and lay it out in one arena.

    Args:
        step: a training step, run once; run it before, so that gradients and optimizer states exist.
        blocks: whose forward and backward passes are planned once for all.
        time_limit: seconds for the program of each arena.
    """
    return report_of(record_trace(step, blocks, device), time_limit=time_limit)


def report_of(*traces: Sequence[Allocation], time_limit: float = 10.0) -> dict[str, Any]:
    """Bytes that the caching allocator reserves for these steps, one after the other, and that their plans need.

    Nothing enforces the plans: torch's allocators take no addresses.
    """
    plans = [plan_memory(trace, time_limit=time_limit) for trace in traces]
    before = fragmentation(*traces)
    planned = max(plan.peak for plan in plans)
    return {
        "allocations": sum(map(len, traces)),
        "allocated": before.allocated,
        "reserved": before.reserved,
        "planned": planned,
        "lower_bound": max(plan.lower_bound for plan in plans),
        "levels": [plan.levels for plan in plans],
        "optimal": all(plan.optimal for plan in plans),
        "reserved_over_planned": before.reserved / planned if planned else 1.0,
        "seconds": sum(plan.seconds for plan in plans),
    }
