"""What an experiment may use while it measures: train an arm, compare two, keep a value, show a figure.

Everything finished is kept in the experiment's working folder, so that an interrupted ``headway reproduce`` goes on.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from headway.core.files import write_json
from headway.core.recipe import Recipe, merge
from headway.core.units import human_seconds
from headway.experiments.base import Arm, Experiment, applies
from headway.experiments.evidence import Figure

if TYPE_CHECKING:
    from headway.core.run import Run
    from headway.experiments.compare import Comparison

J = TypeVar("J")

# Laid under every arm's recipe: an experiment reads metrics.jsonl and summary.json, nobody looks at the rest.
_ARM_DEFAULTS: dict[str, Any] = {"log": {"tensorboard": False}}


class Ledger:
    """What an experiment has already measured: JSON values by key, valid for one version of the code on one machine.

    Args:
        fingerprint: of code and machine; values kept under another one are of no use.
        reuse: take up a finished ledger too, not only an interrupted one.
    """

    def __init__(self, path: Path, fingerprint: str, reuse: bool = False) -> None:
        self.path = path
        self.state: dict[str, Any] = {"fingerprint": fingerprint, "finished": False, "seconds": 0.0, "values": {}}
        self.resumed = False
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if isinstance(kept, dict) and kept.get("fingerprint") == fingerprint and (reuse or not kept["finished"]):
            self.state, self.resumed = {**kept, "finished": False}, True

    def value(self, key: str, compute: Callable[[], J]) -> J:
        """The kept value of ``key``, or else ``compute()``, kept as JSON."""
        values = self.state["values"]
        if key not in values:
            computed = compute()
            values[key] = json.loads(json.dumps(computed))
            self.save()
        return values[key]

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time inside, over all restarts, in ``seconds``."""
        before, start = self.state["seconds"], time.monotonic()
        try:
            yield
        finally:
            self.state["seconds"] = before + time.monotonic() - start
            self.save()

    def finish(self) -> None:
        """Note that the evidence is written: the next run measures anew."""
        self.state["finished"] = True
        self.save()

    def save(self) -> None:
        """Write it whole."""
        write_json(self.path, self.state)


