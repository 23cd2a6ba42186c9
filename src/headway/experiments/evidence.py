"""Evidence: what an experiment measured, on which hardware, at which commit, as a file that one command makes again."""

from __future__ import annotations

import json
import subprocess
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from headway.core.errors import HeadwayError
from headway.core.files import write_text


class _Record(BaseModel):
    # Infinity is a result ("never reached"); JSON has no number for it: it is written and read back as a string.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Series(_Record):
    """One line, set of points or set of bars of a figure."""

    name: str
    x: list[float | str]
    y: list[float]
    low: list[float] | None = None
    """Lower end of each point's interval."""
    high: list[float] | None = None
    kind: Literal["line", "points", "bars"] = "line"


class Figure(_Record):
    """A figure as data, drawn when a report is made."""

    title: str
    x: str
    """What the horizontal axis shows, with its unit."""
    y: str
    series: list[Series]
    log_x: bool = False
    log_y: bool = False
    caption: str = ""


class Value(_Record):
    """A measured number as it is kept."""

    value: float
    interval: tuple[float, float] | None = None
    unit: str = ""
    note: str = ""


class Row(_Record):
    """One expectation: what the paper claims, what was measured, and whether that is as expected."""

    measure: str
    title: str
    claimed: str
    measured: float | None
    """None: not measured in this kind of run."""
    interval: tuple[float, float] | None = None
    unit: str = ""
    expected: str
    """The expectation in words; ``bound`` is the same as data."""
    bound: dict[str, Any]
    held: bool | None
    """None: not judged in this kind of run or on this machine; ``note`` says why."""
    note: str = ""


class Outcome(_Record):
    """What came out of one experiment: also the format of the files in ``evidence/``."""

    schema_version: Literal[1] = 1
    name: str
    title: str
    paper: str
    claim: str
    held: bool
    """Every judged row held, and at least one was judged."""
    quick: bool
    rows: list[Row]
    measurements: dict[str, Value]
    """Every measured number, judged or not."""
    arms: dict[str, list[str]]
    """Name of an arm -> its overrides of the experiment's recipe."""
    recipe: dict[str, Any]
    """What the arms share."""
    seeds: list[int]
    figures: list[Figure] = []
    notes: str = ""
    minutes: float
    """Time spent measuring, over all restarts."""
    date: str
    commit: str | None
    """The source's git commit, with ``+changes`` where the package differed from it; None outside a checkout."""
    hardware: dict[str, Any]
    versions: dict[str, str]

    @property
    def exit_status(self) -> int:
        """0: the claim held here; 1: it did not."""
        return 0 if self.held else 1

    def to_json(self) -> str:
        """The evidence file's text."""
        return json.dumps(json.loads(self.model_dump_json()), indent=1) + "\n"


def save_evidence(outcome: Outcome, path: str | Path) -> Path:
    """Write ``outcome`` whole.

    Raises:
        HeadwayError: ``outcome`` is of a quick run and ``path`` holds the evidence of a full one.
    """
    path = Path(path)
    refuse_overwriting(path, outcome.quick)
    write_text(path, outcome.to_json())
    return path


def refuse_overwriting(path: Path, quick: bool) -> None:
    """A smoke test never replaces evidence.

    Raises:
        HeadwayError: ``quick``, and ``path`` holds the evidence of a full run.
    """
    if quick and path.exists() and not load_evidence(path).quick:
        raise HeadwayError(str(path), "holds the evidence of a full run, which a quick one does not replace",
                           hint="give another folder with --out")  # fmt: skip


def load_evidence(path: str | Path) -> Outcome:
    """The outcome in an evidence file.

    Raises:
        HeadwayError: the file is missing, no JSON, or not evidence; with the first field that is wrong.
    """
    path = Path(path)
    try:
        return Outcome.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HeadwayError(str(path), f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise HeadwayError(str(path), "is not text, so it is no evidence file") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise HeadwayError(str(path), f"is no evidence file: {field}: {first['msg']}",
                           hint="`headway reproduce NAME` writes one") from None  # fmt: skip


def evidence_folder(start: Path | None = None) -> Path:
    """``evidence/`` of the Headway checkout around ``start`` (default: the current folder), or else below ``start``."""
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        project = folder / "pyproject.toml"
        if project.is_file() and _project_name(project) == "headway":
            return folder / "evidence"
    return start / "evidence"


def _project_name(path: Path) -> str | None:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")).get("project", {}).get("name")
    except (OSError, ValueError):
        return None


def provenance() -> dict[str, Any]:
    """Date, commit, hardware and versions of a measurement made now."""
    from headway.core import meters

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(Path(__file__).resolve().parents[1]),
        "hardware": meters.hardware(),
        "versions": meters.versions(),
    }


def _commit(package: Path) -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        if not git("ls-files", "--", "__init__.py"):
            return None  # installed somewhere below a checkout of something else
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None
