"""`headway doctor`: what this machine has, what is missing, and its measured peak rates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from headway.cli.output import JsonFlag, note, print_json, print_table
from headway.core.units import human


def doctor(
    runs: Annotated[
        Path, typer.Option("--runs", metavar="DIR", help="Where runs are written; its disk is measured.")
    ] = Path("runs"),
    json: JsonFlag = False,
) -> None:
    """Say what this machine has, what is missing, and how fast it is at best. Takes some seconds."""
    from headway.plan.machine import examine

    note("measuring matrix products, memory, disk and torch.compile")
    facts = examine(runs)
    print_json(facts) if json else print_facts(facts)


def print_facts(facts: dict[str, Any]) -> None:
    """What `examine` found, as two tables."""
    machine = facts["hardware"]
    rows = [
        ("processor", f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads used"),
        ("memory", human(machine["memory_bytes"], "B")),
        ("GPU", f"{machine['gpus']} x {machine['gpu']}" if machine["gpu"] else "none"),
        ("system", machine["system"]),
        *((name, version) for name, version in facts["versions"].items()),
        *(
            (f"matrix products, {name}", f"{human(rate)}FLOP/s")
            for name, rate in facts["matmul_flops_per_second"].items()
        ),
        ("memory traffic", f"{human(facts['memory_bytes_per_second'], 'B')}/s"),
        (f"writing to {facts['disk_folder']}", f"{human(facts['disk_bytes_per_second'], 'B')}/s"),
        *((f"torch: {name}", state) for name, state in facts["features"].items()),
    ]
    print_table(["this machine", facts["device"]], rows)
    extras = []
    for extra, packages in facts["extras"].items():
        missing = [package for package, version in packages.items() if version is None]
        have = ", ".join(f"{package} {version}" for package, version in packages.items() if version)
        extras.append((extra, have, f"pip install 'headway[{extra}]'" if missing else ""))
    print_table(["extra", "installed", "to have all of it"], extras)
