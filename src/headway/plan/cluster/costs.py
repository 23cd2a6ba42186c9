"""Seconds and bytes of every operation of a step, from a model's shape, a choice and a cluster.

An operation takes ``max(operations / rate, bytes / bandwidth) + launch`` (Williams et al. 2009, roofline), where the
rate depends on the width of the products; a collective over k ranks is a ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from headway.parallel.pipeline.cuts import Cuts, cut_blocks
from headway.plan.cluster.choice import Choice
from headway.plan.cluster.hardware import Cluster, Link
from headway.plan.cluster.shape import Shape

ELEMENT = {"bf16": 2, "fp32": 4, "fp64": 8}
"""Bytes of an activation, and of a weight as it is gathered."""
KERNELS = 14
"""Operations that a block's forward pass launches."""


@dataclass(frozen=True)
class Traffic:
    """What one rank sends for one purpose."""

    bytes: float = 0.0
    seconds: float = 0.0
    messages: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.bytes + other.bytes, self.seconds + other.seconds, self.messages + other.messages)

    def __mul__(self, times: float) -> Traffic:
        return Traffic(self.bytes * times, self.seconds * times, round(self.messages * times))


@dataclass(frozen=True)
class StageCost:
    """One stage and one micro-batch, on one rank; the stage's own share of the once-per-step work beside it."""

    blocks: int
    forward: float
    """Seconds, with what tensor ranks say to each other."""
    input_grad: float
    """Seconds of the backward pass as far as the stage before waits for it; with what is recomputed."""
    weight_grad: float
    """Seconds of the rest of it."""
    kept_bytes: float
    """Activations from the forward to the backward pass."""
    parameters: float
    """Weights on this rank before they are divided among data ranks."""
    tensor: Traffic
    """Sent to the tensor group, both passes."""
    gather: Traffic
    """Sent to gather divided weights once."""
    reduce: Traffic
    """Sent to sum gradients, once."""

    @property
    def backward(self) -> float:
        """Seconds of the whole backward pass."""
        return self.input_grad + self.weight_grad


def ring(size: float, ranks: int, link: Link, rounds: int = 2) -> Traffic:
    """A collective over a ring of ``ranks``: what each of them sends.

    Args:
        size: bytes of the whole tensor.
        rounds: 2 for an all-reduce, 1 for an all-gather or a reduce-scatter.
    """
    if ranks == 1:
        return Traffic()
    sent = rounds * (ranks - 1) / ranks * size
    return Traffic(sent, sent / link.bandwidth + rounds * (ranks - 1) * link.latency, 1)


@lru_cache(maxsize=4096)
def cut(layers: int, ranks: int, chunks: int, head: float, there_and_back: bool = False) -> Cuts:
    """Where the runtime cuts ``layers`` blocks; ``head`` is its cost in blocks."""
    return cut_blocks(layers, ranks, chunks, head=head, there_and_back=there_and_back)


def cuts_of(shape: Shape, choice: Choice) -> Cuts:
    """Where a choice's stages begin and end: the last gets fewer blocks where the head is costly."""
    head = shape.vocab * shape.hidden / shape.block_parameters
    folded = choice.schedule == "zbv-zero-bubble"
    return cut(shape.layers, choice.layout.pipeline, choice.chunks, head, folded)


def stage_costs(
    shape: Shape,
    choice: Choice,
    cluster: Cluster,
    precision: str = "bf16",
    reduce_bytes: int = 4,
    blocks: Sequence[int] | None = None,
) -> list[StageCost]:
    """The cost of every stage, first to last.

    Args:
        precision: of products and activations: ``bf16`` or ``fp32``.
        reduce_bytes: of an element of the gradients that data ranks sum.
        blocks: of each stage; by default as the runtime cuts them.
    """
    if blocks is None:
        cuts = cuts_of(shape, choice)
        blocks = [len(cuts.blocks(stage)) for stage in range(cuts.stages)]
    ends = len(blocks) - 1
    return [
        _stage(shape, choice, cluster, precision, reduce_bytes, count, first=stage == 0, last=stage == ends)
        for stage, count in enumerate(blocks)
    ]


