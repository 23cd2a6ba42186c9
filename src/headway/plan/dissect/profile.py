"""What `headway profile` shows: a recipe's step taken apart, and how it changes from setting to setting."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
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
from headway.plan.dissect.techniques import combinations, recipe_rule, technique

WARMUP, MEASURE = 3, 8
_METRICS = ("step_milliseconds", "tokens_per_second", "flops_rate", "utilization", "peak_memory_bytes",
            "process_peak_bytes", "device_peak_bytes")  # fmt: skip
Settings = Mapping[str, Sequence[str]] | Sequence[Sequence[str]]


@dataclass(frozen=True)
class Setting:
    """A recipe with overrides at one batch, as measured here."""

    name: str
    batch: int
    cell: CellResult
    """Its step times; its status and cause where it failed."""
    time_ratio: float | None
    """Step time over that of the first setting at the same batch, median of the repeats."""
    memory_ratio: float | None
    """The same of the live peak."""
    value: dict[str, Any] | None
    """With ``tree`` and ``memory``, where its step was taken apart: at the first batch."""

    @property
    def phases(self) -> dict[str, float]:
        """Phase -> share of the step; empty where it was not taken apart."""
        return {p["name"]: p["share"] for p in self.value["tree"]["tree"]["children"]} if self.value else {}

    def to_dict(self) -> dict[str, Any]:
        """Plain data: a row of the table by setting."""
        cell = self.cell
        row: dict[str, Any] = {"setting": self.name, "batch": self.batch, "status": cell.status, "cause": cell.cause}
        if cell.status == "ok":
            row |= {name: cell.metric(name) for name in _METRICS}
            row |= {"step_seconds": cell.step_seconds, "precision": cell.precision}
            row |= {"losses": cell.repeats[0]["losses"], "changes": cell.repeats[0]["changes"], "phases": self.phases}
        ratios = {"time_ratio": self.time_ratio, "memory_ratio": self.memory_ratio}
        return row | {name: value for name, value in ratios.items() if value is not None}


@dataclass(frozen=True)
class ProfileReport:
    """A profile of one recipe."""

    recipe: str
    settings: list[Setting]
    """The first that worked is taken apart in the report; the others stand beside it."""

    @property
    def base(self) -> Setting:
        """The first setting whose step was taken apart."""
        return next(s for s in self.settings if s.value is not None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the base's breakdown at the top, where a run's report looks for it, and a row per setting."""
        base = self.base
        assert base.value is not None
        facts = {key: base.value[key] for key in ("memory", "parameters", "trained", "hardware", "versions")}
        rows = {"settings": [setting.to_dict() for setting in self.settings]} if len(self.settings) > 1 else {}
        rate = {"tokens_per_second": base.cell.tokens_per_second, "setting": base.name, "recipe": self.recipe}
        return {**base.value["tree"], **facts, **rate, **rows}

    def save(self, path: str | Path) -> None:
        """Write ``profile.json``, whole."""
        write_json(path, self.to_dict())

    def tables(self, depth: int = 4, least: float = 0.005) -> list[Any]:
        """Rich tables: the step by phase and module, its operations, its memory; several settings side by side.

        Args:
            depth: levels of the breakdown.
            least: leave out what takes a smaller share of the step.
        """
        from headway.plan.dissect import tables

        base = self.base
        assert base.value is not None
        several = [tables.settings_table(self.settings)] if len(self.settings) > 1 else []
        return [
            tables.breakdown_table(base.value["tree"], depth, least),
            tables.operations_table(base.value["tree"], least),
            tables.memory_table(base.value["memory"]),
            *several,
        ]


