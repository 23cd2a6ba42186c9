"""Each rank holds one stage, and every micro-batch takes its own path from rank to rank and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from headway.core.surgery import Absent
from headway.layers.linear_cross_entropy import linear_cross_entropy
from headway.parallel.skippipe.cluster import Cluster, Rules, Schedule, ScheduleError
from headway.parallel.skippipe.reroute import reroute
from headway.parallel.skippipe.simulator import rounds, simulate
from headway.parallel.skippipe.stage_skip import StageSkip, visit_scale

Kind = Literal["forward", "loss", "backward"]
_TAGS: dict[str, int] = {"forward": 0, "loss": 1, "backward": 2, "beside": 3}
BESIDE = ("segments", "positions")
"""What goes along with the activations where a batch has it."""


@dataclass(frozen=True)
class _Facts:
    """What every rank must know of a micro-batch."""

    shape: tuple[int, int]
    targets: int
    beside: dict[str, tuple[int, ...]]


@dataclass
class _Held:
    """What a rank keeps of a micro-batch between forward and backward."""

    entered: Tensor | None
    left: Tensor


class PartialPipeline:
    """One rank of a partial pipeline; its node in the schedule is its rank in the default group.

    Gradients are those of one process that runs every micro-batch along its order (`StageSkip`) and divides the sum of
    losses by the targets of all; over a stage's replicas they are summed.

    Args:
        model: one of Headway's families, with the same weights on every rank; the blocks of other stages are taken out.
        schedule: paths over ranks; micro-batch i takes path i (modulo their number).
        rank: this process's.
        rules: what a schedule may do once a node is lost; default: of the schedule's own length, its own load.
        normalise: ``per_visit`` divides a stage's gradient by the targets that visited it, ``per_batch`` by all.

    Raises:
        ScheduleError: the rank is in no stage.
        ModelError: the model's blocks cannot be left out.
    """

    def __init__(
        self,
        model: Any,
        schedule: Schedule,
        rank: int,
        *,
        rules: Rules | None = None,
        normalise: Literal["per_visit", "per_batch"] = "per_visit",
    ) -> None:
        self.model, self.rank, self.normalise = model, rank, normalise
        self.skip = StageSkip(model, len(schedule.stages))
        self.stage = self._stage(schedule)
        load = max(sum(node in path for path in schedule.paths) for stage in schedule.stages for node in stage)
        self.rules = rules or Rules(len(schedule.paths[0]), memory=load)
        self.messages = 0
        """Sent by this rank so far."""
        for stage, blocks in enumerate(self.skip.stages):
            if stage != self.stage:
                for index in blocks:
                    model.blocks[index] = Absent()
        self._join(schedule)

    def _stage(self, schedule: Schedule) -> int:
        stage = schedule.stage_of().get(self.rank)
        if stage is None:
            raise ScheduleError(f"rank {self.rank}", "is in no stage of the schedule")
        return stage

    def _join(self, schedule: Schedule) -> None:
        """Groups of all that take part, and of this stage's replicas; the others need not call."""
        self.schedule = schedule
        nodes = sorted(node for stage in schedule.stages for node in stage)
        self.everybody = dist.new_group(nodes, use_local_synchronization=True)
        replicas = sorted(schedule.stages[self.stage])
        # A group of one too: torch names a group by how many each of its ranks has made before.
        self.replicas = dist.new_group(replicas, use_local_synchronization=True)

    def lose(self, node: int, cluster: Cluster | None = None) -> Schedule:
        """Go on without ``node``: called by every rank that is left, between two steps.

        A step in which a node was lost is to be discarded (its gradients cleared) and run again.

        Raises:
            ScheduleError: its micro-batches cannot be gone round; names the violated constraint.
        """
        self._join(reroute(self.schedule, node, self.rules, cluster))
        return self.schedule

    def parameters(self) -> list[nn.Parameter]:
        """This rank's own weights: those of its stage; stage 0's include embedding, final norm and head."""
        blocks = [p for i in self.skip.stages[self.stage] for p in self.model.blocks[i].parameters()]
        if self.stage:
            return blocks
        return [p for p in self.model.parameters() if p.requires_grad]

    def step(self, batches: Mapping[int, dict[str, Tensor]], micro_batches: int) -> float:
        """Forward and backward of a step's micro-batches; gradients are added to this rank's weights.

        Args:
            batches: by number of the micro-batch, those whose path starts at this rank: ``tokens`` and ``targets``
                [B, T], also ``segments`` or ``positions``.
            micro_batches: of the step, over all data nodes.

        Returns:
            The sum of losses of this rank's own micro-batches (0 beyond stage 0).

        Raises:
            ScheduleError: a micro-batch is missing where its path starts.
        """
        facts = self._announce(batches, micro_batches)
        paths = [self.schedule.paths[i % len(self.schedule.paths)] for i in range(micro_batches)]
        of = self.schedule.stage_of()
        orders = [tuple(of[node] for node in path) for path in paths]
        targets = [fact.targets for fact in facts]
        scale = visit_scale(orders, targets, len(self.schedule.stages))[self.stage]
        run = _Step(self, facts, dict(batches), paths, scale if self.normalise == "per_visit" else 1.0, sum(targets))
        for micro_batch, kind, position in self._tasks(paths):
            run.task(micro_batch, kind, position)
        run.finish()
        self._sum_replicas()
        return run.loss

    def _announce(self, batches: Mapping[int, dict[str, Tensor]], micro_batches: int) -> list[_Facts]:
        """Tell all ranks the shapes and numbers of targets."""
        own = {
            index: _Facts(
                (batch["tokens"].shape[0], batch["tokens"].shape[1]),
                int((batch["targets"] >= 0).sum()),
                {key: tuple(batch[key].shape) for key in BESIDE if key in batch},
            )
            for index, batch in batches.items()
        }
        gathered: list[Any] = [None] * dist.get_world_size(self.everybody)
        dist.all_gather_object(gathered, own, group=self.everybody)
        found: dict[int, _Facts] = {index: fact for part in gathered for index, fact in part.items()}
        missing = [index for index in range(micro_batches) if index not in found]
        if missing:
            start = self.schedule.paths[missing[0] % len(self.schedule.paths)][0]
            raise ScheduleError(f"micro-batch {missing[0]}", f"was not given to node {start}, where its path starts")
        return [found[index] for index in range(micro_batches)]

    def _tasks(self, paths: list[tuple[int, ...]]) -> list[tuple[int, Kind, int]]:
        """This rank's tasks in the order in which they end on equal links: the same on all ranks, so nobody waits for
        somebody who waits for him."""
        nodes = 1 + max(max(path) for path in paths)
        flat = Cluster(1e-3 * (1 - np.eye(nodes)), np.ones(nodes), memory=len(paths))
        spans = simulate(flat, rounds(paths, flat, len(paths)), gap=0.0, local_gap=0.0).spans
        spans.sort(key=lambda span: (span.end, span.node))
        passes: dict[tuple[int, str], int] = {}
        tasks: list[tuple[int, Kind, int]] = []
        for span in spans:
            done = passes[span.job, span.kind] = passes.get((span.job, span.kind), -1) + 1
            position = len(paths[span.job]) - 1 - done if span.kind == "backward" else done
            if span.node == self.rank:
                tasks.append((span.job, span.kind, position))
        return tasks

    def _sum_replicas(self) -> None:
        if len(self.schedule.stages[self.stage]) == 1:
            return
        for parameter in self.parameters():
            if parameter.grad is None:  # none of its micro-batches came here
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=self.replicas)


