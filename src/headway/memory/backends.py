"""Where the store keeps bytes: host memory, files, or nowhere (only counted)."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import shutil
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from headway.core.errors import HeadwayError
from headway.core.fallback import fallback
from headway.memory.lanes import LaneName

ALIGNMENT = 4096
"""O_DIRECT wants buffers, sizes and offsets in multiples of the drive's block."""


@dataclass
class Stored:
    """Where one tensor's bytes are, and what they should be."""

    place: Any
    nbytes: int
    checksum: int | None = None


class Backend(Protocol):
    """Keeps contiguous tensors as bytes. Its calls run in lane threads and block."""

    name: str
    write_lane: LaneName
    read_lane: LaneName

    def write(self, tensor: Tensor) -> Stored:
        """Keep a copy of ``tensor``."""

    def read(self, stored: Stored, into: Tensor) -> None:
        """Copy the bytes back into a contiguous tensor of the same size."""

    def delete(self, stored: Stored) -> None:
        """Forget it."""

    def close(self) -> None:
        """Let go of everything."""


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor as uint8 [bytes], sharing its memory."""
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)


class HostBackend:
    """Host memory: pinned beside a GPU, anonymous pages elsewhere (so that they are no tensors of the device)."""

    name = "host"
    write_lane: LaneName = "device_to_host"
    read_lane: LaneName = "host_to_device"

    def __init__(self) -> None:
        self.bytes = 0
        self._lock = threading.Lock()

    def write(self, tensor: Tensor) -> Stored:
        """Copy to the host; waits for the copy, not for the device's other work."""
        source = as_bytes(tensor)
        if tensor.is_cuda:
            place: Any = torch.empty(source.numel(), dtype=torch.uint8, pin_memory=True)
            stream = _side_stream(tensor.device)
            with torch.cuda.stream(stream):
                place.copy_(source, non_blocking=True)
            stream.synchronize()
        else:
            place = mmap.mmap(-1, max(1, source.numel()))
            _view(place, source.numel()).copy_(source)
        with self._lock:
            self.bytes += source.numel()
        return Stored(place, source.numel())

    def read(self, stored: Stored, into: Tensor) -> None:
        """Copy back."""
        target = as_bytes(into)
        if into.is_cuda:
            stream = _side_stream(into.device)
            with torch.cuda.stream(stream):
                target.copy_(stored.place, non_blocking=True)
            stream.synchronize()
        else:
            target.copy_(_view(stored.place, stored.nbytes))

    def delete(self, stored: Stored) -> None:
        """Give the memory back."""
        with self._lock:
            self.bytes -= stored.nbytes
        stored.place = None

    def close(self) -> None:
        """Nothing is left open."""


