"""Who takes part in a run: this process alone, or one of many ranks.

The trainer asks its engine for what differs between the two: how the model is divided, what a micro-batch's forward and
backward pass is, and what the ranks have to agree on. `Engine` is the answer of a process that is alone;
`headway.parallel.engine` has the other one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from headway.core import registry
from headway.core.clip import clip_
from headway.core.errors import RecipeError

if TYPE_CHECKING:
    from torch import nn

    from headway.core.method import ForwardBackward, Gradients, Loss
    from headway.core.recipe import Recipe
    from headway.core.trainer import Trainer
    from headway.core.workload import StepBatch, Workload


class Engine:
    """One process that does everything."""

    rank: int = 0
    world: int = 1
    data_rank: int = 0
    """Which share of the samples this rank trains on,"""
    data_ranks: int = 1
    """of how many. Ranks that divide a model or a sequence have the same share."""
    layout_name: str = "one rank"
    """How the run is divided, in words."""
    devices: int = 1
    """How many devices compute. Ranks on one machine's processor share it."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @property
    def leads(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

    @property
    def stream_micro_batch(self) -> int | None:
        """Sequences in each micro-batch that the stream of batches gives this rank; None: its whole share."""
        return self.recipe.train.micro_batch

    def device(self, wanted: torch.device) -> torch.device:
        """The rank's own device of that kind."""
        return wanted

    def split(self, model: nn.Module, workload: Workload) -> nn.Module:
        """The part of a new model that this rank runs; before methods wrap it."""
        return model

    def shard(self, model: nn.Module) -> None:
        """Divide weights among ranks that run the same part, in place; after methods and the compiler."""

    def weights_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which the optimizer finds the weights, for a run whose products are of ``dtype``."""
        return dtype

    def stream(self, stream: Iterator[StepBatch]) -> Iterator[StepBatch]:
        """The rank's part of each batch of its share."""
        return stream

    def forward_backward(self, model: nn.Module, loss: Loss) -> ForwardBackward:
        """One micro-batch, forward and backward: the sum of its losses."""

        def forward_backward(micro: dict[str, torch.Tensor], targets: int) -> torch.Tensor:
            loss_sum, _ = loss(model, micro)
            (loss_sum / targets).backward()
            return loss_sum.detach()

        return forward_backward

    def gradients(self, model: nn.Module, optimizer: torch.optim.Optimizer, clip: float | None) -> Gradients:
        """What makes the micro-batches' gradients the step's, clips them and gives their norm."""

        def gradients() -> torch.Tensor:
            return clip_([p for group in optimizer.param_groups for p in group["params"]], clip)

        return gradients

    def evaluate(self, model: nn.Module, loss: Loss, batch: dict[str, torch.Tensor]) -> float:
        """The sum of the losses of one batch of this rank's share, without gradients."""
        return float(loss(model, batch)[0])

    def begin_step(self, step: int) -> None:
        """Before each training step."""

    def total(self, value: float) -> float:
        """The sum over all shares of what each has found for its own."""
        return value

    def highest(self, value: float) -> float:
        """The highest of the ranks' values."""
        return value

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank."""
        return flag

    def common(self, value: Any) -> Any:
        """The leader's value."""
        return value

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """Where ranks share a disk, the leader of a machine goes first: what it caches, the others find."""
        yield

    def load(self, trainer: Trainer) -> dict[str, Any] | None:
        """The newest checkpoint's state, for ``trainer.load_state_dict``; None if there is none."""
        return trainer.checkpointer.load()

    def to_save(self, state: dict[str, Any]) -> dict[str, Any]:
        """What of a trainer's state this rank has to save."""
        return state

    def model_size(self, trainer: Trainer) -> tuple[int, float]:
        """Parameters of the whole model, and floating-point operations per token."""
        parameters = sum(p.numel() for p in trainer.model.parameters())
        return parameters, trainer.workload.flops_per_token(trainer.model)

    def report(self) -> dict[str, Any]:
        """How the run was divided, for its summary: plain data."""
        return {}


def ranks_here() -> int:
    """How many ranks this process was started among: by `headway train --ranks`, by torchrun, or alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def engine_for(recipe: Recipe) -> Engine:
    """The engine for this process's place.

    Raises:
        RecipeError: the recipe divides the run, and the number of ranks does not fit.
    """
    if "WORLD_SIZE" in os.environ or _initialized():
        engine: Engine = registry.find("engines", "parallel", "parallel")(recipe)
        return engine
    asked = recipe.parallel
    wanted = asked.replicate * (1 if asked.shard == "auto" else asked.shard) * asked.sequence.degree
    wanted *= asked.tensor.degree * asked.pipeline.degree
    if wanted > 1:
        raise RecipeError("parallel", f"divides the run among {wanted} ranks, and there is one process",
                          hint=f"`headway train RECIPE --ranks {wanted}`, or torchrun")  # fmt: skip
    return Engine(recipe)


def _initialized() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized()
