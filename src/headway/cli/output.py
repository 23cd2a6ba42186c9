"""How commands print: results on standard output as a table or as JSON, everything else on standard error."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON value, for programs.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Changes to the recipe, such as train.steps=100.", show_default=False
    ),
]


def print_json(value: Any) -> None:
    """``value`` as indented JSON; numbers that JSON has no word for (inf, NaN) become null."""
    print(json.dumps(_plain(value), indent=2, ensure_ascii=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "") -> None:
    """A table; columns named with a leading ``>`` stand to the right. Where the output is no terminal it is wide."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    print_rich(table)


def print_rich(renderable: Any) -> None:
    """Something that rich can draw, on standard output."""
    _console().print(renderable)


def watcher() -> Any:
    """The console on which long work shows its progress."""
    from rich.console import Console

    return Console(stderr=True)


def _console() -> Any:
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=200)


def note(message: str) -> None:
    """One line to whoever watches; never part of the result."""
    print(message, file=sys.stderr, flush=True)


def percent(value: float) -> str:
    """0.4213 -> ``42%``."""
    return f"{100 * value:.0f}%"
