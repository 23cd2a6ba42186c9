"""Every way to lay a recipe out on so many ranks, each with the reason if it is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from headway.core.errors import RecipeError
from headway.core.recipe import Recipe
from headway.parallel.legality import check_layout
from headway.parallel.mesh import DIMENSIONS, Layout, settle


@dataclass(frozen=True)
class Candidate:
    """One layout of a recipe."""

    layout: Layout
    recipe: Recipe
    """The recipe laid out so, kinds and schedules as it had them."""
    refused: str | None
    """Why it cannot be; None where it can."""


def laid_out(recipe: Recipe, layout: Layout) -> Recipe:
    """The recipe with these numbers of ranks in its ``parallel`` section; kinds and schedules stay."""
    degrees = {"pipeline": "pipeline.degree", "replicate": "replicate", "shard": "shard",
               "sequence": "sequence.degree", "tensor": "tensor.degree", "expert": "experts.degree",
               "expert_tensor": "experts.tensor"}  # fmt: skip
    return recipe.override(*(f"parallel.{key}={getattr(layout, name)}" for name, key in degrees.items()))


def settled(recipe: Recipe, ranks: int) -> Layout:
    """The recipe's own layout of ``ranks`` ranks, checked.

    Raises:
        RecipeError: it cannot be laid out so.
    """
    layout = settle(recipe.parallel, ranks, recipe.train.batch)
    check_layout(recipe, layout)
    return layout


def every_layout(recipe: Recipe, ranks: int) -> Iterator[Candidate]:
    """All products of dimensions that make up ``ranks``; for a model with experts, with all grids of theirs."""
    experts = getattr(recipe.model, "experts", None)
    for sizes in _products(ranks, len(DIMENSIONS)):
        layout = Layout(*sizes)
        for expert, expert_tensor in _grids(ranks // layout.pipeline, experts) if experts else [(1, 1)]:
            changed = replace(layout, expert=expert, expert_tensor=expert_tensor)
            candidate = laid_out(recipe, changed)
            refused = None
            try:
                check_layout(candidate, changed)
            except RecipeError as error:
                refused = str(error)
            yield Candidate(changed, candidate, refused)


def _products(number: int, factors: int) -> Iterator[tuple[int, ...]]:
    if factors == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _products(number // first, factors - 1):
                yield (first, *rest)


def _grids(stage: int, experts: int) -> Iterator[tuple[int, int]]:
    for degree in range(1, min(stage, experts) + 1):
        for tensor in range(1, stage // degree + 1):
            if stage % (degree * tensor) == 0 and experts % degree == 0:
                yield degree, tensor
