"""Charts as inline SVG: drawn without a browser or a network, coloured by the page's style sheet, read by its script.

A chart is drawn twice, for a wide and for a narrow screen, so that its text stays legible on a phone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

from headway.core.units import human

Style = Literal["line", "faint", "dashed", "points", "bars"]
Format = Literal["plain", "si", "bytes", "seconds"]

SIZES = {"full": (1120, 330), "half": (560, 280), "narrow": (350, 250)}
"""Width and height: across the page, beside another chart, on a phone."""
COLORS = 8
"""Number of series colours in the style sheet."""
_POINTS = 400
_MARGIN = (52, 12, 14, 34)  # left, right, top, bottom


@dataclass
class Line:
    """A series of a chart; points that are not finite are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    style: Style = "line"
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    """Ends of each point's interval."""

    def __post_init__(self) -> None:
        bands = (self.low or self.y, self.high or self.y)
        kept = [p for p in zip(self.x, self.y, *bands) if all(math.isfinite(v) for v in p)]
        self.x, self.y, low, high = (list(column) for column in zip(*kept)) if kept else ([], [], [], [])
        if self.low or self.high:
            self.low, self.high = low, high


@dataclass
class Chart:
    """What is drawn, over what, in which numbers."""

    title: str
    x_label: str
    y_label: str
    lines: list[Line]
    x_format: Format = "si"
    y_format: Format = "plain"
    log_x: bool = False
    log_y: bool = False
    full: bool = False
    """Drawn across the page instead of beside another chart."""
    from_zero: bool = False
    """The vertical axis begins at 0, for quantities whose size matters."""
    caption: str = ""
    names: list[str] = field(default_factory=list)
    """Names of places on the horizontal axis, where they are no numbers: place i is x = i."""

    @property
    def empty(self) -> bool:
        """Nothing to draw."""
        return not any(line.x for line in self.lines)

    def html(self) -> str:
        """A figure element: title, legend, the two drawings, the data for the script."""
        shown = [line for line in self.lines if line.x]
        legend = "".join(
            f'<button type="button" class="key {line.style}" data-s="{i}" style="--c:var(--s{line.color % COLORS})">'
            f"<i></i>{escape(line.name)}</button>"
            for i, line in enumerate(shown)
            if line.style != "faint"
        )
        if sum(line.style != "faint" for line in shown) == 1:
            legend = ""  # the title says it
        scales = _Scales(self, shown)
        drawings = "".join(_svg(self, shown, scales, kind) for kind in (("full" if self.full else "half"), "narrow"))
        data = {
            "xf": self.x_format,
            "yf": self.y_format,
            "xl": self.x_label,
            "names": self.names,
            "s": [
                {"n": line.name, "c": line.color % COLORS, "f": line.style == "faint", **_thinned(line)}
                for line in shown
            ],
        }
        payload = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")
        caption = f"<p class='caption'>{escape(self.caption)}</p>" if self.caption else ""
        return (
            f'<figure class="chart"><figcaption><h3>{escape(self.title)}</h3><div class="legend">{legend}</div>'
            f'</figcaption>{drawings}<script type="application/json">{payload}</script>{caption}</figure>'
        )


class _Scales:
    """The ranges of both axes and their ticks."""

    def __init__(self, chart: Chart, lines: list[Line]) -> None:
        strong = [line for line in lines if line.style != "faint"] or lines
        xs = [x for line in lines for x in line.x]
        ys = [y for line in strong for column in (line.y, line.low or (), line.high or ()) for y in column]
        bars = any(line.style == "bars" for line in lines)
        self.log_x = chart.log_x and min(xs) > 0
        self.log_y = chart.log_y and min(ys) > 0
        if chart.names or bars:
            self.x = (min(xs) - 0.6, max(xs) + 0.6)
        else:
            self.x = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 0.5, max(xs) + 0.5)
        self.y = _padded(ys, self.log_y, chart.from_zero or bars)
        self.x_ticks = [] if chart.names else _ticks(*self.x, self.log_x, 9 if chart.full else 5)
        unit = 1024.0 ** max(0, math.floor(math.log(max(self.y[1], 1.0), 1024))) if chart.y_format == "bytes" else 1.0
        self.y_ticks = [tick * unit for tick in _ticks(self.y[0] / unit, self.y[1] / unit, self.log_y, 5)]

    def place(self, kind: str) -> tuple[Callable[[float], float], Callable[[float], float]]:
        """Functions from data to pixels."""
        width, height = SIZES[kind]
        left, right, top, bottom = _MARGIN

        def along(value: float, ends: tuple[float, float], log: bool) -> float:
            if log:
                value, ends = math.log10(max(value, 1e-300)), (math.log10(ends[0]), math.log10(ends[1]))
            return (value - ends[0]) / (ends[1] - ends[0])

        return (
            lambda x: left + along(x, self.x, self.log_x) * (width - left - right),
            lambda y: height - bottom - along(y, self.y, self.log_y) * (height - top - bottom),
        )


