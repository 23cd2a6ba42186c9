"""Does a layout train what one process trains? The same recipe both ways, losses and gradients side by side."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

import headway.parallel.engine
import headway.parallel.experts.parallel
import headway.parallel.pipeline
import headway.parallel.sequence.linear
import headway.parallel.tensor  # noqa: F401
from headway.core.build import build_trainer
from headway.core.recipe import Recipe
from headway.core.trainer import Trainer
from headway.parallel.local import run_ranks
from headway.parallel.pipeline.trace import Span


@dataclass(frozen=True)
class Parity:
    """How far a layout's training is from one process's."""

    layout: str
    ranks: int
    losses: list[tuple[float, float]]
    """(one process, ranks) for each step, then for the evaluation after them."""
    gradients: dict[str, float]
    """Parameter -> largest difference of its gradient in the first step, relative to the largest gradient."""
    changes: list[str]
    timeline: list[Span] = field(default_factory=list)
    """The passes of the last step through a pipeline's stages, for ``chrome_trace``."""

    @property
    def loss_difference(self) -> float:
        """The largest relative difference of a loss."""
        return max(abs(a - b) / max(abs(a), 1e-300) for a, b in self.losses)

    @property
    def gradient_difference(self) -> float:
        """The largest relative difference of a gradient."""
        return max(self.gradients.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"layout": self.layout, "ranks": self.ranks, "loss_difference": self.loss_difference,
                "gradient_difference": self.gradient_difference, "losses": self.losses,
                "gradients": self.gradients, "changes": self.changes}  # fmt: skip


@dataclass(frozen=True)
class Control:
    """What one process finds, with which layouts are compared."""

    losses: list[float]
    """Of each step, then of the evaluation after them."""
    gradients: dict[str, Tensor]
    """Of the first step, by parameter."""


def one_process(recipe: Recipe, steps: int = 3) -> Control:
    """Train ``steps`` steps of the recipe in one process, whatever its ``parallel`` section says.

    Raises:
        HeadwayError: the recipe cannot be run.
    """
    losses, gradients, _, _ = run_ranks(1, _train, recipe.override("parallel=null"), steps)[0]
    return Control(losses, gradients)


def parity(recipe: Recipe, ranks: int, steps: int = 3, control: Control | None = None) -> Parity:
    """Train ``steps`` steps in one process and on ``ranks`` forked here, from the same weights on the same data.

    Args:
        recipe: with the ``parallel`` section that is to be checked; ``train.precision=fp64`` shows faults that fp32's
            rounding hides.
        control: what one process finds in as many steps, where it is known already.

    Raises:
        HeadwayError: the recipe cannot be run or laid out so; a rank failed.
    """
    alone = control or one_process(recipe, steps)
    losses, gradients, report, timeline = run_ranks(ranks, _train, recipe, steps)[0]
    largest = max(float(g.abs().max()) for g in alone.gradients.values())
    differences = {name: float((gradients[name] - g).abs().max()) / largest for name, g in alone.gradients.items()}
    layout, changes = report.get("layout", "one rank"), report.get("changes", [])
    return Parity(layout, ranks, list(zip(alone.losses, losses, strict=True)), differences, changes, timeline)


def _train(_: int, recipe: Recipe, steps: int) -> tuple[list[float], dict[str, Tensor], dict[str, Any], list[Span]]:
    trainer = build_trainer(recipe)
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    inner = trainer.gradients

    def keep() -> Tensor:
        norm = inner()  # sums what several ranks have parts of, and clips
        if not gradients:
            gradients.update(whole_gradients(trainer))
        return norm

    trainer.gradients = keep
    for _step in range(steps):
        losses.append(trainer.train_step()["loss"])
    timeline: list[Span] = trainer.engine.timeline()  # type: ignore[attr-defined]  # before the evaluation's passes
    losses.append(trainer.evaluate()["eval_loss"])
    return losses, gradients, trainer.engine.report(), timeline


def whole_gradients(trainer: Trainer) -> dict[str, Tensor]:
    """Name -> the gradient of the whole parameter, on the CPU; all ranks call it, and each gets all.

    Parameters of other pipeline stages come from the ranks that have them.
    """
    import torch.distributed as dist

    # DTensor warns that gathering what is divided in two ways takes two messages; here nobody counts them.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    masters: dict[Tensor, Tensor] = getattr(trainer.optimizer, "masters", {})
    own: dict[str, Tensor] = {}
    for name, parameter in trainer.model.named_parameters():
        grad: Any = masters.get(parameter, parameter).grad
        if grad is not None:
            own[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).detach().cpu().clone()
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return own
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    return {name: grad for part in reversed(everywhere) for name, grad in part.items()}