def _stage(
    shape: Shape, choice: Choice, cluster: Cluster, precision: str, reduce_bytes: int, blocks: int, first: bool,
    last: bool,
) -> StageCost:  # fmt: skip
    layout, size = choice.layout, ELEMENT[precision]
    t = layout.tensor
    tokens = choice.micro_batch * shape.sequence / layout.sequence
    rate = cluster.rate(shape.hidden / t, precision)

    def product(flops: float, traffic: float) -> float:
        return max(flops / rate, traffic / cluster.device.memory_bandwidth)

    stream = tokens * shape.hidden * size  # bytes of the residual stream
    kept = shape.kept_elements(tokens, t, choice.divided_stream) * size
    scores = 0 if choice.fused_attention else tokens * shape.sequence * shape.heads / t * size
    block = (
        product(shape.block_flops(tokens) / t, shape.block_matrices * size / t)
        # What the products' neighbours (norms, activation, softmax) read and write once each.
        + 2 * (kept + 2 * scores) / cluster.device.memory_bandwidth
        + KERNELS * cluster.device.launch
    )
    head = product(shape.head_flops(tokens) / t, shape.hidden * shape.vocab * size / t) if last else 0.0
    talk = ring(stream, t, cluster.link(t)) * 2  # in either pass, and in one more if it is recomputed
    again = (block + talk.seconds) * choice.recompute
    boundary = stream / (t if choice.divided_stream else 1)
    parameters = blocks * shape.block_parameters + first * shape.embedding_parameters
    if last:  # a matrix shared with the embedding is there twice, unless one rank has both ends
        apart = shape.tied and choice.rank_of(choice.stages - 1) != choice.rank_of(0)
        parameters += shape.head_parameters + apart * shape.vocab * shape.hidden
    # The head keeps the last norm's input and output, and the gradients that it has computed with the loss.
    ends = 3 * boundary + size * shape.vocab * shape.hidden / t
    gather, reduce = _weights(parameters / t, choice, cluster, size, reduce_bytes)
    return StageCost(
        blocks=blocks,
        forward=blocks * (block + talk.seconds) + head,
        input_grad=blocks * (block + talk.seconds + again) + head,
        weight_grad=blocks * block + head,
        kept_bytes=blocks * (boundary if choice.recompute else kept + scores) + (ends if last else 0),
        parameters=parameters / t,
        tensor=talk * (blocks * (3 if choice.recompute else 2)),
        gather=gather,
        reduce=reduce,
    )


def _weights(
    parameters: float, choice: Choice, cluster: Cluster, size: int, reduce_bytes: int
) -> tuple[Traffic, Traffic]:
    """Gathering a stage's weights, and summing its gradients (FSDP2, HSDP)."""
    layout = choice.layout
    shards = layout.shard * layout.sequence
    link = cluster.link(layout.tensor * shards)
    gather = ring(parameters * size, shards, link, rounds=1)
    reduce = ring(parameters * reduce_bytes, shards, link, rounds=1)
    everyone = cluster.link(layout.tensor * shards * layout.replicate)
    return gather, reduce + ring(parameters / shards * reduce_bytes, layout.replicate, everyone)


def boundary(shape: Shape, choice: Choice, cluster: Cluster, precision: str = "bf16") -> tuple[Traffic, Link]:
    """What one rank sends over one boundary for one micro-batch in one direction, and over which link.

    Where the tensor ranks send a part each, they gather it behind the boundary unless the stream is divided anyway.
    """
    layout = choice.layout
    link = cluster.link(layout.world)
    size = choice.micro_batch * shape.sequence / layout.sequence * shape.hidden * ELEMENT[precision]
    parts = layout.tensor if choice.gather or choice.divided_stream else 1
    sent = size / parts
    seconds = sent / link.bandwidth + link.latency
    if parts > 1 and not choice.divided_stream:
        seconds += ring(size, layout.tensor, cluster.link(layout.tensor), rounds=1).seconds
    return Traffic(sent, seconds, 1), link
