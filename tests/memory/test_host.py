"""Host memory: outside of what the device's meter counts, given back, refused with figures.

Needs nothing. Run: pytest tests/memory/test_host.py
"""

from __future__ import annotations

import gc
import mmap
from typing import Any

import pytest
import torch

from headway.core.errors import HeadwayError
from headway.core.meters import host_storages, live_bytes, live_peak
from headway.memory import host
from headway.memory.host import host_empty

CPU = torch.device("cpu")


def test_it_is_no_memory_of_the_device() -> None:
    before = live_bytes(CPU)
    (tensor, view), peak = live_peak(lambda: (lambda t: (t, t[10:].view(-1)))(host_empty(1 << 20, torch.float32, CPU)))
    assert live_bytes(CPU) == before
    assert peak - before < 1 << 16
    assert torch.equal(tensor, torch.zeros(1 << 20))
    known = len(host_storages)
    del tensor
    gc.collect()
    view.fill_(1)  # a view keeps the pages
    assert len(host_storages) == known
    del view
    gc.collect()
    assert len(host_storages) == known - 1


def test_empty() -> None:
    assert host_empty(0, torch.bfloat16, CPU).shape == (0,)


def test_no_such_memory_says_how_much_and_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(HeadwayError, match=r"(?si)4000 bytes.*ulimit -l is"):
        host_empty(1000, torch.float32, CPU)


def test_refused_pinning_says_how_much_and_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_pin", lambda address, nbytes: 2)
    with pytest.raises(HeadwayError, match=r"(?si)4000 bytes.*cannot be pinned.*ulimit -l is"):
        host_empty(1000, torch.float32, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_beside_a_gpu() -> None:
    tensor = host_empty(1000, torch.float32, torch.device("cuda"))
    assert tensor.is_pinned()
    assert tensor.cuda().sum() == 0