class Context:
    """Handed to an experiment's ``measure`` and ``measurements``.

    Args:
        experiment: what is run.
        quick: a smoke test instead of the full experiment.
        folder: the working folder; runs, comparisons and kept values live there until the next full start.
        console: where progress is shown; none: nowhere.
        reuse: take what a finished run of the same code left, too.
    """

    def __init__(
        self, experiment: Experiment, quick: bool, folder: Path, console: Console | None = None, reuse: bool = False
    ) -> None:
        self.experiment, self.quick, self.folder = experiment, quick, folder
        self.console = console or Console(quiet=True)
        self.seeds = experiment.seeds[: experiment.quick.seeds] if quick else experiment.seeds
        self.figures: list[Figure] = []
        self.ledger = Ledger(folder / "ledger.json", code_fingerprint(), reuse)
        self._source = _hash(_source(experiment.measure))
        if not self.ledger.resumed and folder.exists():
            for entry in folder.iterdir():
                if entry.name != ".lock":
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    @property
    def arms(self) -> list[Arm]:
        """The arms that take part in this kind of run, on this machine."""
        return [arm for arm in self.experiment.arms if applies(arm.only, self.quick)]

    def say(self, message: str) -> None:
        """Show a line of progress."""
        self.console.print(f"  {message}", highlight=False, markup=False)

    def show(self, figure: Figure) -> None:
        """Put a figure into the evidence."""
        self.figures.append(figure)

    def keep(self, key: str, compute: Callable[[], J]) -> J:
        """``compute()``, or the value it gave before this experiment was interrupted; plain JSON-able data.

        Args:
            key: names the value; give different settings different keys. A change of the experiment's file forgets it.
        """
        return self.ledger.value(f"value:{self._source[:8]}:{key}", compute)

    def recipe(self, arm: str | Arm, *overrides: str, seed: int | None = None) -> Recipe:
        """An arm's recipe: the experiment's, the arm's overrides, those of a quick run, then ``overrides``."""
        arm = self.experiment.arm(arm) if isinstance(arm, str) else arm
        raw = merge(_ARM_DEFAULTS, dict(arm.recipe if arm.recipe is not None else self.experiment.recipe))
        quick = self.experiment.quick.overrides if self.quick else ()
        named = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{self.experiment.name}-{arm.name}")
        seeded = () if seed is None else (f"seed={seed}",)
        return Recipe.load({**raw, "name": named}, [*arm.overrides, *quick, *overrides, *seeded])

    def train(self, arm: str | Arm, *overrides: str, seed: int | None = None) -> Run:
        """Train an arm, or take the run that was finished before an interruption.

        Args:
            overrides: ``key.path=value``, for instance the size of a grid's cell.
            seed: default: the first of the experiment's seeds.
        """
        from headway.core.run import Run
        from headway.core.train import train
        from headway.experiments.progress import TrainingBar

        arm = self.experiment.arm(arm) if isinstance(arm, str) else arm
        seed = self.seeds[0] if seed is None else seed
        recipe = self.recipe(arm, *overrides, seed=seed)
        path = self.folder / "runs" / f"{recipe.name}-{seed}-{_hash(recipe.to_yaml())[:6]}"
        label = ", ".join([arm.title or arm.name, *overrides, *([f"seed {seed}"] if len(self.seeds) > 1 else [])])
        if (path / "summary.json").is_file() and (run := Run(path)).recipe == recipe:
            return run
        with TrainingBar(self.console, label) as bar:
            run = train(recipe, run=path, observers=[bar])
        summary = run.summary
        losses = [f"{key} {summary[key]:.4f}" for key in ("eval_loss", "bits_per_byte") if key in summary]
        self.say(f"{label}: {', '.join(losses)}, {human_seconds(summary['wall_seconds'])}")
        return run

    def runs(self, arm: str | Arm, *overrides: str) -> list[Run]:
        """An arm's runs, one per seed."""
        return [self.train(arm, *overrides, seed=seed) for seed in self.seeds]

    def compare(self, of: str | Arm, to: str | Arm, *overrides: str, **options: Any) -> Comparison:
        """Two arms interleaved in one process (`compare.py`), ratios ``of`` / ``to``.

        For times and memory, where separate runs mislead.

        Args:
            options: ``blocks``, ``steps``, ``repeats``.
        """
        from headway.experiments.compare import Comparison, compare_recipes

        a, b = self.recipe(to, *overrides, seed=self.seeds[0]), self.recipe(of, *overrides, seed=self.seeds[0])
        names = (a.name.removeprefix(f"{self.experiment.name}-"), b.name.removeprefix(f"{self.experiment.name}-"))

        def measured() -> dict[str, Any]:
            return compare_recipes(a, b, names=names, console=self.console, **options).to_dict()

        key = f"compare:{_hash(a.to_yaml(), b.to_yaml(), repr(sorted(options.items())))}"
        return Comparison.from_dict(self.ledger.value(key, measured))


@cache
def code_fingerprint() -> str:
    """Changes with the machine, torch and the source of all that trains: kept results are of no use after that.

    The command line and the experiments are left out: runs are recognised by their recipes.
    """
    from headway.core import meters

    package = Path(__file__).resolve().parents[1]
    digest = hashlib.blake2b(json.dumps([meters.hardware(), meters.versions()]).encode(), digest_size=16)
    above = (package / "cli", package / "experiments")
    for path in sorted(
        p for p in package.rglob("*.py") if not p.is_relative_to(above[0]) and not p.is_relative_to(above[1])
    ):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()


def _source(function: Callable[..., Any] | None) -> str:
    path = inspect.getsourcefile(function) if function else None
    return Path(path).read_text(encoding="utf-8") if path else ""


def _hash(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()