def _padded(values: list[float], log: bool, from_zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return low / 1.1, high * 1.1
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    # A line that hardly moves is drawn as a line that hardly moves, not as noise blown up to the whole height.
    room = max((high - low) * 0.06, 0.0 if high - low > 0.02 * abs(high) else 0.05 * abs(high), 1e-12)
    return (low if from_zero and low == 0 else low - room), high + room


def _ticks(low: float, high: float, log: bool, count: int) -> list[float]:
    if log:
        decades = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
        steps = (1,) if len(decades) >= 3 else (1, 2, 5)
        found = [m * 10.0**d for d in range(decades.start - 1, decades.stop + 1) for m in steps]
        found = [tick for tick in found if low <= tick <= high * (1 + 1e-9)]
        return found[:: max(1, math.ceil(len(found) / (count + 1)))]
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _thinned(line: Line) -> dict[str, list[float]]:
    """At most `_POINTS` points, each bucket's lowest and highest, in order; the same for the drawing and the script."""
    points = list(zip(line.x, line.y))
    if len(points) > _POINTS and line.style != "bars":
        size = math.ceil(len(points) / (_POINTS // 2))
        kept = []
        for start in range(0, len(points), size):
            bucket = points[start : start + size]
            ends = {min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}
            kept += sorted(ends)
        points = kept if kept[-1] == points[-1] else [*kept, points[-1]]
    return {"x": [float(f"{x:.6g}") for x, _ in points], "y": [float(f"{y:.6g}") for _, y in points]}


def format_value(value: float, kind: Format) -> str:
    """A number for an axis or a table."""
    if kind == "bytes":
        return human(value, "B").replace(".00", "").replace(".0", "")
    if kind == "si" and abs(value) >= 1000:
        return human(value).replace(".00", "").replace(".0", "")
    if kind == "seconds" and abs(value) >= 120:
        return f"{value / 60:.4g} min"
    text = f"{value:.4g}"
    return f"{text} s" if kind == "seconds" else text


def _svg(chart: Chart, lines: list[Line], scales: _Scales, kind: str) -> str:
    width, height = SIZES[kind]
    left, right, top, bottom = _MARGIN
    px, py = scales.place(kind)
    inner = (left, top, width - right, height - bottom)
    parts = []
    for tick in scales.y_ticks:
        y = py(tick)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{inner[2]}"/>')
        label = format_value(tick, chart.y_format)
        parts.append(f'<text x="{left - 7}" y="{y + 3.5:.1f}" text-anchor="end">{escape(label)}</text>')
    x_ticks = [(tick, format_value(tick, chart.x_format)) for tick in scales.x_ticks]
    x_ticks += [(float(i), name) for i, name in enumerate(chart.names)]
    for tick, label in x_ticks if kind != "narrow" or chart.names else x_ticks[::2]:
        x = px(tick)
        anchor = "end" if x > inner[2] - 14 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{inner[3] + 16}" text-anchor="{anchor}">{escape(label)}</text>')
    parts.append(f'<path class="axis" d="M{left} {inner[3]}H{inner[2]}"/>')
    parts.append(
        f'<text class="label" x="{inner[2]}" y="{height - 3}" text-anchor="end">{escape(chart.x_label)}</text>'
    )
    if chart.y_label:
        parts.append(f'<text class="label" x="2" y="{top - 4}">{escape(chart.y_label)}</text>')
    bars = [line for line in lines if line.style == "bars"]
    marks = "".join(_mark(line, i, px, py, scales, bars) for i, line in enumerate(lines))
    # A nested svg cuts off what leaves the plot, without identifiers that would have to be unique in the page.
    box = (left - 4, top - 4, inner[2] - left + 8, inner[3] - top + 8)
    size = f'x="{box[0]}" y="{box[1]}" width="{box[2]}" height="{box[3]}" viewBox="{" ".join(map(str, box))}"'
    drawn = "".join(parts) + f'<svg {size}>{marks}</svg><g class="hover"></g>'
    ends = [*scales.x, int(scales.log_x), *scales.y, int(scales.log_y)]
    return (
        f'<svg class="plot {kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(chart.title)}" '
        f'data-plot="{",".join(map(str, inner))}" data-ends="{",".join(f"{e:.8g}" for e in ends)}">{drawn}</svg>'
    )


def _mark(
    line: Line,
    index: int,
    px: Callable[[float], float],
    py: Callable[[float], float],
    scales: _Scales,
    bars: list[Line],
) -> str:
    thin = _thinned(line)
    points = [(px(x), py(y)) for x, y in zip(thin["x"], thin["y"])]
    parts = []
    if line.style == "bars":
        slot = (px(1) - px(0)) * 0.8 / len(bars)
        offset = (bars.index(line) - (len(bars) - 1) / 2) * slot
        base = py(max(0.0, scales.y[0]))
        points = [(x + offset, y) for x, y in points]
        parts += [
            f'<rect x="{x - slot * 0.46:.1f}" y="{min(y, base):.1f}" width="{slot * 0.92:.1f}" '
            f'height="{abs(base - y):.1f}" rx="2"/>'
            for x, y in points
        ]
    if line.style in ("line", "faint", "dashed"):
        parts.append(f'<path d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in points)}"/>')
    if line.style == "points" or (line.style in ("line", "dashed") and len(points) <= 12):
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{3.5 if line.style == "points" else 2.4}"/>' for x, y in points
        ]
    if line.style == "points" and len(points) == 1:  # a point that is a series is called by its name
        (x, y), right = points[0], (px(scales.x[0]) + px(scales.x[1])) / 2
        at, anchor = (x - 7, "end") if x > right else (x + 7, "start")
        parts.append(f'<text x="{at:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">{escape(line.name)}</text>')
    if line.low is not None and line.high is not None and len(points) == len(line.low):
        parts += [
            f'<path class="whisker" d="M{x:.1f} {py(low):.1f}V{py(high):.1f}M{x - 3:.1f} {py(low):.1f}h6'
            f'M{x - 3:.1f} {py(high):.1f}h6"/>'
            for (x, _), low, high in zip(points, line.low, line.high)
        ]
    return (
        f'<g class="mark {line.style}" data-s="{index}" style="--c:var(--s{line.color % COLORS})">{"".join(parts)}</g>'
    )
