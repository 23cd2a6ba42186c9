"""Step time and memory of one choice: quickly by formulas, or by simulating the schedule's own table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from headway.parallel.pipeline.tables import schedule_table
from headway.plan.cluster.choice import Choice
from headway.plan.cluster.costs import StageCost, boundary, stage_costs
from headway.plan.cluster.hardware import Cluster
from headway.plan.cluster.memory import RankMemory, likely_stash, rank_memory
from headway.plan.cluster.shape import Shape
from headway.plan.cluster.simulator import Task, Timeline, Transfer, simulate

OPTIMIZER_PASSES = 28
"""Bytes that AdamW reads and writes per parameter: gradient, master and two moments, and the weight it writes."""


@dataclass(frozen=True)
class Estimate:
    """A choice with what is expected of it."""

    choice: Choice
    seconds: float
    """Of a step."""
    mfu: float
    """Model FLOPs utilization: the operations that the mathematics needs, of the peak (PaLM, appendix B)."""
    hardware_rate: float
    """FLOP/s per device with recomputation counted, as PTD-P counts."""
    bubble: float
    memory: tuple[RankMemory, ...]
    """By pipeline rank."""
    sent: dict[str, float]
    """Bytes that the busiest rank sends in a step, by purpose."""

    @property
    def peak_bytes(self) -> float:
        """On the fullest rank."""
        return max(memory.total for memory in self.memory)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"choice": str(self.choice), **self.choice.recipe(), "seconds": self.seconds, "mfu": self.mfu,
                "flops_per_second_per_device": self.hardware_rate, "bubble": self.bubble,
                "peak_bytes": self.peak_bytes, "bytes_sent": self.sent}  # fmt: skip


def estimate(
    shape: Shape, choice: Choice, cluster: Cluster, batch: int, *, precision: str = "bf16", reduce_bytes: int = 4,
    blocks: Sequence[int] | None = None,
) -> Estimate:  # fmt: skip
    """By formulas: the slowest rank's work for every micro-batch, and the others' once for the bubble.

    Args:
        batch: sequences of a step.
        precision, reduce_bytes, blocks: see `stage_costs`.
    """
    costs = stage_costs(shape, choice, cluster, precision, reduce_bytes, blocks)
    p, v, m = choice.layout.pipeline, choice.chunks, choice.micro_batches(batch)
    busy = [_busy(choice, costs, rank) for rank in range(p)]
    crossed, _ = boundary(shape, choice, cluster, precision)
    hop = 2 * crossed.seconds if p > 1 else 0.0
    slowest = max(busy) + (0.0 if choice.overlap else hop * v)
    idle = (sum(busy) - max(busy)) / v + hop * (p - 1)
    if "zero-bubble" in choice.schedule:
        # Weight gradients fill the bubble: there and back nearly all of it, in rounds all but t_f + t_b - 2 t_w.
        weight = sum(_weight(choice, costs, rank) for rank in range(p - 1)) / v
        idle = max(0.0, idle - (3 if choice.schedule == "zbv-zero-bubble" else 2) * weight)
    stash = [likely_stash(choice, costs, rank, m) for rank in range(p)]
    return _finish(shape, choice, cluster, batch, precision, costs, slowest * m + idle, idle / (slowest * m), stash)


def simulated(
    shape: Shape, choice: Choice, cluster: Cluster, batch: int, *, precision: str = "bf16", reduce_bytes: int = 4,
    blocks: Sequence[int] | None = None,
) -> tuple[Estimate, Timeline]:  # fmt: skip
    """By simulating the schedule's table, with messages on their links; arguments as for `estimate`.

    Raises:
        HeadwayError: the schedule cannot be made of these numbers.
    """
    costs = stage_costs(shape, choice, cluster, precision, reduce_bytes, blocks)
    crossed, link = boundary(shape, choice, cluster, precision)
    sent = Transfer(crossed.seconds, crossed.bytes, link.kind)
    timeline = simulate(
        orders_of(choice, batch), seconds_of(costs), choice.rank_of, transfer=lambda source, target: sent,
        kept=lambda stage: costs[stage].kept_bytes, overlap=choice.overlap,
    )  # fmt: skip
    found = _finish(shape, choice, cluster, batch, precision, costs, timeline.seconds, timeline.bubble,
                    timeline.peak_stash)  # fmt: skip
    return found, timeline


def edges(choice: Choice, rank: int) -> int:
    """Boundaries over which a pipeline rank sends for each micro-batch, forward or backward."""
    own = [choice.stage(rank, chunk) for chunk in range(choice.chunks)]
    there = sum(stage < choice.stages - 1 and choice.rank_of(stage + 1) != rank for stage in own)
    return there + sum(stage > 0 and choice.rank_of(stage - 1) != rank for stage in own)


def orders_of(choice: Choice, batch: int) -> list[list[Task]]:
    """By pipeline rank, what it does in a step, as the runtime's schedule has it."""
    p, m = choice.layout.pipeline, choice.micro_batches(batch)
    if p == 1:  # no schedule: one micro-batch after the other
        return [[Task(kind, 0, micro) for micro in range(m) for kind in ("forward", "backward")]]
    return schedule_table(choice.schedule, p, choice.chunks, m)


