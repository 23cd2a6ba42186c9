"""What each pipeline rank holds: weights, gradients, optimizer state, gathered weights, activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from headway.plan.cluster.choice import Choice
from headway.plan.cluster.costs import ELEMENT, StageCost
from headway.plan.cluster.shape import Shape

HEAD_CHUNK = 256 * 2**20
"""Bytes of logits that `linear_cross_entropy` makes at a time on a GPU, in fp32."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank of a pipeline; ranks of the same stage hold as much."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    """Whole weights of the blocks at work, and their gradients before they are divided (FSDP2)."""
    activations: float
    """Kept between forward and backward passes, over all micro-batches on their way."""
    working: float
    """The backward pass of one block, the logits, and boundaries being sent."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(asdict(self).values())


def states(precision: str, divided: bool) -> tuple[int, int, int]:
    """Bytes of weight, gradient and optimizer state per parameter, with AdamW.

    One rank alone in bf16 keeps a bf16 weight beside the fp32 master; FSDP2 keeps the master and casts as it gathers.
    """
    if precision == "bf16" and not divided:
        return 2, 4, 12
    wide = 8 if precision == "fp64" else 4
    return wide, wide, 2 * wide


def rank_memory(
    shape: Shape, choice: Choice, costs: Sequence[StageCost], rank: int, stash: float, precision: str = "bf16"
) -> RankMemory:
    """What a pipeline rank holds at most.

    Args:
        costs: of all stages.
        stash: bytes of activations between passes at their peak, as the schedule keeps them.
    """
    own = [costs[choice.stage(rank, chunk)] for chunk in range(choice.chunks)]
    block = shape.block_parameters / choice.layout.tensor
    shards = choice.layout.shard * choice.layout.sequence
    parameters = sum(cost.parameters for cost in own) / shards
    ends = max(cost.parameters - cost.blocks * block for cost in own)
    last = any(choice.stage(rank, chunk) == choice.stages - 1 for chunk in range(choice.chunks))
    return held(shape, choice, parameters, ends, stash, last, precision)


def held(
    shape: Shape, choice: Choice, parameters: float, ends: float, stash: float, last: bool, precision: str = "bf16"
) -> RankMemory:
    """What a rank holds at most.

    Args:
        parameters: of which it holds state: its part of those that are divided.
        ends: weights that the embedding or the head gathers at a time.
        stash: bytes of activations between passes.
        last: it makes the logits.
    """
    layout, size = choice.layout, ELEMENT[precision]
    divided = layout.data * layout.sequence > 1
    weight, gradient, optimizer = states(precision, divided)
    block = shape.block_parameters / layout.tensor
    # Two blocks are whole at a time, the one at work and the next, and one gradient that is not divided yet.
    gathered = (2 * block + ends + max(block, ends)) * size if divided else 0.0
    if divided and layout.pipeline > 1:  # all of a stage's weights, and their sums of gradients until the last one
        gathered = parameters * layout.shard * layout.sequence * (size + max(size, 4))
    tokens = choice.micro_batch * shape.sequence / layout.sequence
    stream = tokens * shape.hidden * size / (layout.tensor if choice.divided_stream else 1)
    again = shape.kept_elements(tokens, layout.tensor, choice.divided_stream) * size if choice.recompute else stream
    scores = 0 if choice.fused_attention else tokens * shape.sequence * shape.heads / layout.tensor * size
    logits = min(tokens * shape.vocab * 4 / layout.tensor, HEAD_CHUNK) if last else 0.0
    boundaries = 4 * stream if layout.pipeline > 1 else 0.0
    return RankMemory(
        weights=parameters * weight,
        gradients=parameters * gradient,
        optimizer=parameters * optimizer,
        gathered=gathered,
        activations=stash,
        working=again + scores + logits + boundaries,
    )


def likely_stash(choice: Choice, costs: Sequence[StageCost], rank: int, micro_batches: int) -> float:
    """Bytes that a rank keeps at the peak, by the published counts of micro-batches under way.

    GPipe keeps all m; 1F1B ``min(p - r, m)``; interleaved 1F1B one more chunk than its warm-up has,
    ``2 (p - r - 1) + (v - 1) p + 1``, at most ``m v``; ZB-V about p of all chunks.

    Source: Narayanan et al., section 2.2; Megatron-Core's warm-up count.
    """
    p, v, m = choice.layout.pipeline, choice.chunks, micro_batches
    own = [costs[choice.stage(rank, chunk)].kept_bytes for chunk in range(v)]
    if choice.schedule == "gpipe" or p == 1:
        passes = m * v if p > 1 else v
    elif choice.schedule == "1f1b":
        passes = min(p - rank, m)
    elif choice.schedule == "zbv-zero-bubble":
        passes = min(2 * p, m * v)
    else:
        passes = min(2 * (p - rank - 1) + (v - 1) * p + 1, m * v)
    return passes * sum(own) / v
