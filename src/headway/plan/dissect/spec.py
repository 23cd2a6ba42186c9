"""A grid as a file or a mapping, and its cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from headway.core.errors import HeadwayError, RecipeError
from headway.core.options import Options, parse_options
from headway.core.recipe import Recipe
from headway.core.units import Bytes, Seconds
from headway.plan.dissect.grid import Cell, Conduct, run_cells
from headway.plan.dissect.results import LEAST_STEPS, Results
from headway.plan.dissect.techniques import Rule, combinations, recipe_rule, technique

LADDER = (1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 192, 224, 256)
"""Batches of the published grid."""


class GridOptions(Options):
    """What to measure: every allowed set of techniques, at every model, sequence and batch."""

    recipe: dict[str, Any] | str
    """The recipe without techniques, or its file."""
    techniques: dict[str, Any]
    """Name to override or overrides, as `accumulate: train.micro_batch=2`; null takes Headway's own of that name."""
    combine: int = Field(4, ge=0)
    """Most techniques at a time."""
    models: dict[str, tuple[str, ...]] = Field({})
    """Name to overrides; default: the recipe's model."""
    sequences: tuple[int, ...] = ()
    """Values of `data.sequence`; default: the recipe's."""
    batches: tuple[int, ...] = ()
    """Values of `train.batch`, from small to large: a ladder that stops at the first failure. Default: the recipe's."""
    warmup: int = Field(3, ge=2)
    """Steps before those that are measured."""
    measure: int = Field(10, ge=LEAST_STEPS)
    """Measured steps."""
    repeats: int = Field(3, ge=1)
    """Rounds over all cells."""
    timeout: Seconds = Field(600.0, gt=0)
    """A cell that takes longer is stopped."""
    memory: Bytes | None = Field(None, gt=0)
    """Bytes that a cell may allocate, to try out a smaller machine."""
    drift: float | None = Field(0.05, gt=0)
    """Cells are void beside which the reference was off by a larger share; null measures no reference."""
    retries: int = Field(1, ge=0)
    """How often a void cell is measured again."""

    @property
    def conduct(self) -> Conduct:
        """How it is measured."""
        return Conduct(self.repeats, self.timeout, self.memory, self.drift, self.retries)


def load_grid(source: str | Path | Mapping[str, Any] | GridOptions) -> GridOptions:
    """A grid from a YAML file (the recipe's path is relative to it) or a mapping.

    Raises:
        HeadwayError: the file is missing or no YAML, or an option is unknown or refused.
    """
    if isinstance(source, GridOptions):
        return source
    if isinstance(source, Mapping):
        return parse_options(GridOptions, dict(source), "grid")
    path = Path(source)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HeadwayError(str(path), f"cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise HeadwayError(str(path), f"is not YAML ({error})") from None
    if isinstance(raw, dict) and isinstance(raw.get("recipe"), str):
        raw["recipe"] = str(path.parent / raw["recipe"])
    return parse_options(GridOptions, raw, "grid")


def cells_of(grid: GridOptions) -> tuple[list[Cell], dict[str, str]]:
    """The cells of a grid, ladders from the lowest rung up, and the sets that are not allowed with the reason.

    Raises:
        HeadwayError: the recipe is not valid, or a technique is unknown.
    """
    recipe = Recipe.load(grid.recipe)
    techniques = {name: technique(value, name) for name, value in grid.techniques.items()}
    refused: dict[str, str] = {}
    cells = []
    for model, model_overrides in (grid.models or {"": ()}).items():
        for sequence in grid.sequences or (recipe.data.sequence,):  # type: ignore[attr-defined]
            base = recipe.override(*model_overrides, f"data.sequence={sequence}")
            sets = combinations(list(techniques), _noting(recipe_rule(base, techniques), refused), grid.combine)
            for batch in grid.batches or (recipe.train.batch,):
                for chosen in sets:
                    overrides = [f"train.batch={batch}", *(o for name in chosen for o in techniques[name])]
                    labels = {**({"model": model} if model else {}), "sequence": sequence, "batch": batch}
                    work = {
                        "recipe": base.override(*overrides).to_dict(),
                        "warmup": grid.warmup,
                        "measure": grid.measure,
                    }
                    cells.append(Cell(chosen, work, labels, ladder="/".join((model, str(sequence), *chosen))))
    return cells, refused


def _noting(rule: Rule, refused: dict[str, str]) -> Rule:
    def noted(chosen: tuple[str, ...]) -> str | None:
        reason = rule(chosen)
        if reason and len(chosen) > 1:
            refused["+".join(chosen)] = reason
        if reason and len(chosen) <= 1:  # not a matter of combination: the recipe or the technique is wrong
            raise RecipeError(f"grid.techniques.{chosen[0]}" if chosen else "grid.recipe", f"cannot be run: {reason}")
        return reason

    return noted


def run_grid(
    spec: str | Path | Mapping[str, Any] | GridOptions,
    log: str | Path,
    say: Callable[[str], None] | None = None,
) -> Results:
    """Measure a grid; started again with the same log it goes on where it was.

    Args:
        log: JSON lines, appended to; a measurement is known by its recipe and its machine.
        say: is told of each measurement.

    Raises:
        HeadwayError: the grid is not valid or has no cell.
    """
    grid = load_grid(spec)
    cells, refused = cells_of(grid)
    for name, reason in refused.items():
        (say or (lambda _: None))(f"{name} is left out: {reason}")
    return run_cells(cells, log, grid.conduct, say=say)
