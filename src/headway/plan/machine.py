"""What this machine has and how fast it is: measured rates, what torch can do here, which extras are installed."""

from __future__ import annotations

import os
import re
import tempfile
import time
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch

from headway.core.errors import HeadwayError
from headway.core.meters import hardware, matmul_peak, synchronize, versions

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def examine(folder: Path, fresh: bool = True) -> dict[str, Any]:
    """Everything that a training's speed and size here depend on; takes a few seconds.

    Args:
        folder: where runs will be written; its disk is measured.
        fresh: measure the matrix-product peak anew instead of taking the remembered one.

    Raises:
        HeadwayError: ``folder`` cannot be written to.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "hardware": hardware(),
        "versions": versions(),
        "device": str(device),
        "matmul_flops_per_second": {name: matmul_peak(dtype, device, fresh) for name, dtype in PRECISIONS.items()},
        "memory_bytes_per_second": memory_rate(device),
        "disk_bytes_per_second": disk_rate(folder),
        "disk_folder": str(folder),
        "features": {"compile": compile_problem() or "works", "bf16": _bf16(), "cuda": torch.version.cuda or "no"},
        "extras": extras(),
    }


def memory_rate(device: torch.device) -> float:
    """Bytes per second read and written by a copy of a tensor larger than the caches; the best of several."""
    size = 1 << (30 if device.type == "cuda" else 27)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size / best


def disk_rate(folder: Path, size: int = 1 << 26) -> float:
    """Bytes per second of writing one file in ``folder`` and forcing it to the disk; the file is removed.

    Raises:
        HeadwayError: nothing can be written there.
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    block = os.urandom(1 << 20)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            start = time.perf_counter()
            for _ in range(size >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return size / (time.perf_counter() - start)
    except OSError as error:
        raise HeadwayError(str(folder), f"cannot be written to ({error.strerror or error})") from error


def compile_problem() -> str:
    """Why torch.compile does not work here; empty where it does."""
    try:
        result = torch.compile(lambda x: torch.sin(x) + 1)(torch.zeros(8))
        return "" if bool((result == 1).all()) else "gives wrong results"
    except Exception as error:  # a compiler, its headers or a supported Python is missing: in any case it does not work
        lines = [line for line in str(error).splitlines() if line.strip()]
        return f"does not work: {lines[0] if lines else type(error).__name__}"


def _bf16() -> str:
    if torch.cuda.is_available():
        return "in hardware" if torch.cuda.is_bf16_supported(including_emulation=False) else "emulated"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = [flag for flag in ("amx_bf16", "avx512_bf16", "bf16") if re.search(rf"\b{flag}\b", flags)]
    return f"in hardware ({found[0]})" if found else "emulated"


def extras() -> dict[str, dict[str, str | None]]:
    """Extra -> its packages -> the installed version, or None where one is missing."""
    found: dict[str, dict[str, str | None]] = {}
    for requirement in requires("headway") or []:
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?[^;]*;.*extra == ['\"]([^'\"]+)['\"]", requirement)
        if match and match[1] != "headway" and match[2] not in ("all", "dev"):
            found.setdefault(match[2], {})[match[1]] = _version(match[1])
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
