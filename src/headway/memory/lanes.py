"""Lanes: the few queues through which everything moves between device, host and disk.

One lane is one direction of one link. Its jobs run in the order in which they came, so two users of a link share it
instead of fighting for it, and what a link carried is counted in one place. A lane can be given a rate, to stand in
for a slower link.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

LaneName = Literal["device_to_host", "host_to_device", "disk_write", "disk_read"]
LANES: tuple[LaneName, ...] = ("device_to_host", "host_to_device", "disk_write", "disk_read")


@dataclass
class LaneReport:
    """What one lane has carried."""

    jobs: int = 0
    bytes: int = 0
    busy_seconds: float = 0.0
    """Time in which a worker was moving bytes, or waiting for the injected rate."""
    waited_seconds: float = 0.0
    """Time that callers spent in `submit` because the queue was full."""
    cancelled: int = 0
    peak_queued_bytes: int = 0

    @property
    def rate(self) -> float:
        """Bytes per busy second; 0 before the first job."""
        return self.bytes / self.busy_seconds if self.busy_seconds else 0.0


@dataclass
class Job:
    """One movement: what to run, how many bytes it moves, and the future of its result."""

    work: Callable[[], Any]
    nbytes: int
    label: str
    future: Future[Any] = field(default_factory=Future)

    def cancel(self) -> bool:
        """Take a job that no worker has begun out of its lane; False when it has begun."""
        return self.future.cancel()

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the job; its exception is raised here."""
        return self.future.result(timeout)

    @property
    def done(self) -> bool:
        """Finished, failed or cancelled."""
        return self.future.done()


class Lane:
    """A first-in, first-out queue of jobs with its workers.

    Args:
        name: of the link and direction.
        workers: threads; more than one only helps where the link itself is parallel, such as a drive with a deep queue.
        rate: bytes per second that the lane pretends to be limited to; None for the link's own speed.
        queue_bytes: bytes of waiting jobs at which `submit` blocks; a single larger job still passes through an
        empty queue.
    """

    def __init__(self, name: str, workers: int = 1, rate: float | None = None, queue_bytes: int = 1 << 30) -> None:
        self.name, self.rate, self.queue_bytes = name, rate, queue_bytes
        self.report = LaneReport()
        self._jobs: deque[Job] = deque()
        self._queued = 0
        self._running = 0
        self._closed = False
        self._changed = threading.Condition()
        self._free_at = 0.0  # when the pretended link is free again
        self._threads = [
            threading.Thread(target=self._work, name=f"headway-{name}-{i}", daemon=True) for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[], Any], nbytes: int, label: str = "") -> Job:
        """Queue ``work``, which moves ``nbytes``; blocks while the queue is full.

        Raises:
            RuntimeError: the lane is closed.
        """
        job = Job(work, nbytes, label)
        with self._changed:
            start = time.perf_counter()
            while self._queued and self._queued + nbytes > self.queue_bytes and not self._closed:
                self._changed.wait()
            self.report.waited_seconds += time.perf_counter() - start
            if self._closed:
                raise RuntimeError(f"lane {self.name} is closed")
            self._jobs.append(job)
            self._queued += nbytes
            self.report.peak_queued_bytes = max(self.report.peak_queued_bytes, self._queued)
            self._changed.notify_all()
        return job

    def drain(self) -> None:
        """Wait until nothing is queued or running."""
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs and not self._running)

    def close(self, cancel: bool = False) -> None:
        """Finish (or cancel) what is queued and end the workers."""
        with self._changed:
            if cancel:
                for job in self._jobs:
                    job.cancel()
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            start = time.perf_counter()
            try:
                result = job.work()
                self._pretend(job.nbytes, start)
            except BaseException as error:  # it belongs to whoever waits for the job, not to this thread
                job.future.set_exception(error)
            else:
                job.future.set_result(result)
            finally:
                with self._changed:
                    self.report.jobs += 1
                    self.report.bytes += job.nbytes
                    self.report.busy_seconds += time.perf_counter() - start
                    self._running -= 1
                    self._changed.notify_all()
                del job  # what it moved may be large; do not keep it while waiting for the next

    def _next(self) -> Job | None:
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return None
                job = self._jobs.popleft()
                self._queued -= job.nbytes
                self._changed.notify_all()
                if job.future.set_running_or_notify_cancel():
                    self._running += 1
                    return job
                self.report.cancelled += 1

    def _pretend(self, nbytes: int, start: float) -> None:
        """Stay busy for as long as a link of the given rate would."""
        if self.rate is None:
            return
        with self._changed:
            self._free_at = max(self._free_at, start) + nbytes / self.rate
            until = self._free_at
        time.sleep(max(0.0, until - time.perf_counter()))


class Lanes:
    """The four lanes of one process."""

    def __init__(
        self,
        rates: dict[LaneName, float] | None = None,
        workers: dict[LaneName, int] | None = None,
        queue_bytes: int = 1 << 30,
    ) -> None:
        self._lanes = {
            name: Lane(name, (workers or {}).get(name, 1), (rates or {}).get(name), queue_bytes) for name in LANES
        }

    def __getitem__(self, name: LaneName) -> Lane:
        return self._lanes[name]

    def report(self) -> dict[str, dict[str, Any]]:
        """Per lane: jobs, bytes, busy and waited seconds, rate in bytes per second."""
        return {name: {**asdict(lane.report), "rate": lane.report.rate} for name, lane in self._lanes.items()}

    def drain(self) -> None:
        """Wait until nothing is moving."""
        for lane in self._lanes.values():
            lane.drain()

    def close(self, cancel: bool = False) -> None:
        """End all workers."""
        for lane in self._lanes.values():
            lane.close(cancel)


__all__ = ["LANES", "CancelledError", "Job", "Lane", "LaneName", "LaneReport", "Lanes"]
