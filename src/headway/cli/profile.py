"""`headway profile`: where the time and memory of a recipe's training step go, and what settings do to them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headway.cli.output import JsonFlag, Overrides, note, print_json, print_rich


def profile(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file.")],
    overrides: Overrides = None,
    vary: Annotated[
        list[str] | None,
        typer.Option("--vary", metavar="KEY=VALUE,VALUE", help="Measure it with each value; several multiply."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--setting", metavar="NAME|NAME:KEY=VALUE", help="Also measure it with this; may be repeated."),
    ] = None,
    combine: Annotated[int, typer.Option(min=1, help="Most --setting at a time.")] = 1,
    batches: Annotated[
        list[int] | None,
        typer.Option("--batch", metavar="N", help="Batch to measure, from small to large; may be repeated."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds over the settings.")] = 3,
    drift: Annotated[
        float,
        typer.Option(min=0.0, help="Void what was measured while the machine drifted by more; 0 keeps everything."),
    ] = 0.0,
    steps: Annotated[int, typer.Option(min=1, help="Dissected steps; figures are means over them.")] = 3,
    depth: Annotated[int, typer.Option(min=1, help="Levels of modules and operations that are shown.")] = 4,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="DIR", help="Keep it in this run directory, for its report.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Take a training step apart: time by phase, module and operation with achieved rates, and memory by purpose.

    With --vary or --setting (a method, bf16, compile, or a name for a change of the recipe) also a table of the step
    by setting: each measured in a process of its own, in turns. With --run the result is kept in DIR/profile.json.
    """
    from headway.core.errors import HeadwayError
    from headway.core.recipe import Recipe
    from headway.core.run import Run
    from headway.plan.dissect import profile as dissect

    if vary and settings:
        raise HeadwayError("--vary", "and --setting are two ways to say the same", hint="use one of them")
    loaded = Recipe.load(recipe, overrides or ())
    folder = Run(run).path if run else None
    named = {name: change or None for name, _, change in (text.partition(":") for text in settings or ())}
    chosen = dissect.vary(vary) if vary else dissect.with_settings(loaded, named, combine)
    note("taking some steps apart")
    found = dissect.profile_recipe(
        loaded,
        steps=steps,
        settings=chosen,
        batches=batches or (),
        repeats=repeats,
        drift=drift or None,
        log=folder / "profile.jsonl" if folder else None,
        say=note,
    )
    if folder:
        found.save(folder / "profile.json")
    if json:
        print_json(found.to_dict())
    else:
        for table in found.tables(depth):
            print_rich(table)
