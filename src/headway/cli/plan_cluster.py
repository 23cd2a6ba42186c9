"""`headway plan RECIPE --on NAME`: layouts ranked, or the recipe's own built without devices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from headway.cli.output import note, percent, print_json, print_table
from headway.core.recipe import Recipe
from headway.core.units import human, human_seconds

if TYPE_CHECKING:
    from headway.plan.cluster.choice import Choice
    from headway.plan.cluster.dryrun import DryRun
    from headway.plan.cluster.hardware import Cluster
    from headway.plan.cluster.planner import Plan


def plan_cluster(recipe: Recipe, on: str, dry_run: bool, trace: Path | None, json: bool) -> None:
    """Plan or build, print, and write the trace if there is to be one."""
    from headway.plan.cluster.hardware import cluster
    from headway.plan.cluster.planner import plan_recipe_on, vocabulary

    found = cluster(on)
    if dry_run:
        from headway.plan.cluster.dryrun import dry_run as build

        note(f"building the recipe's layout on {found.devices} ranks that do not exist")
        built = build(recipe, found.devices, vocabulary(recipe))
        choice = built.choice
        print_json(built.to_dict()) if json else _print_dry_run(built, found)
    else:
        plan = plan_recipe_on(recipe, found)
        choice = plan.best.choice
        print_json(plan.to_dict()) if json else _print_plan(plan)
    if trace is not None:
        _write_trace(recipe, choice, found, trace)


def _print_plan(plan: Plan) -> None:
    rows = [
        (
            str(found.choice.layout), found.choice.micro_batch,
            f"{found.choice.schedule} x {found.choice.chunks}" if found.choice.layout.pipeline > 1 else "",
            "yes" if found.choice.recompute else "", human_seconds(found.seconds), percent(found.mfu),
            percent(found.bubble), human(found.peak_bytes, "B"),
        )
        for found in plan.ranked
    ]  # fmt: skip
    title = (f"{human(plan.parameters)} parameters, {plan.batch} sequences a step, on {plan.cluster.devices} x "
             f"{plan.cluster.name}; {plan.considered} ways considered")  # fmt: skip
    print_table(["layout", ">micro-batch", "schedule", "recompute", ">step", ">MFU", ">bubble", ">memory"], rows, title)
    if plan.rules is not None:
        print(f"By PTD-P's rules of thumb: {plan.rules.choice}: {human_seconds(plan.rules.seconds)} a step.\n")
    print("For the recipe:\n" + yaml.safe_dump(plan.best.choice.recipe(), sort_keys=False).rstrip())


def _print_dry_run(built: DryRun, cluster: Cluster) -> None:
    from headway.plan.cluster.planner import COLUMNS

    rows = [
        (rank.rank, " + ".join(map(str, rank.blocks)), human(rank.parameters),
         *(human(of(rank.memory), "B") for _, of in COLUMNS))
        for rank in built.ranks
    ]  # fmt: skip
    micro = f"{built.micro_batches} micro-batches of {built.choice.micro_batch}"
    title = f"{built.layout} = {built.layout.world} ranks, {micro}"
    print_table([">rank", "blocks", ">parameters", *(f">{name}" for name, _ in COLUMNS)], rows, title)
    names = [
        name for name in ("pipeline", "replicate", "weights", "tensor") if any(name in r.sent for r in built.ranks)
    ]
    sent = [(r.rank, *(f"{r.sent[n].messages} / {human(r.sent[n].bytes, 'B')}" if n in r.sent else "" for n in names))
            for r in built.ranks]  # fmt: skip
    print_table([">rank", *(f">{name}" for name in names)], sent, "messages and bytes that a rank sends in a step")
    for sentence in built.changes:
        print(f"- {sentence}")
    most = max(rank.memory.total for rank in built.ranks)
    word = "fits" if most <= cluster.device.memory else "DOES NOT FIT"
    print(f"The fullest rank takes {human(most, 'B')} of {human(cluster.device.memory, 'B')}: it {word}.")


def _write_trace(recipe: Recipe, choice: Choice, cluster: Cluster, path: Path) -> None:
    import json

    from headway.core.files import write_text
    from headway.parallel.pipeline.trace import chrome_trace
    from headway.plan.cluster.estimate import simulated
    from headway.plan.cluster.planner import sequence_of, vocabulary
    from headway.plan.cluster.shape import shape_of

    shape = shape_of(recipe.model, sequence_of(recipe), vocabulary(recipe))
    _, timeline = simulated(shape, choice, cluster, recipe.train.batch, precision=recipe.train.precision)
    write_text(path, json.dumps(chrome_trace(timeline.spans())))
    note(f"wrote {path}: open it in chrome://tracing or ui.perfetto.dev")
