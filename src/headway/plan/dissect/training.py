"""Dissect a Headway training: the points at which the trainer calls its parts are the phases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from headway.core.trainer import Trainer
from headway.plan.dissect.dissect import dissect
from headway.plan.dissect.scopes import phase
from headway.plan.dissect.tree import Tree


def dissect_trainer(trainer: Trainer, steps: int = 3, **options: Any) -> Tree:
    """Where the time of ``trainer.train_step()`` goes; ``steps`` and about seven more are trained.

    Args:
        options: as for ``dissect``.
    """
    with phases_of(trainer):
        return dissect(trainer.train_step, trainer.model, steps=steps, **options)


@contextmanager
def phases_of(trainer: Trainer) -> Iterator[None]:
    """Mark fetching a batch, the gradients' treatment and the update as phases while this is open."""
    parts = {"stream": trainer.stream, "gradients": trainer.gradients, "update": trainer.update}
    trainer.stream = _MarkedStream(trainer.stream)
    trainer.gradients = _marked("gradients", trainer.gradients)
    trainer.update = _marked("optimizer", trainer.update)
    try:
        yield
    finally:
        for name, part in parts.items():
            setattr(trainer, name, part)


def _marked(name: str, part: Callable[[], Any]) -> Callable[[], Any]:
    def inside() -> Any:
        with phase(name):
            return part()

    return inside


class _MarkedStream:
    """A stream whose items are fetched inside the phase ``data``; everything else is the stream's own."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> _MarkedStream:
        return self

    def __next__(self) -> Any:
        with phase("data"):
            return next(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
