"""The method `skip-pipeline` of a recipe: one process trains as a partial pipeline does."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from headway.core.errors import MethodError, ModelError
from headway.core.method import Card, ForwardBackward, Method
from headway.core.options import Options
from headway.core.recipe import Recipe
from headway.core.workload import StepBatch
from headway.parallel.skippipe.cluster import Schedule, ScheduleError, visits
from headway.parallel.skippipe.links import regions_cluster
from headway.parallel.skippipe.orders import Order, check_visited, draw_orders, legal_orders
from headway.parallel.skippipe.scheduler import skip_paths
from headway.parallel.skippipe.search import Budget
from headway.parallel.skippipe.stage_skip import StageSkip, visit_scale

MEMORY = 3
"""Micro-batches that a node of the planned cluster holds."""
BUDGET = Budget(nodes=100, seconds=10)


class SkipPipelineOptions(Options):
    """Options of `skip-pipeline`."""

    stages: int = Field(6, ge=2, le=12)
    """Stages of consecutive blocks; the first is never left out."""
    path_length: int = Field(4, ge=2)
    """Stages that each micro-batch visits."""
    swap: Literal["local", "none"] = "local"
    """`local`: a path may visit up to two stages after the one that follows them; `none` keeps the order."""
    scheduler: Literal["cbs", "random", "none"] = "random"
    """Where paths come from: `cbs` plans them for nodes in twelve regions of the world, `random` draws them so that all
    stages have as many visits, `none` draws each for itself."""
    normalise: Literal["per_visit", "per_batch"] = "per_visit"
    """Divide a stage's gradient by the targets that visited it, or, as published, by those of the whole step."""
    resample: Literal["fixed", "every-step"] = "every-step"
    """Use the first step's paths in the whole run, as published, or draw anew. With `cbs`, micro-batches take the
    planned paths in another order at every step."""

    @model_validator(mode="after")
    def _fits(self) -> SkipPipelineOptions:
        if self.path_length > self.stages:
            raise ValueError(f"path_length of {self.path_length} is more than the {self.stages} stages")
        return self


