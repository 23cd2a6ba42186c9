"""How the processes of one training agree that a checkpoint is whole.

Two phases. Every process writes its files, syncs them, and votes; process 0 collects the votes and, if all are for it,
writes index and manifest and gives the folder its name; then it tells the others. What is said goes through the
process group's key-value store, so that no collective operation of a worker thread gets between those of training.
All processes save the same steps in the same order, to a file system that all of them see.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from pathlib import Path
from typing import Any

from headway.core.errors import CheckpointError

_made: dict[str, int] = {}
"""Checkpointers by folder: each gets its own keys. All processes make them in the same order."""


class Ranks:
    """This process among those that save together; alone where torch.distributed is not initialized.

    Args:
        folder: of the checkpoints.
        timeout: seconds to wait for another process before the checkpoint counts as failed.
    """

    def __init__(self, folder: Path, timeout: float = 600.0) -> None:
        self.rank, self.world, self.timeout, self.where = 0, 1, timeout, str(folder)
        self._store: Any = None
        distributed = sys.modules.get("torch.distributed")
        if distributed is None or not (distributed.is_available() and distributed.is_initialized()):
            return
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        if self.world > 1:
            number = _made[self.where] = _made.get(self.where, -1) + 1
            # A connection of its own: one that waits would hold up whoever shares it.
            store = distributed.distributed_c10d._get_default_store().clone()
            self._store = distributed.PrefixStore(f"headway/checkpoints/{folder}/{number}", store)

    def tell(self, topic: str, content: Any) -> None:
        """Say something of this process's to the others."""
        if self._store is not None:
            self._store.set(f"{topic}/{self.rank}", zlib.compress(json.dumps(content).encode(), 1))

    def hear(self, topic: str, rank: int) -> Any:
        """What ``rank`` has told; waits for it.

        Raises:
            CheckpointError: it has not told in time: it is gone, or saves other steps.
        """
        key, pause = f"{topic}/{rank}", 0.0005
        end = time.monotonic() + self.timeout
        while not self._store.check([key]):
            if time.monotonic() > end:
                raise CheckpointError(self.where, f"rank {rank} has said nothing of {topic} for {self.timeout:g} s",
                                      hint="is it alive, and does it save the same steps?")  # fmt: skip
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        return json.loads(zlib.decompress(self._store.get(key)))

    def forget(self, topic: str) -> None:
        """Remove what this process told."""
        if self._store is not None:
            self._store.delete_key(f"{topic}/{self.rank}")
