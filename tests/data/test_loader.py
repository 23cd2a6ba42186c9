"""The training stream: same samples whatever the ranks, exact resume, limits; validation in order.

Needs nothing. Run: pytest tests/data/test_loader.py
"""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from tests.data.packed import documents, token_set

from headway.core.errors import DataError, HeadwayError
from headway.core.fallback import FallbackLog, use_log
from headway.data.loader import Stream, in_order
from headway.data.packing import IGNORE

SETS = {number: token_set(documents(number=number), 16) for number in (3, 40)}
DATA = SETS[40]


def rows(batch: list[dict[str, torch.Tensor]]) -> list[tuple[int, ...]]:
    return [tuple(row) for micro in batch for row in micro["tokens"].tolist()]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2, None])
def test_a_step_has_the_same_samples_for_all_ranks_and_micro_batches(world: int, micro: int | None) -> None:
    plain = Stream(DATA, batch=8, seed=3)
    ranks = [Stream(DATA, batch=8, micro_batch=micro, seed=3, rank=r, world=world) for r in range(world)]
    for _ in range(12):
        wanted = next(plain)
        parts = [next(stream) for stream in ranks]
        assert [row for part in parts for row in rows(part.micro)] == rows(wanted.micro)
        assert {(p.tokens, p.targets) for p in parts} == {(wanted.tokens, wanted.targets)}
        assert all(m["tokens"].shape[0] == (micro or 8 // world) for p in parts for m in p.micro)


def test_batch_size_does_not_change_the_order() -> None:
    small, large = Stream(DATA, batch=2, seed=0), Stream(DATA, batch=12, seed=0)
    for _ in range(5):
        assert [row for _ in range(6) for row in rows(next(small).micro)] == rows(next(large).micro)


def test_targets_are_counted_over_all_ranks() -> None:
    stream = Stream(DATA, batch=4, seed=0)
    for _ in range(3 * len(DATA) // 4):
        step = next(stream)
        assert step.targets == sum(int((m["targets"] != IGNORE).sum()) for m in step.micro)
        assert step.tokens == step.targets


@pytest.mark.parametrize("stop_at", [0, 1, 9, 20, 300])
def test_resume_goes_on_exactly(stop_at: int) -> None:
    whole = Stream(DATA, batch=4, seed=7)
    steps = [rows(next(whole).micro) for _ in range(stop_at + 6)]
    first = Stream(DATA, batch=4, seed=7)
    for _ in range(stop_at):
        next(first)
    state = json.loads(json.dumps(first.state_dict()))
    resumed = Stream(DATA, batch=4, micro_batch=2, seed=7)
    resumed.load_state_dict(state)
    assert [rows(next(resumed).micro) for _ in range(6)] == steps[stop_at:]
    assert state["passes"] == 4 * stop_at / len(DATA)


def test_resume_with_another_batch_and_more_ranks() -> None:
    first = Stream(DATA, batch=4, seed=7)
    for _ in range(3):
        next(first)
    wanted = rows(next(first).micro) + rows(next(first).micro)
    ranks = [Stream(DATA, batch=8, seed=7, rank=r, world=2) for r in range(2)]
    for stream in ranks:
        stream.load_state_dict(Stream(DATA, batch=4, seed=7).state_dict() | {"position": 12})
    assert [row for stream in ranks for row in rows(next(stream).micro)] == wanted


def test_other_data_or_seed_is_refused() -> None:
    state = Stream(DATA, batch=4, seed=7).state_dict()
    for other in (
        Stream(DATA, batch=4, seed=8),
        Stream(SETS[3], batch=1, seed=7),
        Stream(token_set(documents(9, 40), 16), batch=1, seed=7),
    ):
        with pytest.raises(DataError, match=r"^data: is not what the checkpoint was trained on: its (seed|sequences)"):
            other.load_state_dict(state)
    with pytest.raises(DataError, match="fingerprint"):
        Stream(token_set(documents(), 16, mask=True), batch=4, seed=7).load_state_dict(
            Stream(token_set(documents(), 16), batch=4, seed=7).state_dict()
        )


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_stop_uses_every_sample_exactly_as_often_as_asked(passes: int, world: int) -> None:
    assert len(DATA) % 8
    streams = [
        Stream(DATA, batch=8, micro_batch=2, seed=1, rank=r, world=world, max_passes=passes, on_exhausted="stop")
        for r in range(world)
    ]
    steps = [list(stream) for stream in streams]
    assert len({len(s) for s in steps}) == 1, "ranks end together"
    seen = [
        row for s in steps for step in s for m in step.micro for row in m["targets"].tolist() if set(row) != {IGNORE}
    ]
    wanted = [DATA[i]["targets"].tolist() for i in range(len(DATA))] * passes
    assert sorted(seen) == sorted(wanted)
    assert sum(step.targets for step in steps[0]) == passes * DATA.targets
    assert {m["tokens"].shape for s in steps for step in s for m in step.micro} == {(2, 16)}, "one shape"
    assert streams[0].passes == passes
    with pytest.raises(StopIteration):
        next(streams[0])


def test_stop_means_one_pass_where_no_limit_is_given() -> None:
    assert sum(step.targets for step in Stream(DATA, batch=4, seed=0, on_exhausted="stop")) == DATA.targets


def test_warn_says_so_once_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    use_log(log := FallbackLog())
    stream = Stream(SETS[3], batch=1, seed=0, max_passes=1, on_exhausted="warn")
    plain = Stream(SETS[3], batch=1, seed=0)
    for step in range(4 * len(SETS[3])):
        assert rows(next(stream).micro) == rows(next(plain).micro)
        assert len(log.entries) == (step >= len(SETS[3]))
    assert capsys.readouterr().err.count("training on the same data again") == 1
    use_log(FallbackLog(strict=True))
    strict = Stream(SETS[3], batch=1, seed=0, max_passes=1, on_exhausted="warn")
    with pytest.raises(HeadwayError, match="is a fallback"):
        for _ in range(len(SETS[3]) + 1):
            next(strict)
    use_log(FallbackLog())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 3, "world": 2}, "train.batch: cannot be shared among 2 ranks, got 3, expected a multiple of 2"),
        ({"batch": 1, "world": 2}, "train.batch: cannot be shared"),
        ({"batch": 12, "micro_batch": 5}, "expected one of 1, 2, 3, 4, 6, 12"),
        ({"batch": 2, "max_passes": 1}, "data.on_exhausted: is repeat"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict, message: str) -> None:
    with pytest.raises(DataError) as caught:
        Stream(DATA, seed=0, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("batch", [1, 3, 8, 1000])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_covers_everything_once(batch: int, world: int) -> None:
    parts = [list(in_order(DATA, batch, rank=r, world=world)) for r in range(world)]
    assert len({len(p) for p in parts}) == 1
    assert len({b["tokens"].shape for p in parts for b in p}) == 1
    by_step = [b for step in zip(*parts, strict=True) for b in step]
    flat = torch.cat([b["targets"] for b in by_step]).flatten()
    whole = DATA.batch(range(len(DATA)))["targets"].flatten()
    assert torch.equal(flat[flat != IGNORE], whole[whole != IGNORE])


@pytest.mark.parametrize("mask", [False, True])
def test_a_batch_costs_microseconds(mask: bool) -> None:
    """8 x 512 tokens, the quickstart's batch; about 20 us (50 with segments) when written; 1 ms is the alarm."""
    data = token_set(documents(number=2000, longest=600), 512, mask)
    stream = Stream(data, batch=8, micro_batch=4, seed=0)
    times = []
    for _ in range(300):
        begin = time.process_time()
        next(stream)
        times.append(time.process_time() - begin)
    assert np.median(times) < 1e-3
