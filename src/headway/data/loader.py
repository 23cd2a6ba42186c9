"""The stream of training batches, and validation batches in a fixed order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch

from headway.core.errors import DataError
from headway.core.fallback import fallback
from headway.core.workload import StepBatch
from headway.data.order import sample_index

_AHEAD = 1024  # places asked from the order at once: it costs little more than asking for one


class Sequences(Protocol):
    """What `Stream` needs of a data set; `TokenSet` is one."""

    def __len__(self) -> int:
        """Number of sequences."""

    @property
    def fingerprint(self) -> str:
        """The same fingerprint, the same sequences."""

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
        """These sequences, stacked; -1 stands for a row that counts in no loss."""

    def counts(self, indices: Sequence[int] | np.ndarray) -> tuple[int, int]:
        """Input tokens and counted targets of these sequences."""


class Stream:
    """Endless or limited batches, one item per optimizer step.

    Step k takes the samples at places ``k * batch`` to ``(k + 1) * batch - 1`` of the global order; rank r of
    ``world`` reads its share of them. So the samples of a step do not depend on the number of ranks or on
    ``micro_batch``. The last step of a limited stream is filled up with rows that count in no loss: every sample is
    used exactly as often as asked, and all batches have one shape.

    Args:
        dataset: the sequences.
        batch: sequences per step, over all ranks; a multiple of ``world * micro_batch``.
        micro_batch: sequences per micro-batch of a rank; None takes its whole share.
        seed: fixes the order.
        max_passes: passes over the data before it is exhausted; None never is.
        on_exhausted: ``stop`` (StopIteration), ``warn`` (say so and go on), ``repeat`` (only without ``max_passes``).

    Raises:
        DataError: batch, ranks and micro-batch do not fit, or the limit and what follows contradict each other.
    """

    def __init__(
        self,
        dataset: Sequences,
        *,
        batch: int,
        micro_batch: int | None = None,
        seed: int,
        rank: int = 0,
        world: int = 1,
        max_passes: int | None = None,
        on_exhausted: Literal["repeat", "stop", "warn"] = "repeat",
    ) -> None:
        share, uneven = divmod(batch, world)
        if uneven or share < 1:
            raise DataError(
                "train.batch", f"cannot be shared among {world} ranks", got=batch, expected=f"a multiple of {world}"
            )
        micro_batch = micro_batch or share
        if share % micro_batch:
            raise DataError(
                "train.micro_batch", f"does not divide the {share} sequences of a rank", got=micro_batch,
                expected="one of " + ", ".join(str(m) for m in range(1, share + 1) if share % m == 0),
            )  # fmt: skip
        if max_passes is not None and on_exhausted == "repeat":
            raise DataError("data.on_exhausted", "is repeat, but data.max_passes sets a limit", expected="stop or warn")
        if max_passes is None and on_exhausted != "repeat":
            max_passes = 1
        self.dataset, self.batch, self.micro_batch, self.seed = dataset, batch, micro_batch, seed
        self.rank, self.world, self.on_exhausted = rank, world, on_exhausted
        self.position = 0
        """Samples given out so far, over all ranks."""
        self._end = None if max_passes is None else max_passes * len(dataset)
        self._said = False
        self._ahead = (0, np.empty(0, dtype=np.int64))

    @property
    def passes(self) -> float:
        """Passes over the data so far."""
        return self.position / len(self.dataset)

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        stop = self._end if self.on_exhausted == "stop" else None
        if stop is not None and self.position >= stop:
            raise StopIteration
        after = self.position + self.batch
        if self._end is not None and stop is None and after > self._end and not self._said:
            self._said = True
            fallback(
                "training on the same data again",
                f"{self._end // len(self.dataset)} of data.max_passes passes are over",
                "over-fitting, the more the longer it goes on",
            )
        indices = self._indices(self.position, after if stop is None else min(after, stop))
        self.position = after if stop is None else min(after, stop)
        share = self.batch // self.world
        mine = self.dataset.batch(indices[self.rank * share : (self.rank + 1) * share])
        tokens, targets = self.dataset.counts(indices)
        size = self.micro_batch
        micro = [{key: value[i : i + size] for key, value in mine.items()} for i in range(0, share, size)]
        return StepBatch(micro=micro, tokens=tokens, targets=targets)

    def _indices(self, start: int, end: int) -> np.ndarray:
        """The samples at these places, and -1 up to a whole batch."""
        first, ahead = self._ahead
        if not first <= start <= end <= first + len(ahead):
            places = np.arange(start, start + max(_AHEAD, self.batch))
            first, ahead = start, sample_index(self.seed, places, len(self.dataset))
            self._ahead = first, ahead
        indices = ahead[start - first : end - first]
        missing = self.batch - len(indices)
        return indices if not missing else np.append(indices, np.full(missing, -1))

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is; the batch, ranks and micro-batch may be others when it is loaded."""
        return {
            "position": self.position,
            "passes": self.passes,
            "seed": self.seed,
            "sequences": len(self.dataset),
            "fingerprint": self.dataset.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a saved place.

        Raises:
            DataError: the state is of other data or of another seed, whose order it does not fit.
        """
        now = self.state_dict()
        for key in ("seed", "sequences", "fingerprint"):
            if state[key] != now[key]:
                raise DataError(
                    "data", f"is not what the checkpoint was trained on: its {key} was {state[key]}", got=now[key],
                    hint="restore the data and its options, or start a new run from the checkpoint's weights",
                )  # fmt: skip
        self.position = int(state["position"])


def in_order(dataset: Sequences, batch: int, *, rank: int = 0, world: int = 1) -> Iterator[dict[str, torch.Tensor]]:
    """All sequences once, in their own order: this rank's batches of ``batch`` rows, filled up with rows that do not
    count.

    Every rank gets the same number of batches of the same shape; summed over ranks, the losses are those of the whole
    set.
    """
    rows = min(batch, -(-len(dataset) // world))
    for first in range(0, len(dataset), rows * world):
        index = np.arange(first + rank * rows, first + (rank + 1) * rows)
        yield dataset.batch(np.where(index < len(dataset), index, -1))
