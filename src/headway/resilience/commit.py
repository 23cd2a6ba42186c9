"""From files to a checkpoint: sync, agree with the other processes, publish under its name, remove old ones."""

from __future__ import annotations

import json
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

from headway.core.errors import CheckpointError
from headway.core.meters import versions as library_versions
from headway.memory.lanes import Job, Lane
from headway.resilience.folders import new_folder, prune
from headway.resilience.manifest import raise_errors, write_bytes, write_manifest
from headway.resilience.ranks import Ranks
from headway.resilience.reading import STATE
from headway.resilience.tensors import Item, write_index
from headway.resilience.version import Version


class Committer:
    """Both phases of a commit; its calls run in the lanes' threads and do not raise.

    Args:
        folder: of the checkpoints.
        keep: how many stay.
        ranks: the processes that save together.
        damaged: checkpoints that do not count as kept; shared with whoever reads.
        disk: the lane that writes; alone, a process commits there too.
    """

    def __init__(self, folder: Path, keep: int, ranks: Ranks, damaged: set[Path], disk: Lane) -> None:
        self.folder, self.keep, self.ranks, self.damaged = folder, keep, ranks, damaged
        # Waiting for others must not keep the disk from what comes next.
        self._own = ranks.world > 1
        self._lane = Lane("commit") if self._own else disk
        self.who = f"rank {ranks.rank}" if ranks.world > 1 else ""

    def close(self) -> None:
        """End what was started here."""
        if self._own:
            self._lane.close()

    def open(self, version: Version) -> Path:
        """The version's temporary folder, which process 0 makes."""
        with version.opening:
            if version.folder is None:
                topic = f"folder-{version.number}"
                if self.ranks.rank == 0:
                    version.folder = version.stack.enter_context(new_folder(self.folder, version.step))
                    self.ranks.tell(topic, str(version.folder))
                else:
                    name = self.ranks.hear(topic, 0)
                    if not name:
                        raise CheckpointError(str(version.final), "was given up by rank 0")
                    version.folder = Path(name)
            return version.folder

    def persist(self, version: Version, writes: list[Job]) -> None:
        """Sync what this process wrote, ``writes``, and see to the commit."""
        for job in writes:  # where several write, others may still be at it
            job.wait()
        try:
            if version.error is None:
                self.open(version)
        except BaseException as error:
            version.fail(error, self.who)
        try:
            version.shards.close()
        except BaseException as error:
            version.fail(error, self.who)
        version.persisted.set()
        if self.ranks.world == 1:
            self._commit(version)
        else:
            self._lane.submit(partial(self._commit, version), 0, f"commit {version.step}", wait=False)

    def _commit(self, version: Version) -> None:
        try:
            if version.error is None:
                version.check()
            (self._publish if self.ranks.rank == 0 else self._follow)(version)
        except BaseException as error:
            version.fail(error, self.who)
        self._end(version)

    def _publish(self, version: Version) -> None:
        """Process 0: collect the votes and give the folder its name."""
        number = version.number
        if version.error is not None:
            raise version.error
        items = list(version.shards.items)
        entries: dict[str, dict[str, Any]] = {}
        for rank in range(1, self.ranks.world):
            vote = self.ranks.hear(f"vote-{number}", rank)
            if vote["error"]:
                raise CheckpointError(str(version.final), vote["error"])
            items += [Item.from_list(item) for item in vote["items"]]
            entries |= vote["files"]
        folder = self.open(version)
        files = [
            *version.shards.files,
            write_bytes(folder / STATE, json.dumps(version.plain, allow_nan=False).encode()),
            write_index(folder, items),
        ]
        raise_errors(files)
        write_manifest(folder, version.step, files, library_versions(), entries)
        with version.lock:
            if version.error is not None:
                raise version.error
            version.stack.close()
            version.committed = True
        self.damaged.discard(version.final)
        if version.unchanged:
            self.prune(version)

    def _follow(self, version: Version) -> None:
        """Another process: vote, and learn what came of it."""
        vote = {"error": str(version.error) if version.error else "",
                "files": {file.path.name: file.entry() for file in version.shards.files},
                "items": [list(astuple(item)) for item in version.shards.items]}  # fmt: skip
        self.ranks.tell(f"vote-{version.number}", vote)
        outcome = self.ranks.hear(f"outcome-{version.number}", 0)
        if outcome:
            raise CheckpointError(str(version.final), outcome)
        version.committed = version.error is None

    def _end(self, version: Version) -> None:
        """Clean up after a failure, tell the others, forget what was told of the version before."""
        if version.error is not None and not version.committed:
            try:
                version.stack.__exit__(type(version.error), version.error, None)
            except BaseException as error:
                version.fail(error)
        version.plain = None
        if self.ranks.world > 1:
            try:
                before = version.number - 1
                if self.ranks.rank == 0:
                    if version.folder is None:
                        self.ranks.tell(f"folder-{version.number}", "")
                    self.ranks.tell(f"outcome-{version.number}", str(version.error or ""))
                    for topic in ("keys", "folder", "outcome") if version.error is None else ():
                        self.ranks.forget(f"{topic}-{before}")
                else:
                    self.ranks.forget(f"vote-{before}")
            except Exception as error:  # the store's own errors, such as that process 0 is gone
                version.fail(error, self.who)
        version.done.set()

    def prune(self, version: Version) -> None:
        """Remove what is no longer kept, now that ``version`` is sure."""
        with version.lock:
            due = version.committed and not version.pruned and self.ranks.rank == 0
            version.pruned = True
        if due:
            prune(self.folder, self.keep, version.step, self.damaged)
