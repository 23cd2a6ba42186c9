"""Run an experiment: train and measure its arms, judge its expectations, write the evidence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from headway.core import registry
from headway.core.errors import HeadwayError, nearest
from headway.core.run import locked
from headway.core.units import human_seconds
from headway.experiments.base import Expectation, Experiment, Measurement, applies
from headway.experiments.context import Context
from headway.experiments.evidence import (
    Outcome,
    Row,
    Value,
    evidence_folder,
    provenance,
    refuse_overwriting,
    save_evidence,
)


def reproduce(
    name: str | Experiment,
    quick: bool = False,
    out: str | Path | None = None,
    *,
    work: str | Path | None = None,
    reuse: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Run the experiment ``name`` and write its evidence.

    An interrupted experiment goes on with the arms that are not finished. A finished one is measured anew.

    Args:
        quick: a smoke test of about three minutes; it never replaces the evidence of a full run.
        out: folder of the evidence file ``NAME.json``; default: the checkout's ``evidence/``, for a quick run ``work``.
        work: the working folder; default ``runs/reproduce/NAME`` (``NAME-quick``).
        reuse: take the runs that a finished run of the same code left; for writing experiments.
        console: where progress is shown.

    Raises:
        HeadwayError: unknown name, an arm that cannot run, a measurement that is missing.
        Interrupted: a signal arrived; what was finished is kept.
    """
    experiment = find_experiment(name) if isinstance(name, str) else name
    folder = Path(work) if work else Path("runs") / "reproduce" / (experiment.name + ("-quick" if quick else ""))
    default = folder if quick else evidence_folder()
    path = Path(out or default) / f"{experiment.name}.json"
    refuse_overwriting(path, quick)
    console = console or Console(quiet=True)
    with locked(folder):
        context = Context(experiment, quick, folder, console, reuse)
        announce(context)
        with context.ledger.timed():
            measured = measure(context)
        outcome = judge(context, measured)
        save_evidence(outcome, path)
        context.ledger.finish()
    console.print(f"  evidence: {path}", highlight=False, markup=False)
    return outcome


def find_experiment(name: str) -> Experiment:
    """The experiment of that name in the registry, or ``module:attribute``.

    Raises:
        HeadwayError: there is none.
    """
    found = registry.find("experiments", name, name)
    if not isinstance(found, Experiment):
        raise HeadwayError(name, "is no headway.experiments.base.Experiment")
    return found


def announce(context: Context) -> None:
    """Say what is going to be done and how long it takes."""
    experiment = context.experiment
    minutes = experiment.quick.minutes if context.quick else experiment.minutes
    context.console.print(f"[bold]{experiment.title}[/]: {experiment.claim}", highlight=False)
    context.say(f"about {human_seconds(minutes * 60)} on two cores{', as a smoke test' if context.quick else ''}")
    if context.ledger.resumed:
        context.say(f"going on with what is finished in {context.folder}")


def measure(context: Context) -> dict[str, Measurement]:
    """Every measurement of the experiment, by name.

    Raises:
        HeadwayError: two measurements have one name.
    """
    experiment = context.experiment
    measured: dict[str, Measurement] = {}
    sources: list[Mapping[str, Measurement]] = []
    for declared in experiment.measurements:
        sources.append({declared.name: declared.measure(context)})
    if experiment.measure is not None:
        sources.append(experiment.measure(context))
    for source in sources:
        if twice := sorted(measured.keys() & source.keys()):
            raise HeadwayError(experiment.name, f"measures {twice[0]!r} twice")
        measured |= source
    return measured


def judge(context: Context, measured: Mapping[str, Measurement]) -> Outcome:
    """The outcome: each expectation beside what was measured."""
    experiment = context.experiment
    rows = [_row(context, expectation, measured) for expectation in experiment.expectations]
    judged = [row.held for row in rows if row.held is not None]
    return Outcome(
        name=experiment.name,
        title=experiment.title,
        paper=experiment.paper,
        claim=experiment.claim,
        held=bool(judged) and all(judged),
        quick=context.quick,
        rows=rows,
        measurements={
            name: Value(value=m.value, interval=m.interval, unit=m.unit, note=m.note) for name, m in measured.items()
        },
        arms={arm.name: list(arm.overrides) for arm in context.arms},
        recipe=dict(experiment.recipe),
        seeds=list(context.seeds),
        figures=context.figures,
        notes=experiment.notes,
        minutes=round(context.ledger.state["seconds"] / 60, 2),
        **provenance(),
    )


def _row(context: Context, expectation: Expectation, measured: Mapping[str, Measurement]) -> Row:
    bound = expectation.bound(context.quick)
    common = {
        "measure": expectation.measure,
        "title": expectation.title or expectation.measure,
        "claimed": expectation.claimed,
        "expected": str(bound),
        "bound": bound.to_dict(),
    }
    if not applies(expectation.only, context.quick):
        why = {"full": "not judged in a quick run", "cuda": "needs a GPU"}[expectation.only]
        return Row(**common, measured=None, held=None, note=why)
    if expectation.measure not in measured:
        raise HeadwayError(context.experiment.name, f"did not measure {expectation.measure!r}",
                           hint=nearest(expectation.measure, measured))  # fmt: skip
    found = measured[expectation.measure]
    held = expectation.judge(found, context.quick)
    return Row(**common, measured=found.value, interval=found.interval, unit=found.unit, note=found.note, held=held)


def outcome_table(outcome: Outcome) -> Table:
    """Claimed against measured, for a terminal."""
    verdict = "[green]held here[/]" if outcome.held else "[red]did not hold here[/]"
    smoke = " (quick run)" if outcome.quick else ""
    table = Table(title=f"{outcome.title}: {verdict}{smoke}", title_justify="left", caption=outcome.paper,
                  caption_justify="left")  # fmt: skip
    for column in ("measure", "claimed", "measured", "90 % interval", "expected", ""):
        table.add_column(column, overflow="fold")
    mark = {True: "[green]held[/]", False: "[red]did not hold[/]", None: "[dim]not judged[/]"}
    for row in outcome.rows:
        value = row.note if row.measured is None else f"{row.measured:.4g} {row.unit}".strip()
        interval = f"{row.interval[0]:.4g} to {row.interval[1]:.4g}" if row.interval else ""
        table.add_row(row.title, row.claimed, value, interval, row.expected, mark[row.held])
    return table
