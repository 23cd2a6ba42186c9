"""The tiered store: forwarding, cancellation, drops at any moment, failures, and a stress with random delays.

Needs nothing. Run: pytest tests/memory/test_store.py
"""

from __future__ import annotations

import errno
import gc
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headway.core.errors import HeadwayError
from headway.core.fallback import FallbackLog, use_log
from headway.core.meters import live_bytes
from headway.memory.backends import DryBackend, FileBackend, HostBackend, Stored
from headway.memory.lanes import Lanes
from headway.memory.store import TieredStore


class Gated(HostBackend):
    """Host memory whose writes and reads wait to be let through."""

    def __init__(self) -> None:
        super().__init__()
        self.writing, self.reading = threading.Event(), threading.Event()
        self.may_write, self.may_read = threading.Event(), threading.Event()
        self.may_write.set()
        self.may_read.set()

    def write(self, tensor: Tensor) -> Stored:
        self.writing.set()
        assert self.may_write.wait(10)
        return super().write(tensor)

    def read(self, stored: Stored, into: Tensor) -> None:
        self.reading.set()
        assert self.may_read.wait(10)
        super().read(stored, into)


@pytest.fixture
def gated() -> Iterator[TieredStore]:
    store = TieredStore(Gated())
    yield store
    store.backend.may_write.set()  # type: ignore[attr-defined]
    store.backend.may_read.set()  # type: ignore[attr-defined]
    store.close()


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    use_log(FallbackLog())
    yield
    use_log(None)


CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_a_tensor_leaves_and_comes_back(kind: str, tmp_path: Path) -> None:
    store = TieredStore(HostBackend() if kind == "host" else FileBackend(tmp_path))
    before = live_bytes(CPU)
    tensor = torch.randn(1 << 16)
    copy_sum = float(tensor.double().sum())
    handle = store.put(tensor, "blocks.0")
    del tensor
    store.drain()
    assert not handle.here and live_bytes(CPU) - before < 1000, "it is still in memory"
    store.prefetch(handle)
    back = store.get(handle)
    assert float(back.double().sum()) == copy_sum
    store.release(handle)
    del back
    assert live_bytes(CPU) - before < 1000
    assert float(store.get(handle).double().sum()) == copy_sum, "released, it can be fetched again"
    store.drop(handle)
    gc.collect()
    assert live_bytes(CPU) - before < 1000, "dropped, but still in memory"
    assert store.report.fetched == 2 and store.report.stored == 1
    with pytest.raises(HeadwayError, match=r"blocks\.0.*dropped"):
        store.get(handle)
    if kind == "disk":
        assert [p.name for p in store.backend.folder.iterdir()] == ["lock"]  # type: ignore[attr-defined]
    store.close()


def test_forwarding_gives_the_very_tensor_back_while_it_is_written(gated: TieredStore) -> None:
    gated.backend.may_write.clear()  # type: ignore[attr-defined]
    first, second = torch.randn(100), torch.randn(100)
    running, queued = gated.put(first), gated.put(second)
    gated.backend.writing.wait(5)  # type: ignore[attr-defined]
    assert gated.get(running).data_ptr() == first.data_ptr()
    gated.prefetch(queued)
    assert gated.get(queued).data_ptr() == second.data_ptr()
    assert (gated.report.forwarded, gated.report.cancelled, gated.report.cancelled_bytes) == (2, 1, 400)
    gated.backend.may_write.set()  # type: ignore[attr-defined]
    gated.drain()
    assert running.here and running.stored is None and gated.backend.bytes == 0, "the copy was of no use"  # type: ignore[attr-defined]
    assert gated.report.fetched == 0 and gated.report.stall_seconds == 0


