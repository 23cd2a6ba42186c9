"""`headway report`: one self-contained HTML page on runs, or on evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    sources: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories; or evidence files, for a page on them.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Where to write it.", show_default="RUN/report.html or report.html"),
    ] = None,
) -> None:
    """Write a page with loss curves, memory and time, of one run or of several side by side; it needs no network."""
    from headway.core.run import Run
    from headway.experiments.report import write_evidence_report, write_report

    if all(source.suffix == ".json" for source in sources):
        print(write_evidence_report(sources, out or Path("report.html")))
        return
    runs = [Run(source) for source in sources]
    print(write_report(runs, out or (runs[0].path / "report.html" if len(runs) == 1 else Path("report.html"))))
