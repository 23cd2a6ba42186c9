"""The performance model: closed form, simulator, choice, memory, calibration.

Needs nothing. Run: pytest tests/memory/test_deep_optimizer_states_plan.py
"""

from __future__ import annotations

import math
import time

import pytest
import torch

from headway.core.errors import HeadwayError
from headway.core.fallback import FallbackLog, use_log
from headway.memory.deep_optimizer_states import (
    Lanes,
    Rates,
    Unit,
    Workers,
    calibrate,
    choose,
    device_extra,
    fitting_numel,
    places,
    predict,
    simulate,
    stride,
)
from headway.memory.deep_optimizer_states.arrange import arrange

HOST, DEVICE, CAST = 1e8, 1e10, 1e9


def rank(k: int | None) -> float:
    return math.inf if k is None else k


def test_closed_form_at_its_ends() -> None:
    assert stride(1e15, HOST, DEVICE, CAST) == 2, "a link without cost: every second one"
    assert stride(1e3, HOST, DEVICE, CAST) is None, "a link that pushing alone saturates"
    assert stride(1e15, HOST, 1.01 * HOST, math.inf) == 2
    assert stride(1e15, HOST, HOST / 2.5, math.inf) == 1 + 3, "the device is slower than the host"


def test_closed_form_is_monotone_in_the_link() -> None:
    found = [rank(stride(10.0**e, HOST, DEVICE, CAST)) for e in range(5, 14)]
    assert found == sorted(found, reverse=True)
    assert found[0] == math.inf
    assert found[-1] == 2
    assert any(2 < k < math.inf for k in (rank(stride(1e7 * x, HOST, DEVICE, CAST)) for x in range(5, 60)))


def test_closed_form_is_the_smallest_stride_that_balances() -> None:
    for link in (1e8, 2e8, 4e8, 1e9):
        k = stride(link, HOST, DEVICE, CAST)
        assert k is not None

        def hidden(k: int, link: float = link) -> bool:
            return (k - 1) * (1 / HOST + 1 / CAST) >= 3 / link + 1 / DEVICE + (k - 1) / (2 * link)

        assert hidden(k)
        assert k == 2 or not hidden(k - 1)


def test_places() -> None:
    assert "".join(p[0] for p in places(8, 2)) == "hdhdhdhd"
    assert "".join(p[0] for p in places(8, 3)) == "hhdhhdhh"
    assert set(places(5, 1)) == {"device"}
    assert set(places(5, None)) == set(places(5, 6)) == {"host"}


def test_the_host_alone_takes_its_own_time_and_the_tail() -> None:
    rates = Rates(to_device=400.0, to_host=100.0, host=10.0, device=1.0, cast=50.0)
    alone = simulate([Unit(100, "host")] * 4, rates)
    assert alone.seconds == pytest.approx(4 * 10 + 100 / 50 + 50 / 400)
    assert alone.busy["host"] == pytest.approx(40)
    assert alone.busy["to_device"] == pytest.approx(4 * 50 / 400)
    assert alone.busy["device"] == alone.busy["to_host"] == 0


def test_one_staged_subgroup_goes_there_and_back() -> None:
    rates = Rates(to_device=100.0, to_host=50.0, host=1.0, device=10.0)
    one = simulate([Unit(10, "device")], rates)
    assert one.seconds == pytest.approx(30 / 100 + 10 / 10 + 30 / 50)
    with_gradient = simulate([Unit(10, "device", words=4)], rates)
    assert with_gradient.seconds - one.seconds == pytest.approx(10 / 100)


def test_buffers_let_the_lanes_overlap() -> None:
    rates = Rates(to_device=30.0, to_host=30.0, host=1.0, device=10.0)  # each takes 1 second
    units = [Unit(10, "device")] * 6
    seconds = [simulate(units, rates, buffers).seconds for buffers in (1, 2, 3, 4)]
    assert seconds == pytest.approx([18.0, 6 / 2 * 3 + 1, 6 + 2, 6 + 2])


def test_the_host_waits_for_the_ring_and_a_push_in_fp32_needs_none() -> None:
    rates = Rates(to_device=1.0, to_host=1.0, host=1e6, device=1.0, cast=1e6)
    units = [Unit(10, "host")] * 5
    narrow = simulate(units, rates, ring=2)
    assert narrow.seconds == pytest.approx(25, rel=1e-3)  # the link is the bottleneck either way
    wide = simulate(units, rates, push=1.0)
    assert wide.seconds == pytest.approx(50, rel=1e-3)
    assert wide.busy["cast"] == 0