class SkipPipeline(Method):
    """Let every micro-batch visit some of the stages."""

    card = Card(
        name="skip-pipeline",
        title="Skipped and swapped pipeline stages",
        paper="Blagoev, Chen and Ersoy, SkipPipe, 2025, arXiv 2502.19913",
        summary="Groups blocks in stages and lets every micro-batch take its own path through some of them.",
        exact=False,
        approximates="the full model's gradient, by paths that leave out or swap stages; the full model is evaluated",
        buys="less computation per step, shorter iterations on slow links, a model that survives losing stages",
        costs="loss per step: at equal steps the full model learns a little more",
        after=("sam", "memo", "length-warmup", "token-accumulation"),
        refuses={
            "fuyou": "it brings weights in the order of the blocks, which paths change",
            "global-lbl": "experts' balance loss has no place in a stage that is left out",
        },
        deviations="gradients are divided by the visits unless normalise is per_batch; paths are drawn anew every step "
        "unless resample is fixed; Adam steps once per iteration, not twice as the published wrapper does",
    )
    Options = SkipPipelineOptions

    def __init__(self, options: Any, recipe: Recipe) -> None:
        super().__init__(options, recipe)
        self.skip: StageSkip | None = None
        self.schedule_used: Schedule | None = None
        self.fixed: tuple[Order, ...] = ()
        self.pending: list[tuple[Order, Sequence[float]]] = []
        self.visited = [0] * options.stages
        self.met = [[0] * options.stages for _ in range(options.stages)]
        self.targets = 0

    @property
    def swaps(self) -> int:
        """Swaps that a path may make."""
        return 2 if self.options.swap == "local" else 0

    def check(self, recipe: Recipe) -> None:
        """Paths of this length must be able to reach every stage, and as many as fixed paths are.

        Raises:
            MethodError: they do not.
        """
        o, train = self.options, recipe.train
        try:
            legal_orders(o.stages, o.path_length, self.swaps)
            micro_batches = math.ceil(train.batch / (train.micro_batch or train.batch))
            if o.resample == "fixed" and o.scheduler != "none":
                need = math.ceil((o.stages - 1) / (o.path_length - 1))
                if micro_batches < need:
                    raise ScheduleError("resample", f"is fixed: {micro_batches} micro-batches a step on paths of "
                                        f"{o.path_length} leave some of {o.stages} stages unvisited",
                                        hint=f"take {need} micro-batches or more, or resample: every-step")  # fmt: skip
        except ScheduleError as error:
            raise MethodError(
                f"{self.where}.{error.where}", error.what, hint=error.args[0].split(". ", 1)[-1]
            ) from None

    def model(self, model: nn.Module) -> nn.Module:
        """Cut the model in stages."""
        o = self.options
        try:
            self.skip = StageSkip(model, o.stages)
        except ModelError as error:
            where = self.where if error.where == "StageSkip" else f"{self.where}.{error.where}"
            raise MethodError(where, error.what or str(error)) from None
        self.skip.install()
        if o.path_length < o.stages:
            self.changed("stages left out by every micro-batch", o.stages - o.path_length, f"of {o.stages}")
        elif o.swap == "local":
            self.changed("stages that may be swapped", o.stages - 1)
        return model

    def stream(self, stream: Iterator[StepBatch]) -> Iterator[StepBatch]:
        """Draw the paths of every step's micro-batches."""
        return PathStream(stream, self)

    def paths(self, micro_batches: int, step: int) -> tuple[Order, ...]:
        """The orders of a step's micro-batches: the same whenever asked."""
        o = self.options
        if o.resample == "fixed" and self.fixed:
            return tuple(self.fixed[i % len(self.fixed)] for i in range(micro_batches))
        rng = random.Random(f"skip-pipeline {self.recipe.seed} {step}")
        if o.scheduler == "cbs":
            planned = list(self._planned(micro_batches))
            if o.resample == "every-step":
                rng.shuffle(planned)
            elif len(planned) > micro_batches:  # the first run of them that misses no stage
                turns = [planned[turn:] + planned[:turn] for turn in range(len(planned))]
                planned = min(turns, key=lambda p: min(visits(p[:micro_batches], o.stages)) == 0)
            drawn = tuple(planned[i % len(planned)] for i in range(micro_batches))
        else:
            drawn = draw_orders(micro_batches, o.stages, o.path_length, self.swaps, rng, o.scheduler == "random")
        if o.resample == "fixed":
            check_visited(drawn, o.stages, f"{self.where}.resample")
            self.fixed = drawn
        return drawn

    def _planned(self, micro_batches: int) -> tuple[Order, ...]:
        if self.schedule_used is None:
            o = self.options
            data = math.ceil(micro_batches / MEMORY)
            memory = max(math.ceil(micro_batches / data), math.ceil((o.stages - 1) / (o.path_length - 1) / data))
            each = math.ceil(data * (o.path_length - 1) / (o.stages - 1))
            replicas = [data] + [each] * (o.stages - 1)
            cluster = regions_cluster(sum(replicas), memory=memory)
            self.schedule_used = skip_paths(cluster, replicas, o.path_length, micro_batches=2 * data * memory,
                                            swaps=self.swaps, seed=self.recipe.seed, budget=BUDGET)  # fmt: skip
        return self.schedule_used.orders()

    def begin(self, micro: Sequence[dict[str, Tensor]], step: int) -> None:
        """Note what the step's micro-batches are to visit."""
        orders = self.paths(len(micro), step)
        targets = [int(torch.count_nonzero(part["targets"] >= 0)) for part in micro]
        stages = self.options.stages
        per_visit = self.options.normalise == "per_visit"
        scale = visit_scale(orders, targets, stages) if per_visit else [1.0] * stages
        self.pending = [(order, scale) for order in orders]
        for order, count in zip(orders, targets):
            self.targets += count
            for stage in order:
                self.visited[stage] += count
                for other in order:
                    self.met[stage][other] += 1

    def forward_backward(self, forward_backward: ForwardBackward) -> ForwardBackward:
        """Run each micro-batch along its path; outside of it the model is whole."""

        def along_a_path(micro: dict[str, Tensor], targets: int) -> Tensor:
            if self.skip is None or not self.pending:
                raise RuntimeError("a micro-batch without a path: the stream did not draw one")
            with self.skip.using(*self.pending.pop(0)):
                return forward_backward(micro, targets)

        return along_a_path

    def report(self) -> dict[str, Any]:
        """Visits of every stage as a share of all targets, pairs of stages that never met, the plan."""
        stages = range(self.options.stages)
        never = [[a, b] for a in stages for b in stages if a < b and not self.met[a][b]]
        report: dict[str, Any] = {
            "visits": [count / max(1, self.targets) for count in self.visited],
            "pairs_never_met": never,
        }
        if self.schedule_used is not None:
            report["planned_seconds"], report["plan"] = self.schedule_used.seconds, self.schedule_used.label
        return report

    def state_dict(self) -> dict[str, Any]:
        """The schedule and the statistics of visits."""
        schedule = self.schedule_used.to_dict() if self.schedule_used is not None else None
        return {"visited": list(self.visited), "met": [list(row) for row in self.met], "targets": self.targets,
                "fixed": [list(order) for order in self.fixed], "schedule": schedule}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the same schedule."""
        self.visited, self.met, self.targets = state["visited"], state["met"], state["targets"]
        self.fixed = tuple(tuple(order) for order in state["fixed"])
        self.schedule_used = Schedule.from_dict(state["schedule"]) if state["schedule"] else None


class PathStream:
    """Tells the method of every step's micro-batches before they are run."""

    def __init__(self, stream: Any, method: SkipPipeline) -> None:
        self.stream, self.method, self.step = stream, method, 0

    def __iter__(self) -> PathStream:
        return self

    def __next__(self) -> StepBatch:
        """The next step's batch."""
        batch = next(self.stream)
        self.method.begin(batch.micro, self.step)
        self.step += 1
        return batch  # type: ignore[no-any-return]

    def state_dict(self) -> dict[str, Any]:
        """The step and the inner stream's state."""
        return {"step": self.step, "stream": self.stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there."""
        self.step = state["step"]
        self.stream.load_state_dict(state["stream"])
