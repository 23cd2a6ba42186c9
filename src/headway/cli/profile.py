"""`headway profile`: where the time and memory of a recipe's training step go, and what settings do to them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from headway.cli.output import JsonFlag, Overrides, note, percent, print_json, print_table
from headway.core.units import human


def profile(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file.")],
    overrides: Overrides = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--setting", metavar="NAME|NAME:KEY=VALUE", help="Also measure it with this; may be repeated."),
    ] = None,
    combine: Annotated[int, typer.Option(min=1, help="Most settings at a time.")] = 1,
    batches: Annotated[
        list[int] | None, typer.Option("--batch", metavar="N", help="Batch of the settings' table; may be repeated.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds over the settings' table.")] = 3,
    drift: Annotated[
        float,
        typer.Option(min=0.0, help="Void what was measured while the machine drifted by more; 0 keeps everything."),
    ] = 0.05,
    steps: Annotated[int, typer.Option(min=1, help="Dissected steps; figures are means over them.")] = 3,
    depth: Annotated[int, typer.Option(min=1, help="Levels of modules and operations that are shown.")] = 4,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="DIR", help="Keep it in this run directory, for its report.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Take a training step apart: time by phase, module and operation with achieved rates, and memory by purpose.

    With --setting (a method, bf16, compile, or a name for a change of the recipe) also a table of the step by setting:
    each measured in a process of its own, in turns. With --run the result is kept in DIR/profile.json.
    """
    from tempfile import TemporaryDirectory

    from headway.core.files import write_json
    from headway.core.recipe import Recipe
    from headway.core.run import Run
    from headway.plan.profile import profile_recipe, profile_settings

    folder = Run(run).path if run else None
    loaded = Recipe.load(recipe, overrides or ())
    note("taking some steps apart")
    found = profile_recipe(loaded, steps)
    if settings or batches:
        named = {name: change or None for name, _, change in (text.partition(":") for text in settings or ())}
        with TemporaryDirectory() as temporary:
            log = (folder or Path(temporary)) / "profile.jsonl"
            found["settings"] = profile_settings(
                loaded,
                named,
                log,
                combine=combine,
                batches=batches or (),
                repeats=repeats,
                drift=drift or None,
                say=note,
            )
    if folder:
        write_json(folder / "profile.json", found)
    print_json(found) if json else print_profile(found, depth)


def print_profile(found: dict[str, Any], depth: int) -> None:
    """The breakdown of the time, that of the memory, and the table by setting."""
    rows = list(_rows(found["tree"], 0, depth))
    print_table(["where the time goes", ">ms", ">share", ">calls", ">FLOP/s", ">of peak", ">bytes/s"], rows)
    memory = found["memory"]
    parts = ("parameters", "gradients", "optimizer", "activations", "other")
    lines = [(part, *(human(memory[when][part], "B") for when in ("before", "peak"))) for part in parts]
    total = ("sum", human(memory["before_bytes"], "B"), human(memory["peak_bytes"], "B"))
    print_table(["tensors", ">between steps", f">at the peak, in {memory['peak_phase']}"], [*lines, total])
    rate = human(found["tokens_per_second"])
    print(f"{rate} tokens/s when not watched; being watched makes a step {found['overhead']:+.0%} longer.")
    if "settings" in found:
        columns = ["setting", ">batch", ">ms", ">tokens/s", ">of peak", ">memory", ">time ratio", ">memory ratio", ""]
        print_table(columns, [_setting(row) for row in found["settings"]])


def _rows(node: dict[str, Any], level: int, depth: int) -> Iterator[tuple[str, ...]]:
    """A line for each part that takes half a percent of the step or more, down to ``depth``."""
    yield (
        "  " * level + node["name"],
        f"{node['milliseconds']:.1f}",
        percent(node["share"]),
        f"{node['calls']:g}" if node["calls"] else "",
        human(node["flops_rate"]) if node["flops_rate"] else "",
        percent(node["utilization"]) if node["utilization"] else "",
        human(node["bytes_rate"], "B") if node["bytes_rate"] else "",
    )
    if level < depth:
        for child in node["children"]:
            if child["share"] >= 0.005:
                yield from _rows(child, level + 1, depth)


def _setting(row: dict[str, Any]) -> tuple[str, ...]:
    if row["status"] != "ok":
        return (row["setting"], str(row["batch"]), *[""] * 6, f"{row['status']}: {row['cause']}")
    return (
        row["setting"],
        str(row["batch"]),
        f"{row['step_milliseconds']:.1f}",
        human(row["tokens_per_second"]),
        percent(row["utilization"]) if row["utilization"] else "",
        human(row["peak_memory_bytes"], "B"),
        f"{row['time_ratio']:.2f}" if "time_ratio" in row else "",
        f"{row['memory_ratio']:.2f}" if "memory_ratio" in row else "",
        "",
    )
