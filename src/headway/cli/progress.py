"""What a person sees of a training: a bar on a terminal, plain lines anywhere else; on standard error either way."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.core.metrics import Observer, Record
from headway.core.units import human, human_seconds

if TYPE_CHECKING:
    from rich.progress import Progress

    from headway.core.trainer import Trainer


def progress() -> Observer:
    """The observer that suits standard error."""
    return ProgressBar() if sys.stderr.isatty() else ProgressLines()


class ProgressLines(Observer):
    """A line per logged step, evaluation and start."""

    def __init__(self) -> None:
        self.began_at, self.began_with = 0.0, 0.0

    def say(self, line: str) -> None:
        """Print one line."""
        print(line, file=sys.stderr, flush=True)

    def on_note(self, text: str) -> None:
        """As it comes."""
        self.say(text)

    def on_start(self, trainer: Trainer) -> None:
        """Say what is trained, where, what is to know about the data, and what each method changed."""
        self.began_at, self.began_with = time.perf_counter(), trainer.progress
        parameters, _ = trainer.engine.model_size(trainer)
        going_on = f", going on after step {trainer.step}" if trainer.step else ""
        self.say(
            f"training {human(parameters)} parameters on {trainer.device} in {trainer.recipe.train.precision}{going_on}"
        )
        for remark in getattr(getattr(trainer.workload, "data", None), "notes", ()):
            self.say(f"  data: {remark}")
        if divided := trainer.engine.report():
            self.say(f"  {divided['ranks']} ranks, {divided['layout']}: {'; '.join(divided['changes'])}")
        for name, changes in trainer.changes.items():
            self.say(f"  method {name}: {'; '.join(changes)}")

    def on_log(self, trainer: Trainer, record: Record) -> None:
        """Step, loss, rate, time left, memory."""
        self.say(f"step {record['step']:>6}  {self.facts(trainer, record)}")

    def on_eval(self, trainer: Trainer, record: Record) -> None:
        """The metrics of the validation split."""
        shown = "  ".join(
            f"{key.replace('_', ' ')} {value:.4f}" for key, value in record.items() if isinstance(value, float)
        )
        self.say(f"step {record['step']:>6}  {shown}")

    def facts(self, trainer: Trainer, record: Record) -> str:
        """``loss 5.123  2.31k tokens/s  1m02s left  230MiB``."""
        left = self.seconds_left(trainer)
        return "  ".join([
            f"loss {record['loss']:.4f}",
            f"{human(record['tokens_per_second'])} tokens/s",
            f"{human_seconds(left)} left" if left is not None else "",
            human(record["peak_memory_bytes"], "B"),
        ])  # fmt: skip

    def seconds_left(self, trainer: Trainer) -> float | None:
        """At the pace since the start or the restart, evaluations included."""
        done = trainer.progress - self.began_with
        return (time.perf_counter() - self.began_at) * (1 - trainer.progress) / done if done > 0 else None


class ProgressBar(ProgressLines):
    """A bar with the share of the budget that is spent; evaluations stay above it as lines."""

    def __init__(self) -> None:
        super().__init__()
        self.bar: Progress | None = None
        self.task: Any = None

    def say(self, line: str) -> None:
        """Print one line above the bar."""
        if self.bar is None:
            super().say(line)
        else:
            self.bar.console.print(line, highlight=False, markup=False)

    def on_start(self, trainer: Trainer) -> None:
        """Say what is trained and open the bar."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        super().on_start(trainer)
        columns = (TextColumn("step {task.fields[step]}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
                   TextColumn("{task.fields[facts]}", markup=False))  # fmt: skip
        self.bar = Progress(*columns, console=Console(stderr=True), refresh_per_second=4)
        self.task = self.bar.add_task("train", total=1.0, step=trainer.step, facts="")
        self.bar.update(self.task, completed=trainer.progress)
        self.bar.start()

    def on_step(self, trainer: Trainer, record: Record) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(self.task, completed=trainer.progress, step=record["step"])

    def on_log(self, trainer: Trainer, record: Record) -> None:
        """Show the step's facts beside the bar."""
        if self.bar is not None:
            self.bar.update(self.task, facts=self.facts(trainer, record))

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """A checkpoint needs no line of its own."""

    def on_end(self, trainer: Trainer, summary: Record) -> None:
        """Leave the full bar behind."""
        self.close()

    def close(self) -> None:
        """Stop drawing, after an error or a signal too."""
        if self.bar is not None:
            with suppress(Exception):
                self.bar.stop()
            self.bar = None
