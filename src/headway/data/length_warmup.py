"""Sequence-length warm-up: begin with short sequences, cut from the same batches, and lengthen them.

Source: Li, Zhang and He, "The Stability-Efficiency Dilemma" (arXiv 2108.06084), section 4: a linear pacing of the
sequence length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pydantic import Field

from headway.core.errors import MethodError
from headway.core.method import Card, Method
from headway.core.options import Options
from headway.core.recipe import Recipe
from headway.core.workload import StepBatch


def paced_length(step: int, first: int, last: int, steps: int, multiple: int = 8) -> int:
    """The sequence length of ``step`` (from 0), in tokens: linear from ``first`` to ``last`` over ``steps``, rounded
    down.

    Source: section 4, equation for the pacing function; a multiple of 8 keeps matrix products aligned.
    """
    if step >= steps:
        return last
    length = first + (last - first) * step / steps
    return min(last, max(first, int(length) // multiple * multiple))


class LengthWarmupOptions(Options):
    """Options of `length-warmup`."""

    first: int = Field(64, ge=8)
    """Sequence length of the first step, tokens."""
    steps: int = Field(100, ge=1)
    """Optimizer steps until the full length."""


class LengthWarmup(Method):
    """Truncate the sequences of the first steps."""

    card = Card(
        name="length-warmup",
        title="Sequence-length warm-up",
        paper="Li, Zhang and He 2021, arXiv 2108.06084",
        summary="Trains on short sequences first and lengthens them; what is cut off is not seen in that pass.",
        exact=False,
        approximates="the plain order of tokens: the tails of early sequences are left out",
        buys="cheaper and calmer first steps, so a higher learning rate or larger batch holds",
        costs="fewer tokens per step at first; long-range context comes later",
    )
    Options = LengthWarmupOptions

    def check(self, recipe: Recipe) -> None:
        """The first length must be shorter than the full one.

        Raises:
            MethodError: it is not, so that nothing would be warmed up.
        """
        full = getattr(recipe.data, "sequence", None)
        if full is None or self.options.first >= full:
            raise MethodError(
                f"{self.where}.first", got=self.options.first, expected=f"less than data.sequence ({full})"
            )

    def stream(self, stream: Iterator[StepBatch]) -> Iterator[StepBatch]:
        """The same batches, cut to the length of their step."""
        full = self.recipe.data.sequence  # type: ignore[attr-defined]
        self.changed("steps shortened", self.options.steps, f"from {self.options.first} to {full} tokens a sequence")
        return ShortenedStream(stream, self.options, full)


class ShortenedStream:
    """Cuts every micro-batch to the paced length."""

    def __init__(self, stream: Any, options: LengthWarmupOptions, full: int) -> None:
        self.stream, self.options, self.full, self.step = stream, options, full, 0

    def __iter__(self) -> ShortenedStream:
        return self

    def __next__(self) -> StepBatch:
        """The next step's batch; where all targets of it are cut off, the one after."""
        batch = next(self.stream)
        length = paced_length(self.step, self.options.first, self.full, self.options.steps)
        self.step += 1
        if length == self.full:
            return batch
        micro = [{key: value[:, :length] for key, value in part.items()} for part in batch.micro]
        targets = sum(int(torch.count_nonzero(part["targets"] >= 0)) for part in micro)
        rows = sum(part["tokens"].shape[0] for part in micro)
        return StepBatch(micro, rows * length, targets) if targets else next(self)

    def state_dict(self) -> dict[str, Any]:
        """The step and the inner stream's state."""
        return {"step": self.step, "stream": self.stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there."""
        self.step = state["step"]
        self.stream.load_state_dict(state["stream"])
