"""A recipe with a memory budget becomes one with the switches that keep it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from headway.core import registry
from headway.core.errors import HeadwayError
from headway.core.recipe import Recipe

FILE = "memory.json"
"""The plan's name in a run directory: a run that goes on keeps the switches that it began with."""


class Plan(Protocol):
    """What the planner answers."""

    budget: int
    predicted_bytes: int

    def apply(self, recipe: Recipe) -> Recipe:
        """The recipe with the plan's switches, without a budget."""

    def explain(self) -> str:
        """The choice and its reasons, for a person."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""


def plan_for(recipe: Recipe, folder: Path | None = None, say: Callable[[str], None] = lambda _: None) -> Plan | None:
    """The plan that keeps ``recipe.memory.budget``: the one kept in ``folder``, or a new one; None without a budget.

    Raises:
        HeadwayError: nothing fits, or the kept plan cannot be read.
    """
    if recipe.memory.budget is None:
        return None
    kept = folder / FILE if folder is not None else None
    if kept is not None and kept.is_file():
        try:
            plan: Plan = registry.find("planners", "memory-plan", "memory.budget")(json.loads(kept.read_text("utf-8")))
        except (ValueError, KeyError, TypeError) as error:
            raise HeadwayError(str(kept), f"is no memory plan ({error})", hint="restore it, or start over with "
                               "--fresh") from error  # fmt: skip
        return plan
    say("planning for the memory budget")
    planned: Plan = registry.find("planners", "memory", "memory.budget")(recipe, say)
    return planned
