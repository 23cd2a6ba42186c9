"""Take one training step apart: phase, module, operation; time, calls, FLOPs, bytes and achieved rates."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

from headway.core.meters import matmul_peak, profiled, synchronize
from headway.plan.dissect.attribution import build_tree
from headway.plan.dissect.counting import Costs, count
from headway.plan.dissect.events import read_events
from headway.plan.dissect.scopes import STEP, marked
from headway.plan.dissect.tree import Tree

_PROFILER_WARMUP = 1  # the first step under the profiler pays for its start


def dissect(
    step_fn: Callable[[], Any],
    model: nn.Module,
    *,
    optimizer: Any = None,
    steps: int = 3,
    warmup: int = 2,
    plain: int = 3,
    collapse: bool = True,
    peaks: dict[str, float] | None = None,
) -> Tree:
    """Run ``step_fn`` several times and return where its time went.

    Forward, backward and recompute are told apart by themselves; mark the rest with ``with phase("data"):`` inside
    ``step_fn``. Each call is a real step: the model trains on. All hooks are removed again, also after an error.

    Args:
        step_fn: one training step, without arguments.
        model: its modules become the tree's branches; compiled ones stay whole.
        optimizer: torch optimizer, or several; what it does is marked as such.
        steps: dissected steps; figures are means over them.
        warmup: steps run first and not measured, such as those that compile.
        plain: steps timed without the profiler, to know its overhead.
        collapse: add up the modules of a list, ``blocks.0`` and ``blocks.1`` as ``blocks.*``.
        peaks: matrix-product peaks in FLOP/s by data type (``float32``); default: measured on this machine.

    Returns:
        The tree. Its steps take longer than plain ones by ``tree.overhead``; shares are of the dissected time.

    Raises:
        HeadwayError: ``optimizer`` is none.

    Source: Zhang et al., arXiv 2311.03687, section on dissection; scopes in place of its kernel-name sequences.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for _ in range(warmup):
        step_fn()
    synchronize(device)
    plain_seconds = [_timed(step_fn, device) for _ in range(plain)]
    costs = count(step_fn)
    with marked(model, optimizer, collapse):
        step_fn()
        synchronize(device)
        with profiled(device, record_shapes=True) as profiler:
            for _ in range(_PROFILER_WARMUP + steps):
                with record_function(STEP):
                    step_fn()
                    synchronize(device)
    root, seconds = build_tree(read_events(profiler), costs, skip=_PROFILER_WARMUP)
    return Tree(root, steps, seconds, plain_seconds, costs.flops, _peaks(costs, device) if peaks is None else peaks)


def _timed(step_fn: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    step_fn()
    synchronize(device)
    return time.perf_counter() - start


def _peaks(costs: Costs, device: torch.device) -> dict[str, float]:
    """Measured peaks of the data types whose FLOPs matter."""
    total = sum(costs.flops.values())
    return {
        name: matmul_peak(getattr(torch, name), device)
        for name, value in costs.flops.items()
        if value > 1e-3 * total and getattr(torch, name).is_floating_point
    }
