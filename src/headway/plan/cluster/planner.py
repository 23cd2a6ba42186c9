"""Which layout trains a model fastest on a cluster, and whether any fits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from headway.core.errors import HeadwayError
from headway.core.recipe import Recipe
from headway.core.units import human
from headway.parallel.mesh import Layout
from headway.plan.cluster.estimate import Estimate, estimate, simulated
from headway.plan.cluster.hardware import Cluster
from headway.plan.cluster.layouts import choices, divisors, schedules, tensor_degrees
from headway.plan.cluster.memory import RankMemory
from headway.plan.cluster.shape import Shape, shape_of

HEADROOM = 0.06
"""Share of a device's memory that a plan leaves free: what the driver and the allocator take, and its own error."""

MOST_TASKS = 40_000
"""Forward passes in a step up to which the ranked layouts are simulated; the formulas serve for more."""


class DoesNotFit(HeadwayError):
    """No layout fits; ``nearest`` is the one that takes least."""

    def __init__(self, where: str, what: str, nearest: Estimate, hint: str) -> None:
        super().__init__(where, what, hint=hint)
        self.nearest = nearest


@dataclass(frozen=True)
class Plan:
    """What fits, fastest first."""

    cluster: Cluster
    batch: int
    parameters: int
    ranked: list[Estimate]
    considered: int
    rules: Estimate | None
    """What the paper's rules of thumb would take; None where they find nothing that fits."""

    @property
    def best(self) -> Estimate:
        """The fastest."""
        return self.ranked[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"on": self.cluster.name, "devices": self.cluster.devices, "batch": self.batch,
                "parameters": self.parameters, "considered": self.considered,
                "ranked": [found.to_dict() for found in self.ranked],
                "rules": self.rules.to_dict() if self.rules else None}  # fmt: skip


def plan(
    config: Any, cluster: Cluster, batch: int, *, sequence: int, vocab: int | None = None, precision: str = "bf16",
    micro: int | None = None, most: int = 10, allow_tp_across_nodes: bool = False,
) -> Plan:  # fmt: skip
    """Rank the layouts of a model on a cluster by predicted time.

    Args:
        config: of a Llama or GPT-2.
        batch: sequences of a step, over all ranks.
        sequence: tokens.
        vocab: where the configuration leaves it open.
        micro: the only micro-batch to try.
        most: how many to return.
        allow_tp_across_nodes: tensor ranks may be of several nodes.

    Raises:
        DoesNotFit: nothing fits the devices' memory; it says by rank what the thriftiest layout takes.
        HeadwayError: the batch cannot be shared among so many devices.
    """
    shape = shape_of(config, sequence, vocab)
    tried = list(choices(shape, cluster, batch, micro=micro, across_nodes=allow_tp_across_nodes))
    if not tried:
        raise HeadwayError("train.batch", f"of {batch} sequences cannot be shared among {cluster.devices} devices",
                           hint=f"take a multiple of {cluster.devices}, or fewer devices")  # fmt: skip
    found = [estimate(shape, choice, cluster, batch, precision=precision) for choice in tried]
    fitting = sorted((f for f in found if fits(f, cluster)), key=_order)
    if not fitting:
        raise _does_not_fit(min(found, key=lambda f: f.peak_bytes), shape, cluster)
    simulations = (_simulate(f, shape, cluster, batch, precision) for f in _distinct(fitting))
    ranked = list(islice((f for f in simulations if fits(f, cluster)), most))
    if not ranked:
        raise _does_not_fit(min(found, key=lambda f: f.peak_bytes), shape, cluster)
    return Plan(cluster, batch, shape.parameters, sorted(ranked, key=_order), len(tried),
                by_rules(shape, cluster, batch, precision, micro))  # fmt: skip


def _simulate(found: Estimate, shape: Shape, cluster: Cluster, batch: int, precision: str) -> Estimate:
    choice = found.choice
    if choice.layout.pipeline * choice.chunks * choice.micro_batches(batch) > MOST_TASKS:
        return found
    return simulated(shape, choice, cluster, batch, precision=precision)[0]


def plan_recipe_on(recipe: Recipe, cluster: Cluster, most: int = 10) -> Plan:
    """`plan` of a recipe's model, batch and sequences; ``train.micro_batch`` is kept where the recipe sets it.

    Raises:
        HeadwayError: see `plan`; the recipe's model has no formulas.
    """
    return plan(recipe.model, cluster, recipe.train.batch, sequence=sequence_of(recipe), vocab=vocabulary(recipe),
                precision=recipe.train.precision, micro=recipe.train.micro_batch, most=most)  # fmt: skip


