"""The command line: each command is a file of this folder; none imports torch before it runs, so help comes at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from headway.cli import (
    compare,
    doctor,
    export,
    generate,
    import_hf,
    methods,
    parity,
    plan,
    profile,
    recipe,
    report,
    reproduce,
    train,
)
from headway.core.errors import HeadwayError, Interrupted

app = typer.Typer(
    name="headway",
    help="Train neural networks with less time, less memory and fewer machines.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version.", is_eager=True)) -> None:
    if version:
        from importlib.metadata import version as installed

        print(installed("headway"))
        raise typer.Exit


app.command()(train.train)
app.command()(compare.compare)
app.command()(reproduce.reproduce)
app.command()(methods.methods)
app.command()(plan.plan)
app.command()(parity.parity)
app.command()(profile.profile)
app.command()(generate.generate)
app.command()(report.report)
app.command()(export.export)
app.command("import")(import_hf.import_hf)
app.command()(doctor.doctor)
app.add_typer(recipe.app, name="recipe")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status.

    0: done. 1: done, and the answer is no (``reproduce``), or a fault of ours, with its traceback. 2: a mistake of the
    user's or a damaged input, told in one message. 130 or 143: stopped by Ctrl-C or SIGTERM, with the run saved.
    """
    command = typer.main.get_command(app)
    try:
        command(args=None if argv is None else list(argv), prog_name="headway")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except HeadwayError as error:
        print(f"headway: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"headway: {stop}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
