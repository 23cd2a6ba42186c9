"""What `headway profile` shows: a recipe's step taken apart, and settings of it side by side."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from headway.core.errors import HeadwayError, RecipeError
from headway.core.files import write_json
from headway.core.recipe import Recipe
from headway.plan.dissect.grid import Cell, Conduct, run_cells
from headway.plan.dissect.measure import measure_recipe
from headway.plan.dissect.results import CellResult, Results, ratio

WARMUP, MEASURE = 3, 5


@dataclass(frozen=True)
class Setting:
    """A recipe with overrides, as measured here."""

    overrides: tuple[str, ...]
    cell: CellResult
    """Its step times; its status and cause where it failed."""
    ratios: dict[str, float]
    """``step_milliseconds`` and ``peak_memory_bytes`` over those of the first setting, medians of the repeats."""
    tree: dict[str, Any] | None
    """Its step taken apart (``Tree.to_dict``); None where it failed."""
    memory: dict[str, Any] | None
    """Its memory by purpose (``MemoryReport.to_dict``)."""

    @property
    def name(self) -> str:
        """The overrides."""
        return " ".join(self.overrides) or "as it is"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        found: dict[str, Any] = {
            "overrides": list(self.overrides),
            "status": self.cell.status,
            "cause": self.cell.cause,
        }
        if self.cell.status == "ok":
            names = ("step_milliseconds", "tokens_per_second", "flops_rate", "utilization", "peak_memory_bytes")
            found |= {name: self.cell.metric(name) for name in (*names, "process_peak_bytes", "device_peak_bytes")}
            found |= {"step_seconds": self.cell.step_seconds, "ratios": self.ratios, "precision": self.cell.precision}
            found |= {"losses": self.cell.repeats[0]["losses"], "changes": self.cell.repeats[0]["changes"]}
        if self.tree is not None:
            phases = self.tree["tree"]["children"]
            found["phases"] = {p["name"]: {"milliseconds": p["milliseconds"], "share": p["share"]} for p in phases}
            found["memory"] = self.memory
        return found


@dataclass(frozen=True)
class ProfileReport:
    """A profile of one recipe."""

    recipe: str
    settings: list[Setting]
    """The first is taken apart in the report; the others stand beside it."""
    machine: dict[str, Any]

    @property
    def base(self) -> Setting:
        """The first setting that could be measured."""
        return next(s for s in self.settings if s.tree is not None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the base's tree and memory at the top, where a run's report looks for them, and every setting."""
        base = self.base
        return {
            "recipe": self.recipe,
            "setting": base.name,
            **(base.tree or {}),
            "memory": base.memory,
            "tokens_per_second": base.cell.tokens_per_second,
            "settings": [setting.to_dict() for setting in self.settings],
            "machine": self.machine,
        }

    def save(self, path: str | Path) -> None:
        """Write ``profile.json``, whole."""
        write_json(path, self.to_dict())

    def tables(self, depth: int = 4, least: float = 0.005) -> list[Any]:
        """Rich tables: the settings where there are several, the step by phase and module, the operations, the memory.

        Args:
            depth: levels of the breakdown.
            least: leave out what takes a smaller share of the step.
        """
        from headway.plan.dissect import tables

        base = self.base
        assert base.tree is not None and base.memory is not None
        several = [tables.settings_table(self.settings)] if len(self.settings) > 1 else []
        return [
            *several,
            tables.breakdown_table(base.tree, depth, least),
            tables.operations_table(base.tree, least),
            tables.memory_table(base.memory),
        ]


def profile_recipe(
    recipe: Recipe | str | Path | dict[str, Any],
    *,
    steps: int = 3,
    settings: Sequence[Sequence[str]] = (),
    measure: int = MEASURE,
    repeats: int = 3,
    timeout: float = 1200.0,
    say: Callable[[str], None] | None = None,
) -> ProfileReport:
    """Train a few steps of a recipe, or of several settings of it, and take them apart; nothing of it is kept.

    Several settings are measured in processes of their own and in turns, so that one may fail without the others; a
    single one in this process.

    Args:
        steps: dissected steps; the figures of a breakdown are means over them.
        settings: overrides, a list of them for each setting (see ``vary``).
        measure: steps whose time is measured, per repeat.
        repeats: rounds over the settings.
        timeout: seconds after which a setting is given up.
        say: is told of the progress.

    Raises:
        HeadwayError: the recipe cannot be run; with several settings: none of them can.
    """
    base = Recipe.load(recipe)
    overrides = [tuple(s) for s in settings] or [()]
    works = [{"recipe": base.override(*chosen).to_dict(), "warmup": WARMUP, "measure": measure} for chosen in overrides]
    names = [Cell(chosen, work) for chosen, work in zip(overrides, works)]
    if len(overrides) == 1:
        value = measure_recipe({**works[0], "dissect": steps})
        whole = CellResult(names[0].key, overrides[0], {}, "ok", "", "", {0: value})
        setting = Setting(overrides[0], whole, {}, value["tree"], value["memory"])
        return ProfileReport(base.name, [setting], {**value["hardware"], **value["versions"]})
    with tempfile.TemporaryDirectory(prefix="headway-profile-") as folder:
        conduct = Conduct(repeats=repeats, timeout=timeout, drift=None)
        timed = run_cells(names, Path(folder) / "times.jsonl", conduct, say=say)
        apart = [Cell(cell.techniques, {**cell.work, "dissect": steps}) for cell in names]
        once = Conduct(repeats=1, timeout=timeout, drift=None)
        dissected = run_cells(apart, Path(folder) / "trees.jsonl", once, say=say)
        machine = dissected.lines[0]["machine"]
    found = [_setting(cell, whole, timed, dissected) for cell, whole in zip(names, apart)]
    if all(setting.tree is None for setting in found):
        raise HeadwayError(base.name, "; ".join(f"{s.name}: {s.cell.status}, {s.cell.cause}" for s in found))
    return ProfileReport(base.name, found, machine)


def _setting(cell: Cell, whole: Cell, timed: Results, dissected: Results) -> Setting:
    by_key = {result.key: result for result in (*timed.cells, *dissected.cells)}
    result, apart = by_key[cell.key], by_key.get(whole.key)
    ratios = {}
    first = timed.cells[0]
    if result.status == first.status == "ok" and result.tokens_per_step == first.tokens_per_step:
        ratios = {name: ratio(result, first, name).value for name in ("step_milliseconds", "peak_memory_bytes")}
    if apart is None or apart.status != "ok" or result.status != "ok":
        return Setting(cell.techniques, result, ratios, None, None)
    value = apart.repeats[0]
    return Setting(cell.techniques, result, ratios, value["tree"], value["memory"])


def vary(texts: Sequence[str]) -> list[tuple[str, ...]]:
    """``train.precision=fp32,bf16`` -> the settings ``train.precision=fp32`` and ``train.precision=bf16``.

    Several texts multiply.

    Raises:
        RecipeError: no ``=``, or values that are no YAML.
    """
    choices = []
    for text in texts:
        key, equals, values = text.partition("=")
        try:
            parsed = yaml.safe_load(f"[{values}]")
        except yaml.YAMLError:
            raise RecipeError(key, got=values, expected="values in YAML, with commas between") from None
        if not equals or not key or not parsed:
            raise RecipeError(
                text, "is nothing to vary", expected="key.path=value,value, as in train.precision=fp32,bf16"
            )
        choices.append([f"{key}={_written(value)}" for value in parsed])
    return [tuple(chosen) for chosen in itertools.product(*choices)]


def _written(value: Any) -> str:
    """``value`` as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9).strip()
    return text.removesuffix("...").strip()