def test_residents_are_the_devices_first_work() -> None:
    rates = Rates(to_device=30.0, to_host=30.0, host=1.0, device=10.0)
    timeline = predict([10, 10], 2, rates, resident=[50])
    assert timeline.busy["device"] == pytest.approx(6.0)
    assert timeline.seconds == pytest.approx(max(10.0 + 0.5 * 10 / 30, 5 + 1 + 1), rel=0.05)


@pytest.mark.parametrize("link", [1e7, 3e7, 1e8, 3e8, 1e9, 1e10])
def test_the_choice_is_the_best_of_all_it_tried(link: float) -> None:
    rates = Rates(link, link, HOST, DEVICE, CAST)
    sizes = [1_000_000] * 24
    placement = choose(sizes, rates)
    every = {k: predict(sizes, k, rates).seconds for k in [*range(1, 25), None]}
    assert placement.predicted_seconds <= min(every.values()) * 1.02
    assert placement.predicted_seconds == every[placement.k]
    assert placement.to_dict()["candidates"]["inf"] == every[None]
    if placement.closed_form is not None:  # it knows of no k = 1 and of no ends, but is never far off
        assert every.get(placement.closed_form, every[None]) <= 1.5 * every[None]


def test_a_faster_link_never_takes_longer() -> None:
    sizes = [1_000_000] * 12
    for k in (1, 2, 3, None):
        seconds = [predict(sizes, k, Rates(b, b, HOST, DEVICE, CAST)).seconds for b in (1e7, 1e8, 1e9)]
        assert seconds == sorted(seconds, reverse=True)


def test_equals_go_to_the_larger_stride() -> None:
    rates = Rates(1e12, 1e12, HOST, 1e12, math.inf)
    assert choose([10**6] * 8, rates, allowed=[3, 4]).k == 4, "both have two subgroups on the device"


def test_memory_of_staging() -> None:
    assert device_extra(100, 800, None, 8) == 0
    assert device_extra(100, 800, 2, 8) == 2 * 1600 + 4 * 400
    assert device_extra(100, 800, 1, 8) == 3 * 1600 + 4 * 800
    for k in (1, 2, 3):
        for limit in (4000, 10_000, 100_000):
            numel = fitting_numel(100, 800, k, limit)
            assert numel == 100 or numel * 16 * (3 if k == 1 else 2) + 3200 // k <= limit
    assert fitting_numel(100, 800, 2, 1600) == 0
    assert fitting_numel(100, 800, None, 0) == 100


def test_arrangement_of_groups_types_and_residents() -> None:
    use_log(FallbackLog())
    a, b, c = (torch.zeros(1024), torch.zeros(1024, dtype=torch.bfloat16), torch.zeros(512))
    groups = [{"params": [a, b]}, {"params": [c]}]
    found = arrange(groups, {}, 2, 256, 1 << 30, lambda dtype, numel: None)
    assert found.group_of == [0, 0, 1]
    for s in found.layout:
        assert len({found.layout.params[p.param].dtype for p in s.pieces}) == 1
    assert found.plan is None
    found = arrange(groups, {b: None}, 2, 256, 1 << 30, lambda dtype, numel: None)
    assert b not in set(found.layout.params)
    with pytest.raises(HeadwayError, match="too little for stride 1"):
        arrange(groups, {}, 1, 256, 1000, lambda dtype, numel: None)
    use_log(None)


def test_calibration_finds_pretended_rates_in_bounded_time() -> None:
    lanes = Lanes(rates={"host_to_device": 4e7, "device_to_host": 8e7})
    workers = Workers(lanes, host_rate=5e6, device_rate=2e7)
    start = time.perf_counter()
    rates = calibrate(workers, torch.device("cpu"), torch.bfloat16, 1 << 18, seconds=0.5)
    assert time.perf_counter() - start < 3
    assert rates.to_device == pytest.approx(1e7, rel=0.3)
    assert rates.to_host == pytest.approx(2e7, rel=0.3)
    assert rates.host == pytest.approx(5e6, rel=0.3)
    assert rates.device == pytest.approx(2e7, rel=0.3)
    assert math.isfinite(rates.cast)
    assert calibrate(workers, torch.device("cpu"), torch.float32, 1 << 12, seconds=0.1).cast == math.inf
    workers.close()
    lanes.close()
