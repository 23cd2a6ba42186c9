"""The simulator against the formulas: bubble, stash, deadlock, messages; schedules written out here, and the runtime's.

Needs nothing. Run: pytest tests/plan/test_cluster_simulator.py
"""

import random

import pytest

from headway.core.errors import HeadwayError
from headway.parallel.pipeline.tables import schedule_table
from headway.parallel.pipeline.trace import chrome_trace
from headway.plan.cluster.formulas import bubble
from headway.plan.cluster.simulator import Task, Transfer, simulate, stash

F, B = "forward", "backward"


def gpipe(p, m):
    return [[Task(F, r, i) for i in range(m)] + [Task(B, r, i) for i in range(m)] for r in range(p)]


def one_f_one_b(p, m):
    orders = []
    for r in range(p):
        warm = min(p - r - 1, m)
        order = [Task(F, r, i) for i in range(warm)]
        for i in range(m - warm):
            order += [Task(F, r, warm + i), Task(B, r, i)]
        orders.append(order + [Task(B, r, i) for i in range(m - warm, m)])
    return orders


def interleaved(p, v, m):
    """Megatron's: rounds of p micro-batches, chunk after chunk."""
    rows = [(chunk, start + i) for start in range(0, m, p) for chunk in range(v) for i in range(p)]
    orders = []
    for r in range(p):
        forwards = [Task(F, chunk * p + r, i) for chunk, i in rows]
        backwards = [Task(B, (v - 1 - chunk) * p + r, i) for chunk, i in rows]
        warm = min(2 * (p - r - 1) + (v - 1) * p, m * v)
        order = forwards[:warm]
        for i in range(m * v - warm):
            order += [forwards[warm + i], backwards[i]]
        orders.append(order + backwards[m * v - warm :])
    return orders


def uniform(task):
    return 1.0 if task.kind == F else 2.0


@pytest.mark.parametrize("p, m", [(1, 3), (2, 2), (2, 7), (4, 4), (4, 9), (8, 16)])
def test_plain_schedules_have_the_formulas_bubble(p, m):
    for orders in (gpipe(p, m), one_f_one_b(p, m)):
        assert simulate(orders, uniform, lambda s: s).bubble == pytest.approx(bubble(p, m), abs=1e-9)


def test_interleaving_divides_the_bubble_by_the_chunks():
    generator = random.Random(0)
    for _ in range(30):
        p, v = generator.randint(2, 8), generator.randint(1, 4)
        m = p * generator.randint(1, 4)
        found = simulate(interleaved(p, v, m), uniform, lambda s, p=p: s % p)
        assert found.bubble == pytest.approx(bubble(p, m, v), abs=1e-9), (p, v, m)


def test_stash_is_the_published_one():
    p, m = 4, 9
    assert simulate(gpipe(p, m), uniform, lambda s: s).peak_stash == [m] * p
    assert simulate(one_f_one_b(p, m), uniform, lambda s: s).peak_stash == [min(p - r, m) for r in range(p)]
    for p, v, m in ((4, 3, 8), (2, 2, 6), (4, 2, 4)):
        found = simulate(interleaved(p, v, m), uniform, lambda s, p=p: s % p).peak_stash
        assert found == [min(2 * (p - r - 1) + (v - 1) * p + 1, m * v) for r in range(p)]


def test_an_order_that_never_ends_names_who_waits():
    orders = one_f_one_b(2, 2)
    orders[1].reverse()
    with pytest.raises(HeadwayError, match="rank 0 waits to run the backward pass of micro-batch 0 in stage 0"):
        simulate(orders, uniform, lambda s: s)


def test_messages_take_their_time_and_are_counted():
    p, m = 2, 3
    sent = Transfer(seconds=0.5, bytes=10, link="ib")
    free = simulate(one_f_one_b(p, m), uniform, lambda s: s)
    found = simulate(one_f_one_b(p, m), uniform, lambda s: s, transfer=lambda a, b: sent)
    assert found.bytes_by_link() == {"ib": 2 * (p - 1) * m * 10}
    # The round trip of the first micro-batch shows, and whatever 1F1B cannot hide behind its one forward in hand.
    assert found.seconds >= free.seconds + 2 * 0.5
    blocking = simulate(one_f_one_b(p, m), uniform, lambda s: s, transfer=lambda a, b: sent, overlap=False)
    assert blocking.seconds >= found.seconds
    assert not free.messages or free.bytes_by_link() == {"free": 0}


