"""Files of optimizer states: every group in generations, so that its only good copy is never overwritten.

A step writes a new file for each group it updates. Once all of them are on disk the step is committed, in one go, and
the files before are removed. Until then the state before the step is complete, and whoever has mapped a file keeps its
content for as long as the mapping lives.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import shutil
import threading
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headway.core.errors import HeadwayError
from headway.core.files import write_json
from headway.core.units import human
from headway.memory.backends import FileBackend, lock_folder, read_all, write_all
from headway.memory.fuyou.groups import STATES, Layout
from headway.memory.host import host_empty
from headway.memory.lanes import LaneName

INDEX = "index.json"


@dataclass(frozen=True)
class Generation:
    """One complete copy of a group on disk."""

    path: Path
    checksums: dict[str, int] = field(default_factory=dict)
    """CRC-32 of each region."""


class Buffer:
    """Page-aligned host memory; ``users`` counts who still needs its content."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.users = 0
        self.tensor = host_empty(nbytes, torch.uint8, device)
        self.memory = memoryview(self.tensor.numpy())  # type: ignore[arg-type]


class GroupFiles:
    """Reads and writes groups, past the page cache where the file system allows it; its calls run in lanes.

    Args:
        folder: on the drive to use.
        keep: the files outlive the process, in ``folder`` itself: a new `GroupFiles` on it finds the newest committed
            step. Otherwise they lie in a folder of this process, which is removed with it.
        verify: keep a CRC-32 of every region and check it on the way back.

    Raises:
        HeadwayError: the folder cannot be made or written, or another process uses it.
    """

    def __init__(self, folder: str | Path, keep: bool = False, verify: bool = True) -> None:
        self.root, self.keep, self.verify = Path(folder), keep, verify
        self.backend = FileBackend(self.root, verify)  # removes leftovers, finds out about O_DIRECT
        self.folder = self.root / "states" if keep else self.backend.folder
        self.write_lane: LaneName = self.backend.write_lane
        self.read_lane: LaneName = self.backend.read_lane
        self.bytes_written = self.bytes_read = 0
        self.step = 0
        """The newest committed step that was found (``keep``), with what was committed beside it."""
        self.found: dict[str, Generation] = {}
        self.note: dict[str, Any] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        if keep:
            self._own()

    def _own(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = lock_folder(self.folder)
        except BlockingIOError:
            raise HeadwayError(str(self.folder), "holds the states of a training that is running",
                               hint="give each its own folder") from None  # fmt: skip
        except OSError as error:
            raise HeadwayError(str(self.folder), f"cannot hold optimizer states ({error.strerror})") from error
        self._finalizer = weakref.finalize(self, os.close, descriptor)
        try:
            index = json.loads((self.folder / INDEX).read_text())
            self.step, self.note = index["step"], index["note"]
            self.found = {name: Generation(self.folder / file, sums) for name, (file, sums) in index["groups"].items()}
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError) as error:
            raise HeadwayError(str(self.folder / INDEX), f"cannot be read ({error})",
                               hint="start from a checkpoint in an empty folder") from error  # fmt: skip
        self._numbers = itertools.count(1 + max((int(p.path.name) for p in self.found.values()), default=-1))
        current = {generation.path for generation in self.found.values()}
        for path in self.folder.glob("[0-9]" * 8):
            if path not in current:  # of a step that was never committed
                path.unlink()

    def require(self, nbytes: int, what: str) -> None:
        """Refuse to start where the drive cannot hold ``nbytes``.

        Raises:
            HeadwayError: with what is needed and what there is.
        """
        free = shutil.disk_usage(self.folder).free
        if free < nbytes:
            raise HeadwayError(str(self.root), f"has {human(free, 'B')} free; {what} take {human(nbytes, 'B')}",
                               hint="make room, or give another path")  # fmt: skip

    def write(self, layout: Layout, buffer: Buffer) -> Generation:
        """Write a new generation from the buffer's first ``layout.nbytes`` bytes.

        Raises:
            OSError: the disk is full or fails; no file is left, and the generation before is untouched.
        """
        with self._lock:
            path = self.folder / f"{next(self._numbers):08d}"
        memory = buffer.memory[: layout.nbytes]
        sums = {name: zlib.crc32(memory[start : start + n]) for name, (start, n) in layout.regions.items()}
        try:
            descriptor = self.backend.open(path, os.O_CREAT | os.O_WRONLY)
            try:
                write_all(descriptor, memory)
                if self.keep:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        with self._lock:
            self.bytes_written += layout.nbytes
        return Generation(path, sums if self.verify else {})

    def read(self, layout: Layout, generation: Generation, into: memoryview, regions: Sequence[str] = ()) -> None:
        """Read a generation, or neighbouring regions of it, into page-aligned memory.

        Raises:
            HeadwayError: the file is shorter than it was, or its content changed.
        """
        names = tuple(regions) or tuple(layout.regions)
        first = layout.regions[names[0]][0]
        nbytes = sum(layout.regions[name][1] for name in names)
        descriptor = self.backend.open(generation.path, os.O_RDONLY)
        try:
            got = read_all(descriptor, into[:nbytes], first)
        finally:
            os.close(descriptor)
        if got < nbytes:
            raise HeadwayError(str(generation.path), f"holds {first + got} bytes of {layout.nbytes}",
                               hint="the drive lost data; go on from a checkpoint")  # fmt: skip
        for name in names:
            start, size = layout.regions[name]
            self._check(generation, name, into[start - first : start - first + size])
        with self._lock:
            self.bytes_read += nbytes

    def _check(self, generation: Generation, region: str, memory: Any) -> None:
        if region in generation.checksums and zlib.crc32(memory) != generation.checksums[region]:
            raise HeadwayError(str(generation.path), f"came back with other bytes in {region}",
                               hint="the drive corrupted data; go on from a checkpoint")  # fmt: skip

    def staging(self, nbytes: int) -> memoryview:
        """Page-aligned memory of the calling thread, for reads that go on elsewhere."""
        return memoryview(self.backend.buffer(nbytes))

    def map(self, layout: Layout, generation: Generation, regions: Sequence[str] = STATES) -> dict[str, list[Tensor]]:
        """Region of `STATES` -> the parameters' values, fp32, which take no memory before they are looked at.

        With ``verify`` these regions are read once here, to be checked.

        They stay as they are for as long as anybody holds them, whatever later steps write.

        Raises:
            HeadwayError: the file is damaged.
        """
        try:
            with generation.path.open("rb") as file:
                pages = mmap.mmap(file.fileno(), layout.nbytes, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise HeadwayError(str(generation.path), f"cannot be read ({error})",
                               hint="go on from a checkpoint") from error  # fmt: skip
        found: dict[str, list[Tensor]] = {}
        with memoryview(pages) as memory:
            for region in regions:
                first, size = layout.regions[region]
                with memory[first : first + size] as part:
                    self._check(generation, region, part)
                found[region] = [_values(pages, first + 4 * start, shape)
                                 for start, shape in zip(layout.starts, layout.shapes, strict=True)]  # fmt: skip
        return found

    def commit(self, step: int, groups: dict[str, Generation], note: dict[str, Any]) -> None:
        """Make these generations the state of ``step``; the ones before may be removed then."""
        if self.keep:
            index = {name: (g.path.name, g.checksums) for name, g in groups.items()}
            write_json(self.folder / INDEX, {"step": step, "note": note, "groups": index})

    def delete(self, generation: Generation) -> None:
        """Remove a generation; those who have mapped it keep its content."""
        generation.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove what is not to be kept."""
        self.backend.close()
        if self.keep:
            self._finalizer()


def _values(pages: mmap.mmap, offset: int, shape: torch.Size) -> Tensor:
    if not shape.numel():
        return torch.empty(shape)
    return torch.frombuffer(pages, dtype=torch.float32, count=shape.numel(), offset=offset).view(shape)
