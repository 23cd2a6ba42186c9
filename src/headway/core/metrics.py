"""What watches a run: observers. The metrics file, TensorBoard and the optional services are such."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from headway.core.errors import HeadwayError, require
from headway.core.files import write_text

if TYPE_CHECKING:
    from headway.core.recipe import Recipe
    from headway.core.trainer import Trainer

Record = dict[str, Any]


class Observer:
    """Watches a training; override what interests you. An observer never changes the run."""

    def on_note(self, text: str) -> None:
        """Something that a person should know, before training begins."""

    def on_start(self, trainer: Trainer) -> None:
        """Training is about to begin or to go on."""

    def on_step(self, trainer: Trainer, record: Record) -> None:
        """A step is done; ``record`` holds step, tokens, loss, lr, grad_norm and step_seconds."""

    def on_log(self, trainer: Trainer, record: Record) -> None:
        """A step of ``log.every``; ``record`` also holds tokens_per_second and peak_memory_bytes."""

    def on_eval(self, trainer: Trainer, record: Record) -> None:
        """An evaluation is done."""

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """A checkpoint is complete."""

    def on_end(self, trainer: Trainer, summary: Record) -> None:
        """Training is over."""

    def close(self) -> None:
        """Let go of files and connections; always called, after an error too."""


class MetricsFile(Observer):
    """``metrics.jsonl``: a line per logged step and per evaluation."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: IO[str] | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Drop the lines of steps that will be done again, and a line that a kill cut short."""
        kept = [r for r in read_metrics(self.path) if r["step"] <= trainer.step]
        if trainer.evaluation.get("step") != trainer.step:
            kept = [r for r in kept if r["step"] < trainer.step or "eval_loss" not in r]
        write_text(self.path, "".join(json.dumps(r) + "\n" for r in kept))
        self.file = self.path.open("a", encoding="utf-8", buffering=1)

    def on_log(self, trainer: Trainer, record: Record) -> None:
        """Append the line."""
        self._write(record)

    def on_eval(self, trainer: Trainer, record: Record) -> None:
        """Append the line."""
        self._write(record)

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """Make the lines as durable as the checkpoint: a run that goes on from it does not write them again."""
        if self.file is not None:
            with _written(self.path):
                os.fsync(self.file.fileno())

    def _write(self, record: Record) -> None:
        assert self.file is not None
        with _written(self.path):
            self.file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # a full disk was told of when the line was written
            if self.file:
                self.file.close()


class TensorBoard(Observer):
    """TensorBoard events in the run directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: Any = None

    def on_start(self, trainer: Trainer) -> None:
        """Open the event file; steps to be done again are purged."""
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        with _written(self.folder):
            self.writer = EventFileWriter(str(self.folder))

    def on_log(self, trainer: Trainer, record: Record) -> None:
        """Write every number under ``train/``."""
        self._write("train", record)

    def on_eval(self, trainer: Trainer, record: Record) -> None:
        """Write every number under ``eval/``."""
        self._write("eval", record)

    def _write(self, group: str, record: Record) -> None:
        import time

        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=f"{group}/{key}", simple_value=float(value))
            for key, value in record.items()
            if key != "step" and isinstance(value, int | float) and math.isfinite(value)
        ]
        with _written(self.folder):
            self.writer.add_event(Event(wall_time=time.time(), step=record["step"], summary=Summary(value=values)))

    def close(self) -> None:
        """Flush and close."""
        if self.writer:
            with _written(self.folder):
                self.writer.close()


class WandB(Observer):
    """Weights & Biases (extra ``wandb``)."""

    def __init__(self, recipe: Recipe) -> None:
        self.run = require("wandb", "wandb", "log.sinks").init(
            project="headway", name=recipe.name, config=recipe.to_dict()
        )

    def on_log(self, trainer: Trainer, record: Record) -> None:
        """Send the line."""
        self.run.log({f"train/{k}": v for k, v in record.items() if k != "step"}, step=record["step"])

    def on_eval(self, trainer: Trainer, record: Record) -> None:
        """Send the line."""
        self.run.log({f"eval/{k}": v for k, v in record.items() if k != "step"}, step=record["step"])

    def close(self) -> None:
        """Finish the service's run."""
        self.run.finish()


class MLflow(Observer):
    """MLflow (extra ``mlflow``)."""

    def __init__(self, recipe: Recipe) -> None:
        self.mlflow = require("mlflow", "mlflow", "log.sinks")
        self.mlflow.start_run(run_name=recipe.name)
        self.mlflow.log_dict(recipe.to_dict(), "recipe.json")

    def on_log(self, trainer: Trainer, record: Record) -> None:
        """Send the line."""
        self._send("train", record)

    def on_eval(self, trainer: Trainer, record: Record) -> None:
        """Send the line."""
        self._send("eval", record)

    def _send(self, group: str, record: Record) -> None:
        numbers = {f"{group}/{k}": v for k, v in record.items() if k != "step" and isinstance(v, int | float)}
        self.mlflow.log_metrics(numbers, step=record["step"])

    def close(self) -> None:
        """End the service's run."""
        self.mlflow.end_run()


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Say of a failure to write, such as a full disk, what file it is and that the run can go on."""
    try:
        yield
    except OSError as error:
        why = f"cannot be written ({error.strerror or error})"
        raise HeadwayError(
            str(path), why, hint="start the run again when that is mended: it goes on from its last checkpoint"
        ) from error


def read_metrics(path: Path) -> list[Record]:
    """The lines of a ``metrics.jsonl``, without a last one that a kill cut short or lines that are no records."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records
