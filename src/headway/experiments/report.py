"""`headway report`: one self-contained HTML page on one run, or on several side by side; and one on evidence."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.core.errors import HeadwayError
from headway.core.files import write_text
from headway.core.units import human, human_seconds
from headway.experiments.charts import COLORS
from headway.experiments.curves import Log, loss_chart, other_charts
from headway.experiments.differences import recipe_differences
from headway.experiments.evidence_report import write_evidence_report
from headway.experiments.page import hardware_line, render
from headway.experiments.profile_report import profile_view

if TYPE_CHECKING:
    from headway.core.run import Run

__all__ = ["write_evidence_report", "write_report"]

Summary = dict[str, Any]
Show = Callable[[float], str]

# Key of summary.json, its name, how it is shown, and whether more (+1) or less (-1) of it is better.
_FACTS: tuple[tuple[str, str, Show, int], ...] = (
    ("eval_loss", "eval loss", "{:.4f}".format, -1),
    ("bits_per_byte", "bits per byte", "{:.4f}".format, -1),
    ("tokens_per_second", "tokens per second", human, 1),
    ("model_flops_utilization", "of the matrix-product peak", "{:.1%}".format, 1),
    ("peak_memory_bytes", "live peak", lambda v: human(v, "B"), -1),
    ("process_peak_bytes", "process peak", lambda v: human(v, "B"), -1),
    ("device_peak_bytes", "device peak", lambda v: human(v, "B"), -1),
    ("train_seconds", "training time", human_seconds, -1),
    ("wall_seconds", "whole time", human_seconds, -1),
    ("tokens", "tokens", human, 0),
    ("steps", "steps", "{:,}".format, 0),
    ("parameters", "parameters", human, 0),
)
_MEMORY = ("peak_memory_bytes", "process_peak_bytes", "device_peak_bytes")


def write_report(runs: Sequence[Run], out: str | Path) -> Path:
    """Write the page.

    It holds loss curves, learning rate, throughput, memory, gradient norm, a summary, methods with their changes,
    fallbacks and the machine; of several runs also the keys in which their recipes differ, and where ``headway
    profile`` left a ``profile.json`` in a run, its breakdown of a step.

    Args:
        runs: finished or not.
        out: the file to write; whole, or not at all.

    Raises:
        HeadwayError: no runs, or a run whose files are damaged.
    """
    if not runs:
        raise HeadwayError("report", "needs a run", hint="give a run directory, such as runs/quickstart-1")
    labels = _labels(runs)
    logs = [Log.of(run, label) for run, label in zip(runs, labels)]
    summaries = [_summary(run, log) for run, log in zip(runs, logs)]
    single = len(runs) == 1
    page = render(
        "report.html",
        kind="run report" if single else "runs side by side",
        title=f"{', '.join(labels)} · Headway",
        heading=labels[0] if single else " · ".join(labels),
        subtitle=_subtitle(runs[0], summaries[0]) if single else f"{len(runs)} runs",
        footer=f"Made by headway report on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC. This file needs no network.",
        unfinished=[label for run, label in zip(runs, labels) if not run.summary],
        colors=COLORS,
        runs=[
            {"label": label, "recipe": run.recipe.to_yaml(), "machine": _machine(summary)}
            for run, label, summary in zip(runs, labels, summaries)
        ],
        tiles=_tiles(summaries[0]) if single else [],
        summary=[] if single else _summary_rows(summaries, [bool(run.summary) for run in runs]),
        warnings=[
            {"run": "" if single else label, **entry}
            for label, summary in zip(labels, summaries)
            for entry in summary.get("fallbacks", [])
        ],
        loss=_loss_views(logs),
        charts=other_charts(logs),
        memory=_memory_bars(labels, summaries),
        profiles=[
            {"run": "" if single else label, **view}
            for run, label in zip(runs, labels)
            if (view := profile_view(run.path / "profile.json"))
        ],
        differences=_differences(runs),
        methods=[
            {"run": "" if single else label, "name": name, "changes": changes}
            for label, summary in zip(labels, summaries)
            for name, changes in summary.get("methods", {}).items()
        ],
    )
    write_text(out, page)
    return Path(out)


def _labels(runs: Sequence[Run]) -> list[str]:
    names = [run.name for run in runs]
    return [str(run.path) if names.count(name) > 1 else name for run, name in zip(runs, names)]


def _summary(run: Run, log: Log) -> Summary:
    """The run's summary; of one that is not finished, what its log says so far."""
    try:
        if summary := run.summary:
            return summary
    except json.JSONDecodeError as error:
        raise HeadwayError(str(run.path / "summary.json"), f"is no JSON ({error})") from None
    so_far: Summary = {}
    if log.steps:
        last = log.steps[-1]
        so_far = {key: last[key] for key in ("tokens", "tokens_per_second", "peak_memory_bytes") if key in last}
        so_far |= {"steps": last["step"], "train_seconds": log.seconds[-1]}
    if log.evaluations:
        so_far |= {k: v for k, v in log.evaluations[-1].items() if k not in ("step", "tokens")}
    return so_far


