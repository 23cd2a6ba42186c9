"""Ranks forked on this machine. Needs nothing; `pytest tests/parallel/test_local.py`."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from headway.parallel.local import RankFailed, run_ranks


def test_every_rank_runs_and_talks_to_the_others() -> None:
    offset = torch.tensor(10.0)  # seen by the ranks without being sent

    def work(rank: int, factor: int) -> tuple[int, float, int]:
        total = offset + rank * factor
        dist.all_reduce(total)
        return rank, float(total), torch.get_num_threads()

    assert run_ranks(3, work, 2) == [(0, 36.0, 1), (1, 36.0, 1), (2, 36.0, 1)]


def test_a_rank_that_raises_is_named_and_the_others_do_not_wait_for_it() -> None:
    def work(rank: int) -> None:
        if rank == 1:
            raise ValueError("no such thing")
        dist.barrier()

    start = time.monotonic()
    with pytest.raises(RankFailed, match=r"rank 1 of 2.*(?s:.*)no such thing"):
        run_ranks(2, work)
    assert time.monotonic() - start < 20


def test_a_rank_that_is_killed_is_named() -> None:
    def work(rank: int) -> None:
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    with pytest.raises(RankFailed, match=r"rank 0 of 2.*killed by signal 9"):
        run_ranks(2, work)
