"""`headway recipe`: check a recipe, or print the JSON schema that editors use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headway.cli.output import JsonFlag, Overrides, print_json

app = typer.Typer(no_args_is_help=True, help="Check a recipe, or print the schema of recipes.")


@app.command()
def check(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file.")],
    overrides: Overrides = None,
    json: JsonFlag = False,
) -> None:
    """Check a recipe and print it with every default spelled out; nothing is loaded or trained."""
    from headway.core.method import resolve
    from headway.core.recipe import Recipe

    loaded = Recipe.load(recipe, overrides or ())
    order = [method.card.name for method in resolve(loaded)]
    if json:
        print_json({"recipe": loaded.to_dict(), "order": order})
        return
    print(loaded.to_yaml(), end="")
    if order:
        print(f"# The methods wrap in this order: {', '.join(order)}")


@app.command()
def schema() -> None:
    """Print the JSON schema of recipe files: save it and name it in your editor."""
    from headway.core.recipe import Recipe

    print_json(Recipe.file_schema())
