"""Evidence files as a page: what was claimed, what was measured, and the figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from headway.core.errors import HeadwayError
from headway.core.files import write_text
from headway.core.units import human_seconds
from headway.experiments.base import Bound
from headway.experiments.charts import Chart, Line
from headway.experiments.evidence import Figure, Outcome, Row, load_evidence
from headway.experiments.page import hardware_line, render


def write_evidence_report(evidence: Sequence[Outcome | str | Path], out: str | Path) -> Path:
    """Write one page on the outcomes of experiments.

    Args:
        evidence: outcomes, or paths of evidence files or of folders of them.
        out: the file to write; whole, or not at all.

    Raises:
        HeadwayError: nothing to show, or a file that is no evidence.
    """
    outcomes = [outcome for item in evidence for outcome in _outcomes(item)]
    if not outcomes:
        raise HeadwayError("report", "found no evidence", hint="`headway reproduce NAME` makes some")
    held = sum(outcome.held for outcome in outcomes)
    single = len(outcomes) == 1
    page = render(
        "evidence.html",
        kind="evidence",
        title=f"{outcomes[0].title if single else 'Evidence'} · Headway",
        heading="Evidence",
        subtitle="Claimed and measured"
        if single
        else f"{len(outcomes)} experiments: {held} held here, {len(outcomes) - held} did not",
        footer=f"Made by headway report on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC. This file needs no network.",
        outcomes=[_outcome_view(outcome) for outcome in outcomes],
    )
    write_text(out, page)
    return Path(out)


def _outcomes(item: Outcome | str | Path) -> list[Outcome]:
    if isinstance(item, Outcome):
        return [item]
    path = Path(item)
    return [load_evidence(p) for p in sorted(path.glob("*.json"))] if path.is_dir() else [load_evidence(path)]


def _outcome_view(outcome: Outcome) -> dict[str, Any]:
    measured = f"measured on {outcome.date[:10]} in {human_seconds(outcome.minutes * 60)}"
    seeds = f"seeds {', '.join(map(str, outcome.seeds))}" if len(outcome.seeds) > 1 else f"seed {outcome.seeds[0]}"
    commit, _, changes = (outcome.commit or "").partition("+")
    source = f"commit {commit[:12]}{' with changes' if changes else ''}" if commit else "outside a checkout"
    charts = [figure_chart(figure) for figure in outcome.figures]
    if len(charts) % 2:
        charts[-1].full = True  # it has a row of the page to itself
    verdict = ("held here", "held") if outcome.held else ("did not hold here", "missed")
    return {
        "name": outcome.name,
        "title": outcome.title,
        "claim": outcome.claim,
        "paper": outcome.paper,
        "quick": outcome.quick,
        "verdict": verdict[0],
        "verdict_class": verdict[1],
        "rows": [_row_view(row) for row in outcome.rows],
        "charts": charts,
        "notes": outcome.notes,
        "provenance": f"{measured}, {seeds}, {source}. {hardware_line(outcome.hardware, outcome.versions)}",
        "arms": outcome.arms,
        "recipe": yaml.safe_dump(outcome.recipe, sort_keys=False) if outcome.recipe else "",
    }


def _row_view(row: Row) -> dict[str, Any]:
    verdict = {True: ("held", "held"), False: ("did not hold", "missed"), None: ("not judged", "")}[row.held]
    unit = row.unit if row.unit in ("x", "%", "") else f" {row.unit}"
    return {
        "title": row.title,
        "claimed": row.claimed,
        "measured": "–" if row.measured is None else f"{row.measured:.4g}".replace("inf", "∞") + unit,
        "interval": f"{row.interval[0]:.4g} to {row.interval[1]:.4g}" if row.interval else "",
        "expected": row.expected,
        "note": row.note,
        "verdict": verdict[0],
        "verdict_class": verdict[1],
        "gauge": _gauge(row),
    }


def _gauge(row: Row) -> Markup:
    """The measured number and its interval against the band of what is expected, on a line without numbers."""
    if row.measured is None or not math.isfinite(row.measured):
        return Markup("")
    bound = Bound.from_dict(row.bound)
    ends = [
        v for v in (row.measured, *(row.interval or ()), bound.low, bound.high) if v is not None and math.isfinite(v)
    ]
    low, high = min(ends), max(ends)
    room = (high - low) * 0.25 or abs(high) * 0.1 or 1.0
    low, high = low - room, high + room

    def place(value: float) -> float:
        return 150 * (value - low) / (high - low)

    band = (0.0 if bound.low is None else place(bound.low), 150.0 if bound.high is None else place(bound.high))
    whisker = ""
    if row.interval and all(math.isfinite(v) for v in row.interval):
        a, b = (place(v) for v in row.interval)
        whisker = f'<path class="whisker" d="M{a:.1f} 13H{b:.1f}M{a:.1f} 9v8M{b:.1f} 9v8"/>'
    return Markup(
        f'<div class="gauge {"missed" if row.held is False else ""}"><svg viewBox="0 0 150 26" role="img" '
        f'aria-label="measured against expected"><path class="line" d="M0 13H150"/>'
        f'<rect class="band" x="{band[0]:.1f}" y="4" width="{max(band[1] - band[0], 1):.1f}" height="18" rx="3"/>'
        f'{whisker}<circle cx="{place(row.measured):.1f}" cy="13" r="4.5"/></svg></div>'
    )


def figure_chart(figure: Figure) -> Chart:
    """A figure of the evidence as a chart."""
    names = list(dict.fromkeys(x for series in figure.series for x in series.x if isinstance(x, str)))
    lines = [
        Line(
            series.name,
            [float(names.index(x)) if isinstance(x, str) else x for x in series.x],
            series.y,
            index,
            series.kind,
            series.low,
            series.high,
        )
        for index, series in enumerate(figure.series)
    ]
    return Chart(figure.title, figure.x, figure.y, lines, log_x=figure.log_x, log_y=figure.log_y,
                 caption=figure.caption, names=names)  # fmt: skip
