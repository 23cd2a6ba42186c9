"""Other ways to save, to compare lazy checkpoints with, and a watch on how long any of them stops training."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter

from headway.core.checkpointer import NoCheckpoints
from headway.resilience.flatten import flatten
from headway.resilience.lazy import LazyCheckpointer


class AsyncSave(NoCheckpoints):
    """torch's ``dcp.async_save``, used as torchtitan does: one under way, waited for before the next.

    Args:
        rate: bytes per second that the files take; None: what the disk does.
    """

    def __init__(self, folder: Path, rate: float | None = None) -> None:
        self.folder, self.rate, self._future = folder, rate, None

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Copy the state, then have a thread write it."""
        self.wait()
        path = self.folder / str(step)
        writer = FileSystemWriter(path, sync_files=True)
        if self.rate:
            writer.fs = Throttled(self.rate)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            saved: Any = dcp.async_save(flatten(state)[1], storage_writer=writer, no_dist=True)  # type: ignore[arg-type]
        self._future = getattr(saved, "upload_completion", saved)
        return path

    def wait(self) -> None:
        """Until the thread is through."""
        if self._future is not None:
            self._future.result()
            self._future = None

    def close(self) -> None:
        """Also removes what was written."""
        self.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class Throttled(FileSystem):
    """Files that take ``rate`` bytes per second."""

    def __init__(self, rate: float) -> None:
        self.rate, self.free_at = rate, 0.0

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        """A file whose writes take their time."""
        with super().create_stream(path, mode) as stream:
            yield _SlowFile(stream, self)


@dataclass
class _SlowFile:
    file: Any
    disk: Throttled

    def write(self, data: Any) -> int:
        self.disk.free_at = max(self.disk.free_at, time.perf_counter()) + memoryview(data).nbytes / self.disk.rate
        ahead = self.disk.free_at - time.perf_counter()
        if ahead > 0.002:  # a sleep has its own cost, and most writes are of some bytes
            time.sleep(ahead)
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class Blocking(LazyCheckpointer):
    """The same work through the same lanes, but training waits for all of it."""

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Save and wait."""
        path = super().save(step, state)
        self.wait()
        return path


@dataclass
class Watched:
    """A checkpointer, with the time for which it stops training."""

    saver: Any
    every: int | None = None
    stalled: float = 0.0
    """Seconds in `save` and `fence`."""
    fences: list[tuple[float, float]] = field(default_factory=list)
    """When each fence was called, and how long it took."""

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Timed."""
        start = time.perf_counter()
        path = self.saver.save(step, state)
        self.stalled += time.perf_counter() - start
        return path

    def fence(self) -> None:
        """Timed."""
        start = time.perf_counter()
        self.saver.fence()
        took = time.perf_counter() - start
        self.stalled += took
        self.fences.append((start, took))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.saver, name)
