"""Files that a GPU moves itself: when that way is taken, and what is asked of kvikio; with a GPU, the real thing.

Needs: nothing; with a GPU and kvikio also those. Run: pytest tests/memory/test_gpudirect.py
"""

import sys
import types

import pytest
import torch

from headway.core.errors import HeadwayError
from headway.memory.backends import FileBackend
from headway.memory.gpudirect import GPUDirectBackend, disk_backend


class CuFile:
    """kvikio's interface (`CuFile(path, flags)`, `write(buffer)`, `read(buffer)`) over plain files."""

    room = 1 << 30

    def __init__(self, path, flags):
        self.file = path.open(f"{flags}b")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, buffer):
        if buffer.numel() > self.room:
            raise RuntimeError("cuFile: no space left on device")
        return self.file.write(buffer.numpy().tobytes())

    def read(self, buffer):
        data = self.file.read(buffer.numel())
        buffer[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return len(data)


@pytest.fixture
def backend(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kvikio", types.SimpleNamespace(CuFile=CuFile))
    made = GPUDirectBackend(tmp_path)
    monkeypatch.setattr(made, "on_device", lambda tensor: tensor.numel() > 0)
    yield made
    made.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_bytes_come_back(backend, dtype):
    tensor = torch.randn(1000).mul(100).to(dtype)
    stored = backend.write(tensor)
    assert backend.bytes_written == stored.nbytes == tensor.numel() * tensor.element_size()
    back = torch.empty_like(tensor)
    backend.read(stored, back)
    assert torch.equal(back, tensor)
    backend.delete(stored)
    assert not stored.place.exists()


def test_a_full_disk_leaves_no_file(backend, monkeypatch):
    monkeypatch.setattr(CuFile, "room", 10)
    with pytest.raises(OSError, match="no space left"):
        backend.write(torch.ones(100))
    assert not list(backend.folder.glob("0*"))
    assert backend.bytes_written == 0


def test_a_torn_or_missing_file_is_an_error(backend):
    stored = backend.write(torch.ones(100))
    stored.place.write_bytes(b"short")
    with pytest.raises(HeadwayError, match="holds 5 bytes of 400"):
        backend.read(stored, torch.empty(100))
    stored.place.unlink()
    with pytest.raises(HeadwayError, match="cannot be read back"):
        backend.read(stored, torch.empty(100))


def test_it_is_taken_with_a_gpu_kvikio_and_no_checksums(tmp_path, monkeypatch):
    module = types.ModuleType("kvikio")
    module.__spec__ = types.SimpleNamespace(name="kvikio")
    module.CuFile = CuFile
    monkeypatch.setitem(sys.modules, "kvikio", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert type(disk_backend(tmp_path, verify=True)) is FileBackend
    assert type(disk_backend(tmp_path, verify=False)) is GPUDirectBackend
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert type(disk_backend(tmp_path, verify=False)) is FileBackend


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path):
    pytest.importorskip("kvikio")
    backend = disk_backend(tmp_path, verify=False)
    tensor = torch.randn(1 << 20, device="cuda")
    back = torch.empty_like(tensor)
    backend.read(backend.write(tensor), back)
    assert torch.equal(back, tensor)