def seconds_of(costs: Sequence[StageCost]) -> Callable[[Task], float]:
    """The time of a task, from its stage's costs."""

    def seconds(task: Task) -> float:
        cost = costs[task.stage]
        return {"forward": cost.forward, "backward": cost.backward, "input": cost.input_grad,
                "weight": cost.weight_grad}[task.kind]  # fmt: skip

    return seconds


def _busy(choice: Choice, costs: Sequence[StageCost], rank: int) -> float:
    own = [costs[choice.stage(rank, chunk)] for chunk in range(choice.chunks)]
    return sum(cost.forward + cost.backward for cost in own)


def _weight(choice: Choice, costs: Sequence[StageCost], rank: int) -> float:
    return sum(costs[choice.stage(rank, chunk)].weight_grad for chunk in range(choice.chunks))


def _finish(
    shape: Shape, choice: Choice, cluster: Cluster, batch: int, precision: str, costs: Sequence[StageCost],
    compute: float, bubble: float, stash: Sequence[float],
) -> Estimate:  # fmt: skip
    layout, m = choice.layout, choice.micro_batches(batch)
    ranks = range(layout.pipeline)
    own = [[costs[choice.stage(rank, chunk)] for chunk in range(choice.chunks)] for rank in ranks]
    gather = max(sum(cost.gather.seconds for cost in stages) for stages in own) * choice.gathers(m)
    reduce = max(sum(cost.reduce.seconds for cost in stages) for stages in own)
    times = 1 if choice.reductions_once else m
    held = max(sum(cost.parameters for cost in stages) for stages in own) / (layout.shard * layout.sequence)
    # Gathering and reducing run beside the products; what they need beyond that shows. A reduction at the end does not.
    at_end = reduce if choice.reductions_once else 0.0
    seconds = max(compute, gather + reduce * times - at_end) + at_end
    seconds += held * OPTIMIZER_PASSES / cluster.device.memory_bandwidth
    each = layout.world * seconds
    crossed, _ = boundary(shape, choice, cluster, precision)
    return Estimate(
        choice=choice,
        seconds=seconds,
        mfu=shape.step_flops(batch) / each / cluster.peak(precision),
        hardware_rate=shape.step_flops(batch, choice.recompute) / each,
        bubble=bubble,
        memory=tuple(rank_memory(shape, choice, costs, rank, stash[rank], precision) for rank in ranks),
        sent={
            "tensor": max(sum(cost.tensor.bytes for cost in stages) for stages in own) * m,
            "pipeline": crossed.bytes * max(edges(choice, rank) for rank in ranks) * m,
            "weights": max(
                sum(cost.gather.bytes * choice.gathers(m) + cost.reduce.bytes * times for cost in stages)
                for stages in own
            ),
        },
    )
