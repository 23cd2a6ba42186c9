"""The tiered store: tensors that leave the device and come back.

    handle = store.put(tensor)      queued for its tier; the caller may drop the tensor
    store.prefetch(handle)          begin to bring it back
    tensor = store.get(handle)      have it: at once if it is here, or still on its way out (forwarding), else after
    a wait store.drop(handle)              forget it; a write that has not begun is cancelled

Everything moves through `Lanes`; nobody opens a second queue.
"""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from headway.core.errors import HeadwayError
from headway.memory.backends import Backend, Stored
from headway.memory.lanes import Job, Lanes


@dataclass
class StoreReport:
    """What a store has done."""

    stored: int = 0
    stored_bytes: int = 0
    fetched: int = 0
    fetched_bytes: int = 0
    forwarded: int = 0
    """Tensors handed back while they were queued or being written."""
    cancelled: int = 0
    """Writes that were not needed any more before they began."""
    kept: int = 0
    """Tensors kept in memory because their write failed."""
    stall_seconds: float = 0.0
    """Time that `get` had to wait."""


class Handle:
    """One tensor in the store."""

    __slots__ = ("device", "dtype", "job", "label", "lock", "nbytes", "reading", "shape", "stored", "tensor", "wanted")

    def __init__(self, tensor: Tensor, label: str) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.nbytes, self.label = tensor.numel() * tensor.element_size(), label
        self.tensor: Tensor | None = tensor  # until it is written, and once it is back
        self.stored: Stored | None = None
        self.job: Job | None = None  # of the write
        self.reading: Job | None = None
        self.wanted = False  # forwarded while being written: keep the tensor, the copy is not needed
        self.lock = threading.Lock()


class TieredStore:
    """Puts tensors into one tier and brings them back, in the background.

    Args:
        backend: the tier.
        lanes: shared with whatever else moves data; by default the store's own.
        keep_on_failure: keep a tensor in memory when its write fails (disk full); otherwise `get` raises.
    """

    def __init__(self, backend: Backend, lanes: Lanes | None = None, keep_on_failure: bool = True) -> None:
        self.backend, self.keep_on_failure = backend, keep_on_failure
        self.lanes = lanes or Lanes()
        self._owns_lanes = lanes is None
        self.report = StoreReport()
        self.failure: BaseException | None = None
        """The first write that failed, if any."""
        self._lock = threading.Lock()

    def put(self, tensor: Tensor, label: str = "") -> Handle:
        """Queue ``tensor`` for the tier; it must not be changed in place until it is dropped.

        Args:
            tensor: contiguous.
            label: for messages: whose tensor it is.
        """
        handle = Handle(tensor.detach(), label)
        event = None
        if tensor.is_cuda:
            event = torch.cuda.Event()
            event.record()
        with handle.lock:
            handle.job = self.lanes[self.backend.write_lane].submit(
                lambda: self._write(handle, event), handle.nbytes, label
            )
        with self._lock:
            self.report.stored += 1
            self.report.stored_bytes += handle.nbytes
        return handle

    def _write(self, handle: Handle, event: torch.cuda.Event | None) -> None:
        tensor = handle.tensor
        if tensor is None:
            return
        if event is not None:
            event.synchronize()
        try:
            stored = self.backend.write(tensor)
        except Exception as error:
            with self._lock:
                self.failure = self.failure or error
                self.report.kept += self.keep_on_failure
            if not self.keep_on_failure:
                raise
            return
        with handle.lock:
            superfluous = handle.tensor is None or handle.wanted
            if not superfluous:
                handle.stored = stored
                handle.tensor = None
        if superfluous:
            self.backend.delete(stored)

    def prefetch(self, handle: Handle) -> None:
        """Begin to bring ``handle`` back, if it is away and not on its way already."""
        with handle.lock:
            if handle.tensor is not None or handle.reading is not None:
                return
            handle.reading = self.lanes[self.backend.read_lane].submit(
                lambda: self._read(handle), handle.nbytes, handle.label
            )

    def _read(self, handle: Handle) -> None:
        stored = handle.stored
        if stored is None:
            return
        tensor = torch.empty(handle.shape, dtype=handle.dtype, device=handle.device)
        self.backend.read(stored, tensor)
        with handle.lock:
            handle.tensor = tensor
        with self._lock:
            self.report.fetched += 1
            self.report.fetched_bytes += handle.nbytes

    def get(self, handle: Handle) -> Tensor:
        """The tensor; it stays at hand until it is dropped.

        Raises:
            HeadwayError: it cannot be read back, or its write failed and it was not kept; names the label.
        """
        with handle.lock:
            if handle.tensor is not None:
                tensor, job = handle.tensor, handle.job
                if handle.stored is None and job is not None and not job.done:
                    # Still on its way out: hand it over and save the rest of the trip.
                    handle.wanted = True
                    with self._lock:
                        self.report.forwarded += 1
                        self.report.cancelled += job.cancel()
                return tensor
        self.prefetch(handle)
        start = time.perf_counter()
        try:
            if handle.job is not None:
                handle.job.result()
            assert handle.reading is not None
            handle.reading.result()
        except HeadwayError as error:
            raise HeadwayError(f"{handle.label or 'offloaded tensor'}: {error}") from error
        finally:
            with self._lock:
                self.report.stall_seconds += time.perf_counter() - start
        if handle.tensor is None:
            raise HeadwayError(handle.label or "offloaded tensor", "was dropped before it was fetched")
        return handle.tensor

    def drop(self, handle: Handle) -> None:
        """Forget ``handle`` and give its memory and its place in the tier back."""
        with handle.lock:
            if handle.job is not None and handle.job.cancel():
                with self._lock:
                    self.report.cancelled += 1
            handle.tensor = None
            stored, handle.stored = handle.stored, None
            if handle.reading is not None:
                handle.reading.cancel()
        if stored is not None:
            if handle.reading is not None and not handle.reading.done:
                handle.reading.result()
                handle.tensor = None
            self.backend.delete(stored)

    def summary(self) -> dict[str, Any]:
        """What the store and its lanes have done."""
        return {**asdict(self.report), "tier": self.backend.name, "lanes": self.lanes.report()}

    def close(self) -> None:
        """End the lanes (unless shared) and remove what is stored."""
        if self._owns_lanes:
            self.lanes.close(cancel=True)
        else:
            self.lanes.drain()
        self.backend.close()