def test_drop_at_every_moment(gated: TieredStore) -> None:
    backend: Gated = gated.backend  # type: ignore[assignment]
    backend.may_write.clear()
    running, queued = gated.put(torch.randn(100)), gated.put(torch.randn(100))
    backend.writing.wait(5)
    gated.drop(running)
    gated.drop(queued)
    gated.drop(queued)
    backend.may_write.set()
    gated.drain()
    assert backend.bytes == 0 and gated.report.cancelled == 1

    handle = gated.put(torch.randn(100))
    gated.drain()
    backend.may_read.clear()
    gated.prefetch(handle)
    backend.reading.wait(5)
    start = time.perf_counter()
    gated.drop(handle)  # while it is read: must neither wait nor pull the bytes away
    assert time.perf_counter() - start < 1 and backend.bytes == 400
    backend.may_read.set()
    gated.drain()
    assert backend.bytes == 0 and not handle.here

    handle = gated.put(torch.randn(100))
    gated.drain()
    backend.may_read.clear()
    threading.Timer(0.1, gated.drop, [handle]).start()
    threading.Timer(0.15, backend.may_read.set).start()
    with pytest.raises(HeadwayError, match="dropped while"):
        gated.get(handle)
    assert gated.report.stall_seconds > 0.05


def test_a_drop_never_waits_for_the_stores_lock(gated: TieredStore) -> None:
    handle = gated.put(torch.randn(100))
    gated.drain()
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        with gated.lock:
            held.set()
            free.wait(5)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(5)
    gated.drop(handle)  # what a garbage collection in a worker may do
    free.set()
    thread.join(5)
    gated.put(torch.randn(1))
    gated.drain()
    assert gated.backend.bytes == 4, "it was forgotten instead of being dropped later"  # type: ignore[attr-defined]


def test_back_pressure_bounds_what_waits() -> None:
    lanes = Lanes(rates={"device_to_host": 40_000}, queue_bytes=4000)
    store = TieredStore(HostBackend(), lanes)
    for _ in range(5):
        store.put(torch.randn(500))  # 2000 bytes, 50 ms each
    assert store.report.wait_seconds > 0.05
    assert lanes["device_to_host"].report.peak_queued_bytes <= 4000
    store.close()
    lanes.close()


def test_a_full_disk_keeps_the_tensor_and_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FileBackend(tmp_path)
    store, log = TieredStore(backend), FallbackLog()
    use_log(log)
    fits = store.put(torch.ones(1000))
    store.drain()

    def full(tensor: Tensor) -> Stored:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(backend, "write", full)
    tensors = [torch.randn(100) for _ in range(3)]
    handles = []
    for tensor in tensors:
        handles.append(store.put(tensor))
        store.drain()
    for tensor, handle in zip(tensors, handles, strict=True):
        assert torch.equal(store.get(handle), tensor)
    assert torch.equal(store.get(fits), torch.ones(1000))
    assert store.report.kept == 3
    assert len(log.entries) == 1 and "No space left" in log.entries[0]["why"]
    assert not store.has_room(1), "it is full"
    store.drop(fits)
    assert store.has_room(4000) and not store.has_room(4001)
    store.close()
    assert not list(tmp_path.iterdir())


def test_a_strict_run_stops_at_the_first_failed_write() -> None:
    class Broken(DryBackend):
        def write(self, tensor: Tensor) -> Stored:
            raise MemoryError

    use_log(FallbackLog(strict=True))
    store = TieredStore(Broken())
    store.put(torch.ones(1))
    store.drain()
    with pytest.raises(HeadwayError, match="strict"):
        store.put(torch.ones(1))
    store.close()


def test_where_nothing_may_be_kept_a_failed_write_is_an_error() -> None:
    class Broken(DryBackend):
        def write(self, tensor: Tensor) -> Stored:
            raise OSError(errno.EIO, "Input/output error")

    store = TieredStore(Broken(), keep_on_failure=False)
    handle = store.put(torch.ones(1), "blocks.3.mlp")
    store.drain()
    with pytest.raises(HeadwayError, match=r"blocks\.3\.mlp: could not be stored \(Input/output error\)"):
        store.get(handle)
    store.close()


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_tensor_is_named(damage: str, tmp_path: Path) -> None:
    store = TieredStore(FileBackend(tmp_path))
    handle = store.put(torch.randn(3000), "blocks.7.attention")
    store.drain()
    assert handle.stored is not None
    path: Path = handle.stored.place
    raw = bytearray(path.read_bytes())
    raw[5] ^= 64
    path.unlink() if damage == "gone" else path.write_bytes(raw if damage == "flip" else raw[:4096])
    for _ in range(2):
        with pytest.raises(HeadwayError, match=r"blocks\.7\.attention"):
            store.get(handle)
    store.drop(handle)
    store.close()


