"""Several ranks on this machine, forked from this process: for experiments, checks of parity, and tests.

Forking copies what is imported and loaded already, so that four ranks start in a fraction of a second. A training of
one's own is started by `headway.parallel.launch` instead, with processes that owe nothing to this one.
"""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from headway.core.errors import HeadwayError

TIMEOUT = 120.0
"""Seconds that a collective operation waits for the other ranks."""


class RankFailed(HeadwayError):
    """A rank raised or died; the message is the first one's."""


def run_ranks(
    world: int,
    work: Callable[..., Any],
    *arguments: Any,
    timeout: float = TIMEOUT,
    enter: Callable[[int], None] | None = None,
) -> list[Any]:
    """Run ``work(rank, *arguments)`` in ``world`` forked processes with a gloo process group, one thread each.

    Args:
        world: number of ranks.
        work: what each rank does; its result must be picklable. It sees all that this process has in memory.
        timeout: seconds that a collective operation waits for the other ranks.
        enter: called with the rank in its process before it joins the others, for instance to give it a network of
            its own.

    Returns:
        The results by rank.

    Raises:
        RankFailed: a rank raised or was killed; the others are killed too.
    """
    import torch.distributed  # noqa: F401  imported once, before the fork

    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryDirectory(prefix="headway-ranks-") as name:
        folder = Path(name)
        children = {_fork(folder, rank, world, work, arguments, timeout, enter): rank for rank in range(world)}
        failed: dict[int, str] = {}
        while children:
            pid, status = _any_of(children)
            rank = children.pop(pid)
            if status == 0:
                continue
            report = folder / f"error-{rank}"
            signal = f"was killed by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "ended early"
            failed[rank] = report.read_text() if report.is_file() else signal
            for other in children:
                os.kill(other, 9)
        if failed:
            # The first to fail is often a rank that lost its neighbour: one that says more than that comes first.
            rank = min(failed, key=lambda r: ("Connection" in failed[r] or "was killed" in failed[r], r))
            raise RankFailed(f"rank {rank} of {world}", failed[rank])
        return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(world)]


def _any_of(children: dict[int, int]) -> tuple[int, int]:
    while True:  # a library may have children of its own, which are not ours to collect
        for pid in children:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return done, status
        time.sleep(0.005)


def _fork(folder: Path, rank: int, world: int, work: Any, arguments: Any, timeout: float, enter: Any) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        import torch.distributed as dist

        torch.set_num_threads(1)
        if enter is not None:
            enter(rank)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'rendezvous'}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout),
        )
        result = pickle.dumps(work(rank, *arguments))
        (folder / f"result-{rank}").write_bytes(result)
        dist.barrier()  # nobody leaves while another still talks to it
        status = 0
    except HeadwayError as error:
        (folder / f"error-{rank}").write_text(str(error))
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
    finally:
        sys.stdout.flush()
        os._exit(status)
