"""What a step of a deep model takes, from steps of shallow ones.

All blocks of a model are alike, so each further block adds the same bytes to each phase of a step and the same time.
Two shallow copies of the model, at the true width, sequence and micro-batch, tell both.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields

from headway.core.build import build_trainer
from headway.core.errors import HeadwayError, is_out_of_memory
from headway.core.meters import live_bytes, live_peak, synchronize
from headway.core.recipe import Recipe
from headway.core.trainer import Trainer

MICRO_BATCHES = 2
"""Micro-batches of a probed step at most: the second one finds the first one's gradients in memory."""


@dataclass(frozen=True)
class Footprint:
    """A step's needs."""

    idle: float
    """Live bytes between two steps: weights, masters, optimizer state."""
    gradients: float
    """Live bytes that a step's gradients add, at its end."""
    backward: float
    """Highest number of live bytes during forward and backward passes."""
    update: float
    """Highest number of live bytes from the clipping to the end of the update."""
    pass_seconds: float
    """Time of one micro-batch."""
    update_seconds: float

    @property
    def peak(self) -> float:
        """Highest number of live bytes in a step."""
        return max(self.backward, self.update)

    def seconds(self, micro_batches: int) -> float:
        """Time of a step of so many micro-batches."""
        return micro_batches * self.pass_seconds + self.update_seconds


def footprint(recipe: Recipe, depths: tuple[int, int], measure: Callable[[Recipe], Footprint]) -> Footprint:
    """The needs of a step of ``recipe``, from those of copies with ``depths`` blocks, each told by ``measure``.

    Raises:
        HeadwayError: the recipe cannot be run, or its model has no ``layers``.
        MemoryError: not even the shallow copies fit in this machine's memory.
    """
    layers = getattr(recipe.model, "layers", None)
    if layers is None:
        raise HeadwayError("memory.budget", f"needs model.layers, which {type(recipe.model).__name__} does not have",
                           hint="choose the methods by hand: `headway methods`")  # fmt: skip
    if layers <= depths[1]:
        return measure(recipe)
    low, high = (measure(shallow(recipe, depth)) for depth in depths)
    return extrapolate(low, high, depths, layers)


def extrapolate(low: Footprint, high: Footprint, depths: tuple[int, int], layers: int) -> Footprint:
    """The line through ``low`` at ``depths[0]`` blocks and ``high`` at ``depths[1]``, at ``layers`` blocks."""
    share = (layers - depths[1]) / (depths[1] - depths[0])
    names = [field.name for field in fields(Footprint)]
    grown = {n: max(0.0, getattr(high, n) - getattr(low, n)) for n in names}
    return Footprint(**{n: getattr(high, n) + share * grown[n] for n in names})


def shallow(recipe: Recipe, layers: int) -> Recipe:
    """The same recipe with fewer blocks, from random weights."""
    raw = recipe.to_dict()
    raw["model"]["layers"] = layers
    if raw["model"].get("window_layers") is not None:
        raw["model"]["window_layers"] = [layer for layer in raw["model"]["window_layers"] if layer < layers]
    raw["train"]["from"] = None
    return Recipe.load(raw)


def measure(recipe: Recipe) -> Footprint:
    """Run two steps of ``recipe``: one makes the optimizer's state, one is metered; the faster one's time counts.

    Raises:
        MemoryError: memory did not suffice.
    """
    micro = recipe.train.micro_batch or recipe.train.batch
    size = micro * min(MICRO_BATCHES, recipe.train.batch // micro)
    raw = recipe.to_dict()
    raw["train"].update(batch=size, micro_batch=micro, steps=2, tokens=None, time=None)
    try:
        return _measure(build_trainer(Recipe.load(raw)), size // micro)
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise MemoryError(str(error)) from None
        raise


def _measure(trainer: Trainer, micro_batches: int) -> Footprint:
    first_passes, first_update = _timed(trainer, _passes), _timed(trainer, _update)
    idle = live_bytes(trainer.device)
    passes, backward = live_peak(lambda: _timed(trainer, _passes), trainer.device)
    gradients = live_bytes(trainer.device) - idle
    update, updating = live_peak(lambda: _timed(trainer, _update), trainer.device)
    return Footprint(idle, gradients, backward, updating, min(passes, first_passes) / micro_batches,
                     min(update, first_update))  # fmt: skip


def _passes(trainer: Trainer) -> None:
    batch = next(trainer.stream)
    trainer.model.train()
    for micro in batch.micro:
        on_device = {key: value.to(trainer.device) for key, value in micro.items()}
        trainer.forward_backward(on_device, batch.targets)


def _update(trainer: Trainer) -> None:
    trainer.gradients()
    trainer.update()


def _timed(trainer: Trainer, function: Callable[[Trainer], None]) -> float:
    start = time.perf_counter()
    function(trainer)
    synchronize(trainer.device)
    return time.perf_counter() - start
