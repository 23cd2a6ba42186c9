"""Keep the memory that a training step frees, for the next step."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_LARGEST = 2**30


def keep_freed_memory() -> bool:
    """Tell glibc to hold on to freed memory instead of handing it back to the kernel at once.

    By default every tensor beyond 32 MiB, and often much smaller ones, gets fresh pages from the kernel each time it
    is made. A training step makes the same tensors again and again; faulting their pages in costs a CPU training
    about a tenth of its time. Allocations beyond 1 GiB go back as before. The setting is the process's.

    Returns:
        Whether the C library has such a setting (glibc has; musl and those of macOS and Windows have not).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST) and mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST - 1))