class _Step:
    """One step on one rank: what it holds and has sent."""

    def __init__(
        self,
        pipeline: PartialPipeline,
        facts: list[_Facts],
        batches: dict[int, dict[str, Tensor]],
        paths: list[tuple[int, ...]],
        scale: float,
        targets: int,
    ) -> None:
        self.pipeline, self.facts, self.batches, self.paths = pipeline, facts, batches, paths
        self.scale, self.targets = scale, targets
        self.model, self.skip = pipeline.model, pipeline.skip
        self.held: dict[int, _Held] = {}
        self.returned: dict[int, Tensor] = {}
        self.sent: list[tuple[Any, Tensor]] = []
        self.loss = 0.0
        self.weight = pipeline.model.embedding.weight

    def send(self, x: Tensor, to: int, micro_batch: int, kind: str) -> None:
        x = x.detach().contiguous()
        self.sent.append((dist.isend(x, to, tag=8 * micro_batch + _TAGS[kind]), x))
        self.pipeline.messages += 1

    def receive(self, source: int, micro_batch: int, kind: str) -> Tensor:
        x = self.weight.new_empty((*self.facts[micro_batch].shape, self.weight.shape[1]))  # [B, T, D]
        dist.recv(x, source, tag=8 * micro_batch + _TAGS[kind])
        return x

    def task(self, micro_batch: int, kind: Kind, position: int) -> None:
        """Run one task; its input is received first, its output sent on."""
        path = self.paths[micro_batch]
        if kind == "forward":
            self.forward(micro_batch, path, position)
        elif kind == "loss":
            self.lose(micro_batch, path)
        else:
            self.backward(micro_batch, path, position)

    def beside(self, micro_batch: int, source: int | None) -> dict[str, Tensor]:
        """Positions and segments: the batch's, or what came along."""
        if source is None:
            batch = self.batches[micro_batch]
            return {key: batch[key] for key in BESIDE if key in batch}
        came = {}
        for offset, (key, shape) in enumerate(self.facts[micro_batch].beside.items()):
            came[key] = torch.empty(shape, dtype=torch.int64)
            dist.recv(came[key], source, tag=8 * micro_batch + _TAGS["beside"] + offset)
        return came

    def pass_on(self, beside: dict[str, Tensor], to: int, micro_batch: int) -> None:
        for offset, key in enumerate(self.facts[micro_batch].beside):
            x = beside[key].to(torch.int64).contiguous()
            self.sent.append((dist.isend(x, to, tag=8 * micro_batch + _TAGS["beside"] + offset), x))

    def forward(self, micro_batch: int, path: tuple[int, ...], position: int) -> None:
        source = path[position - 1] if position else None
        entered = None
        if source is not None:
            entered = self.receive(source, micro_batch, "forward").requires_grad_()
        given = self.beside(micro_batch, source)
        tokens = self.batches[micro_batch]["tokens"] if source is None else self.weight.new_zeros(
            self.facts[micro_batch].shape, dtype=torch.int64
        )  # fmt: skip
        if entered is None:
            x, shared = self.model.embed(tokens, **given)
        else:
            with torch.no_grad():  # only for what every block gets beside: rotary tables, masks
                shared = self.model.embed(tokens, **given)[1]
            x = entered
        left = self.skip.run_stage(self.pipeline.stage, x, shared, self.scale)
        self.held[micro_batch] = _Held(entered, left)
        last = position + 1 == len(path)
        self.send(left, path[0] if last else path[position + 1], micro_batch, "loss" if last else "forward")
        if not last:
            self.pass_on(given, path[position + 1], micro_batch)

    def lose(self, micro_batch: int, path: tuple[int, ...]) -> None:
        """Final norm, head and loss, back at the data node, which kept the targets."""
        x = self.receive(path[-1], micro_batch, "loss").requires_grad_()
        targets = self.batches[micro_batch]["targets"].flatten()
        hidden = self.model.norm(x).flatten(0, 1)
        head_loss = getattr(self.model, "head_loss", linear_cross_entropy)
        loss, _ = head_loss(hidden, self.model.head_weight, targets)
        (loss / self.targets).backward()
        self.loss += float(loss.detach())
        assert x.grad is not None
        self.send(x.grad, path[-1], micro_batch, "backward")

    def backward(self, micro_batch: int, path: tuple[int, ...], position: int) -> None:
        source = path[0] if position + 1 == len(path) else path[position + 1]
        held = self.held.pop(micro_batch)
        held.left.backward(self.receive(source, micro_batch, "backward"))
        if held.entered is not None:
            assert held.entered.grad is not None
            self.send(held.entered.grad, path[position - 1], micro_batch, "backward")

    def finish(self) -> None:
        """Every message has arrived.

        Raises:
            ScheduleError: a micro-batch's gradient never came: the step is not whole.
        """
        for work, _ in self.sent:
            work.wait()
        if self.held:
            raise ScheduleError("step", f"has no gradient for micro-batches {sorted(self.held)}")
