"""What a comparison found: two arms, the ratios B / A with their spread, and how they are shown."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from headway.core.units import human
from headway.experiments.statistics import Estimate


@dataclass
class ArmResult:
    """What one arm did; of several repeats, the medians."""

    name: str
    metrics: dict[str, float]
    """``seconds_per_token`` (``_byte`` if tokenizers differ), ``live_peak_bytes``, ``train_loss``, ``eval_loss``."""
    tokens: int
    """Tokens seen by the end, when the arm was evaluated."""
    methods: dict[str, list[str]]
    """What each method changed."""
    fallbacks: list[dict[str, str]]
    times: list[float] = field(default_factory=list)
    """Seconds per token (or byte) of every counted block, over all repeats."""
    losses: list[list[tuple[int, float]]] = field(default_factory=list)
    """Per repeat: tokens seen and loss, after each step."""


@dataclass
class Comparison:
    """Two arms and the ratios B / A."""

    a: ArmResult
    b: ArmResult
    ratios: dict[str, Estimate]
    differences: dict[str, list[Any]]
    """Key of the recipe -> its value in A and in B."""
    notes: list[str]
    """What to keep in mind when reading the ratios."""
    options: dict[str, int]
    hardware: dict[str, Any]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for ``--json``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Comparison:
        """The inverse of ``to_dict``."""
        arms = {key: ArmResult(**data[key]) for key in ("a", "b")}
        return cls(**{**data, **arms, "ratios": {key: Estimate(**value) for key, value in data["ratios"].items()}})

    def table(self) -> Group:
        """For a terminal: the ratios, what differs, what methods changed, what to keep in mind."""
        table = Table()
        for column in ("", "A", "B", "B / A", "90 % interval"):
            table.add_column(column, justify="left" if not column else "right")
        for key, (label, show) in _ROWS.items():
            if key in self.ratios:
                values = (show(arm.metrics[key]) for arm in (self.a, self.b))
                table.add_row(label, *values, *_ratio_texts(self.ratios[key]))
                if key.startswith("seconds_per_"):
                    rates = (f"{human(1 / arm.metrics[key])}/s" for arm in (self.a, self.b))
                    table.add_row(f"{key.removeprefix('seconds_per_')}s", *rates)
        names = (Text(f"A: {self.a.name}"), Text(f"B: {self.b.name}"))
        lines = [Text(f"{key}: {a} -> {b}") for key, (a, b) in self.differences.items()]
        for label, arm in (("A", self.a), ("B", self.b)):
            lines += [Text(f"{label}, {name}: {', '.join(done)}") for name, done in arm.methods.items()]
            lines += [Text(f"{label} fell back: {f['what']} ({f['why']}; {f['cost']})") for f in arm.fallbacks]
        return Group(*names, table, *lines, *(Text(f"note: {note}", style="yellow") for note in self.notes))


def _duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


_ROWS: dict[str, tuple[str, Callable[[float], str]]] = {
    "seconds_per_token": ("time per token", _duration),
    "seconds_per_byte": ("time per byte", _duration),
    "live_peak_bytes": ("live peak", lambda value: human(value, "B")),
    "train_loss": ("train loss", "{:.4f}".format),
    "eval_loss": ("eval loss", "{:.4f}".format),
    "bits_per_byte": ("bits per byte", "{:.4f}".format),
}


def _ratio_texts(ratio: Estimate) -> tuple[Text, Text]:
    """Less is better in every row; coloured only where the spread leaves no doubt about the direction."""
    low, high = ratio.interval or (ratio.value, ratio.value)
    style = "green" if high < 1 else "red" if low > 1 else ""
    digits = 5 if ratio.interval is None and abs(ratio.value - 1) < 0.01 else 3
    spread = f"{low:.3f} to {high:.3f}" if ratio.interval else ""
    return Text(f"{ratio.value:.{digits}f}", style=style), Text(spread, style=style)


def window_mean(losses: list[tuple[int, float]], start: float, end: float) -> float:
    """Mean loss over the tokens from ``start`` to ``end``; a step that lies partly outside counts by its part inside.

    Args:
        losses: tokens seen and loss, after each step; the loss is the mean over the tokens since the step before.
    """
    total = weight = 0.0
    seen = 0
    for tokens, loss in losses:
        inside = max(0.0, min(tokens, end) - max(seen, start))
        total, weight, seen = total + inside * loss, weight + inside, tokens
    return total / weight if weight else math.nan
