"""The way of a checkpoint: tensors to host memory, host memory to files, files to a published folder.

`device_to_host` and `disk_write` are lanes; what a lane's worker raises fails the checkpoint, not the training.

    caller's thread        save: flatten, copy small tensors, queue the rest        fence: wait for `staged`
    device_to_host         take a span of the ring, copy a batch, compare           last one: `staged`
    disk_write             append the batch to a file, give the span back; sync     `persisted`
    commit                 votes, index, manifest, rename, remove old ones          `committed`
"""

from __future__ import annotations

import atexit
import os
import sys
import time
import weakref
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headway.core.fallback import fallback
from headway.core.units import human
from headway.memory.backends import side_stream
from headway.memory.host import host_empty
from headway.memory.lanes import Lanes
from headway.resilience.commit import Committer
from headway.resilience.flatten import flatten
from headway.resilience.folders import checkpoints, folder_name, remove
from headway.resilience.limits import host_memory_left
from headway.resilience.ranks import Ranks
from headway.resilience.ring import Ring
from headway.resilience.shards import Shards
from headway.resilience.staging import ALIGNMENT, Batch, ChangedError, Source, cut, mark, sources
from headway.resilience.version import Version

if TYPE_CHECKING:
    from headway.resilience.interval import Interval
    from headway.resilience.lazy import LazyCheckpointer, Until

CHUNK = 8 << 20
"""Bytes of a batch: small beside the ring, large beside what a job costs."""
SMALL, SMALL_TOTAL, TINY_STATE = 1 << 16, 8 << 20, 1 << 20
"""Tensors up to SMALL bytes, SMALL_TOTAL of them altogether, are copied by `save` itself: that takes less than to queue
them. So is a state of up to TINY_STATE, which then needs neither ring nor worker."""
PENDING = 2
"""Checkpoints under way at most; `save` waits for the oldest."""