def profile_recipe(
    recipe: Recipe | str | Path | dict[str, Any],
    *,
    steps: int = 3,
    settings: Settings = (),
    batches: Sequence[int] = (),
    measure: int = MEASURE,
    repeats: int = 3,
    drift: float | None = None,
    timeout: float = 1200.0,
    log: str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> ProfileReport:
    """Train a few steps of a recipe, or of several settings of it, and take them apart.

    Several are measured in processes of their own and in turns, so that one may fail without the others; a single one
    in this process.

    Args:
        steps: dissected steps; the figures of a breakdown are means over them.
        settings: name -> overrides, or overrides alone (see ``vary`` and ``with_settings``); the first is what the
            others are compared with.
        batches: values of ``train.batch`` to climb with each setting until it fails; default: the recipe's.
        measure: steps whose time is measured, per repeat.
        repeats: rounds over the settings.
        drift: a measurement is void while the first setting was off its median by more than this share; None keeps all.
        timeout: seconds after which a setting is given up.
        log: JSON lines, appended to; what it has is not measured again. Default: nothing is kept.
        say: is told of the progress.

    Raises:
        HeadwayError: the recipe or a setting is refused, or none of them can be run.
    """
    base = Recipe.load(recipe)
    named = _named(settings)
    if len(named) == 1 and len(batches) <= 1:
        [(name, overrides)] = named.items()
        chosen = base.override(*overrides, *(f"train.batch={batch}" for batch in batches))
        value = measure_recipe({**_work(chosen, measure), "dissect": steps})
        whole = CellResult("", (name,), {}, "ok", "", "", {0: value})
        return ProfileReport(base.name, [Setting(name, chosen.train.batch, whole, None, None, value)])
    timed, apart = [], []
    rungs: Sequence[int | None] = batches or (None,)
    for batch in rungs:
        for name, overrides in named.items():
            at = base.override(*overrides, *([f"train.batch={batch}"] if batch else []))
            work, labels = _work(at, measure), {"batch": at.train.batch}
            timed.append(Cell((name,), work, labels, ladder=name))
            if batch == rungs[0]:
                apart.append(Cell((name,), {**work, "dissect": steps}, labels))
    with tempfile.TemporaryDirectory(prefix="headway-profile-") as folder:
        path = log or Path(folder) / "profile.jsonl"
        times = run_cells(timed, path, Conduct(repeats, timeout, drift=drift), say=say)
        trees = run_cells(apart, path, Conduct(1, timeout, drift=None), say=say)
    found = _settings(times, {c.techniques[0]: c.repeats[0] for c in trees.cells if c.status == "ok"})
    if all(setting.value is None for setting in found):
        raise HeadwayError(base.name, "; ".join(f"{s.name}: {s.cell.status}, {s.cell.cause}" for s in found))
    return ProfileReport(base.name, found)


def _work(recipe: Recipe, measure: int) -> dict[str, Any]:
    return {"recipe": recipe.to_dict(), "warmup": WARMUP, "measure": measure}


def _named(settings: Settings) -> dict[str, tuple[str, ...]]:
    if isinstance(settings, Mapping):
        return {name: tuple(overrides) for name, overrides in settings.items()} or {"none": ()}
    return {" ".join(overrides) or "none": tuple(overrides) for overrides in settings} or {"none": ()}


def _settings(times: Results, values: Mapping[str, dict[str, Any]]) -> list[Setting]:
    found: list[Setting] = []
    for table in times.tables():
        first, batch = table[0], table[0].labels["batch"]
        for cell in table:
            both = cell.status == first.status == "ok" and cell.tokens_per_step == first.tokens_per_step
            time, memory = (
                ratio(cell, first, metric).value if both else None
                for metric in ("step_milliseconds", "peak_memory_bytes")
            )
            name = cell.techniques[0]
            apart = values.get(name) if cell.status == "ok" and not any(s.name == name for s in found) else None
            found.append(Setting(name, batch, cell, time, memory, apart))
    return found


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
            raise RecipeError(text, "is nothing to vary", expected="values, such as train.precision=fp32,bf16")
        choices.append([f"{key}={_written(value)}" for value in parsed])
    return [tuple(chosen) for chosen in itertools.product(*choices)]


def _written(value: Any) -> str:
    """``value`` as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9).strip()
    return text.removesuffix("...").strip()


def with_settings(recipe: Recipe, named: Mapping[str, str | None], combine: int = 1) -> dict[str, tuple[str, ...]]:
    """The plain recipe, each named change of it, and the allowed combinations of up to ``combine`` of them.

    Args:
        named: name -> override, or None for what Headway knows by that name: a method, ``bf16``, ``compile``.

    Raises:
        HeadwayError: a name that is none, or a change that the recipe does not allow.
    """
    changes = {name: technique(change, name) for name, change in named.items()}
    rule = recipe_rule(recipe, changes)
    for name in changes:
        if reason := rule((name,)):
            raise RecipeError(name, f"cannot be set: {reason}")
    sets = combinations(list(changes), rule, combine)
    return {"+".join(chosen) or "none": tuple(o for name in chosen for o in changes[name]) for chosen in sets}
