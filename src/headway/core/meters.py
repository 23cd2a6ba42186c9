"""Memory, floating-point rates and the facts of the machine."""

from __future__ import annotations

import gc
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from headway.core.files import cache_folder, write_json

R = TypeVar("R")

host_storages: set[int] = set()
"""Addresses of storages that stand for host memory where the device is the CPU: `live_bytes` passes over them."""


def live_bytes(device: torch.device) -> int:
    """Bytes of all distinct tensor storages alive on ``device``."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    gc.collect()
    seen: dict[int, int] = {}
    for thing in gc.get_objects():
        try:
            if not issubclass(type(thing), torch.Tensor) or type(thing).__module__ == "torch._subclasses.fake_tensor":
                continue
            if thing.device.type == device.type and thing.layout is torch.strided:
                storage = thing.untyped_storage()
                if storage.data_ptr() not in host_storages:
                    seen[storage._cdata] = storage.nbytes()
        except (ReferenceError, RuntimeError, NotImplementedError, ValueError):
            continue  # a dead weak proxy, or a tensor without storage, such as a lazy module's parameter
    return sum(seen.values())


def live_peak(function: Callable[[], R], device: torch.device | str = "cpu") -> tuple[R, int]:
    """Run ``function``; also return the highest number of bytes of tensor storage alive on ``device`` meanwhile.

    What the allocator hands out is counted, so temporaries inside fused and compiled code count too. The figure is
    the same on every machine and every time; on a GPU it is the caching allocator's peak of allocated bytes.
    """
    device = torch.device(device)
    before = live_bytes(device)
    result, rise = _rise(function, device)
    return result, before + rise


def live_rise(function: Callable[[], R], device: torch.device) -> tuple[R, int]:
    """Run ``function``; also return by how much `live_peak` meanwhile lies above the live bytes at its start.

    It does not look for what is alive already, which takes longer than a small step.
    """
    gc.collect()  # garbage that is freed meanwhile would count against what is allocated
    return _rise(function, device)


def _rise(function: Callable[[], R], device: torch.device) -> tuple[R, int]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    with profiled(device, profile_memory=True) as profiler:
        result = function()
    # The kineto events are the only place that lists every allocation with its sign and time.
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    deltas = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]")
    peak = current = 0
    for _, _, delta in deltas:
        current += delta
        peak = max(peak, current)
    return result, peak


@contextmanager
def profiled(device: torch.device, **options: Any) -> Iterator[torch.profiler.profile]:
    """torch's profiler over the block, of the CPU and of ``device``; its events are there when the block has ended.

    Args:
        options: of ``torch.profiler.profile``.
    """
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU] + ([kinds.CUDA] if device.type == "cuda" else [])
    profiler = torch.profiler.profile(activities=activities, **options)
    with without_native_stderr():
        profiler.start()
    try:
        yield profiler
    finally:
        with without_native_stderr():
            profiler.stop()


@contextmanager
def without_native_stderr() -> Iterator[None]:
    """Some builds of the profiler announce themselves on file descriptor 2 as it starts and stops."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def process_peak_bytes() -> int:
    """The process's largest resident set so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_peak_bytes(device: torch.device) -> int | None:
    """The device allocator's peak in bytes; None where there is no device apart from the host."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read next measures work done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """The best rate of a large square matrix product, in FLOP/s, over a fraction of a second."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    best, deadline = float("inf"), time.perf_counter() + 0.6
    while best == float("inf") or time.perf_counter() < deadline:  # once at least, however busy the machine is
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def matmul_peak(dtype: torch.dtype, device: torch.device, fresh: bool = False, reached: float = 0.0) -> float:
    """The matrix-product peak in FLOP/s, measured once per machine, torch and number of threads.

    Args:
        fresh: measure it now.
        reached: a rate that something reached. A remembered peak below it was measured while the machine was busy;
            it is measured again and the higher one stays.
    """
    path = cache_folder() / "matmul-peak.json"
    facts = hardware()
    key = "|".join(str(v) for v in (facts["gpu"] if device.type == "cuda" else facts["cpu"], device.type, str(dtype),
                                    torch.__version__, torch.get_num_threads()))  # fmt: skip
    try:
        known: dict[str, float] = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    if fresh or known.get(key, 0.0) <= reached:
        known[key] = max(measure_matmul_peak(dtype, device), 0.0 if fresh else known.get(key, 0.0))
        write_json(path, known)
    return known[key]


def hardware() -> dict[str, Any]:
    """What a measurement was made on."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """The versions that a measurement depends on."""
    from importlib.metadata import version

    return {"headway": version("headway"), "torch": torch.__version__, "python": platform.python_version()}


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
