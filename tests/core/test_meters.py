"""Live storage bytes against closed forms, and the machine's peak.

Needs nothing. Run: pytest tests/core/test_meters.py
"""

from __future__ import annotations

import torch

from headway.core import meters
from headway.core.meters import hardware, live_bytes, live_peak, matmul_peak, process_peak_bytes

MiB = 2**20


def test_peak_counts_temporaries_views_and_what_was_there() -> None:
    kept = torch.zeros(MiB, dtype=torch.uint8)
    before = live_bytes(torch.device("cpu"))

    def work() -> torch.Tensor:
        a = torch.zeros(4 * MiB, dtype=torch.uint8)
        b = a.view(2, -1)[0]  # a view: no storage of its own
        del a
        c = torch.zeros(3 * MiB, dtype=torch.uint8)
        del b  # 4 + 3 alive until here
        return torch.cat([c, c[:MiB]])  # 3 + 4

    result, peak = live_peak(work)
    assert peak == before + 7 * MiB
    assert result.numel() == 4 * MiB
    assert kept.numel() == MiB


def test_peak_of_a_linear_layer_is_its_closed_form() -> None:
    x, w = torch.zeros(256, 512), torch.zeros(1024, 512, requires_grad=True)
    before = live_bytes(torch.device("cpu"))

    def work() -> None:
        (x @ w.t()).sum().backward()

    for _ in range(2):
        w.grad = None
        _, peak = live_peak(work)
        y, grad_w, scalars = 256 * 1024 * 4, w.numel() * 4, 4 * 4
        # Both the output and its transposed product may be alive with the gradient; never more.
        assert before + grad_w <= peak <= before + y + grad_w + scalars + 64


def test_peak_is_deterministic() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))

    def work() -> None:
        layer(torch.ones(32, 64)).sum().backward()
        layer.zero_grad()

    work()
    assert len({live_peak(work)[1] for _ in range(3)}) == 1


def test_tensors_without_storage_do_not_count() -> None:
    before = live_bytes(torch.device("cpu"))
    strange = [torch.nn.UninitializedParameter(), torch.ones(3, device="meta"), torch.ones(3).to_sparse()]
    assert live_bytes(torch.device("cpu")) >= before and strange


def test_matmul_peak_is_measured_once() -> None:
    cpu = torch.device("cpu")
    first = matmul_peak(torch.float32, cpu)
    assert first > 1e9
    assert matmul_peak(torch.float32, cpu) == first


def test_a_peak_that_was_surpassed_is_measured_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path))
    cpu = torch.device("cpu")
    rates = iter([2e9, 5e9, 4e9, 3e9])
    monkeypatch.setattr(meters, "measure_matmul_peak", lambda dtype, device: next(rates))
    assert matmul_peak(torch.float32, cpu) == 2e9
    assert matmul_peak(torch.float32, cpu, reached=1e9) == 2e9
    assert matmul_peak(torch.float32, cpu, reached=3e9) == 5e9
    assert matmul_peak(torch.float32, cpu, reached=6e9) == 5e9, "a busy machine measures less; the higher one stays"
    assert matmul_peak(torch.float32, cpu, fresh=True) == 3e9


def test_facts() -> None:
    assert hardware()["cores"] >= 1
    assert process_peak_bytes() > 50 * MiB
