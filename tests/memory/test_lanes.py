"""Lanes: order, back-pressure, cancellation, injected rates, failures.

Needs nothing. Run: pytest tests/memory/test_lanes.py
"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from functools import partial

import pytest

from headway.memory.lanes import CancelledError, Lane, Lanes


class Gate:
    """Work that waits until it is let through."""

    def __init__(self) -> None:
        self.entered, self.open = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.entered.set()
        assert self.open.wait(10)


@pytest.fixture
def lane() -> Iterator[Lane]:
    lane = Lane("test", queue_bytes=100)
    yield lane
    lane.close(cancel=True)


def test_jobs_run_in_the_order_in_which_they_came_and_are_counted(lane: Lane) -> None:
    ran: list[int] = []

    def run(i: int) -> int:
        ran.append(i)
        return i * i

    jobs = [lane.submit(partial(run, i), 10) for i in range(20)]
    assert [job.result(5) for job in jobs] == [i * i for i in range(20)]
    assert ran == list(range(20))
    assert (lane.report.jobs, lane.report.bytes, lane.report.failed) == (20, 200, 0)
    assert 0 < lane.report.peak_queued_bytes <= 100


def test_a_full_queue_blocks_and_the_wait_is_counted(lane: Lane) -> None:
    gate = Gate()
    lane.submit(gate, 60)
    gate.entered.wait(5)
    lane.submit(lambda: None, 60)  # waits in the queue
    third = threading.Thread(target=lambda: lane.submit(lambda: None, 60))
    third.start()
    time.sleep(0.1)
    assert third.is_alive()
    gate.open.set()
    third.join(5)
    assert not third.is_alive()
    assert lane.report.waited_seconds > 0.05


def test_a_job_larger_than_the_queue_passes_when_it_is_empty(lane: Lane) -> None:
    assert lane.submit(lambda: "through", 10_000).result(5) == "through"


def test_a_cancelled_job_never_runs_and_makes_room_at_once(lane: Lane) -> None:
    gate, ran = Gate(), []
    running = lane.submit(gate, 10)
    gate.entered.wait(5)
    waiting = lane.submit(lambda: ran.append(1), 100)
    assert waiting.cancel() and waiting.done
    assert not running.cancel()
    after = lane.submit(lambda: ran.append(2), 100)  # would block if the cancelled one still took up the queue
    gate.open.set()
    after.result(5)
    assert ran == [2] and lane.report.cancelled == 1
    with pytest.raises(CancelledError):
        waiting.result(5)
    waiting.wait()


def test_what_a_job_raises_is_its_callers_and_the_lane_goes_on(lane: Lane) -> None:
    def fail() -> None:
        raise SystemExit("even this")

    job = lane.submit(fail, 10)
    with pytest.raises(SystemExit):
        job.result(5)
    assert lane.submit(lambda: 5, 10).result(5) == 5
    assert lane.report.failed == 1 and lane.report.bytes == 10


def test_an_injected_rate_is_kept_and_what_follows_comes_after_it() -> None:
    lane = Lane("slow", rate=1000)
    start, seen = time.perf_counter(), []
    job = lane.submit(lambda: "value", 100, then=lambda value: seen.append((value, time.perf_counter() - start)))
    assert job.result(5) is None
    assert seen[0][0] == "value" and 0.1 <= seen[0][1] < 0.5
    lane.submit(lambda: None, 100).result(5)
    assert time.perf_counter() - start >= 0.2
    assert 500 < lane.report.rate <= 1000
    lane.close()


def test_closing_finishes_or_cancels_and_frees_those_who_wait(lane: Lane) -> None:
    done: list[int] = []
    other = Lane("other")
    for i in range(5):
        other.submit(partial(done.append, i), 1)
    other.close()
    assert done == list(range(5))
    with pytest.raises(RuntimeError, match="closed"):
        other.submit(lambda: None, 1)

    gate, errors = Gate(), []
    lane.submit(gate, 100)
    gate.entered.wait(5)
    queued = lane.submit(lambda: done.append(9), 100)

    def blocked() -> None:
        try:
            lane.submit(lambda: None, 100)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=blocked)
    thread.start()
    time.sleep(0.05)
    threading.Timer(0.05, gate.open.set).start()
    lane.close(cancel=True)
    thread.join(5)
    assert errors and queued.done and 9 not in done


def test_workers_go_home_and_a_forgotten_lane_leaves_nothing() -> None:
    lane = Lane("short", idle_seconds=0.02)
    lane.submit(lambda: None, 1).result(5)
    for _ in range(100):
        if not lane._threads:
            break
        time.sleep(0.01)
    assert not lane._threads
    assert lane.submit(lambda: 7, 1).result(5) == 7, "a worker comes back when there is work"
    gone = weakref.ref(lane)
    del lane
    for _ in range(100):
        gc.collect()
        if gone() is None:
            break
        time.sleep(0.01)
    assert gone() is None


def test_a_job_lets_go_of_what_it_moved(lane: Lane) -> None:
    class Thing:
        pass

    thing = Thing()
    gone = weakref.ref(thing)
    job = lane.submit(partial(lambda t: t, thing), 1, then=lambda _: None)
    del thing
    job.result(5)
    lane.drain()
    assert gone() is None


def test_several_workers_share_one_lane() -> None:
    lane = Lane("wide", workers=2)
    gates = [Gate(), Gate()]
    jobs = [lane.submit(gate, 1) for gate in gates]
    assert all(gate.entered.wait(5) for gate in gates), "both run at once"
    for gate in gates:
        gate.open.set()
    for job in jobs:
        job.result(5)
    lane.close()


def test_nonsense_is_refused() -> None:
    for settings in ({"workers": 0}, {"rate": 0.0}, {"queue_bytes": 0}):
        with pytest.raises(ValueError, match="lane"):
            Lane("bad", **settings)  # type: ignore[arg-type]


def test_lanes_report_all_four() -> None:
    lanes = Lanes(rates={"disk_read": 1e9})
    lanes["disk_read"].submit(lambda: None, 5)
    lanes.drain()
    report = lanes.report()
    assert report["disk_read"]["bytes"] == 5 and report["disk_write"]["bytes"] == 0
    assert set(report) == {"device_to_host", "host_to_device", "disk_write", "disk_read"}
    lanes.close()
