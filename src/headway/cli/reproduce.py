"""`headway reproduce`: a paper's claim, run again here; the exit status says whether it held."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headway.cli.output import JsonFlag, print_json, print_rich, watcher


def reproduce(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Experiments.", show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every experiment.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A smoke test of about three minutes each.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder of the evidence files.", show_default="evidence")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Run a paper's experiment, print claimed against measured, and write the evidence.

    Exit status 0: every claim held; 1: one did not. Without a name: the list of experiments.
    """
    from headway.core import registry
    from headway.core.errors import HeadwayError
    from headway.experiments.reproduce import outcome_table
    from headway.experiments.reproduce import reproduce as run_experiment

    if names and everything:
        raise HeadwayError("--all", "stands beside names", hint="give one or the other")
    chosen = registry.names("experiments") if everything else names
    if not chosen:
        _list(json)
        return
    outcomes = []
    for name in chosen:
        outcome = run_experiment(name, quick, out, console=watcher())
        outcomes.append(outcome)
        if not json:
            print_rich(outcome_table(outcome))
    if json:
        found = [outcome.model_dump(mode="json") for outcome in outcomes]
        print_json(found if len(chosen) > 1 or everything else found[0])
    raise typer.Exit(0 if all(outcome.held for outcome in outcomes) else 1)


def _list(json: bool) -> None:
    from headway.cli.output import print_table
    from headway.core import registry
    from headway.experiments.reproduce import find_experiment

    found = [find_experiment(name) for name in registry.names("experiments")]
    if json:
        print_json([{"name": e.name, "title": e.title, "claim": e.claim, "minutes": e.minutes} for e in found])
    else:
        print_table(["experiment", "claim", ">minutes"], [(e.name, e.claim, f"{e.minutes:g}") for e in found])