def test_a_change_in_place_is_found_before_it_does_harm(gated: TieredStore) -> None:
    backend: Gated = gated.backend  # type: ignore[assignment]
    backend.may_write.clear()
    running, queued = torch.randn(100), torch.randn(100)
    handles = [gated.put(running, "a"), gated.put(queued.view(10, 10), "b", source=queued)]
    backend.writing.wait(5)
    running.add_(1)
    queued.mul_(2)
    backend.may_write.set()
    gated.drain()
    for handle in handles:
        with pytest.raises(HeadwayError, match="changed in place"):
            gated.get(handle)
    tensor = torch.randn(100)
    right = tensor.clone()
    handle = gated.put(tensor)
    gated.drain()
    tensor.zero_()  # once it is written, it may be
    assert torch.equal(gated.get(handle), right)


def test_closing_in_the_middle_of_everything(tmp_path: Path) -> None:
    lanes = Lanes(rates={"disk_write": 1e5, "disk_read": 1e5})
    store, neighbour = TieredStore(FileBackend(tmp_path), lanes), TieredStore(HostBackend(), lanes)
    handles = [store.put(torch.randn(1000)) for _ in range(10)]
    time.sleep(0.1)
    store.prefetch(handles[0])
    other = neighbour.put(torch.ones(10))
    store.close()
    store.close()
    assert not list(tmp_path.iterdir())
    with pytest.raises(HeadwayError, match="dropped"):
        store.get(handles[5])
    with pytest.raises(HeadwayError, match="closed"):
        store.put(torch.ones(1))
    assert torch.equal(neighbour.get(other), torch.ones(10)), "shared lanes go on for others"
    neighbour.close()
    lanes.close()


class Erratic(HostBackend):
    """Random delays, and now and then a failure to write."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.rng = rng

    def write(self, tensor: Tensor) -> Stored:
        time.sleep(self.rng.random() * 2e-3)
        if self.rng.random() < 0.05:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(tensor)

    def read(self, stored: Stored, into: Tensor) -> None:
        time.sleep(self.rng.random() * 2e-3)
        super().read(stored, into)
        time.sleep(self.rng.random() * 1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_no_interleaving_gives_wrong_bytes(seed: int) -> None:
    rng = random.Random(seed)
    lanes = Lanes(workers={"device_to_host": 3, "host_to_device": 3}, queue_bytes=20_000)
    backend = Erratic(random.Random(seed + 100))
    store = TieredStore(backend, lanes)
    alive: list[tuple[int, int, object]] = []
    for number in range(400):
        size = rng.randint(1, 2000)
        alive.append((number, size, store.put(torch.full((size,), float(number)))))
        for _ in range(rng.randint(0, 3)):
            index = rng.randrange(len(alive))
            value, size, handle = alive[index]
            action = rng.choice(["prefetch", "get", "release", "drop"])
            if action == "get":
                got = store.get(handle)  # type: ignore[arg-type]
                assert got.shape == (size,) and bool((got == value).all())
            elif action == "drop":
                store.drop(handle)  # type: ignore[arg-type]
                alive.pop(index)
                if not alive:
                    break
            else:
                getattr(store, action)(handle)
        if rng.random() < 0.2:
            time.sleep(1e-3)
    for value, size, handle in alive:
        got = store.get(handle)  # type: ignore[arg-type]
        assert got.shape == (size,) and bool((got == value).all())
        store.drop(handle)  # type: ignore[arg-type]
    lanes.drain()
    assert backend.bytes == 0 and store._held == 0 and store._resident == 0
    store.close()
    lanes.close()
