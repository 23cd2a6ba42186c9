"""Accumulate gradients until a step has seen a number of target tokens, whatever each sequence holds.

With padding, prompts that do not count, or masked documents, equal numbers of sequences are unequal numbers of
targets; a step by tokens keeps the noise of the gradient even. Source: the token-based batches of Ott et al. (arXiv
1806.00187), section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from headway.core.method import Card, Method
from headway.core.options import Options
from headway.core.units import Count
from headway.core.workload import StepBatch


class TokenAccumulationOptions(Options):
    """Options of `token-accumulation`."""

    targets: Count = Field(ge=1)
    """Target tokens that an optimizer step has at least."""


class TokenAccumulation(Method):
    """Join batches into one step until it holds enough targets."""

    card = Card(
        name="token-accumulation",
        title="Gradient accumulation by tokens",
        paper="Ott et al. 2018, arXiv 1806.00187",
        summary="Joins batches until an optimizer step has a number of targets; the loss is their token mean.",
        exact=False,
        approximates="nothing: steps are larger and fewer; each step's gradient is the exact token mean",
        buys="an even number of targets per step where sequences differ in theirs, and large batches in little memory",
        costs="fewer optimizer steps for the same tokens",
        after=("length-warmup",),
        parallel=("replicate", "shard", "sequence", "tensor"),
    )
    Options = TokenAccumulationOptions

    def stream(self, stream: Iterator[StepBatch]) -> Iterator[StepBatch]:
        """Steps of at least ``targets`` targets."""
        self.changed("batches joined", 1, f"until a step has {self.options.targets} targets")
        return JoinedStream(stream, self.options.targets)


class JoinedStream:
    """Takes batches until they hold ``targets`` targets; the last step of exhausted data may hold fewer."""

    def __init__(self, stream: Any, targets: int) -> None:
        self.stream, self.targets = stream, targets

    def __iter__(self) -> JoinedStream:
        return self

    def __next__(self) -> StepBatch:
        """One step's batch."""
        joined = next(self.stream)
        while joined.targets < self.targets:
            try:
                more = next(self.stream)
            except StopIteration:
                break
            joined = StepBatch(joined.micro + more.micro, joined.tokens + more.tokens, joined.targets + more.targets)
        return joined

    def state_dict(self) -> dict[str, Any]:
        """The inner stream's state; nothing is held back between steps."""
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there."""
        self.stream.load_state_dict(state)
