"""What the trainer asks of whatever saves and loads its state."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol


class Checkpointer(Protocol):
    """Saves and loads a run's state; made from a recipe's ``checkpoint`` section and a folder.

    ``save`` may return before the tensors of the state were read. They are the run's own, not copies: whoever is
    about to change them in place, the optimizer first of all, calls ``fence`` before.
    """

    every: int | None
    """Optimizer steps between checkpoints; None: only at the end and on interruption."""

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Save ``state`` as the checkpoint of ``step``, or begin to; where it will be."""

    def fence(self) -> None:
        """The state is about to change: return once all that was saved has been read."""

    def wait(self) -> None:
        """Return once all that was saved can be loaded after a crash of the machine.

        Raises:
            CheckpointError: a checkpoint could not be written.
        """

    def report(self) -> dict[str, Any]:
        """What saving has cost, for the run's summary: plain data."""

    def load(self) -> dict[str, Any] | None:
        """The newest complete state, tensors on the CPU, or None if there is none."""

    def close(self) -> None:
        """Give back whatever is held; call `wait` first if what was saved matters."""


class NoCheckpoints:
    """For a training without a directory, such as an arm of a comparison: saves nothing, finds nothing."""

    every: int | None = None

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Keep nothing."""
        return Path()

    def fence(self) -> None:
        """Nothing is being read."""

    def wait(self) -> None:
        """Nothing is being written."""

    def report(self) -> dict[str, Any]:
        """Nothing was done."""
        return {}

    def load(self) -> None:
        """Find nothing."""

    def close(self) -> None:
        """Nothing is open."""