class FileBackend:
    """One file per tensor in a folder of this process, past the page cache where the file system allows it.

    Args:
        folder: an existing or new folder, on the drive to use. What killed processes left in it is removed.
        verify: keep a CRC-32 of every tensor and check it on the way back.

    Raises:
        HeadwayError: the folder cannot be made or written.
    """

    name = "disk"
    write_lane: LaneName = "disk_write"
    read_lane: LaneName = "disk_read"

    def __init__(self, folder: str | Path, verify: bool = True) -> None:
        self.verify = verify
        self.bytes_written = 0
        root = Path(folder)
        try:
            root.mkdir(parents=True, exist_ok=True)
            remove_leftovers(root)
            self.folder = _own_folder(root)
            self._lock_file = _lock(self.folder)
            self._direct = self._probe_direct()
        except OSError as error:
            raise HeadwayError(str(root), f"cannot hold offloaded tensors ({error.strerror})") from error
        self._numbers = itertools.count()
        self._local = threading.local()

    def _probe_direct(self) -> bool:
        path = self.folder / "probe"
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_DIRECT, 0o600)
            try:
                os.pwrite(descriptor, mmap.mmap(-1, ALIGNMENT), 0)
            finally:
                os.close(descriptor)
            return True
        except (OSError, AttributeError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            fallback("buffered files for offloaded tensors", f"{self.folder.parent} takes no O_DIRECT",
                     "a copy through the page cache, which takes host memory")  # fmt: skip
            return False
        finally:
            path.unlink(missing_ok=True)

    def _buffer(self, nbytes: int) -> mmap.mmap:
        """This thread's aligned buffer, grown as needed."""
        size = -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = self._local.buffer = mmap.mmap(-1, size)
        return buffer

    def _open(self, path: Path, flags: int) -> int:
        return os.open(path, flags | (os.O_DIRECT if self._direct else 0), 0o600)

    def write(self, tensor: Tensor) -> Stored:
        """Write a new file.

        Raises:
            OSError: the disk is full or fails; no file is left.
        """
        source = as_bytes(tensor)
        nbytes = source.numel()
        buffer = self._buffer(nbytes)
        _view(buffer, nbytes).copy_(source)
        checksum = zlib.crc32(memoryview(buffer)[:nbytes]) if self.verify else None
        path = self.folder / f"{next(self._numbers):08d}"
        descriptor = self._open(path, os.O_CREAT | os.O_WRONLY)
        try:
            _pwrite_all(descriptor, memoryview(buffer)[: -(-nbytes // ALIGNMENT) * ALIGNMENT])
        except OSError:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        self.bytes_written += nbytes
        return Stored(path, nbytes, checksum)

    def read(self, stored: Stored, into: Tensor) -> None:
        """Read a file back.

        Raises:
            HeadwayError: the file is shorter than it was, or its content changed.
        """
        buffer = self._buffer(stored.nbytes)
        size = -(-stored.nbytes // ALIGNMENT) * ALIGNMENT
        descriptor = self._open(stored.place, os.O_RDONLY)
        try:
            got = _pread_all(descriptor, memoryview(buffer)[:size])
        finally:
            os.close(descriptor)
        if got < stored.nbytes:
            raise HeadwayError(str(stored.place), f"holds {got} bytes of {stored.nbytes}", hint="the drive lost data")
        if stored.checksum is not None and zlib.crc32(memoryview(buffer)[: stored.nbytes]) != stored.checksum:
            raise HeadwayError(str(stored.place), "came back with other bytes", hint="the drive corrupted data")
        as_bytes(into).copy_(_view(buffer, stored.nbytes))

    def delete(self, stored: Stored) -> None:
        """Remove the file."""
        stored.place.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove everything this process has written."""
        os.close(self._lock_file)
        shutil.rmtree(self.folder, ignore_errors=True)


class DryBackend:
    """Keeps nothing and counts: what a plan would move. Reading gives zeros, so results are not to be trained on."""

    name = "dry"
    write_lane: LaneName = "disk_write"
    read_lane: LaneName = "disk_read"

    def write(self, tensor: Tensor) -> Stored:
        """Note the size."""
        return Stored(None, tensor.numel() * tensor.element_size())

    def read(self, stored: Stored, into: Tensor) -> None:
        """Fill with zeros."""
        into.zero_()

    def delete(self, stored: Stored) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is open."""


def remove_leftovers(root: Path) -> list[Path]:
    """Remove the folders of dead processes in ``root``: those whose lock nobody holds."""
    removed = []
    for folder in root.glob("headway-store-*"):
        try:
            os.close(_lock(folder))
        except OSError:
            continue  # its owner lives
        shutil.rmtree(folder, ignore_errors=True)
        removed.append(folder)
    return removed


def _own_folder(root: Path) -> Path:
    for number in itertools.count():
        folder = root / f"headway-store-{os.getpid()}-{number}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
    raise AssertionError("unreachable")


def _lock(folder: Path) -> int:
    import fcntl

    descriptor = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that starts after what the current stream has queued, for this thread's copies."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream


def _view(buffer: mmap.mmap, nbytes: int) -> Tensor:
    """The first bytes of a buffer as uint8 [nbytes], without a copy."""
    return torch.frombuffer(buffer, dtype=torch.uint8, count=nbytes) if nbytes else torch.empty(0, dtype=torch.uint8)


def _pwrite_all(descriptor: int, data: memoryview) -> None:
    offset = 0
    while offset < len(data):
        offset += os.pwrite(descriptor, data[offset:], offset)


def _pread_all(descriptor: int, data: memoryview) -> int:
    offset = 0
    while offset < len(data):
        got = os.preadv(descriptor, [data[offset:]], offset)
        if got == 0:
            break
        offset += got
    return offset