def sequence_of(recipe: Recipe) -> int:
    """Tokens per sequence.

    Raises:
        HeadwayError: the workload has no sequences of tokens.
    """
    sequence = getattr(recipe.data, "sequence", None)
    if sequence is None:
        raise HeadwayError("workload", f"{recipe.workload} has no sequences of tokens, which a plan counts in")
    return int(sequence)


def vocabulary(recipe: Recipe) -> int:
    """The model's vocabulary, or the tokenizer's where it can be known without reading the data."""
    known = getattr(recipe.model, "vocab", None)
    if known is not None:
        return int(known)
    if getattr(recipe.data, "tokenizer", "") == "byte":
        return 257
    return int(getattr(recipe.data, "vocab", 0)) or 50_000


def fits(found: Estimate, cluster: Cluster) -> bool:
    """Whether the fullest rank leaves the headroom free."""
    return found.peak_bytes <= cluster.device.memory * (1 - HEADROOM)


def by_rules(
    shape: Shape, cluster: Cluster, batch: int, precision: str = "bf16", micro: int | None = None
) -> Estimate | None:  # fmt: skip
    """PTD-P's three rules: as many tensor ranks as it takes to fit, within a node; then pipeline ranks; the rest data.

    Then the micro-batch and the chunks with the least predicted time. Whole copies, and recomputation, as in the paper.

    Source: section 3, takeaways 1 to 3.
    """
    tensors = tensor_degrees(shape, cluster.node)
    grown = [(t, 1) for t in tensors]
    grown += [(tensors[-1], p) for p in divisors(cluster.devices // tensors[-1]) if 1 < p <= shape.layers]
    for tensor, pipeline in grown:
        data, left = divmod(cluster.devices, tensor * pipeline)
        if left or batch % data:
            continue
        layout = Layout(pipeline=pipeline, replicate=data, tensor=tensor)
        possible = (replace(c, recompute=True) for c in schedules(shape, layout, batch // data, micro) if c.recompute)
        found = [f for f in (estimate(shape, c, cluster, batch, precision=precision) for c in possible)
                 if fits(f, cluster)]  # fmt: skip
        if found:
            return min(found, key=_order)
    return None


def _order(found: Estimate) -> tuple[float, int, int]:
    """Fastest first; among equals, the one that divides the model least."""
    layout = found.choice.layout
    return (found.seconds, layout.tensor * layout.pipeline, layout.shard)


def _distinct(found: Iterable[Estimate]) -> list[Estimate]:
    """The best of each layout: variants of one layout tell little."""
    best: dict[Layout, Estimate] = {}
    for candidate in found:
        best.setdefault(candidate.choice.layout, candidate)
    return list(best.values())


def _does_not_fit(nearest: Estimate, shape: Shape, cluster: Cluster) -> DoesNotFit:
    table = "\n".join("  " + line for line in memory_table(nearest.memory))
    have = human(cluster.device.memory * (1 - HEADROOM), "B")
    what = (f"{human(shape.parameters)} parameters on {cluster.devices} devices take {human(nearest.peak_bytes, 'B')} "
            f"on the fullest rank at the least ({nearest.choice}), and {have} is there:\n{table}\n")  # fmt: skip
    needed = -(-nearest.peak_bytes * cluster.devices // (cluster.device.memory * (1 - HEADROOM)))
    return DoesNotFit(cluster.name, what, nearest, f"about {needed:.0f} devices would do, or fewer parameters, a "
                      "shorter sequence, or methods that move state off the device")  # fmt: skip


COLUMNS: tuple[tuple[str, Callable[[RankMemory], float]], ...] = (
    ("weights", lambda m: m.weights),
    ("gradients", lambda m: m.gradients),
    ("optimizer", lambda m: m.optimizer),
    ("gathered", lambda m: m.gathered),
    ("activations", lambda m: m.activations),
    ("working", lambda m: m.working),
    ("total", lambda m: m.total),
)


def memory_table(memory: Iterable[RankMemory]) -> list[str]:
    """Bytes by pipeline rank, as lines of equal columns."""
    lines = ["rank " + "".join(f"{name:>13}" for name, _ in COLUMNS)]
    for rank, held in enumerate(memory):
        lines.append(f"{rank:>4} " + "".join(f"{human(of(held), 'B'):>13}" for _, of in COLUMNS))
    return lines
