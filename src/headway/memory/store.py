"""The tiered store: tensors that leave the device and come back.

    handle = store.put(tensor)      queued for its tier; the caller may let go of the tensor
    store.prefetch(handle)          begin to bring it back
    tensor = store.get(handle)      have it: at once if it is here or on its way out (forwarding), else after a wait
    store.release(handle)           not needed for now: keep it in the tier only
    store.drop(handle)              forget it; a write that has not begun is cancelled

Everything moves through `Lanes`; nobody opens a second queue.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from concurrent.futures import CancelledError
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from headway.core.errors import HeadwayError, reason
from headway.core.fallback import fallback
from headway.memory.backends import Backend, Stored, side_stream
from headway.memory.lanes import Job, Lanes


@dataclass
class StoreReport:
    """What a store has done."""

    stored: int = 0
    """Tensors handed to `put`."""
    stored_bytes: int = 0
    fetched: int = 0
    fetched_bytes: int = 0
    forwarded: int = 0
    """Tensors handed back while they were queued or being written."""
    cancelled: int = 0
    """Writes that were not needed any more before they began."""
    cancelled_bytes: int = 0
    kept: int = 0
    """Tensors kept in memory because their write failed."""
    stall_seconds: float = 0.0
    """Time that `get` waited for a tensor."""
    wait_seconds: float = 0.0
    """Time that `put` waited for room in the queue."""


class Handle:
    """One tensor in the store."""

    __slots__ = ("__weakref__", "busy", "counted", "device", "dropped", "dtype", "error", "job", "label", "nbytes",
                 "reading", "shape", "source", "stored", "tensor", "version", "wanted")  # fmt: skip

    def __init__(self, tensor: Tensor, label: str, source: Tensor) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.nbytes, self.label = tensor.numel() * tensor.element_size(), label
        self.tensor: Tensor | None = tensor  # until it is written, and once it is back
        self.source: Tensor | None = source  # tells of changes in place, as long as the tensor is the caller's own
        self.version = version(source)
        self.stored: Stored | None = None
        self.job: Job | None = None  # of the write
        self.reading: Job | None = None
        self.busy = False  # being read at this moment
        self.wanted = False  # forwarded while being written: keep the tensor, the copy is not needed
        self.dropped = False
        self.counted = True  # among the bytes that are in the tier or on their way
        self.error: BaseException | None = None

    @property
    def here(self) -> bool:
        """In memory, or still in memory."""
        return self.tensor is not None


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
        self.capacity: int | None = None
        """Bytes that the tier has proved to hold; known once a write failed."""
        self.closed = False
        self._said = False
        self._held = 0  # bytes in the tier or on their way there
        self._resident = 0  # bytes in the tier
        self._handles: weakref.WeakSet[Handle] = weakref.WeakSet()
        self._doomed: deque[Handle] = deque()
        # What lanes' threads are done with. Torch counts the CPU's memory by thread, so that what one thread made and
        # another freed looks as if it were never freed: the store's user frees, and makes, on a CPU.
        self._trash: deque[tuple[Tensor | None, Tensor | None]] = deque()
        # One for all handles: who touches the version counter of a tensor that may be being written holds it too.
        # Re-entrant, as a garbage collection inside may drop a tensor of this very store.
        self.lock = threading.RLock()

    def put(self, tensor: Tensor, label: str = "", source: Tensor | None = None) -> Handle:
        """Queue ``tensor`` for the tier; it must not be changed in place until it is written or dropped.

        Args:
            tensor: contiguous.
            label: for messages: whose tensor it is.
            source: a tensor on the same storage whose version counter tells of changes in place; default ``tensor``.

        Raises:
            HeadwayError: the store is closed, or an earlier write failed and the run is strict.
        """
        self.check()
        if self.closed:
            raise HeadwayError(label or "offloaded tensor", "is put into a store that is closed")
        handle = Handle(tensor.detach(), label, (tensor if source is None else source).detach())
        event = None
        if tensor.is_cuda:
            event = torch.cuda.Event()
            event.record()
        with self.lock:
            self.report.stored += 1
            self.report.stored_bytes += handle.nbytes
            self._held += handle.nbytes
            self._handles.add(handle)
            self._drop_doomed()
        self.sweep()
        handle.job = self.lanes[self.backend.write_lane].submit(
            lambda: self._write(handle, event), handle.nbytes, label, lambda stored: self._written(handle, stored)
        )
        with self.lock:
            self.report.wait_seconds += handle.job.waited_seconds
        return handle

    def has_room(self, nbytes: int) -> bool:
        """Whether the tier is known to hold ``nbytes`` more, or not known not to."""
        return self.capacity is None or self._held + nbytes <= self.capacity

    def check(self) -> None:
        """Say, once, that a write failed.

        Raises:
            HeadwayError: the run is strict.
        """
        if self.failure is not None and self.keep_on_failure and not self._said:
            self._said = True
            why = f"{self.backend.name} took {self.capacity} bytes and then failed ({reason(self.failure)})"
            fallback("keeping tensors in memory that were to be offloaded", why, "the memory that they take")

    # In the lanes' threads.

    def _write(self, handle: Handle, event: torch.cuda.Event | None) -> Stored | None:
        tensor = handle.tensor
        if tensor is None:  # dropped just now
            return None
        if event is not None:
            event.synchronize()
        try:
            return self.backend.write(tensor)
        except Exception as error:
            with self.lock:
                self._forget(handle)
                self.failure = self.failure or error.with_traceback(None)  # whose frames hold the tensor
                self.capacity = min(self._resident, self._resident if self.capacity is None else self.capacity)
                self.report.kept += self.keep_on_failure
                if self.keep_on_failure:
                    return None
                handle.error = error
                self._let_go(handle)
            raise

    def _written(self, handle: Handle, stored: Stored | None) -> None:
        if stored is None:
            return
        with self.lock:
            superfluous = handle.dropped or handle.wanted or not _unchanged(handle)
            if not superfluous:
                handle.stored = stored
                self._let_go(handle)
                self._resident += handle.nbytes
            else:
                self._forget(handle)
            self._drop_doomed()
        if superfluous:
            self.backend.delete(stored)

    def _read(self, handle: Handle, into: Tensor | None) -> Tensor | None:
        with self.lock:
            if handle.dropped or handle.stored is None:
                return None
            stored, handle.busy = handle.stored, True
        try:
            with side_stream(handle.device):  # memory of the stream that copies: nothing to wait for
                tensor = _room_for(handle) if into is None else into
                self.backend.read(stored, tensor)
            return tensor
        except BaseException:
            self._read_over(handle, None)
            raise

    def _read_over(self, handle: Handle, tensor: Tensor | None) -> None:
        with self.lock:
            handle.busy = False
            if handle.dropped:
                self._delete(handle)
                if tensor is not None and not tensor.is_cuda:
                    self._trash.append((tensor, None))
                return
            handle.tensor = tensor
            if tensor is not None:
                self.report.fetched += 1
                self.report.fetched_bytes += handle.nbytes

    # For whoever uses it.

    def prefetch(self, handle: Handle) -> None:
        """Begin to bring ``handle`` back, if it is away and not on its way; keep it, if it is still on its way out."""
        self.sweep()
        with self.lock:
            if handle.dropped or handle.reading is not None:
                return
            if handle.tensor is not None:
                self._forward(handle)
            elif handle.stored is not None:
                into = None if handle.device.type == "cuda" else _room_for(handle)
                handle.reading = self.lanes[self.backend.read_lane].submit(
                    lambda: self._read(handle, into),
                    handle.nbytes,
                    handle.label,
                    lambda tensor: self._read_over(handle, tensor),
                    wait=False,  # we hold the lock that the lane's jobs need to end
                )

    def _forward(self, handle: Handle) -> None:
        """Under the lock: keep what is still being written, and save the rest of the trip."""
        if handle.stored is not None or handle.wanted or handle.job is None or handle.job.done:
            return
        handle.wanted = True
        self.report.forwarded += 1
        self._cancel(handle)

    def _cancel(self, handle: Handle) -> None:
        if handle.job is not None and handle.job.cancel():
            self.report.cancelled += 1
            self.report.cancelled_bytes += handle.nbytes
            self._forget(handle)

    def get(self, handle: Handle) -> Tensor:
        """The tensor; it stays at hand until it is released or dropped.

        Raises:
            HeadwayError: it cannot be read back, it was changed in place before it was written, or its write failed and
                it was not kept; names the label.
        """
        label = handle.label or "offloaded tensor"
        with self.lock:
            self._drop_doomed()
            if handle.tensor is not None:
                if not _unchanged(handle):
                    raise HeadwayError(label, "was changed in place after it was stored",
                                       hint="do not modify tensors that the backward pass needs")  # fmt: skip
                self._forward(handle)
                return _for_this_stream(handle.tensor)
            if handle.error is not None:
                raise HeadwayError(label, f"could not be stored ({reason(handle.error)})") from handle.error
            if handle.dropped or self.closed:
                raise HeadwayError(label, "is asked for after it was dropped")
            self.prefetch(handle)
            reading = handle.reading
        assert reading is not None
        start = time.perf_counter()
        try:
            reading.result()
        except (HeadwayError, OSError) as error:
            raise HeadwayError(label, f"could not be read back: {reason(error)}") from error
        except CancelledError:
            raise HeadwayError(label, "was dropped while it was waited for") from None
        finally:
            with self.lock:
                self.report.stall_seconds += time.perf_counter() - start
        tensor = handle.tensor
        if tensor is None:
            raise HeadwayError(label, "was dropped while it was waited for")
        return _for_this_stream(tensor)

    def release(self, handle: Handle) -> None:
        """Keep ``handle`` in the tier only; it can be fetched again. Does nothing if it never got there."""
        with self.lock:
            self._drop_doomed()
            if handle.stored is not None and not handle.busy:
                if handle.reading is not None:
                    handle.reading.cancel()
                handle.tensor = handle.reading = None

    def drop(self, handle: Handle) -> None:
        """Forget ``handle`` and give its memory and its place in the tier back.

        Never waits, and may be called from anywhere, a garbage collection too.
        """
        # A collection may come to pass while another thread holds the store's lock and waits for one that this thread
        # holds (the back end's, a lane's). So this must not wait: whoever has the lock next does it.
        self._doomed.append(handle)
        if self.lock.acquire(blocking=False):
            try:
                self._drop_doomed()
            finally:
                self.lock.release()
        self.sweep()

    def sweep(self) -> None:
        """Free what has been written since the last call; most calls do it by the way."""
        while self._trash:
            try:
                self._trash.popleft()
            except IndexError:  # another thread took it
                return

    def drain(self) -> None:
        """Wait until nothing moves in the lanes, and free what was written."""
        self.lanes.drain()
        self.sweep()

    def _let_go(self, handle: Handle) -> None:
        if handle.device.type != "cuda":
            self._trash.append((handle.tensor, handle.source))
        handle.tensor = handle.source = None

    def _drop_doomed(self) -> None:
        while self._doomed:
            handle = self._doomed.popleft()
            if handle.dropped:
                continue
            handle.dropped = True
            self._cancel(handle)
            self._let_go(handle)
            if handle.reading is not None:
                handle.reading.cancel()
            if not handle.busy:  # else whoever reads it removes it
                self._delete(handle)

    def _delete(self, handle: Handle) -> None:
        stored, handle.stored = handle.stored, None
        if stored is not None:
            self._resident -= handle.nbytes
            self._forget(handle)
            self.backend.delete(stored)

    def _forget(self, handle: Handle) -> None:
        if handle.counted:
            handle.counted = False
            self._held -= handle.nbytes

    def summary(self) -> dict[str, Any]:
        """What the store and its lanes have done."""
        self.check()
        return {**asdict(self.report), "tier": self.backend.name, "lanes": self.lanes.report()}

    def close(self) -> None:
        """Cancel what waits, wait for what moves, and remove all that is stored. Safe after any failure, and twice."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
            handles = list(self._handles)
            self._doomed.extend(handles)
            self._drop_doomed()
        for handle in handles:
            for job in (handle.job, handle.reading):
                if job is not None and not job.done:
                    job.wait()
        self.sweep()
        if self._owns_lanes:
            self.lanes.close(cancel=True)
        self.backend.close()


def _room_for(handle: Handle) -> Tensor:
    return torch.empty(handle.shape, dtype=handle.dtype, device=handle.device)


def version(tensor: Tensor) -> int:
    """How often the tensor's memory was changed in place, as far as torch knows; 0 for tensors of inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def _unchanged(handle: Handle) -> bool:
    return handle.source is None or version(handle.source) == handle.version


def _for_this_stream(tensor: Tensor) -> Tensor:
    if tensor.is_cuda:  # it may be of a copying stream's memory, which must not be reused before our kernels are done
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor
