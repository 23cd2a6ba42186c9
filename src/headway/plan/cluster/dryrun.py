"""A layout of hundreds of ranks in one process: a rank of each stage builds its part and runs it without contents.

The process group is torch's fake one, tensors have shapes alone, and the model goes through the same functions as in a
run: stages are cut, matrices divided, blocks recomputed, weights sharded. What it keeps and sends is counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from headway.core import registry
from headway.core.errors import HeadwayError
from headway.core.recipe import Recipe
from headway.core.surgery import Absent, replace_blocks
from headway.memory.recompute import RecomputedBlock
from headway.models.build import empty_model
from headway.parallel.legality import check_layout, micro_batch, sequence_kind
from headway.parallel.mesh import Layout, Mesh, settle
from headway.parallel.pipeline.cuts import Cuts
from headway.parallel.pipeline.stages import Stage, keep_own_parts, make_stages
from headway.parallel.sequence.apply import sequence_parallel
from headway.parallel.sequence.batch import shard_batch
from headway.parallel.shard import shard_weights
from headway.parallel.tensor import tensor_parallel
from headway.plan.cluster.choice import Choice
from headway.plan.cluster.costs import ELEMENT, cuts_of
from headway.plan.cluster.counting import CountCollectives, CountKept, Sent
from headway.plan.cluster.estimate import edges, orders_of
from headway.plan.cluster.memory import RankMemory, held
from headway.plan.cluster.shape import Shape, shape_of
from headway.plan.cluster.simulator import stash


@dataclass(frozen=True)
class DryRank:
    """What one rank of a stage holds and sends."""

    rank: int
    """Its number."""
    blocks: tuple[int, ...]
    """In each of its stages."""
    parameters: int
    """On this rank, weights that are divided counted by its part."""
    memory: RankMemory
    sent: dict[str, Sent]
    """By dimension, in a step; ``weights`` is shard and sequence in one."""


@dataclass(frozen=True)
class DryRun:
    """A layout that was built, rank by rank of one pipeline."""

    layout: Layout
    choice: Choice
    micro_batches: int
    ranks: list[DryRank]
    changes: list[str]
    """What was done to the first rank's model, as sentences."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        ranks = [
            {"rank": r.rank, "blocks": list(r.blocks), "parameters": r.parameters,
             "memory": asdict(r.memory) | {"total": r.memory.total},
             "sent": {name: asdict(sent) for name, sent in r.sent.items()}}
            for r in self.ranks
        ]  # fmt: skip
        return {"layout": str(self.layout), "world": self.layout.world, "micro_batches": self.micro_batches,
                **self.choice.recipe(), "ranks": ranks, "changes": self.changes}  # fmt: skip


def choice_of(recipe: Recipe, world: int) -> Choice:
    """The recipe's own ``parallel`` section on ``world`` ranks.

    Raises:
        RecipeError: it cannot be laid out so.
    """
    layout = settle(recipe.parallel, world, recipe.train.batch)
    check_layout(recipe, layout)
    pipeline = recipe.parallel.pipeline
    return Choice(
        layout, micro_batch(recipe, layout), pipeline.schedule, pipeline.chunks, "recompute" in recipe.methods,
        recipe.parallel.tensor.sequence, pipeline.gather,
    )  # fmt: skip


def dry_run(recipe: Recipe, world: int, vocab: int) -> DryRun:
    """Build the recipe's layout on ``world`` ranks that do not exist, and count.

    Args:
        vocab: where the recipe's model leaves it to the tokenizer.

    Raises:
        HeadwayError: it cannot be laid out so, or this process is a rank of something already.
    """
    if torch.distributed.is_initialized():
        raise HeadwayError("--dry-run", "needs a process without a process group", hint="run it alone")
    choice = choice_of(recipe, world)
    config: Any = recipe.model
    if getattr(config, "vocab", None) is None:
        config = config.model_copy(update={"vocab": vocab})
    shape = shape_of(config, recipe.data.sequence)  # type: ignore[attr-defined]
    built: list[_Rank] = []
    for at in range(choice.layout.pipeline):
        like = next((one for one in built if one.signature == signature(shape, choice, at)), None)
        built.append(like.moved(at) if like else _Rank(recipe, config, shape, choice, at))
    ranks = []
    kept = {stage: size for one in built for stage, size in one.kept.items()}
    count = choice.micro_batches(recipe.train.batch)
    orders = orders_of(choice, recipe.train.batch)
    for one in built:
        ranks.append(one.summary(stash(orders[one.at], kept.__getitem__), count))
    return DryRun(choice.layout, choice, count, ranks, built[0].changes)


def signature(shape: Shape, choice: Choice, at: int) -> list[tuple[int, bool, bool]]:
    """Blocks, embedding and head of each of a pipeline rank's stages: ranks with the same hold and send the same."""
    cuts = cuts_of(shape, choice)
    return [(len(cuts.blocks(s)), s == 0, s == cuts.stages - 1) for s in cuts.stages_of(at)]


@contextmanager
def fake_ranks(rank: int, world: int) -> Iterator[None]:
    """This process as rank ``rank`` of ``world`` that answer at once and with nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


class _Rank:
    """A representative of one pipeline rank, built and run once."""

    def __init__(self, recipe: Recipe, config: Any, shape: Shape, choice: Choice, at: int) -> None:
        self.recipe, self.shape, self.choice, self.at = recipe, shape, choice, at
        self.precision = recipe.train.precision
        self.kept: dict[int, int] = {}
        self.crossing = 0
        self.changes: list[str] = []
        layout = choice.layout
        self.rank = layout.rank(pipeline=at)
        self.divided = layout.data * layout.sequence > 1
        with fake_ranks(self.rank, layout.world):
            mesh = Mesh(layout, self.rank, "cpu")
            self._run(self._build(config, mesh), mesh)

    @property
    def signature(self) -> list[tuple[int, bool, bool]]:
        """See `signature`."""
        return signature(self.shape, self.choice, self.at)

    def moved(self, at: int) -> _Rank:
        """The same, as another pipeline rank with the same stages."""
        other = copy(self)
        other.at, other.rank = at, self.choice.layout.rank(pipeline=at)
        there = cuts_of(self.shape, self.choice).stages_of(at)
        other.kept = dict(zip(there, (self.kept[stage] for stage in sorted(self.kept)), strict=True))
        return other

    def _build(self, config: Any, mesh: Mesh) -> Any:
        layout = self.choice.layout
        with torch.device("meta"):
            model = empty_model(config)
        self.cuts: Cuts = cuts_of(self.shape, self.choice)
        self.stages: list[Stage] = []
        if layout.tensor > 1:
            self.changes += tensor_parallel(model, mesh["tensor"], sequence=self.choice.divided_stream)
        if layout.pipeline > 1:
            self.changes += keep_own_parts(model, self.cuts, self.at)
        for block in model.blocks:
            if not isinstance(block, Absent):
                block.attention.attend = _fused  # as on a GPU: the CPU's own kernel keeps other tensors
        if layout.sequence > 1:
            options, kind = self.recipe.parallel.sequence, sequence_kind(self.recipe)
            self.changes += sequence_parallel(model, mesh["sequence"], kind=kind, ring=options.ring,
                                              layout=options.layout)  # fmt: skip
        if self.choice.recompute:
            replace_blocks(model.blocks, RecomputedBlock, "recompute")
        if layout.pipeline > 1:
            self.stages = make_stages(model, self.cuts, self.at)
        if self.divided:
            parts = [*self.stages] or [model]
            self.changes += shard_weights(model, parts, mesh.weights(), self.precision)
        return model

    def _run(self, model: Any, mesh: Mesh) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        # Where all weights are divided among the ranks of a sequence the two are one group: the later name stays.
        shared = ["sequence"] if self.choice.layout.sequence > 1 else []
        names = [*shared, "pipeline", "replicate", "weights", "tensor"]
        groups = {_name(mesh[d]): (d, mesh[d].size()) for d in names}
        batch = self._batch(mesh)
        product = torch.bfloat16 if self.precision == "bf16" else torch.float32
        loss = registry.find("workloads", self.recipe.workload, "workload")(self.recipe).loss()
        self.counter = CountCollectives(groups)
        with FakeTensorMode(allow_non_fake_inputs=True), self.counter:
            _without_contents(model, torch.float32 if self.divided else product)
            self.local = {id(p): _local(p).numel() for p in model.parameters()}
            if not self.stages:
                self._pass(0, partial(loss, model, batch), model)
            for stage in self.stages:
                stage.loss = loss
                given = batch["tokens"] if stage.first else self._boundary(product)
                others = {key: value for key, value in batch.items() if key != "tokens"}
                self._pass(stage.index, partial(stage, given, **others), stage)

    def _batch(self, mesh: Mesh) -> dict[str, Tensor]:
        """The rank's part of a micro-batch."""
        tokens = torch.zeros(self.choice.micro_batch, self.shape.sequence, dtype=torch.long)
        batch = {"tokens": tokens, "targets": tokens}
        degree, options = self.choice.layout.sequence, self.recipe.parallel.sequence
        if degree == 1:
            return batch
        return shard_batch(batch, mesh.at["sequence"], degree, kind=sequence_kind(self.recipe), ring=options.ring,
                           layout=options.layout)  # fmt: skip

    def _boundary(self, dtype: torch.dtype) -> Tensor:
        parts = self.choice.layout.tensor if self.choice.divided_stream else 1
        parts *= self.choice.layout.sequence
        size = (self.choice.micro_batch, self.shape.sequence // parts, self.shape.hidden)
        return torch.zeros(size, dtype=dtype, requires_grad=True)

    def _pass(self, stage: int, forward: Any, module: nn.Module) -> None:
        with CountKept(module.modules()) as kept:
            result = forward()
        self.kept[stage] = kept.bytes
        end: Tensor = result[0] if isinstance(result, tuple) else result
        if end.ndim == 3:  # it goes on to the next stage
            self.crossing = end.numel() * end.element_size()
        end.backward(torch.ones_like(end))

    def summary(self, activations: float, micro_batches: int) -> DryRank:
        """What the rank holds and sends in a step."""
        choice, tensor = self.choice, self.choice.layout.tensor
        parameters = sum(self.local.values())
        sent: dict[str, Sent] = {}
        for (name, reduces), counted in self.counter.sent.items():
            # A pipeline gathers its weights once, and sums its gradients over data ranks after its last micro-batch.
            rare = choice.reductions_once if reduces else choice.layout.pipeline > 1
            once = rare and name in ("weights", "replicate")
            times = 1 if once else micro_batches
            total = sent.setdefault(name, Sent())
            total.messages += counted.messages * times
            total.bytes += counted.bytes * times
        if choice.layout.pipeline > 1:
            parts = tensor if choice.gather and not choice.divided_stream else 1
            messages = edges(choice, self.at) * micro_batches
            sent["pipeline"] = Sent(messages, messages * (self.crossing or self._crossing()) / parts)
        last = choice.stages - 1 in self.kept
        memory = held(self.shape, choice, parameters, self._largest(), activations, last, self.precision)
        blocks = tuple(len(self.cuts.blocks(stage)) for stage in sorted(self.kept))
        return DryRank(self.rank, blocks, parameters, memory, sent)

    def _crossing(self) -> float:
        tokens = self.choice.micro_batch * self.shape.sequence / self.choice.layout.sequence
        parts = self.choice.layout.tensor if self.choice.divided_stream else 1
        return tokens * self.shape.hidden * ELEMENT[self.precision] / parts

    def _largest(self) -> float:
        """Weights that embedding or head gather at a time."""
        last = self.choice.stages - 1 in self.kept
        first = 0 in self.kept
        ends = first * self.shape.embedding_parameters
        ends = max(ends, last * (self.shape.head_parameters + self.shape.tied * self.shape.vocab * self.shape.hidden))
        return ends / self.choice.layout.tensor


def _fused(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def _name(mesh: Any) -> str:
    return str(mesh.get_group().group_name)


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _without_contents(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace weights on the meta device by fake ones, which FSDP2 and the collectives take for real ones."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                local = torch.empty(_local(parameter).shape, dtype=dtype)
                if isinstance(parameter, DTensor):
                    local = DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=False,
                                               shape=parameter.shape, stride=parameter.stride())  # fmt: skip
                made[id(parameter)] = nn.Parameter(local, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
