"""What `headway profile` shows: one recipe's step taken apart, and how the step changes from setting to setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from headway.core.recipe import Recipe
from headway.plan.dissect.measure import measure_recipe
from headway.plan.dissect.results import CellResult, ratio
from headway.plan.dissect.spec import run_grid

WARMUP, MEASURED = 3, 8  # steps


def profile_recipe(recipe: Recipe, steps: int = 3) -> dict[str, Any]:
    """Train some steps of ``recipe`` and take the last ``steps`` apart; nothing is saved.

    Returns:
        The breakdown of the time (``tree`` and what `Tree.to_dict` has beside it), ``memory``, ``tokens_per_second``,
        ``parameters``, ``hardware`` and ``versions``: what a run's report reads from ``RUN/profile.json``.

    Raises:
        HeadwayError: the recipe cannot be run.
    """
    found = measure_recipe({"recipe": recipe.to_dict(), "warmup": WARMUP, "measure": MEASURED, "dissect": steps})
    middle = sorted(found["step_seconds"])[len(found["step_seconds"]) // 2]
    facts = {key: found[key] for key in ("memory", "parameters", "hardware", "versions")}
    return {**found["tree"], **facts, "tokens_per_second": found["tokens_per_step"] / middle}


def profile_settings(
    recipe: Recipe,
    settings: Mapping[str, str | None],
    log: str | Path,
    *,
    combine: int = 1,
    batches: Sequence[int] = (),
    repeats: int = 3,
    drift: float | None = 0.05,
    say: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """The macro table: the recipe without and with each setting, each in a process of its own, in turns.

    Args:
        settings: name -> override of the recipe, or None for what Headway knows by that name (a method, ``compile``).
        log: JSON lines that are appended to; what it holds already is not measured again.
        combine: most settings at a time.
        batches: values of ``train.batch`` to climb until one fails; default: the recipe's.
        drift: a measurement beside which the plain recipe's was off its median by more than this share is void; None
            keeps everything.
        say: is told of each measurement.

    Returns:
        A row per cell: ``setting``, ``batch``, ``sequence``, ``status``, ``cause``; where it was measured also
        ``step_milliseconds``, ``tokens_per_second``, ``utilization``, ``peak_memory_bytes``, and ``time_ratio`` and
        ``memory_ratio`` to the plain recipe of the same batch.

    Raises:
        HeadwayError: the recipe or a setting is refused.
    """
    grid = {"recipe": recipe.to_dict(), "techniques": dict(settings), "combine": combine, "batches": list(batches),
            "warmup": WARMUP, "measure": MEASURED, "repeats": repeats, "drift": drift}  # fmt: skip
    return [_row(cell, table[0]) for table in run_grid(grid, log, say).tables() for cell in table]


def _row(cell: CellResult, plain: CellResult) -> dict[str, Any]:
    row: dict[str, Any] = {"setting": cell.name, **cell.labels, "status": cell.status, "cause": cell.cause}
    if cell.status != "ok":
        return row
    for name in ("step_milliseconds", "tokens_per_second", "utilization", "peak_memory_bytes"):
        row[name] = cell.metric(name)
    if plain.status == "ok":
        row["time_ratio"] = ratio(cell, plain).value
        row["memory_ratio"] = ratio(cell, plain, "peak_memory_bytes").value
    return row
