"""Schedule tables: complete, in order, without deadlock. `pytest tests/parallel/test_pipeline_tables.py`.

Needs gloo. Run: pytest tests/parallel/test_pipeline_tables.py
"""

import random

import pytest

from headway.core.errors import HeadwayError
from headway.parallel.pipeline.cuts import cut_blocks
from headway.parallel.pipeline.tables import Action, schedule_table
from headway.parallel.pipeline.trace import Span, chrome_trace

RANDOM = random.Random(0)
CASES = [("gpipe", p, 1, m) for p in (1, 2, 5, 8) for m in (1, 3, 8)]
CASES += [("1f1b", p, 1, m) for p in (1, 2, 3, 8) for m in (1, 2, 7, 16)]
CASES += [("interleaved-1f1b", p, v, p * k) for p in (2, 3, 4, 8) for v in (2, 3, 4) for k in (1, 3)]
CASES += [("interleaved-zero-bubble", p, v, p * RANDOM.randint(1, 4)) for p in (2, 4) for v in (2, 3)]
CASES += [("zbv-zero-bubble", p, 2, 2 * p + RANDOM.randint(0, 3)) for p in (2, 3, 4, 8)]


def run(table: list[list[Action]], stages: int) -> list[list[Action]]:
    """Every rank in its order, each action once what it needs is there; the actions of each round."""
    done: set[tuple[str, int, int]] = set()
    position, rounds = [0] * len(table), []
    while any(at < len(actions) for at, actions in zip(position, table, strict=True)):
        now = []
        for rank, actions in enumerate(table):
            if position[rank] == len(actions):
                continue
            kind, stage, micro = actions[position[rank]]
            needs = {
                "forward": [("forward", stage - 1, micro)] if stage else [],
                "weight": [("input", stage, micro)],
            }.get(kind, [("forward", stage, micro), *([("gradient", stage + 1, micro)] if stage + 1 < stages else [])])
            if all(need in done for need in needs):
                now.append((rank, actions[position[rank]]))
        assert now, "the ranks wait for one another"
        for rank, action in now:
            position[rank] += 1
            done.add(tuple(action))
            if action.kind in ("backward", "input"):
                done.add(("gradient", action.stage, action.micro))
        rounds.append([action for _, action in now])
    return rounds


@pytest.mark.parametrize(("name", "p", "v", "m"), CASES)
def test_everything_runs_once_and_nobody_waits_for_ever(name: str, p: int, v: int, m: int) -> None:
    table = schedule_table(name, p, v, m)
    assert len(table) == p
    run(table, p * v)
    every = [action for actions in table for action in actions]
    assert len(set(every)) == len(every)
    wanted = {(stage, micro) for stage in range(p * v) for micro in range(m)}
    assert {(a.stage, a.micro) for a in every if a.kind == "forward"} == wanted
    whole = {(a.stage, a.micro) for a in every if a.kind == "backward"}
    assert whole | {(a.stage, a.micro) for a in every if a.kind == "input"} == wanted
    assert whole | {(a.stage, a.micro) for a in every if a.kind == "weight"} == wanted
    cuts = cut_blocks(p * v, p, v, there_and_back=name.startswith("zbv"))
    for rank, actions in enumerate(table):
        assert {a.stage for a in actions} == set(cuts.stages_of(rank))


def stash(actions: list[Action]) -> int:
    kept = most = 0
    for action in actions:
        kept += {"forward": 1, "backward": -1, "weight": -1}.get(action.kind, 0)
        most = max(most, kept)
    return most


@pytest.mark.parametrize(("p", "m"), [(2, 1), (2, 8), (4, 3), (8, 16)])
def test_a_rank_keeps_as_many_micro_batches_as_published(p: int, m: int) -> None:
    assert [stash(actions) for actions in schedule_table("1f1b", p, 1, m)] == [min(p - rank, m) for rank in range(p)]
    assert [stash(actions) for actions in schedule_table("gpipe", p, 1, m)] == [m] * p


@pytest.mark.parametrize(("p", "v", "k"), [(2, 2, 2), (4, 2, 2), (4, 3, 1), (8, 4, 2)])
def test_the_interleaved_schedule_warms_up_as_published(p: int, v: int, k: int) -> None:
    m = p * k
    for rank, actions in enumerate(schedule_table("interleaved-1f1b", p, v, m)):
        before = next(i for i, action in enumerate(actions) if action.kind == "backward")
        warm = min(2 * (p - rank - 1) + (v - 1) * p, m * v)
        assert before == min(warm + 1, m * v), "and one forward pass of the steady state"
        first = [action.stage for action in actions[: 2 * p]]
        assert first == [rank] * p + [rank + p] * p, "p micro-batches through one chunk, then the next chunk"


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(HeadwayError, match="interleaved-1f1b cannot be made"):
        schedule_table("interleaved-1f1b", 2, 2, 5)
    with pytest.raises(HeadwayError, match=r"chunks: of 2 does not fit 1f1b"):
        schedule_table("1f1b", 2, 2, 2)
    with pytest.raises(HeadwayError, match="2f2b"):
        schedule_table("2f2b", 2, 1, 2)


@pytest.mark.parametrize(("layers", "ranks", "chunks", "head", "expected"), [
    (8, 2, 1, 0.0, [4, 4]), (8, 2, 1, 2.0, [5, 3]), (7, 2, 1, 0.0, [4, 3]), (12, 2, 2, 1.0, [3, 3, 3, 3]),
    (5, 4, 1, 5.0, [2, 1, 1, 1]), (4, 4, 1, 9.0, [1, 1, 1, 1]),
])  # fmt: skip
def test_blocks_are_cut_by_weight(layers: int, ranks: int, chunks: int, head: float, expected: list[int]) -> None:
    cuts = cut_blocks(layers, ranks, chunks, head=head)
    found = [len(cuts.blocks(stage)) for stage in range(cuts.stages)]
    assert sum(found) == layers
    if found != expected:  # as good a cut: no stage heavier, no less even
        weigh = lambda blocks: sorted((*blocks[:-1], blocks[-1] + head), reverse=True)  # noqa: E731
        assert weigh(found)[0] <= weigh(expected)[0]


def test_fewer_blocks_than_stages_is_refused() -> None:
    with pytest.raises(HeadwayError, match=r"8 stages \(4 ranks x 2\) of 6 blocks.*at most 3 ranks"):
        cut_blocks(6, 4, 2)


def test_ranks_of_stages() -> None:
    assert [cut_blocks(8, 2, 2).rank_of(stage) for stage in range(4)] == [0, 1, 0, 1]
    assert [cut_blocks(8, 2, 2, there_and_back=True).rank_of(stage) for stage in range(4)] == [0, 1, 1, 0]


def test_a_trace_has_a_row_for_each_rank() -> None:
    trace = chrome_trace([Span(1, "forward", 1, 0, 5.5, 6.0), Span(0, "forward", 0, 0, 5.0, 5.5)])
    rows = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert [(row["tid"], row["ts"], row["dur"], row["name"]) for row in rows] == [
        (0, 0.0, 5e5, "forward 0"), (1, 5e5, 5e5, "forward 0")]  # fmt: skip
