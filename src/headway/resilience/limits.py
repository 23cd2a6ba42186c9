"""How much host memory this process may still take."""

from __future__ import annotations

import resource
from pathlib import Path

import psutil


def host_memory_left() -> int:
    """Bytes that can be allocated before the machine, the control group or the address-space limit says no."""
    left = [psutil.virtual_memory().available]
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    if soft != resource.RLIM_INFINITY:
        left.append(soft - psutil.Process().memory_info().vms)
    if (group := _control_group()) is not None:
        left.append(group)
    return max(0, min(left))


def _control_group(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Version 2 and, where that is not mounted, version 1; page cache that the kernel can drop counts as free."""
    for limit, used, stat, cache in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        try:
            text = (root / limit).read_text(encoding="ascii").strip()
            if text == "max":
                return None
            lines = dict(line.split() for line in (root / stat).read_text(encoding="ascii").splitlines())
            taken = int((root / used).read_text(encoding="ascii")) - int(lines.get(cache, 0))
            return int(text) - taken if int(text) < 1 << 60 else None
        except (OSError, ValueError):
            continue
    return None
