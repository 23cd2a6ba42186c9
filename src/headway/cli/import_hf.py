"""`headway import`: make a run directory of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headway.cli.output import JsonFlag, note, print_json


def import_hf(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Hugging Face folder: config.json, safetensors, tokenizer.")
    ],
    run: Annotated[Path, typer.Option("--run", metavar="RUN", help="Run directory to make.")],
    json: JsonFlag = False,
) -> None:
    """Make a run directory of a Hugging Face folder: to generate from it, or to train from it with train.from=RUN."""
    from headway.workloads.load import import_hf as import_folder

    made = import_folder(folder, run)
    note(f"to train from it: set train.from={made.path} and data.tokenizer={made.path}/tokenizer.json")
    print_json({"run": str(made.path)}) if json else print(made.path)