def test_weight_gradients_can_wait():
    """A split backward pass lets the stage before go on: the same work, less idle time."""
    m = 4

    def split(order):
        tasks = [Task("input", t.stage, t.micro) if t.kind == B else t for t in order]
        return tasks + [Task("weight", t.stage, t.micro) for t in order if t.kind == B]

    whole = simulate(one_f_one_b(2, m), uniform, lambda s: s)
    parts = simulate([split(o) for o in one_f_one_b(2, m)], lambda task: 1.0, lambda s: s)
    assert parts.seconds < whole.seconds
    assert parts.busy(0) == whole.busy(0)
    assert parts.peak_stash == [m, m]  # kept until the weight gradient is there


def test_the_same_whatever_the_order_of_ranks():
    p, m = 4, 6
    cost = {(k, s): random.Random(f"{k}{s}").uniform(0.5, 2) for k in (F, B) for s in range(p)}
    orders = one_f_one_b(p, m)

    def seconds(task):
        return cost[task.kind, task.stage]

    turned = simulate(orders[::-1], seconds, lambda s: p - 1 - s, transfer=lambda a, b: Transfer(0.3))
    assert turned.seconds == pytest.approx(
        simulate(orders, seconds, lambda s: s, transfer=lambda a, b: Transfer(0.3)).seconds
    )


def test_the_runtimes_tables_have_the_formulas_bubble_and_stash():
    for p, m in ((2, 2), (4, 9), (8, 16)):
        for name in ("gpipe", "1f1b"):
            found = simulate(schedule_table(name, p, 1, m), uniform, lambda s: s)
            assert found.bubble == pytest.approx(bubble(p, m), abs=1e-9)
        assert found.peak_stash == [min(p - r, m) for r in range(p)]
    generator = random.Random(1)
    for _ in range(12):
        p, v = generator.randint(2, 8), generator.randint(2, 4)
        m = p * generator.randint(1, 3)
        found = simulate(schedule_table("interleaved-1f1b", p, v, m), uniform, lambda s, p=p: s % p)
        assert found.bubble == pytest.approx(bubble(p, m, v), abs=1e-9), (p, v, m)
        assert found.peak_stash == [min(2 * (p - r - 1) + (v - 1) * p + 1, m * v) for r in range(p)]


def test_zero_bubble_tables_leave_less_idle():
    p, m = 4, 8

    def seconds(task):
        return 2.0 if task.kind == B else 1.0

    folded = simulate(schedule_table("zbv-zero-bubble", p, 2, m), seconds, lambda s: min(s, 2 * p - 1 - s))
    rounds = simulate(schedule_table("interleaved-zero-bubble", p, 2, m), seconds, lambda s: s % p)
    plain = simulate(schedule_table("interleaved-1f1b", p, 2, m), seconds, lambda s: s % p)
    assert folded.bubble <= rounds.bubble < plain.bubble
    assert plain.bubble == pytest.approx(bubble(p, m, 2))


def test_a_simulation_as_a_trace():
    found = simulate(one_f_one_b(2, 3), uniform, lambda s: s, transfer=lambda a, b: Transfer(0.25))
    events = [event for event in chrome_trace(found.spans())["traceEvents"] if event["ph"] == "X"]
    assert len(events) == 2 * 2 * 3 + 2 * 3
    assert max(event["ts"] + event["dur"] for event in events) == pytest.approx(found.seconds * 1e6)


def test_messages_of_one_rank_leave_one_after_the_other():
    m, slow = 4, Transfer(seconds=3.0)
    found = simulate(gpipe(2, m), uniform, lambda s: s, transfer=lambda a, b: slow)
    arrived = [event.start for event in found.events if event.rank == 1 and event.task.kind == F]
    assert arrived == [1 + 3.0 * (i + 1) for i in range(m)]
    starts = [event.start for event in found.events if event.rank == 0 and event.task.kind == F]
    assert starts == [0, 1, 2, 3]  # it goes on meanwhile
    waits = simulate(gpipe(2, m), uniform, lambda s: s, transfer=lambda a, b: slow, overlap=False)
    assert [event.start for event in waits.events if event.rank == 0 and event.task.kind == F] == [0, 4, 8, 12]


def test_a_weight_gradient_frees_what_was_kept():
    order = [Task(kind, 0, micro) for micro in range(3) for kind in (F, "input", "weight")]
    assert stash(order) == 1
    assert stash([task for task in order if task.kind != "weight"]) == 3
