"""This process as one of many ranks: it finds its place in the environment that torchrun, or
`headway train --ranks`, has made."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from headway.core.errors import HeadwayError

TIMEOUT = timedelta(minutes=10)
"""How long an operation waits for ranks that are silent; the launcher ends the others of a dead one at once."""


def join_ranks() -> tuple[int, int]:
    """This process's rank and the number of ranks; the process group is made if nobody has.

    Raises:
        HeadwayError: the environment says that there are ranks, but not how to find them.
    """
    if not dist.is_initialized():
        missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise HeadwayError("ranks", f"the environment has WORLD_SIZE but no {missing[0]}",
                               hint="start with `headway train --ranks N` or torchrun")  # fmt: skip
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank() % torch.cuda.device_count())
        # gloo carries what is on the CPU (what ranks agree on, checkpoints), whatever the model is on
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
        atexit.register(_leave)
    return dist.get_rank(), dist.get_world_size()


def local_rank() -> int:
    """This process's number among those on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def ranks_on_machine() -> int:
    """How many processes there are on this one's machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
