"""Activation recomputation: keep each block's input, run the block again in the backward pass.

Source: Chen et al. (arXiv 1604.06174); selective recomputation as in Korthikanti et al. (arXiv 2205.05198), section 5.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import nn
from torch.utils.checkpoint import checkpoint

from headway.core.method import Card, Method
from headway.core.options import Options
from headway.core.surgery import Shell, replace_blocks
from headway.models.structure import structure


class RecomputedBlock(Shell):
    """A block that keeps nothing of its forward pass but its inputs."""

    def forward(self, *args: Any, **shared: Any) -> Any:
        """As the block."""
        if not torch.is_grad_enabled() or shared.get("cache") is not None:
            return self.original(*args, **shared)
        return checkpoint(partial(self.original, **shared), *args, use_reentrant=False)


class RecomputeOptions(Options):
    """Options of `recompute`."""

    every: int = Field(1, ge=1)
    """Recompute every n-th block and keep the others: 1 recomputes all of them, 2 half."""


class Recompute(Method):
    """Trade a second forward pass of blocks for the memory of their activations."""

    card = Card(
        name="recompute",
        title="Activation recomputation",
        paper="Chen et al. 2016, arXiv 1604.06174",
        summary="Keeps the input of a block and runs the block once more in the backward pass.",
        exact=True,
        approximates="",
        buys="the activations of one block instead of all",
        costs="one more forward pass of the recomputed blocks",
        refuses={"streambp": "both decide how a block's backward pass gets its activations"},
    )
    Options = RecomputeOptions

    def model(self, model: nn.Module) -> nn.Module:
        """Wrap the blocks."""
        blocks = structure(model).blocks
        chosen = [block for index, block in enumerate(blocks) if index % self.options.every == 0]
        wanted = set(map(id, chosen))
        replace_blocks(blocks, lambda b: RecomputedBlock(b) if id(b) in wanted else b, self.where)
        self.changed("blocks recomputed", len(chosen), f"{len(chosen)} of {len(blocks)}")
        return model
