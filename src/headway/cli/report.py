"""`headway report`: one self-contained HTML page on one run, or on several side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Where to write it.", show_default="RUN/report.html or report.html"),
    ] = None,
) -> None:
    """Write a page with loss curves, memory and time; it opens without a network."""
    from headway.core.run import Run
    from headway.experiments.report import write_report

    opened = [Run(path) for path in runs]
    target = out or (opened[0].path / "report.html" if len(opened) == 1 else Path("report.html"))
    write_report(opened, target)
    print(target)