class Pipeline:
    """Takes states in at `save` and leaves checkpoints in a folder.

    Args:
        folder: of the checkpoints.
        options: of the checkpointer.
        ranks: the processes that save together.
        damaged: checkpoints that do not count as kept; shared with whoever reads.
        lanes: to share; None: its own.
        interval: told of every step.
    """

    def __init__(
        self,
        folder: Path,
        options: LazyCheckpointer.Options,
        ranks: Ranks,
        damaged: set[Path],
        lanes: Lanes | None = None,
        interval: Interval | None = None,
    ) -> None:
        self.folder, self.options, self.ranks, self.interval = folder, options, ranks, interval
        self._own = lanes is None
        # Half the cores at most hash and write; the others are training.
        self.lanes = lanes or Lanes(workers={"disk_write": max(1, min(8, (os.cpu_count() or 2) // 2))})
        self._commits = Committer(folder, options.keep, ranks, damaged, self.lanes["disk_write"])
        self._ring: Ring | None = None
        self._memory: Tensor | None = None
        self._wanted = 0
        self._spare: Tensor | None = None
        self._unsteady: set[str] = set()
        self._versions: list[Version] = []
        self._last: Version | None = None
        self._number = 0
        self._tick: float | None = None
        self._busy = False
        self.seconds = {"save": 0.0, "fence": 0.0}
        self.counts = {"saved": 0, "committed": 0, "failed": 0, "bytes": 0}
        self._at_exit = partial(_drain_at_exit, weakref.ref(self), os.getpid())
        atexit.register(self._at_exit)

    # In the thread that trains.

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Begin to save ``state``."""
        start = time.perf_counter()
        self._fence()
        if self.interval is not None:
            self.interval.saved()
        self._busy = True
        plain, tensors = flatten(state, sharded=True)
        pending = [version for version in self._versions if not version.done.is_set()]
        for version in pending:
            if len(pending) >= PENDING or any(v.step == step for v in pending):
                version.done.wait()
                pending = [v for v in pending if not v.done.is_set()]
        self._settle()
        final = self.folder / folder_name(step)
        version = Version(step, self._number, final, plain, Shards(self.ranks.rank))
        self._number += 1  # also where the next line fails: all processes must go on with the same number
        found = sources(tensors, self._mine(version.number, tensors))
        small, large = self._split(found)
        version.sources = large
        first = self._copied(small)
        version.batches = ([first] if first.pieces else []) + self._batches(large)
        self.counts["saved"] += 1
        self.counts["bytes"] += sum(source.tensor.nbytes for source in found)
        self._versions.append(version)
        self._last = version
        try:
            self._begin(version, eager=bool(first.pieces))
        except BaseException as error:
            version.fail(error, self._commits.who)
            self._staged(version)  # whose commit will find it failed, and tidy up
            if not isinstance(error, Exception):
                raise
        self.seconds["save"] += time.perf_counter() - start
        return final

    def fence(self) -> None:
        """Return once the tensors that were saved have been copied."""
        start = time.perf_counter()
        self._fence()
        now = time.perf_counter()
        self.seconds["fence"] += now - start
        if self.interval is not None:
            if self._tick is not None:
                self.interval.step(now - self._tick, self._busy)
            self._tick = now
            self._busy = any(not version.done.is_set() for version in self._versions)

    def _fence(self) -> None:
        if self._versions:
            for version in self._versions:
                version.staged.wait()
            self._settle()

    def wait(self, until: Until = "committed") -> None:
        """Return once everything saved is that far."""
        for version in self._versions:
            version.staged.wait()
        self._settle(but=self._last)
        for version in self._versions:
            {"staged": version.staged, "persisted": version.persisted, "committed": version.done}[until].wait()
        self._settle(but=self._last)
        if until != "staged" and self._last is not None and self._last.error is not None:
            self._last.told = True
            raise self._last.error

    def drain(self) -> None:
        """Return once nothing is under way, however it ended."""
        for version in self._versions:
            version.done.wait()

    def close(self) -> None:
        """Finish what is under way, then let go of everything."""
        atexit.unregister(self._at_exit)
        try:
            self.drain()
        except KeyboardInterrupt:
            steps = [version.step for version in self._versions if not version.done.is_set()]
            print(f"headway: gave up the checkpoints of steps {steps}, which were being written", file=sys.stderr)
            self.lanes.close(cancel=True)
            raise
        try:
            self._settle()
        finally:
            if self._own:
                self.lanes.close()
            self._commits.close()
            self._ring = self._memory = self._spare = None

    def status(self) -> dict[int, str]:
        """Step -> how far it is."""
        shown = [*self._versions, *([self._last] if self._last else [])]
        return {version.step: version.status for version in shown}

    def report(self) -> dict[str, Any]:
        """Counts, seconds in which training waited, the ring's size, the lanes' own reports."""
        return {**self.counts, "save_seconds": self.seconds["save"], "fence_seconds": self.seconds["fence"],
                "ring_bytes": self._ring.size if self._ring else 0,
                "lanes": {k: v for k, v in self.lanes.report().items() if v["jobs"]}}  # fmt: skip

    def _settle(self, but: Version | None = None) -> None:
        """Let go of tensors that have been copied, and tell of checkpoints that failed (of ``but``, its waiter does).

        In the thread that saves, and changes what it saved: so whatever it changed before shows in the counters now.
        """
        failed = []
        for version in list(self._versions):
            if version.staged.is_set() and not version.unchanged:
                if version.let_go() is not None:
                    self._withdraw(version)
                if version.committed and not version.pruned:
                    self.lanes["disk_write"].submit(partial(self._commits.prune, version), 0, "prune", wait=False)
            if version.done.is_set():
                self._versions.remove(version)
                self.counts["committed" if version.error is None else "failed"] += 1
            if version.error is not None and not version.told:
                if isinstance(version.error, ChangedError):
                    self._unsteady.add(version.error.key)
                if version is not but:
                    version.told = True
                    failed.append(version)
        for version in failed:
            self._tell(version)

    def _tell(self, version: Version) -> None:
        newest = max(checkpoints(self.folder), default=None)
        start = "the beginning" if newest is None else f"step {newest}"
        why = str(version.error)
        if isinstance(version.error, ChangedError):
            why += "; from now on it is copied when it is saved"
        fallback(f"no checkpoint of step {version.step}", why, f"time, if the run had to start again: from {start}")

    def _withdraw(self, version: Version) -> None:
        with version.lock:
            if version.committed:
                version.committed = False
                remove(version.final)

    def _mine(self, number: int, tensors: dict[str, Tensor]) -> set[str] | None:
        """The plain tensors that this process saves: all of process 0's, and of others what process 0 has not."""
        if self.ranks.world == 1:
            return None
        plain = {key for key, tensor in tensors.items() if type(tensor) is Tensor}
        if self.ranks.rank == 0:
            self.ranks.tell(f"keys-{number}", sorted(plain))
            return plain
        return plain - set(self.ranks.hear(f"keys-{number}", 0))

    def _split(self, found: list[Source]) -> tuple[list[Source], list[Source]]:
        """Sources to copy at once, and those to copy in the background."""
        small: list[Source] = []
        large: list[Source] = []
        total = 0
        for source in sorted(found, key=lambda source: source.tensor.nbytes):
            nbytes = source.tensor.nbytes
            total += nbytes
            at_once = total <= TINY_STATE or (nbytes <= SMALL and total <= SMALL_TOTAL)
            (small if at_once or self._unsteady.intersection(source.keys) else large).append(source)
        return small, large

    def _copied(self, small: list[Source]) -> Batch:
        """The small tensors, copied now into memory of their own."""
        batch = Batch()
        for source in small:
            for piece in cut(source, 1 << 62):
                batch.add(piece)
        if batch.nbytes:
            spare, self._spare = self._spare, None
            device = next((s.tensor.device for s in small if s.tensor.is_cuda), torch.device("cpu"))
            fits = spare is not None and batch.nbytes <= spare.numel() <= 4 * batch.nbytes
            batch.memory = spare if fits else host_empty(batch.nbytes, torch.uint8, device)
            batch.copy_in(check=False)
        return batch

    def _batches(self, large: list[Source]) -> list[Batch]:
        """The other tensors, cut and grouped; the ring is made or made larger for them."""
        if not large:
            return []
        limit = self._make_ring(large)
        batches: list[Batch] = []
        pieces = [piece for source in large for piece in cut(source, limit)]
        for piece in pieces:
            mark(piece)
            last = batches[-1] if batches else None
            if last is None or last.nbytes + piece.nbytes > limit or last.device != piece.source.tensor.device:
                batches.append(last := Batch(device=piece.source.tensor.device))
            last.add(piece)
        return batches

    def _make_ring(self, large: list[Source]) -> int:
        """Have a ring for these tensors; the size of a batch."""
        total = sum(source.tensor.nbytes for source in large)
        wanted = min(self.options.host_cache if "host" in self.options.tiers else 2 * CHUNK, total + CHUNK)
        if self._ring is None or self._wanted < wanted:
            self.drain()  # the old ring must be empty
            self._ring, self._memory, self._wanted = None, None, wanted
            left = host_memory_left() // 2
            size = max(1 << 16, min(wanted, left)) // ALIGNMENT * ALIGNMENT
            if size < wanted // 2:
                fallback(f"{human(size, 'B')} of host memory for checkpoints instead of {human(wanted, 'B')}",
                         f"only {human(2 * left, 'B')} are left", "updates wait for the disk")  # fmt: skip
            device = next((s.tensor.device for s in large if s.tensor.is_cuda), torch.device("cpu"))
            self._memory, self._ring = host_empty(size, torch.uint8, device), Ring(size)
        return max(ALIGNMENT, min(CHUNK, self._ring.size // 8) // ALIGNMENT * ALIGNMENT)

    def _begin(self, version: Version, eager: bool) -> None:
        """Queue the version's jobs."""
        queued = version.batches[1:] if eager else version.batches
        if eager:
            self._forward(version, version.batches[0], None, last=not queued)
        elif not queued:
            self._staged(version)
        ready = {d: torch.cuda.current_stream(d).record_event() for d in {b.device for b in queued} if d.type == "cuda"}
        for batch in queued:
            self.lanes["device_to_host"].submit(
                partial(self._stage, version, batch, ready.get(batch.device)), batch.nbytes, f"step {version.step}",
                then=partial(self._forward, version, batch, last=batch is queued[-1]), wait=False,
            )  # fmt: skip

    # In the lanes' threads. None of these may raise.

    def _stage(self, version: Version, batch: Batch, ready: Any) -> None:
        if version.error is not None:
            return
        try:
            assert self._ring is not None
            start = self._ring.take(batch.nbytes)
            assert start is not None
            batch.memory, batch.start, batch.ring = self._memory, start, self._ring
            with side_stream(batch.device) as stream:
                if stream is not None:
                    stream.wait_event(ready)
                batch.copy_in()
        except BaseException as error:
            version.fail(error, self._commits.who)

    def _forward(self, version: Version, batch: Batch, _: Any, last: bool) -> None:
        try:
            version.writes.append(
                self.lanes["disk_write"].submit(
                    partial(self._write, version, batch), batch.nbytes, f"step {version.step}",
                    then=lambda _: self._give(batch), wait=False,
                )
            )  # fmt: skip
        except Exception as error:  # closed in the middle, or there is no thread to be had
            version.fail(error)
            self._give(batch)  # whoever comes next would wait for its place in the ring for ever
        if last:
            self._staged(version)

    def _staged(self, version: Version) -> None:
        version.staged.set()
        try:
            work = partial(self._commits.persist, version, list(version.writes))
            self.lanes["disk_write"].submit(work, 0, f"sync {version.step}", wait=False)
        except RuntimeError as error:
            version.fail(error)
            version.persisted.set()
            version.done.set()

    def _write(self, version: Version, batch: Batch) -> None:
        if version.error is not None or batch.memory is None:
            return
        try:
            version.shards.write(self._commits.open(version), batch)
        except BaseException as error:
            version.fail(error, self._commits.who)

    def _give(self, batch: Batch) -> None:
        if batch.ring is not None:
            batch.ring.give(batch.start)
        elif batch.memory is not None:
            self._spare = batch.memory
        batch.memory = batch.ring = None


def _drain_at_exit(pipeline: weakref.ref[Pipeline], pid: int) -> None:
    """A process that ends without `close` still writes what it has copied, and says what it could not."""
    found = pipeline()
    if found is not None and os.getpid() == pid:
        found.drain()
        found._settle()
