"""Runners for grid tests: measurements made up on the spot, and every way to fail."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from headway.core.errors import DivergedError, HeadwayError


def made_up(work: dict[str, Any]) -> dict[str, Any]:
    """``seconds`` and ``tokens`` per step; ``fail`` chooses a failure; ``count`` is a file that calls are noted in."""
    if "count" in work:
        with Path(work["count"]).open("a") as file:
            file.write(f"{work.get('name', '')}\n")
    fail = work.get("fail")
    if fail == "oom":
        raise MemoryError("no more")
    if fail == "cuda-oom":
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
    if fail == "allocate":
        return {"value": len(bytes(8 << 30))}
    if fail == "nan":
        raise DivergedError("step 3", "the loss is nan")
    if fail == "refused":
        raise HeadwayError("methods.x", "cannot do this")
    if fail == "crash":
        raise ValueError("a bug\nwith details")
    if fail == "exit":
        os._exit(7)
    if fail in ("SIGKILL", "SIGSEGV"):
        os.kill(os.getpid(), getattr(signal, fail))
    if fail == "sleep":
        time.sleep(60)
    seconds = work.get("seconds", 0.1)
    if "speeds" in work:  # a file with the speeds of the calls to come, the machine's drift
        path = Path(work["speeds"])
        first, *rest = path.read_text().split()
        path.write_text(" ".join(rest))
        seconds *= float(first)
    return {
        "step_seconds": [seconds] * work.get("steps", 3),
        "tokens_per_step": work.get("tokens", 100),
        "flops_per_step": 1e9,
        "precision": {"float32": 1.0},
        "matmul_peak": 1e11,
        "peak_memory_bytes": work.get("memory", 1000),
        "losses": [5.0, 4.0, 3.0, 2.0, 1.0],
    }
