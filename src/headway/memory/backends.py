"""Where the store keeps bytes: host memory, files, or nowhere (only counted)."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import shutil
import tempfile
import threading
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
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
    """Host memory: pinned beside a GPU, anonymous pages elsewhere (so that they are no tensors of the device).

    Pages that are given back are kept for the next tensor of their size: fresh ones cost a fault each.
    """

    name = "host"
    write_lane: LaneName = "device_to_host"
    read_lane: LaneName = "host_to_device"

    def __init__(self) -> None:
        self.bytes = 0
        """Bytes in use."""
        self._lock = threading.RLock()
        self._free: dict[int, list[mmap.mmap]] = {}

    def write(self, tensor: Tensor) -> Stored:
        """Copy to the host; waits for the copy, not for the device's other work."""
        source = as_bytes(tensor)
        nbytes = source.numel()
        if tensor.is_cuda:
            place: Any = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            with side_stream(tensor.device) as stream:
                place.copy_(source, non_blocking=True)
                stream.synchronize()
        else:
            place = self._pages(nbytes)
            _view(place, nbytes).copy_(source)
        with self._lock:
            self.bytes += nbytes
        return Stored(place, nbytes)

    def _pages(self, nbytes: int) -> mmap.mmap:
        size = _aligned(nbytes)
        with self._lock:
            free = self._free.get(size)
            if free:
                return free.pop()
        return mmap.mmap(-1, size)

    def read(self, stored: Stored, into: Tensor) -> None:
        """Copy back."""
        target = as_bytes(into)
        if into.is_cuda:
            with side_stream(into.device) as stream:
                target.copy_(stored.place, non_blocking=True)
                stream.synchronize()
        else:
            target.copy_(_view(stored.place, stored.nbytes))

    def delete(self, stored: Stored) -> None:
        """Give the memory back."""
        with self._lock:
            self.bytes -= stored.nbytes
            if isinstance(stored.place, mmap.mmap):
                self._free.setdefault(len(stored.place), []).append(stored.place)
        stored.place = None

    def close(self) -> None:
        """Give all pages back to the system."""
        with self._lock:
            self._free.clear()


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
            self.folder, lock = _own_folder(root)
        except OSError as error:
            raise HeadwayError(str(root), f"cannot hold offloaded tensors ({error.strerror})") from error
        # Also runs when the process ends, or when the backend is forgotten without `close`.
        self._finalizer = weakref.finalize(self, _remove_own, self.folder, lock, os.getpid())
        try:
            self._direct = self._probe_direct()
        except OSError as error:
            self.close()
            raise HeadwayError(str(root), f"cannot hold offloaded tensors ({error.strerror})") from error
        kind = filesystem(root)
        if kind in IN_MEMORY:
            fallback("files in memory for offloaded tensors", f"{root} is {kind}, which is no disk",
                     "host memory for all that is offloaded")  # fmt: skip
        elif kind in _NETWORK:
            fallback("files across the network for offloaded tensors", f"{root} is {kind}",
                     "the network's rate instead of a local drive's")  # fmt: skip
        self._numbers = itertools.count()
        self._local = threading.local()
        self._lock = threading.Lock()

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

    def buffer(self, nbytes: int) -> mmap.mmap:
        """This thread's aligned buffer, grown as needed."""
        size = _aligned(nbytes)
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = self._local.buffer = mmap.mmap(-1, size)
        return buffer

    def open(self, path: Path, flags: int) -> int:
        """A descriptor that goes past the page cache where that is possible."""
        return os.open(path, flags | (os.O_DIRECT if self._direct else 0), 0o600)

    def write(self, tensor: Tensor) -> Stored:
        """Write a new file.

        Raises:
            OSError: the disk is full or fails; no file is left.
        """
        source = as_bytes(tensor)
        nbytes = source.numel()
        buffer = self.buffer(nbytes)
        _view(buffer, nbytes).copy_(source)
        checksum = zlib.crc32(memoryview(buffer)[:nbytes]) if self.verify else None
        path = self.new_path()
        descriptor = self.open(path, os.O_CREAT | os.O_WRONLY)
        try:
            write_all(descriptor, memoryview(buffer)[: _aligned(nbytes)])
        except OSError:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        self.count(nbytes)
        return Stored(path, nbytes, checksum)

    def new_path(self) -> Path:
        """A file that is not there yet."""
        return self.folder / f"{next(self._numbers):08d}"

    def count(self, nbytes: int) -> None:
        """Note what was written, for the estimate of the drive's life."""
        with self._lock:
            self.bytes_written += nbytes

    def read(self, stored: Stored, into: Tensor) -> None:
        """Read a file back.

        Raises:
            HeadwayError: the file is shorter than it was, or its content changed.
        """
        buffer = self.buffer(stored.nbytes)
        size = _aligned(stored.nbytes)
        descriptor = self.open(stored.place, os.O_RDONLY)
        try:
            got = read_all(descriptor, memoryview(buffer)[:size])
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
        self._finalizer()


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


