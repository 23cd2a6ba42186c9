"""The stream of batches where ranks share sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from headway.core.workload import StepBatch


class SharedSequences:
    """A stream of which each rank takes a part of every sequence."""

    def __init__(self, stream: Any, part: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
        self._stream, self._part = stream, part

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        batch: StepBatch = next(self._stream)
        return StepBatch([self._part(micro) for micro in batch.micro], batch.tokens, batch.targets)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream of whole sequences is."""
        state: dict[str, Any] = self._stream.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there."""
        self._stream.load_state_dict(state)
