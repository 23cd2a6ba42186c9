"""The stream of batches where ranks share sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from headway.core.workload import StepBatch
from headway.parallel.sequence.batch import check_same_batch


class SharedSequences:
    """A stream of which each rank takes a part of every sequence.

    Args:
        stream: of whole sequences, the same on all ranks of ``group``: the first batch is compared.
        part: what a rank takes of a batch.
        group: the ranks that share sequences; it carries what is on the CPU.
    """

    def __init__(self, stream: Any, part: Callable[[dict[str, Tensor]], dict[str, Tensor]], group: Any) -> None:
        self._stream, self._part, self._group, self._checked = stream, part, group, False

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        batch: StepBatch = next(self._stream)
        if not self._checked and batch.micro:
            check_same_batch(batch.micro[0], self._group)
            self._checked = True
        return StepBatch([self._part(micro) for micro in batch.micro], batch.tokens, batch.targets)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream of whole sequences is."""
        state: dict[str, Any] = self._stream.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there."""
        self._stream.load_state_dict(state)
