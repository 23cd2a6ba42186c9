"""A run's directory: everything that one training left behind."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from headway.core.errors import HeadwayError, RecipeError
from headway.core.metrics import read_metrics
from headway.core.recipe import Recipe


class Run:
    """One training, in one directory.

    Raises:
        HeadwayError: the directory is missing or is not a run.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "recipe.yaml").is_file():
            why = "holds no recipe.yaml, so it is no run" if self.path.is_dir() else "there is no such run directory"
            raise HeadwayError(str(self.path), why, hint="`headway train RECIPE --run DIR` makes one")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.resolve().name

    @cached_property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        path = self.path / "recipe.yaml"
        try:
            return Recipe.load(path)
        except RecipeError as error:
            if error.where == str(path.resolve()) or error.where == str(path):
                raise
            raise RecipeError(str(path), f"is not a recipe any more ({error})") from error

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    def metrics(self) -> list[dict[str, Any]]:
        """The logged training steps, in order."""
        return [r for r in read_metrics(self.path / "metrics.jsonl") if "loss" in r]

    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluations, in order."""
        return [r for r in read_metrics(self.path / "metrics.jsonl") if "eval_loss" in r]

    @property
    def summary(self) -> dict[str, Any]:
        """What the finished run came to; empty while it is not finished."""
        path = self.path / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def next_run_directory(name: str, root: Path = Path("runs")) -> Path:
    """``runs/NAME-N`` with the first N that is not taken."""
    number = 1
    while (root / f"{name}-{number}").exists():
        number += 1
    return root / f"{name}-{number}"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a run directory for one process; the lock dies with the process.

    Raises:
        HeadwayError: another process trains in it, or it cannot be made or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("a+")
    except OSError as error:
        why = f"cannot be written ({error.strerror or error})"
        raise HeadwayError(str(path), why, hint="choose another directory with --run") from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip()
            raise HeadwayError(
                str(path), f"another process{f' ({owner})' if owner else ''} is training in it"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
