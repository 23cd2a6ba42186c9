"""`headway plan`: how big a model and how many tokens for a budget, or how to train within so much memory."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headway.cli.output import JsonFlag, Overrides, note, print_json
from headway.core.errors import HeadwayError

if TYPE_CHECKING:
    from headway.core.recipe import Recipe
    from headway.plan.one_epoch import OneEpochPlan


def plan(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file: data, batch and the model's family.")],
    overrides: Overrides = None,
    budget_flops: Annotated[
        str | None, typer.Option("--flops", metavar="N", help="Budget in floating-point operations, such as 3e15.")
    ] = None,
    budget_time: Annotated[
        str | None, typer.Option("--time", metavar="TIME", help="Budget in training time here, such as 30min.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="Budget in bytes of live tensors, such as 6GiB.")
    ] = None,
    on: Annotated[
        str | None,
        typer.Option("--on", metavar="NAME", help="Devices, such as h100x64, herex4, or a YAML file of your own."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --on: build the recipe's own layout without devices, and count.")
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="With --on: write the simulated step for chrome://tracing."),
    ] = None,
    ratio: Annotated[
        float, typer.Option(help="Tokens per parameter that is no embedding; see the one-epoch card.")
    ] = 20.0,
    json: JsonFlag = False,
) -> None:
    """Say how big a model and how many steps spend a budget in one pass over the recipe's data; or, with --memory, how
    to train the recipe within so many bytes; or, with --on, how to lay it out on a cluster.

    Nothing is trained but, for a budget in time or memory, a few steps to know what this machine does.
    """
    from headway.core.recipe import Recipe
    from headway.core.units import count, seconds
    from headway.plan.budget import plan_recipe

    asked = [budget_flops is not None or budget_time is not None, memory is not None, on is not None]
    if on is None and (dry_run or trace is not None):
        raise HeadwayError("--dry-run" if dry_run else "--trace", "needs --on", hint="name the devices: --on h100x64")
    if on is not None and sum(asked) == 1:
        from headway.cli.plan_cluster import plan_cluster

        return plan_cluster(Recipe.load(recipe, overrides or ()), on, dry_run, trace, json)
    if memory is not None or on is not None:
        if sum(asked) > 1:
            raise HeadwayError("--memory" if memory is not None else "--on", "is a plan of its own",
                               hint="ask for one thing at a time")  # fmt: skip
        return _plan_memory(Recipe.load(recipe, [*(overrides or ()), f"memory.budget={memory}"]), json)
    note("reading the data" + (" and timing some steps" if budget_time else ""))
    found = plan_recipe(
        Recipe.load(recipe, overrides or ()),
        budget_flops=_number("--flops", budget_flops, count),
        budget_seconds=_number("--time", budget_time, seconds),
        ratio=ratio,
    )
    print_json(_plain(found)) if json else print(_text(found))


def _plan_memory(recipe: Recipe, json: bool) -> None:
    from headway.plan.memory.planner import plan_memory

    found = plan_memory(recipe, note)
    if json:
        return print_json(found.to_dict())
    switches = "".join(f" methods.{name}={_inline(options)}" for name, options in found.chosen.methods.items())
    print(f"{found.explain()}\nto train it: headway train RECIPE memory.budget={recipe.memory.budget}, or, the same by "
          f"hand: headway train RECIPE train.micro_batch={found.chosen.micro_batch}{switches}")  # fmt: skip


def _inline(options: dict[str, Any]) -> str:
    return "'{" + ", ".join(f"{key}: {value}" for key, value in options.items()) + "}'"


def _number(option: str, text: str | None, parse: Any) -> float | None:
    try:
        return None if text is None else float(parse(text))
    except ValueError as error:
        raise HeadwayError(option, got=text, expected=str(error).removeprefix("expected ")) from None


def _plain(plan: OneEpochPlan) -> dict[str, Any]:
    facts = {name: value for name, value in asdict(plan).items() if name not in ("size", "smaller")}
    size = {
        "parameters": plan.size.parameters,
        "width": plan.size.width,
        "depth": plan.size.depth,
        "heads": plan.size.heads,
    }
    smaller = _plain(plan.smaller) if plan.smaller else None
    return {"size": size, **facts, "recipe": plan.recipe(), "smaller": smaller}


def _text(plan: OneEpochPlan) -> str:
    changes = [f"model.{key}={value}" for key, value in plan.recipe()["model"].items()]
    changes += [f"train.steps={plan.steps}", *(["'methods.one-epoch={}'"] if plan.epochs <= 1 else [])]
    text = f"{plan}\nto train it: headway train RECIPE {' '.join(changes)}"
    return f"{text}\n\nWithout a repeat:\n{_text(plan.smaller)}" if plan.smaller else text