def _subtitle(run: Run, summary: Summary) -> str:
    recipe = run.recipe.to_dict()
    parts = [f"{recipe['model'].get('family', recipe['workload'])} model"]
    if "parameters" in summary:
        parts.append(f"{human(summary['parameters'])} parameters")
    if "tokens" in summary:
        parts.append(f"{human(summary['tokens'])} tokens in {summary['steps']:,} steps")
    parts.append(recipe["train"]["precision"])
    return ", ".join(parts)


def _machine(summary: Summary) -> str:
    return hardware_line(summary.get("hardware", {}), summary.get("versions", {})) if summary.get("hardware") else ""


def _tiles(summary: Summary) -> list[dict[str, str]]:
    def tile(key: str, name: str, show: Show, unit: str = "", note: str = "") -> dict[str, str] | None:
        value = summary.get(key)
        return None if value is None else {"name": name, "value": show(value), "unit": unit, "note": note}

    loss = summary.get("eval_loss")
    peak = summary.get("process_peak_bytes")
    used = summary.get("model_flops_utilization")
    found = (
        tile("bits_per_byte", "Bits per byte", "{:.3f}".format, "", "validation text"),
        tile("eval_loss", "Eval loss", "{:.3f}".format, "", "nats per target") if loss else None,
        tile("tokens_per_second", "Throughput", human, "tokens/s",
             f"{used:.0%} of the matrix-product peak" if used else ""),
        tile("peak_memory_bytes", "Live memory, peak", lambda v: human(v, "B"), "",
             f"process {human(peak, 'B')}" if peak else ""),
        tile("train_seconds", "Training time", human_seconds, "",
             f"{human_seconds(summary['wall_seconds'])} in all" if "wall_seconds" in summary else ""),
    )  # fmt: skip
    return [entry for entry in found if entry]


def _summary_rows(summaries: list[Summary], finished: list[bool]) -> list[dict[str, Any]]:
    rows = []
    for key, name, show, better in _FACTS:
        values = [summary.get(key) for summary in summaries]
        if all(value is None for value in values):
            continue
        # A run that is not finished has had less of everything: it neither wins nor is set in proportion.
        known = [value for value, done in zip(values, finished) if done and value is not None]
        best = (max if better > 0 else min)(known) if better and len(set(known)) > 1 else None
        first = values[0]
        cells = []
        for index, value in enumerate(values):
            related = index and finished[0] and finished[index] and first and value is not None and value != first
            ratio = f"{(value or 0) / first:.3g}x" if related and first else ""
            text = "–" if value is None else show(value)
            cells.append({"text": text, "best": best is not None and value == best, "ratio": ratio})
        rows.append({"name": name, "cells": cells})
    return rows


def _loss_views(logs: list[Log]) -> list[dict[str, Any]]:
    charts = (("by tokens", loss_chart(logs)), ("by training time", loss_chart(logs, by_time=True)))
    return [{"name": name, "chart": chart} for name, chart in charts if not chart.empty]


def _memory_bars(labels: list[str], summaries: list[Summary]) -> list[dict[str, Any]]:
    names = {key: name for key, name, _, _ in _FACTS}
    found = [
        (f"{names[key]}, {label}" if len(labels) > 1 else names[key], summary[key], index)
        for key in _MEMORY
        for index, (label, summary) in enumerate(zip(labels, summaries))
        if summary.get(key)
    ]
    largest = max((value for _, value, _ in found), default=1)
    return [
        {"name": name, "text": human(value, "B"), "width": f"{100 * value / largest:.1f}", "color": index % COLORS}
        for name, value, index in found
    ]


def _differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    differences = recipe_differences([run.recipe for run in runs])
    return [{"key": key, "values": ["–" if v is None else v for v in row]} for key, row in differences.items()]
