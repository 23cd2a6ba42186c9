"""`headway parity`: does a recipe on many ranks train what it trains in one process?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headway.cli.output import JsonFlag, Overrides, note, print_json, print_table

if TYPE_CHECKING:
    from headway.core.recipe import Recipe
    from headway.parallel.parity import Control, Parity

TOLERANCE = {"fp64": 1e-9, "fp32": 1e-4, "bf16": 2e-2}
"""Largest relative difference that rounding explains, by the precision of the products."""
SHOWN = 8
"""Gradients in the table."""


def parity(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file, with its `parallel` section.")],
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option("--ranks", metavar="N", min=1, help="Ranks, forked on this machine.")] = 2,
    steps: Annotated[int, typer.Option("--steps", metavar="K", min=1, help="Training steps.")] = 3,
    layouts: Annotated[
        bool, typer.Option("--layouts", help="Try every layout of N ranks that the recipe allows, not its own alone.")
    ] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance", metavar="NUMBER", show_default="1e-9 in fp64, 1e-4 in fp32, 0.02 in bf16",
            help="Largest relative difference of a loss or gradient.",
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="Write the pipeline's passes of the last step, for Chrome."),
    ] = None,
    json: JsonFlag = False,
) -> None:  # fmt: skip
    """Train a few steps in one process and on N ranks, on the CPU, from the same weights and data; compare losses and
    gradients.

    Exit status 0: they agree within the tolerance; 1: they do not. `train.precision=fp64` shows faults that the
    rounding of other precisions hides.
    """
    from headway.core.recipe import Recipe
    from headway.parallel.layouts import settled
    from headway.parallel.parity import one_process
    from headway.parallel.parity import parity as compare

    loaded = Recipe.load(recipe, [*(overrides or ()), "train.device=cpu"])
    limit = TOLERANCE[loaded.train.precision] if tolerance is None else tolerance
    if not layouts:
        layout = settled(loaded, ranks)
        note(f"training {steps} steps in one process, then on {ranks} ranks ({layout})")
        found = compare(loaded, ranks, steps)
        if trace is not None:
            _write_trace(found, trace)
        print_json(_facts(found, limit)) if json else _print(found, limit)
        raise typer.Exit(_status(found, limit))
    note(f"training {steps} steps in one process")
    results, refused = _try_all(loaded, ranks, steps, one_process(loaded, steps))
    if json:
        print_json({"tolerance": limit, "layouts": {name: _facts(found, limit) for name, found in results.items()},
                    "refused": refused})  # fmt: skip
    else:
        _print_all(results, refused, limit)
    raise typer.Exit(max((_status(found, limit) for found in results.values()), default=1))


def _write_trace(found: Parity, path: Path) -> None:
    from headway.core.errors import HeadwayError
    from headway.core.files import write_json
    from headway.parallel.pipeline.trace import chrome_trace

    if not found.timeline:
        raise HeadwayError("--trace", f"draws the passes of a pipeline, and {found.layout} has none",
                           hint="set parallel.pipeline")  # fmt: skip
    write_json(path, chrome_trace(found.timeline))
    note(f"wrote {path}: open it in chrome://tracing or ui.perfetto.dev")


def _try_all(
    recipe: Recipe, ranks: int, steps: int, control: Control
) -> tuple[dict[str, Parity | str], dict[str, str]]:
    """By layout: what was found, or how it failed; and what was refused, with the reason."""
    from headway.core.errors import HeadwayError
    from headway.parallel.layouts import every_layout
    from headway.parallel.parity import parity as compare

    results: dict[str, Parity | str] = {}
    refused: dict[str, str] = {}
    for candidate in every_layout(recipe, ranks):
        name = str(candidate.layout)
        if candidate.refused:
            refused[name] = candidate.refused
            continue
        note(name)
        try:
            results[name] = compare(candidate.recipe, ranks, steps, control)
        except HeadwayError as error:
            results[name] = str(error).strip()
    return results, refused


def _status(found: Parity | str, limit: float) -> int:
    if isinstance(found, str):
        return 1
    # (A comparison with NaN is never true.)
    return 0 if found.loss_difference <= limit and found.gradient_difference <= limit else 1


def _facts(found: Parity | str, limit: float) -> dict[str, Any]:
    facts = {"failed": found} if isinstance(found, str) else found.to_dict()
    return {**facts, "tolerance": limit, "agrees": _status(found, limit) == 0}


def _print(found: Parity, limit: float) -> None:
    rows = [
        (f"step {number}" if number < len(found.losses) else "evaluation", f"{one:.12g}", f"{many:.12g}",
         f"{abs(one - many) / max(abs(one), 1e-300):.1e}")
        for number, (one, many) in enumerate(found.losses, start=1)
    ]  # fmt: skip
    print_table(["", ">one process", f">{found.ranks} ranks", ">relative difference"], rows, f"{found.layout}: loss")
    worst = sorted(found.gradients.items(), key=lambda item: -item[1])[:SHOWN]
    print_table(["parameter", ">difference"], [(name, f"{value:.1e}") for name, value in worst],
                f"gradients of the first step: the {len(worst)} of {len(found.gradients)} that differ most, relative "
                "to the largest")  # fmt: skip
    for sentence in found.changes:
        print(f"- {sentence}")
    verdict = "agree" if _status(found, limit) == 0 else "DO NOT AGREE"
    print(f"{found.ranks} ranks and one process {verdict}: losses to {found.loss_difference:.1e}, gradients to "
          f"{found.gradient_difference:.1e}; tolerance {limit:g}.")  # fmt: skip


def _print_all(results: dict[str, Parity | str], refused: dict[str, str], limit: float) -> None:
    rows = []
    for name, found in results.items():
        verdict = "agrees" if _status(found, limit) == 0 else "DOES NOT AGREE"
        if isinstance(found, str):
            rows.append((name, "", "", "", f"FAILED: {found.splitlines()[-1]}"))
        else:
            worst = max(found.gradients, key=lambda p: found.gradients[p])
            rows.append((name, f"{found.loss_difference:.1e}", f"{found.gradient_difference:.1e}", worst, verdict))
    print_table(["layout", ">losses", ">gradients", "worst gradient", ""], rows,
                f"relative differences from one process; tolerance {limit:g}")  # fmt: skip
    for name, why in refused.items():
        print(f"- {name} is refused: {why}")
    agreeing = sum(_status(found, limit) == 0 for found in results.values())
    print(f"{agreeing} of {len(results)} layouts agree with one process; {len(refused)} are refused.")
