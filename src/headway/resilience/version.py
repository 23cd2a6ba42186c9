"""One checkpoint on its way from the running training to the disk."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headway.core.errors import CheckpointError
from headway.memory.lanes import Job
from headway.resilience.reading import cannot_be_written
from headway.resilience.shards import Shards
from headway.resilience.staging import Batch, ChangedError, Source


@dataclass(eq=False)
class Version:
    """The state of one step: what of it has been copied, written and published, and what went wrong."""

    step: int
    number: int
    """How many were saved before; the same in every process."""
    final: Path
    plain: Any
    shards: Shards
    sources: list[Source] = field(default_factory=list)
    """What is copied in the background; let go, by the thread that saved, once it has been."""
    batches: list[Batch] = field(default_factory=list)
    writes: list[Job] = field(default_factory=list)
    error: CheckpointError | None = None
    staged: threading.Event = field(default_factory=threading.Event)
    persisted: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)
    """Committed or failed."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    opening: threading.Lock = field(default_factory=threading.Lock)
    looking: threading.Lock = field(default_factory=threading.Lock)
    folder: Path | None = None
    stack: ExitStack = field(default_factory=ExitStack)
    """Publishes the folder when it is closed, removes it when it is left with an error."""
    committed: bool = False
    unchanged: bool = False
    """The thread that saved has seen, after the copies were made, that nothing had been changed."""
    pruned: bool = False
    told: bool = False

    def fail(self, error: BaseException, who: str = "") -> None:
        """Give the checkpoint up; the first reason counts."""
        with self.lock:
            if self.error is not None:
                return
            if isinstance(error, OSError):
                self.error = cannot_be_written(self.final, error)
            elif isinstance(error, CheckpointError):
                self.error = error
            else:
                self.error = CheckpointError(str(self.final), f"was not saved ({type(error).__name__}: {error})")
            if who and who not in str(self.error):
                self.error.args = (f"{who}: {self.error}",)
            self.error.__cause__ = error if error is not self.error else None

    def changed(self) -> Source | None:
        """A tensor that has been changed since it was saved, if there is one."""
        return next((source for source in self.sources if source.changed), None)

    def check(self) -> None:
        """Look again whether anything has been changed: an operation that was under way when it was copied shows late.

        Raises:
            ChangedError: a tensor was.
        """
        with self.looking:  # nobody passes the fence, and changes something, meanwhile
            source = None if self.unchanged else self.changed()
        if source is not None:
            raise ChangedError(source.keys[0])

    def let_go(self) -> ChangedError | None:
        """The copies are made: look for changes a last time and drop the tensors, in the thread that saved them."""
        with self.looking:
            source = self.changed() if self.error is None else None
            error = ChangedError(source.keys[0]) if source is not None else None
            if error is not None:
                self.fail(error)
            # What changed must not count as sure for a moment: its commit would remove the checkpoints before it.
            self.sources, self.batches, self.unchanged = [], [], error is None
        return error

    @property
    def status(self) -> str:
        """How far it is, in a word; why it failed."""
        if self.error is not None:
            return f"failed: {self.error}"
        names = {"committed": self.committed, "persisted": self.persisted.is_set(), "staged": self.staged.is_set()}
        return next((name for name, reached in names.items() if reached), "staging")
