"""Back ends: bytes come back as they were, damage is found, dead processes' files go and live ones' stay.

Needs nothing. Run: pytest tests/memory/test_backends.py
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from headway.core.errors import HeadwayError
from headway.core.fallback import FallbackLog, use_log
from headway.core.meters import live_peak
from headway.memory import backends
from headway.memory.backends import ALIGNMENT, DryBackend, FileBackend, HostBackend, filesystem, remove_leftovers

HOLD = """
import sys, time, torch
from headway.memory.backends import FileBackend
backend = FileBackend(sys.argv[1])
backend.write(torch.ones(1000))
print(backend.folder, flush=True)
time.sleep(60)
"""


def holder(root: Path) -> tuple[subprocess.Popen[str], Path]:
    """Another process that has written a file, and its folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(root)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64])
@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 5000])
@pytest.mark.parametrize("kind", ["host", "disk"])
def test_bytes_come_back(kind: str, size: int, dtype: torch.dtype, tmp_path: Path) -> None:
    backend = HostBackend() if kind == "host" else FileBackend(tmp_path)
    tensor = (torch.randn(size) * 3).to(dtype)
    other = torch.full_like(tensor, 1)
    stored, second = backend.write(tensor), backend.write(other)
    for expected, place in ((other, second), (tensor, stored)):
        back = torch.empty_like(tensor)
        backend.read(place, back)
        assert torch.equal(back, expected)
    backend.delete(stored)
    backend.delete(second)
    backend.close()


def test_host_pages_are_no_tensor_storage_and_are_used_again() -> None:
    backend, tensor = HostBackend(), torch.randn(1 << 18)
    stored, peak = live_peak(lambda: backend.write(tensor))
    _, before = live_peak(lambda: None)
    assert peak - before < tensor.nbytes / 10
    assert backend.bytes == tensor.nbytes
    place = stored.place
    backend.delete(stored)
    assert backend.bytes == 0 and backend.write(tensor).place is place
    backend.close()


def test_damage_is_found(tmp_path: Path) -> None:
    backend, tensor = FileBackend(tmp_path), torch.randn(5000)
    stored = backend.write(tensor)
    raw = bytearray(stored.place.read_bytes())
    assert len(raw) % ALIGNMENT == 0
    raw[777] ^= 1
    stored.place.write_bytes(raw)
    with pytest.raises(HeadwayError, match="other bytes"):
        backend.read(stored, torch.empty_like(tensor))
    stored.place.write_bytes(raw[:ALIGNMENT])
    with pytest.raises(HeadwayError, match="holds 4096 bytes of 20000"):
        backend.read(stored, torch.empty_like(tensor))
    backend.close()


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FileBackend(tmp_path)
    monkeypatch.setattr(backends.os, "pwrite", lambda fd, data, offset: 1000)  # takes a part, as a full disk does
    with pytest.raises(OSError) as caught:
        backend.write(torch.randn(5000))
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in backend.folder.iterdir()] == ["lock"]
    backend.close()


def test_closing_removes_everything_even_when_forgotten(tmp_path: Path) -> None:
    backend = FileBackend(tmp_path)
    backend.write(torch.ones(10))
    backend.close()
    backend.close()
    assert not list(tmp_path.iterdir())
    backend = FileBackend(tmp_path)
    backend.write(torch.ones(10))
    del backend
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_process_go_and_those_of_a_live_one_stay(tmp_path: Path) -> None:
    process, folder = holder(tmp_path)
    try:
        assert len(list(folder.iterdir())) == 2
        mine = FileBackend(tmp_path)
        assert folder.is_dir() and not remove_leftovers(tmp_path), "a live process's folder was taken"
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        deadline = time.monotonic() + 5
        while folder.exists() and time.monotonic() < deadline:
            other = FileBackend(tmp_path)
            other.close()
        assert not folder.exists()
        assert mine.folder.is_dir(), "this process's own folder was taken"
        mine.close()
    finally:
        process.kill()


def test_a_forked_child_does_not_remove_its_parents_files(tmp_path: Path) -> None:
    backend = FileBackend(tmp_path)
    stored = backend.write(torch.ones(10))
    child = os.fork()
    if child == 0:
        backend.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert stored.place.exists()
    backend.close()


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HeadwayError, match="file: cannot hold offloaded tensors"):
        FileBackend(tmp_path / "file")

    def denied(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(backends.tempfile, "mkdtemp", denied)
    with pytest.raises(HeadwayError, match="Permission denied"):
        FileBackend(tmp_path / "folder")


def test_without_direct_access_plain_files_serve_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def no_direct(path: object, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, mode)  # type: ignore[arg-type]

    log = FallbackLog()
    use_log(log)
    monkeypatch.setattr(backends.os, "open", no_direct)
    backend, tensor = FileBackend(tmp_path), torch.randn(3000)
    back = torch.empty_like(tensor)
    backend.read(backend.write(tensor), back)
    assert torch.equal(back, tensor)
    assert "buffered files" in log.entries[0]["what"]
    backend.close()
    use_log(None)


def test_a_file_system_in_memory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert filesystem(Path("/proc")) == "proc"
    log = FallbackLog()
    use_log(log)
    monkeypatch.setattr(backends, "filesystem", lambda path: "tmpfs")
    FileBackend(tmp_path).close()
    assert any("tmpfs" in entry["why"] for entry in log.entries)
    use_log(None)


def test_dry_counts_and_gives_zeros() -> None:
    backend, tensor = DryBackend(), torch.ones(10)
    stored = backend.write(tensor)
    assert stored.nbytes == 40
    backend.read(stored, tensor)
    assert not tensor.any()
