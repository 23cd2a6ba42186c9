"""`headway compare`: a recipe with and without a switch, interleaved on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headway.cli.output import JsonFlag, print_json, print_rich, watcher

Switches = list[str] | None


def compare(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file.")],
    with_: Annotated[
        Switches, typer.Option("--with", metavar="NAME[:KEY=VALUE,...]", help="Method of arm B; may be repeated.")
    ] = None,
    against: Annotated[
        Switches,
        typer.Option("--against", metavar="NAME|KEY=VALUE", help="Method or setting of arm A; may be repeated."),
    ] = None,
    set_: Annotated[
        Switches, typer.Option("--set", metavar="KEY=VALUE", help="Setting of arm B; may be repeated.")
    ] = None,
    blocks: Annotated[int, typer.Option(min=1, help="Counted blocks per arm; the arms take turns.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps per block.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats, each with another seed.")] = 1,
    json: JsonFlag = False,
) -> None:
    """Train RECIPE with and without something, in turns; print the ratios of time, memory and loss, with their spread.

    Arm A is the recipe (with --against); arm B is the recipe with --with and --set.
    """
    from headway.experiments.compare import compare as compare_arms

    result = compare_arms(
        recipe,
        with_=with_ or (),
        against=against or (),
        set_=set_ or (),
        blocks=blocks,
        steps=steps,
        repeats=repeats,
        console=watcher(),
    )
    print_json(result.to_dict()) if json else print_rich(result.table())
