"""Collectives between processes as bus bandwidth, and any function run on several ranks of this machine."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from headway.plan.dissect.opbench import Rate

_SHARE = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0}
"""Bytes that cross the bus for each byte of the whole tensor, times (n - 1) / n."""


def bench_collectives(sizes: list[int], ranks: int = 2, backend: str = "gloo", seconds: float = 0.3) -> list[Rate]:
    """Bus bandwidth of all-reduce, all-gather and reduce-scatter of fp32 tensors of so many bytes.

    Bus bandwidth is what a link carries, the same for every number of ranks: an all-reduce of S bytes over n ranks
    moves 2 (n - 1) / n S bytes over each, the other two half of that.

    Source: NVIDIA nccl-tests, doc/PERFORMANCE.md.
    """
    return [Rate(**record) for record in on_ranks(_collectives, ranks, sizes, seconds, backend=backend)[0]]


def _collectives(rank: int, sizes: list[int], seconds: float) -> list[dict[str, Any]]:
    ranks = dist.get_world_size()
    device = torch.device("cuda", rank) if dist.get_backend() == "nccl" else torch.device("cpu")
    rates = []
    for size in sizes:
        count = max(ranks, size // 4 // ranks * ranks)
        whole, part = torch.ones(count, device=device), torch.ones(count // ranks, device=device)
        parts = list(whole.chunk(ranks))
        calls: dict[str, Callable[[], Any]] = {
            "all-reduce": partial(dist.all_reduce, whole),
            "all-gather": partial(dist.all_gather, parts, part),
            "reduce-scatter": partial(dist.reduce_scatter, part, parts),
        }
        for name, call in calls.items():
            took = _time_together(call, device, seconds)
            moved = _SHARE[name] * (ranks - 1) / ranks * count * 4
            sizes_of = {"bytes": count * 4, "ranks": ranks}
            rates.append(Rate(name, sizes_of, median(took) * 1e3, moved / median(took), "bytes/s", None).to_dict())
    return rates


def _time_together(call: Callable[[], Any], device: torch.device, seconds: float) -> list[float]:
    """Durations of as many calls on each rank as rank 0 finds time for."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    runs = torch.tensor([int(max(3, min(200, seconds / max(time.perf_counter() - start, 1e-5))))], device=device)
    dist.broadcast(runs, 0)
    took = []
    for _ in range(int(runs)):
        dist.barrier()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - start)
    return took


def on_ranks(function: Callable[..., Any], ranks: int, *arguments: Any, backend: str = "gloo") -> list[Any]:
    """``function(rank, *arguments)`` in so many processes that form a process group; what each returned.

    Args:
        function: of a module's top level, so that other processes can import it; returns what ``torch.save`` can write.

    Raises:
        ProcessRaisedException: a rank failed; the others are stopped.
    """
    with tempfile.TemporaryDirectory(prefix="headway-ranks-") as folder:
        mp.spawn(_rank, (function, ranks, arguments, backend, folder), nprocs=ranks)  # type: ignore[no-untyped-call]
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _rank(rank: int, function: Callable[..., Any], ranks: int, arguments: Any, backend: str, folder: str) -> None:
    threads = max(1, torch.get_num_threads() // ranks)
    torch.set_num_threads(threads)  # the ranks of one machine share its cores
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    try:
        torch.save(function(rank, *arguments), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
