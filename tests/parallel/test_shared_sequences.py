"""Ranks that share sequences must read the same ones. Needs gloo; `pytest tests/parallel/test_shared_sequences.py`."""

from typing import Any

import pytest

from headway.core.build import build_trainer
from headway.parallel.local import RankFailed, run_ranks
from tests.parallel.recipes import recipe


def test_other_samples_on_one_rank_are_found_out_in_the_first_step() -> None:
    def work(rank: int, seed_of_last: int) -> float:
        trainer: Any = build_trainer(recipe(parallel={"sequence": 2}))
        if rank == 1:
            trainer.stream._stream.seed = seed_of_last
        return trainer.train_step()["loss"]

    first, second = run_ranks(2, work, 0)
    assert first == second
    with pytest.raises(RankFailed, match=r"parallel\.sequence: has ranks 1 of 2 read other samples"):
        run_ranks(2, work, 5)


def test_windows_go_round_the_ring() -> None:
    def work(rank: int, parallel: dict[str, Any]) -> float:
        trainer = build_trainer(recipe(parallel=parallel, model={"window": 7}))
        trainer.train_step()
        return trainer.train_step()["loss"]

    alone = run_ranks(1, work, {})[0]
    for kind in ("ring", "ulysses"):
        assert run_ranks(2, work, {"sequence": {"degree": 2, "kind": kind}}) == pytest.approx([alone] * 2, rel=1e-9)
