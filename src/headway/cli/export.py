"""`headway export`: hand a trained model to other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headway.cli.output import JsonFlag, print_json


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    to: Annotated[
        tuple[str, Path], typer.Option("--to", metavar="hf DIR", help="Format and folder; `hf` is the one format.")
    ],
    json: JsonFlag = False,
) -> None:
    """Write a run's model as a Hugging Face folder: weights, configuration, tokenizer."""
    from headway.core.errors import HeadwayError, nearest
    from headway.workloads.load import export_hf

    kind, folder = to
    if kind != "hf":
        raise HeadwayError("--to", got=kind, expected="hf", hint=nearest(kind, ["hf"]))
    written = export_hf(run, folder)
    print_json({"folder": str(written), "format": kind}) if json else print(written)
