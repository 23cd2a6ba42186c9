"""Write the reference pages from the code: cli.md, api.md, the tables of recipe.md and parallel.md. Run: make docs."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from typer.models import OptionInfo

import headway
from headway.cli.main import app
from headway.core import registry
from headway.core.recipe import EvalOptions, LogOptions, Recipe, TrainOptions
from headway.data.options import DataOptions
from headway.models.config import FAMILIES
from headway.optim.options import OptimizerOptions, ScheduleOptions

DOCS = Path(__file__).resolve().parent
MADE = "<!-- Made by `make docs` from the code; edit there. -->\n"
START, END = "<!-- tables: made by `make docs` from the code -->", "<!-- end of tables -->"


def pages() -> dict[Path, str]:
    """Page -> the text that it should have."""
    return {
        DOCS / "recipe.md": _with_tables(DOCS / "recipe.md", _recipe_tables()),
        DOCS / "parallel.md": _with_tables(DOCS / "parallel.md", _methods_on_ranks()),
        DOCS / "cli.md": _cli(),
        DOCS / "api.md": _api(),
    }


def _with_tables(page: Path, tables: str) -> str:
    before, _, rest = page.read_text(encoding="utf-8").partition(START)
    return f"{before}{START}\n\n{tables}\n{END}{rest.partition(END)[2]}"


def _methods_on_ranks() -> str:
    columns = ("replicate", "shard", "sequence", "tensor", "pipeline", "experts")
    rows = [f"| method | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for name in registry.names("methods"):
        able = registry.find("methods", name, "methods").card.parallel
        rows.append(f"| `{name}` | {' | '.join('yes' if column in able else '' for column in columns)} |")
    return "\n".join(rows) + "\n"


def _recipe_tables() -> str:
    checkpoint = registry.find("checkpointers", "lazy", "checkpoint").Options
    parts: list[tuple[str, type[BaseModel]]] = [("Top level", Recipe), ("train", TrainOptions)]
    parts += [(f"model, family {name}", options) for name, options in FAMILIES.items()]
    parts += [("data", DataOptions), ("optimizer", OptimizerOptions), ("schedule", ScheduleOptions)]
    parts += [("eval", EvalOptions), ("log", LogOptions), ("checkpoint", checkpoint)]
    return "\n".join(f"### {title}\n\n{_options(options)}" for title, options in parts)


def _options(options: type[BaseModel]) -> str:
    rows = ["| key | kind | default | what it is |", "|---|---|---|---|"]
    for name, info in options.model_fields.items():
        if info.is_required():
            default = "required"
        elif isinstance(info.default, BaseModel) or info.default in ({}, PydanticUndefined):
            default = ""
        else:
            default = f"`{_yaml(info.default)}`"
        help_text = " ".join((info.description or "").split()).replace("|", "\\|")
        rows.append(f"| `{info.alias or name}` | {_kind(info.annotation)} | {default} | {help_text} |")
    return "\n".join(rows) + "\n"


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _kind(annotation: Any) -> str:
    names = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false", "NoneType": ""}
    if isinstance(annotation, type) and not get_args(annotation):
        return "section" if issubclass(annotation, BaseModel) else names.get(annotation.__name__, annotation.__name__)
    text = str(annotation)
    if text.startswith("typing.Literal"):
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if text.startswith(("tuple", "dict")):
        return {"tuple": "list", "dict": "mapping"}[text.split("[")[0]]
    kinds = dict.fromkeys(_kind(part) for part in get_args(annotation) if not _is_metadata(part))
    return " or ".join(kind for kind in kinds if kind)


def _is_metadata(part: Any) -> bool:
    return not (isinstance(part, type) or get_args(part))


def _cli() -> str:
    lines = [MADE, "# The command line\n", "`headway COMMAND --help` says the same.\n"]
    lines.append(
        "Exit status: 0 done; 1 the answer is no, or a fault of Headway's (with a traceback); 2 a mistake or a"
    )
    lines.append("damaged input, told in one message; 130 or 143 stopped by Ctrl-C or SIGTERM, with the run saved.\n")
    lines.append("Results go to standard output (`--json`: as one JSON value), progress to standard error.\n")
    commands = [(info.name or "", info.callback) for info in app.registered_commands]
    for group in app.registered_groups:
        inner = group.typer_instance.registered_commands if group.typer_instance else []
        commands += [(f"{group.name} {info.name or info.callback.__name__}", info.callback) for info in inner]
    lines += [_command(f"headway {name or function.__name__}", function) for name, function in commands]
    return "\n".join(lines)


def _command(path: str, function: Any) -> str:
    usage, rows = [path], []
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        kind, info = get_args(hints[name])
        is_option = isinstance(info, OptionInfo)
        shown = info.metavar or _value(kind)
        if is_option:
            given = (info.default, *(info.param_decls or ()))  # in Annotated, the first declaration takes this place
            declared = [text for text in given if isinstance(text, str) and text.startswith("-")]
            shown = f"{', '.join(declared) or '--' + name.replace('_', '-')}{'' if kind is bool else ' ' + shown}"
        else:
            usage.append(shown)
        default = parameter.default
        if isinstance(info.show_default, str):
            default = info.show_default
        needless = default is parameter.empty or default in (None, False)
        default_text = "" if needless else f" Default: {default}."
        rows.append(f"| `{shown}` | {info.help or ''}{default_text} |")
    usage.append("[OPTIONS]")
    table = "\n".join(["| | |", "|---|---|", *(_escaped(row) for row in rows)]) if rows else ""
    return f"## {path}\n\n    {' '.join(usage)}\n\n{inspect.getdoc(function)}\n\n{table}\n"


def _value(kind: Any) -> str:
    """``int | None`` -> ``INT``."""
    parts = [part for part in get_args(kind) if part is not type(None)] or [kind]
    return {"int": "N", "float": "NUMBER", "str": "TEXT"}.get(getattr(parts[0], "__name__", ""), "VALUE")


def _escaped(row: str) -> str:
    """A bar within backticks would end the cell."""
    return re.sub(r"`[^`]*`", lambda code: code[0].replace("|", "\\|"), row)


def _api() -> str:
    lines = [
        MADE,
        "# The Python interface\n",
        "`import headway` is quick; each name is loaded when it is first used.\n",
    ]
    for name in headway.__all__:
        thing = getattr(headway, name)
        if name == "__version__":
            lines.append("## headway.\\_\\_version\\_\\_\n\nThe installed version.\n")
            continue
        shown = [
            f"headway.{name}{'' if inspect.isclass(thing) else _signature(thing)}",
            "",
            inspect.getdoc(thing) or "",
        ]
        if inspect.isclass(thing):
            shown += ["", *_members(thing)]
        lines.append(f"## headway.{name}\n\n```text\n" + "\n".join(shown).rstrip() + "\n```\n")
    return "\n".join(lines)


def _signature(function: Any) -> str:
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(function)))
    return text.replace("(self, ", "(").replace("(self)", "()")


def _members(cls: type) -> list[str]:
    """The public methods and properties that Headway's own classes in the line define, with their first sentence."""
    lines = []
    for base in reversed([base for base in cls.__mro__ if base.__module__.startswith("headway.")]):
        for name, member in vars(base).items():
            function = getattr(member, "__func__", member)
            if name.startswith("_") or not (inspect.isfunction(function) or hasattr(member, "__get__")):
                continue
            doc = (inspect.getdoc(member) or "").split("\n\n")[0].replace("\n", " ")
            if doc and inspect.isfunction(function):
                lines.append(f".{name}{_signature(function).replace('(cls, ', '(').replace('(cls)', '()')}\n    {doc}")
            elif doc:
                lines.append(f".{name}\n    {doc}")
    return lines


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
