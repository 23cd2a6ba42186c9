"""Tensors in host memory that stay there: pinned beside a GPU, anonymous pages elsewhere.

`core.meters.live_bytes` passes over them, so that on a machine whose device is torch's CPU allocator "host" means what
it means beside a GPU: memory that is not the device's.
"""

from __future__ import annotations

import mmap
import resource
import weakref
from pathlib import Path

import torch
from torch import Tensor

from headway.core.errors import HeadwayError
from headway.core.meters import host_storages
from headway.core.units import human


def host_empty(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A flat tensor of zeros in host memory, for copies to and from ``device``.

    Its pages are the process's own, exactly as many as it needs (torch's pinned allocator rounds up to a power of
    two), and go back when the last view is gone.

    Returns:
        [numel], on the CPU; page-locked where ``device`` is a GPU.

    Raises:
        HeadwayError: the system gives no such memory, or does not let it be pinned; says how much was asked for and
            what the limits are.
    """
    nbytes = numel * dtype.itemsize
    if nbytes == 0:
        return torch.empty(0, dtype=dtype)
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise HeadwayError("host memory", f"{human(nbytes, 'B')} ({nbytes} bytes) cannot be had ({error.strerror})",
                           hint=f"{_limits()}; a smaller model, or optimizer state on disk") from error  # fmt: skip
    tensor = torch.frombuffer(pages, dtype=dtype, count=numel)
    address = tensor.untyped_storage().data_ptr()
    if device.type == "cuda" and (code := _pin(address, nbytes)):
        raise HeadwayError("host memory", f"{human(nbytes, 'B')} ({nbytes} bytes) cannot be pinned (CUDA error {code})",
                           hint=f"{_limits()}; raise the limit, or offload less")  # fmt: skip
    host_storages.add(address)
    weakref.finalize(pages, _forget, address, device.type == "cuda")
    return tensor


def _pin(address: int, nbytes: int) -> int:
    """Page-lock memory for the GPU; 0, or CUDA's error code."""
    return int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))


def _forget(address: int, pinned: bool) -> None:
    host_storages.discard(address)
    if pinned:
        torch.cuda.cudart().cudaHostUnregister(address)


def _limits() -> str:
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    text = "unlimited" if locked == resource.RLIM_INFINITY else human(locked, "B")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        group = "unlimited" if limit == "max" else human(int(limit), "B")
    except (OSError, ValueError):
        group = "unknown"
    return f"ulimit -l is {text}, the control group's memory limit {group}"
