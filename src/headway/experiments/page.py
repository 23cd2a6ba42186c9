"""A self-contained HTML page from a template of `templates/`: style sheet and script inlined, nothing fetched."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from headway.core.units import human, human_seconds
from headway.experiments.charts import Chart

_TEMPLATES = Path(__file__).parent / "templates"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES, encoding="utf-8"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["draw"] = lambda chart: Markup(chart.html())  # its text is escaped where it is made
    environment.filters["human"] = human
    environment.filters["duration"] = human_seconds
    environment.filters["bytes"] = lambda value: human(value, "B")
    environment.filters["significant"] = lambda value, digits=4: f"{value:.{digits}g}"
    return environment


def render(template: str, **values: Any) -> str:
    """The page of ``templates/TEMPLATE`` with ``values`` filled in."""
    style, script = ((_TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    return _environment().get_template(template).render(style=Markup(style), script=Markup(script), **values)


def hardware_line(hardware: dict[str, Any], versions: dict[str, str]) -> str:
    """``4-core CPU, 2 threads, 15.6GiB, Linux x86_64; torch 2.11, Python 3.12`` from what a run noted."""
    parts = []
    if hardware.get("gpu"):
        parts.append(f"{hardware.get('gpus', 1)} x {hardware['gpu']}")
    if hardware.get("cpu"):
        parts.append(str(hardware["cpu"]))
    if hardware.get("cores"):
        parts.append(f"{hardware['cores']} cores, {hardware.get('threads', '?')} threads")
    if hardware.get("memory_bytes"):
        parts.append(human(hardware["memory_bytes"], "B"))
    if hardware.get("system"):
        parts.append(str(hardware["system"]))
    return ", ".join(parts) + "; " + ", ".join(f"{name} {version}" for name, version in versions.items())


__all__ = ["Chart", "hardware_line", "render"]