def offload_folder(path: str | Path | None) -> Path:
    """Where to put what leaves memory: ``path``, or the system's temporary folder."""
    return Path(path or tempfile.gettempdir()).expanduser()


def remove_leftovers(root: Path) -> list[Path]:
    """Remove the folders of dead processes in ``root``: those whose lock nobody holds."""
    removed = []
    for folder in [*root.glob("headway-store-*"), *root.glob(".headway-new-*")]:
        if not (folder / "lock").exists() and folder.name.startswith("."):
            continue  # a process is just making it
        try:
            lock = lock_folder(folder)
        except OSError:
            continue  # its owner lives, or it is another user's
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
        removed.append(folder)
    return removed


def filesystem(path: Path) -> str:
    """The type of the file system that holds ``path`` (``ext4``, ``tmpfs``, ``nfs4``); empty where it is not known."""
    best, kind = -1, ""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return kind
    real = path.resolve()
    for line in mounts:
        _, point, found, *_ = line.split(" ")
        where = Path(point.encode().decode("unicode_escape"))
        if real.is_relative_to(where) and len(where.parts) > best:
            best, kind = len(where.parts), found
    return kind


IN_MEMORY = ("tmpfs", "ramfs")
"""File systems that take memory for what is written to them."""
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "lustre", "fuse.sshfs", "virtiofs")


def _own_folder(root: Path) -> tuple[Path, int]:
    """A new folder of this process and the descriptor of its lock."""
    # Locked under a name that nobody takes for a leftover, then renamed: at no moment is it there without its lock.
    made = Path(tempfile.mkdtemp(prefix=".headway-new-", dir=root))
    lock = lock_folder(made)
    for number in itertools.count():
        folder = root / f"headway-store-{os.getpid()}-{number}"
        if not folder.exists():
            made.rename(folder)
            return folder, lock
    raise AssertionError("unreachable")


def _remove_own(folder: Path, lock: int, pid: int) -> None:
    if os.getpid() != pid:
        return  # a forked child must not remove its parent's
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def lock_folder(folder: Path) -> int:
    """Hold ``folder`` for as long as the descriptor is open.

    Raises:
        BlockingIOError: another holds it.
    """
    import fcntl

    descriptor = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


_streams = threading.local()


@contextmanager
def side_stream(device: torch.device) -> Iterator[Any]:
    """This thread's stream for copies on ``device``; what is allocated inside belongs to it. None without a GPU."""
    if device.type != "cuda":
        yield None
        return
    streams: dict[torch.device, Any] = _streams.__dict__.setdefault("by_device", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    with torch.cuda.stream(streams[device]):
        yield streams[device]


def _aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to whole blocks of a drive, at least one."""
    return -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT


def _view(buffer: mmap.mmap, nbytes: int) -> Tensor:
    """The first bytes of a buffer as uint8 [nbytes], without a copy."""
    return torch.frombuffer(buffer, dtype=torch.uint8, count=nbytes) if nbytes else torch.empty(0, dtype=torch.uint8)


def write_all(descriptor: int, data: memoryview) -> None:
    """Write ``data``, aligned, from the beginning of a file.

    Raises:
        OSError: the disk is full or fails.
    """
    offset = 0
    while offset < len(data):
        written = os.pwrite(descriptor, data[offset:], offset)
        offset += written
        if offset < len(data) and (written == 0 or offset % ALIGNMENT):  # goes on, unaligned, with a misleading error
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_all(descriptor: int, data: memoryview, start: int = 0) -> int:
    """Fill ``data`` from byte ``start`` of a file; how many bytes there were."""
    offset = 0
    while offset < len(data):
        got = os.preadv(descriptor, [data[offset:]], start + offset)
        if got == 0:
            break
        offset += got
    return offset
