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
from concurrent.futures import CancelledError, Future, wait
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
    failed: int = 0
    """Jobs that raised; their bytes do not count."""
    peak_queued_bytes: int = 0

    @property
    def rate(self) -> float:
        """Bytes per busy second; 0 before the first job."""
        return self.bytes / self.busy_seconds if self.busy_seconds else 0.0


@dataclass(eq=False)
class Job:
    """One movement: what to run, how many bytes it moves, and the future of its result."""

    lane: Lane
    work: Callable[[], Any]
    nbytes: int
    label: str
    then: Callable[[Any], None] | None = None
    future: Future[Any] = field(default_factory=Future)
    waited_seconds: float = 0.0
    """Time that `submit` waited for room."""

    def cancel(self) -> bool:
        """Take a job that no worker has begun out of its lane; False when it has begun or is over."""
        return self.lane.cancel(self)

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the job; its exception is raised here."""
        return self.future.result(timeout)

    def wait(self) -> None:
        """Wait for the job, however it ends."""
        wait([self.future])

    @property
    def done(self) -> bool:
        """Finished, failed or cancelled."""
        return self.future.done()


class Lane:
    """A first-in, first-out queue of jobs with its workers.

    Workers start with the first job and go home when there has been none for a while, so that a lane that nobody
    closes leaves no thread behind.

    Args:
        name: of the link and direction.
        workers: threads; more than one only helps where the link itself is parallel, such as a drive with a deep queue.
        rate: bytes per second that the lane pretends to be limited to; None for the link's own speed.
        queue_bytes: bytes of waiting jobs at which `submit` blocks; a single larger job still passes through an
            empty queue.
        idle_seconds: after which a worker without work goes home.
    """

    def __init__(
        self,
        name: str,
        workers: int = 1,
        rate: float | None = None,
        queue_bytes: int = 1 << 30,
        idle_seconds: float = 1.0,
    ) -> None:
        if workers < 1 or queue_bytes < 1 or (rate is not None and not rate > 0):
            raise ValueError(f"lane {name}: needs a worker, a queue and a rate above 0")
        self.name, self.workers, self.rate, self.queue_bytes = name, workers, rate, queue_bytes
        self.idle_seconds = idle_seconds
        self.report = LaneReport()
        self._jobs: deque[Job] = deque()
        self._queued = 0
        self._running = 0
        self._idle = 0
        self._closed = False
        # Its lock is re-entrant, as it must be: a garbage collection inside may drop a tensor, which cancels its job.
        self._changed = threading.Condition()
        self._free_at = 0.0  # when the pretended link is free again
        self._threads: set[threading.Thread] = set()

    def submit(
        self,
        work: Callable[[], Any],
        nbytes: int,
        label: str = "",
        then: Callable[[Any], None] | None = None,
        wait: bool = True,
    ) -> Job:
        """Queue ``work``, which moves ``nbytes``; blocks while the queue is full.

        Args:
            then: gets the result of ``work``, in place of the job's own, once the pretended link would have moved the
                bytes.
            wait: for room in the queue; False for those who hold what the queue's jobs need to end.

        Raises:
            RuntimeError: the lane is closed, or the system gives no thread.
        """
        job = Job(self, work, nbytes, label, then)
        with self._changed:
            start = time.perf_counter()
            while wait and self._queued and self._queued + nbytes > self.queue_bytes and not self._closed:
                self._changed.wait()
                job.waited_seconds = time.perf_counter() - start
            self.report.waited_seconds += job.waited_seconds
            if self._closed:
                raise RuntimeError(f"lane {self.name} is closed")
            self._jobs.append(job)
            self._queued += nbytes
            self.report.peak_queued_bytes = max(self.report.peak_queued_bytes, self._queued)
            if len(self._jobs) > self._idle and len(self._threads) < self.workers:
                thread = threading.Thread(target=self._work, name=f"headway-{self.name}", daemon=True)
                try:
                    thread.start()  # it waits for the lock
                except RuntimeError:  # no memory for its stack
                    self._jobs.remove(job)
                    self._queued -= nbytes
                    raise
                self._threads.add(thread)
            self._changed.notify_all()
        return job

    def cancel(self, job: Job) -> bool:
        """Take ``job`` out of the queue, so that it takes up no room; False when it has begun or is over."""
        with self._changed:
            if job not in self._jobs:
                return False
            self._jobs.remove(job)
            self._queued -= job.nbytes
            self.report.cancelled += 1
            job.future.cancel()
            job.future.set_running_or_notify_cancel()  # tells those who wait
            job.work, job.then = _nothing, None  # lets go of what it would have moved
            self._changed.notify_all()
        return True

    def drain(self) -> None:
        """Wait until nothing is queued or running."""
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs and not self._running)

    def close(self, cancel: bool = False) -> None:
        """Finish (or cancel) what is queued and end the workers; whoever waits in `submit` gets its error."""
        with self._changed:
            self._closed = True
            while cancel and self._jobs:
                self.cancel(self._jobs[0])
            self._changed.notify_all()
            threads = list(self._threads)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            start = time.perf_counter()
            result, error = None, None
            try:
                result = job.work()
                self._pretend(job.nbytes, start)
                if job.then is not None:
                    job.then(result)
                    result = None  # a job is kept longer than what it moved
            except BaseException as raised:  # it belongs to whoever waits for the job, not to this thread
                error = raised
            with self._changed:
                self.report.jobs += 1
                self.report.failed += error is not None
                self.report.bytes += job.nbytes if error is None else 0
                self.report.busy_seconds += time.perf_counter() - start
                job.work, job.then = _nothing, None
                job.future.set_exception(error) if error is not None else job.future.set_result(result)
                self._running -= 1
                self._changed.notify_all()
            del job, result, error  # what was moved may be large; do not keep it while waiting for the next

    def _next(self) -> Job | None:
        """The next job; None when the worker is to go home."""
        with self._changed:
            self._idle += 1
            self._changed.wait_for(lambda: self._jobs or self._closed, timeout=self.idle_seconds)
            self._idle -= 1
            if not self._jobs:
                self._threads.discard(threading.current_thread())
                return None
            job = self._jobs.popleft()
            self._queued -= job.nbytes
            self._running += 1
            job.future.set_running_or_notify_cancel()  # always true: a cancelled job is not in the queue
            self._changed.notify_all()
            return job

    def _pretend(self, nbytes: int, start: float) -> None:
        """Stay busy for as long as a link of the given rate would."""
        if self.rate is None:
            return
        with self._changed:
            self._free_at = max(self._free_at, start) + nbytes / self.rate
            until = self._free_at
        time.sleep(max(0.0, until - time.perf_counter()))


def _nothing() -> None:
    """What a job does whose work is done or was cancelled."""


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
