"""The method `streambp` of a recipe."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import nn

from headway.core.errors import MethodError
from headway.core.method import Card, Method
from headway.core.options import Options
from headway.core.recipe import Recipe
from headway.core.units import Count
from headway.memory.streambp.stream import stream_backward
from headway.models.structure import structure


class StreamBPOptions(Options):
    """Options of `streambp`."""

    chunk: Count | None = Field(None, ge=1)
    """Positions per chunk of a block's backward pass; default: a third of the sequence."""
    logits_chunk: Count | None = Field(128, ge=1)
    """Positions whose logits exist at a time, over the whole micro-batch."""


class StreamBP(Method):
    """Exact gradients with the activations of one chunk of one block."""

    card = Card(
        name="streambp",
        title="Streamed backpropagation",
        paper="Luo et al., StreamBP, NeurIPS 2025, arXiv 2506.03077",
        summary="Keeps each block's input only, and runs its backward pass a chunk of positions at a time.",
        exact=True,
        approximates="",
        buys="sequences several times as long as with recomputation of whole blocks, in the same memory",
        costs="the forward pass once more, as all recomputation does; small chunks add kernel launches",
        deviations="keys and values are recomputed once per block, not once per chunk",
    )
    Options = StreamBPOptions

    def check(self, recipe: Recipe) -> None:
        """Compiled blocks cannot be taken apart.

        Raises:
            MethodError: the recipe compiles.
        """
        if recipe.train.compile:
            raise MethodError(self.where, "cannot stream blocks that train.compile turns into one graph each",
                              hint="switch one of the two off")  # fmt: skip

    def model(self, model: nn.Module) -> nn.Module:
        """Stream every block."""
        blocks = structure(model).blocks
        replaced = stream_backward(blocks, self.options.chunk)
        chunk = self.options.chunk or "a third of the sequence"
        self.changed("blocks streamed", len(replaced), f"{len(replaced)} of {len(blocks)}, {chunk} positions at a time")
        return model

    def loss(self, loss: Any) -> Any:
        """Make fewer logits at a time, where the loss is chunked."""
        import dataclasses

        if self.options.logits_chunk is None or not hasattr(loss, "chunk"):
            return loss
        self.changed("head streamed", 1, f"{self.options.logits_chunk} positions at a time")
        return dataclasses.replace(loss, chunk=self.options.logits_chunk)
