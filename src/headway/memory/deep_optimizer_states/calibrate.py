"""Measure the rates of a machine's lanes, in a second or so."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from headway.memory.backends import side_stream
from headway.memory.deep_optimizer_states.kernel import adam_
from headway.memory.deep_optimizer_states.plan import Rates
from headway.memory.deep_optimizer_states.update import Slot, Workers
from headway.memory.host import host_empty
from headway.memory.lanes import Lane

GROUP: dict[str, Any] = {"lr": 0.0, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "maximize": False,
                         "decoupled_weight_decay": True}  # fmt: skip


def calibrate(
    workers: Workers, device: torch.device, dtype: torch.dtype, numel: int = 1 << 22, seconds: float = 1.0
) -> Rates:
    """Rates of the lanes, each measured on its own with the work that a step will give it.

    Args:
        workers: the lanes, with whatever rates they pretend to have.
        device: where the weights are.
        dtype: of the weights.
        numel: parameters of the scratch subgroup, at most.
        seconds: to spend on all lanes together, about; each is measured twice at least.

    Returns:
        Parameters per second. The best of the repeats, as what disturbs a lane only slows it down.
    """
    p, m, v = (host_empty(numel, torch.float32, device) for _ in range(3))
    g, narrow = host_empty(numel, torch.float32, device), host_empty(numel, dtype, device)
    slot, count = Slot.make(numel, device), [torch.zeros(())]
    slot.grad.zero_()

    def to_device(n: int) -> None:
        for here, there in zip(slot.state, (p, m, v)):
            here[:n].copy_(there[:n], non_blocking=True)

    def to_host(n: int) -> None:
        for here, there in zip(slot.state, (p, m, v)):
            there[:n].copy_(here[:n], non_blocking=True)

    def host(n: int) -> None:
        adam_([p[:n]], [g[:n]], [m[:n]], [v[:n]], count, GROUP)

    def on_device(n: int) -> None:
        adam_([slot.state[0][:n]], [slot.grad[:n]], [slot.state[1][:n]], [slot.state[2][:n]], count, GROUP)

    def cast(n: int) -> None:
        narrow[:n].copy_(p[:n])

    def rate(lane: Lane, work: Callable[[int], None], amount: int) -> float:
        best, n, deadline, runs = 0.0, min(numel, 1 << 16), time.perf_counter() + seconds / 5, 0
        while runs < 2 or time.perf_counter() < deadline:

            def timed(n: int = n) -> None:
                with torch.no_grad(), side_stream(device) as stream:
                    work(n)
                    if stream is not None:
                        stream.synchronize()

            start = time.perf_counter()
            lane.submit(timed, n * amount).result()
            took = time.perf_counter() - start
            best, runs = max(best, n / took), runs + 1
            if took < seconds / 50:
                n = min(numel, 4 * n)
        return best

    to_device(numel)  # what is copied, and updated, must be numbers
    return Rates(
        to_device=3 * rate(workers.to_device, to_device, 12),
        to_host=3 * rate(workers.to_host, to_host, 12),
        host=rate(workers.host, host, 1),
        device=rate(workers.device, on_device, 1),
        cast=math.inf if dtype == torch.float32 else rate(workers.cast, cast, 1),
    )
