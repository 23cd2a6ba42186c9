"""Progress of long work on a terminal: rate, time left, loss, memory. Elsewhere nothing is drawn."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from headway.core.metrics import Observer, Record
from headway.core.units import human, human_seconds

if TYPE_CHECKING:
    from headway.core.trainer import Trainer


class Bar:
    """One line that shows how far something is, and then disappears.

    It is drawn when told to and at no other time: a thread of its own would run in the middle of what is timed.

    Args:
        console: it is drawn only on a terminal.
        label: what is being done.
    """

    def __init__(self, console: Console, label: str) -> None:
        columns = ("  ", TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.percentage:>3.0f}%"),
                   TextColumn("{task.fields[detail]}", markup=False))  # fmt: skip
        self._progress = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal, auto_refresh=False
        )
        self._task = self._progress.add_task(label, total=1.0, detail="")
        self._began_at = self._began_with = self._drawn_at = 0.0

    def update(self, share: float, detail: str) -> None:
        """Show ``share`` (0 to 1) as done, at most twice a second, with the time that the rest will take."""
        now = time.monotonic()
        if now - self._drawn_at < 0.5 and share < 1:
            return
        if not self._began_at:
            self._began_at, self._began_with = now, share
        done = share - self._began_with
        left = f", {human_seconds((now - self._began_at) * (1 - share) / done)} left" if done > 0 and share < 1 else ""
        self._drawn_at = now
        self._progress.update(self._task, completed=share, detail=detail + left, refresh=True)

    def __enter__(self) -> Any:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class TrainingBar(Bar, Observer):
    """The progress of a training, as its observer."""

    def on_log(self, trainer: Trainer, record: Record) -> None:
        """Show step, loss, rate and memory."""
        detail = f"loss {record['loss']:.3f}, {human(record['tokens_per_second'])} tokens/s, " + human(
            record["peak_memory_bytes"], "B"
        )
        self.update(trainer.progress, detail)
