"""Activation recomputation: keep each block's input, run the block again in the backward pass.

Source: Chen et al. (arXiv 1604.06174); selective recomputation as in Korthikanti et al. (arXiv 2205.05198), section 5,
through torch's selective checkpoint contexts.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from headway.core.method import Card, Method
from headway.core.options import Options
from headway.core.surgery import Shell, replace_blocks
from headway.models.structure import structure

Keep = Literal["nothing", "attention", "products"]

ATTENTION = frozenset({
    "headway::blocked_attention", "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
})  # fmt: skip
"""The operations whose cost grows with the square of the sequence."""
PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear"})


def keep_results_of(names: frozenset[str]) -> Any:
    """Contexts for ``torch.utils.checkpoint`` in which the results of these operations are kept, all else recomputed.

    Args:
        names: of operators, such as ``aten::mm``.
    """

    def policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = getattr(operation, "name", str)().partition(".")[0] in names
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class RecomputedBlock(Shell):
    """A block that keeps of its forward pass its inputs, and what ``keep`` names: the outputs of ``attention``, or
    those of all matrix ``products`` and attention, so that only the cheap operations run twice."""

    def __init__(self, original: nn.Module, keep: Keep = "nothing") -> None:
        super().__init__(original)
        names = {"nothing": None, "attention": ATTENTION, "products": ATTENTION | PRODUCTS}[keep]
        self._options: dict[str, Any] = {"context_fn": partial(keep_results_of, names)} if names else {}

    def forward(self, *args: Any, **shared: Any) -> Any:
        """As the block."""
        if not torch.is_grad_enabled() or shared.get("cache") is not None:
            return self.original(*args, **shared)
        return checkpoint(partial(self.original, **shared), *args, use_reentrant=False, **self._options)


class RecomputeOptions(Options):
    """Options of `recompute`."""

    every: int = Field(1, ge=1)
    """Recompute every n-th block and keep the others: 1 recomputes all of them, 2 half."""
    keep: Keep = "nothing"
    """What a recomputed block keeps: `nothing` but its input; the output of `attention`, which costs most at long
    sequences; or that of attention and all matrix `products`, so that only norms and activation functions run twice."""


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
        costs="one more forward pass of the recomputed blocks, or of their cheap parts",
        refuses={"streambp": "both decide how a block's backward pass gets its activations"},
        parallel=("replicate", "shard", "sequence", "tensor", "pipeline", "experts"),
    )
    Options = RecomputeOptions

    def model(self, model: nn.Module) -> nn.Module:
        """Wrap the blocks."""
        blocks, keep = structure(model).blocks, self.options.keep
        chosen = [block for index, block in enumerate(blocks) if index % self.options.every == 0]
        wanted = set(map(id, chosen))
        replace_blocks(blocks, lambda b: RecomputedBlock(b, keep) if id(b) in wanted else b, self.where)
        kept = "" if keep == "nothing" else f", keeping {keep}"
        self.changed("blocks recomputed", len(chosen), f"{len(chosen)} of {len(blocks)}{kept}")
        return model
