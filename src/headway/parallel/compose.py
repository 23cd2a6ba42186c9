"""The steps that spread a model over ranks, for a training loop of one's own, in the one order in which they fit.

`headway.parallel.engine` applies the same steps in the same order to a recipe's model.

Source of the order: Liang et al., TorchTitan (arXiv 2410.06511).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import nn

from headway.core.errors import MethodError
from headway.core.surgery import Absent, replace_blocks
from headway.memory.recompute import Keep, RecomputedBlock
from headway.models.structure import structure
from headway.parallel.experts.parallel import expert_parallel
from headway.parallel.pipeline import Cuts, Stage, keep_own_parts, make_stages
from headway.parallel.sequence import sequence_parallel
from headway.parallel.shard import shard_weights
from headway.parallel.tensor import tensor_parallel

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass
class Composed:
    """A model on one of many ranks."""

    model: Any
    stages: list[Stage] = field(default_factory=list)
    """With a pipeline: this rank's stages, for a ``PipelineRunner``; the last one needs its ``loss`` set."""
    changes: list[str] = field(default_factory=list)
    """What was done, as sentences."""
    pipeline: Pipeline | None = None
    """How the model was split, if it was."""

    def make_stages(self) -> None:
        """Make the stages out of the blocks as they are now."""
        if self.pipeline is not None and not self.stages:
            self.stages = make_stages(self.model, self.pipeline.cuts, self.pipeline.rank)


class Step(ABC):
    """One of the steps of `compose`."""

    name: str
    first: str
    """Why no later step may come before it."""

    @abstractmethod
    def apply(self, to: Composed) -> None:
        """Change the model in place."""


@dataclass(frozen=True)
class Pipeline(Step):
    """Keep what rank ``rank`` of the pipeline runs; `headway.parallel.pipeline.cut_blocks` cuts.

    A matrix that embedding and head share is then on two ranks: their gradients of it are yours to add.
    """

    cuts: Cuts
    rank: int
    name = "pipeline"
    first = "what other ranks run would be divided, wrapped and gathered as well"

    def apply(self, to: Composed) -> None:
        """Put `Absent` in the place of the other parts."""
        to.changes += keep_own_parts(to.model, self.cuts, self.rank)
        to.pipeline = self


@dataclass(frozen=True)
class Tensors(Step):
    """Divide each matrix among the ranks of ``mesh``; see `tensor_parallel`."""

    mesh: DeviceMesh
    sequence: bool = True
    apart: tuple[str, ...] = ()
    name = "tensor"
    first = "it reads the model's own plan and divides whole matrices"

    def apply(self, to: Composed) -> None:
        """Make DTensors of the matrices."""
        to.changes += tensor_parallel(to.model, self.mesh, sequence=self.sequence, apart=self.apart)


@dataclass(frozen=True)
class Experts(Step):
    """Spread experts over the ranks of ``mesh``, and each one's matrices over those of ``tensor``; see
    `expert_parallel`. With `Tensors`, which then has ``apart=("blocks.*.mlp.experts",)``."""

    mesh: DeviceMesh
    tensor: DeviceMesh | None = None
    dispatcher: str = "all-to-all"
    name = "experts"
    first = "it divides whole stacks of experts and replaces their dispatcher"

    def apply(self, to: Composed) -> None:
        """Keep this rank's experts."""
        to.changes += expert_parallel(to.model, self.mesh, self.tensor, dispatcher=self.dispatcher)


@dataclass(frozen=True)
class Sequences(Step):
    """Share each sequence among the ranks of ``mesh``; see `sequence_parallel`. Batches are cut by `shard_batch`."""

    mesh: DeviceMesh
    kind: str = "ulysses"
    ring: int = 1
    layout: str = "zigzag"
    name = "sequence"
    first = "it replaces the attention inside of blocks that nothing has wrapped or traced"

    def apply(self, to: Composed) -> None:
        """Replace what blocks do for attention."""
        options: dict[str, Any] = {"kind": self.kind, "ring": self.ring, "layout": self.layout}
        to.changes += sequence_parallel(to.model, self.mesh, **options)


@dataclass(frozen=True)
class Recompute(Step):
    """Run each block again in the backward pass, but for what ``keep`` names; see `headway.memory.recompute`."""

    keep: Keep = "nothing"
    name = "recompute"
    first = "the graph of a block has to hold its recomputation, and FSDP2 has to gather for it"

    def apply(self, to: Composed) -> None:
        """Wrap the blocks of this rank."""
        count = len(replace_blocks(structure(to.model).blocks, partial(RecomputedBlock, keep=self.keep), "compose"))
        kept = "" if self.keep == "nothing" else f", keeping {self.keep}"
        to.changes.append(f"{count} blocks recomputed{kept}")


@dataclass(frozen=True)
class Compile(Step):
    """Compile each block."""

    backend: str = "inductor"
    name = "compile"
    first = "the hooks with which FSDP2 gathers and frees have to stay outside of the graphs"

    def apply(self, to: Composed) -> None:
        """Mark the blocks of this rank; they are compiled when they first run."""
        own = [block for block in structure(to.model).blocks if not isinstance(block, Absent)]
        for block in own:
            block.compile(backend=self.backend)
        to.changes.append(f"{len(own)} blocks compiled")


@dataclass(frozen=True)
class Shard(Step):
    """FSDP2 over ``mesh``, HSDP where it has two dimensions; see `shard_weights`."""

    mesh: DeviceMesh
    precision: str = "fp32"
    experts: DeviceMesh | None = None
    name = "shard"
    first = ""

    def apply(self, to: Composed) -> None:
        """Divide weights, gradients and what the optimizer will keep of them."""
        to.make_stages()
        parts: list[nn.Module] = [*to.stages] or [to.model]
        to.changes += shard_weights(to.model, parts, self.mesh, self.precision, self.experts)


STEPS: tuple[type[Step], ...] = (Pipeline, Tensors, Experts, Sequences, Recompute, Compile, Shard)
"""In the legal order."""
ORDER = tuple(step.name for step in STEPS)


def compose(model: Any, steps: Sequence[Step], *, strict_order: bool = False) -> Composed:
    """Apply the steps to a model of Headway, in place, in the one legal order.

    Args:
        steps: any of `Pipeline`, `Tensors`, `Experts`, `Sequences`, `Recompute`, `Compile`, `Shard`, each once at most.
            They are sorted into that order.
        strict_order: refuse a list that is not in that order, instead of sorting it.

    Raises:
        MethodError: a step is there twice or, with ``strict_order``, before one that must come first; nothing is
            changed then.
    """
    composed = Composed(model)
    for step in in_order(steps, strict_order):
        step.apply(composed)
    composed.make_stages()
    return composed


def in_order(steps: Sequence[Step], strict_order: bool = False) -> list[Step]:
    """The steps in the legal order.

    Raises:
        MethodError: as `compose`.
    """
    for step in steps:
        if not isinstance(step, STEPS):
            raise MethodError(
                "compose", got=step, expected=f"steps of the kinds {', '.join(s.__name__ for s in STEPS)}"
            )
    names = [step.name for step in steps]
    for name in names:
        if names.count(name) > 1:
            raise MethodError("compose", f"has {name} {names.count(name)} times", hint="each step is applied once")
    if strict_order:
        for before, after in pairwise(steps):
            if ORDER.index(before.name) > ORDER.index(after.name):
                raise MethodError("compose", f"has {before.name} before {after.name}, which must come first: "
                                  f"{after.first}", hint=f"the order is {', '.join(ORDER)}")  # fmt: skip
    return sorted(steps, key=lambda step: ORDER.index(step.name))
