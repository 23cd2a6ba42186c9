"""Train a recipe in a run directory: new, or where it stopped."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from headway.core import meters
from headway.core.budget import FILE as PLAN_FILE
from headway.core.budget import plan_for
from headway.core.build import DTYPES, build_trainer
from headway.core.engine import engine_for
from headway.core.errors import CheckpointError, HeadwayError, RecipeError, is_out_of_memory, shown
from headway.core.fallback import entries
from headway.core.files import write_json
from headway.core.metrics import MetricsFile, MLflow, Observer, Record, TensorBoard, WandB, read_metrics
from headway.core.recipe import Recipe
from headway.core.run import Run, locked, next_run_directory
from headway.core.trainer import Trainer

# Keys that may differ between the recipe of a run directory and the one it is resumed with: they do not touch the
# mathematics, but for the order of its sums.
RESUMABLE = ("name", "log", "eval", "checkpoint", "strict", "parallel")

GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
"""What gloo says of a rank that has died or hangs; which of it depends on what this rank was doing."""


def train(
    recipe: Recipe | dict[str, Any] | str | Path,
    *,
    run: str | Path | None = None,
    fresh: bool = False,
    observers: Sequence[Observer] = (),
) -> Run:
    """Train, or go on training, until the recipe's budget is spent.

    Args:
        recipe: a recipe, a mapping, or the path of a recipe file.
        run: the run directory; default ``runs/NAME-N``. One that already holds a part of this run is resumed.
        fresh: start over in a directory that holds a run, which is deleted first.
        observers: also told of every step, evaluation and checkpoint.

    Raises:
        HeadwayError: bad recipe, data or checkpoint, a method that changed nothing, or divergence; nothing is lost.
        Interrupted: a signal arrived; the run was saved.
    """
    recipe = Recipe.load(recipe)
    engine = engine_for(recipe)
    path = engine.common(Path(run) if run else next_run_directory(recipe.name))
    if engine.leads:
        _check_directory(path, recipe, fresh)
    else:
        observers = ()

    started = time.perf_counter()
    with ExitStack() as stack:
        plan = plan_for(recipe, None if fresh else path, lambda text: _note(observers, text))
        if plan is not None:
            _note(observers, plan.explain())
        trainer = build_trainer(plan.apply(recipe) if plan else recipe, path / "checkpoints", observers, engine)
        if engine.leads:
            stack.enter_context(locked(path))
            if fresh:
                _clear(path)
        stack.callback(trainer.checkpointer.close)
        if (state := engine.load(trainer)) is not None:
            trainer.load_state_dict(state)
            del state
        elif (path / "summary.json").is_file():
            raise CheckpointError(str(path / "checkpoints"), "is gone or empty, though this run was finished",
                                  hint="restore it, or start over with --fresh")  # fmt: skip
        if engine.leads:
            trainer.observers = [*_sinks(recipe, path, stack), *observers]
            recipe.save(path / "recipe.yaml")
            if plan is not None:
                write_json(path / PLAN_FILE, plan.to_dict())
            trainer.workload.save_extras(path)
        try:
            trainer.fit()
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise _out_of_memory(trainer, error, planned=plan is not None) from error
            if engine.world > 1 and any(sign in str(error) for sign in GONE):
                raise HeadwayError(f"step {trainer.step + 1}", "another rank is gone or silent") from error
            raise
        summary = summarize(trainer, path, time.perf_counter() - started)
        if plan is not None:
            summary["memory"] = {"budget": plan.budget, "predicted_bytes": plan.predicted_bytes}
        if engine.leads:
            write_json(path / "summary.json", summary)
        for observer in trainer.observers:
            observer.on_end(trainer, summary)
    return Run(path)


def _check_directory(path: Path, recipe: Recipe, fresh: bool) -> None:
    if path.exists() and not path.is_dir():
        raise HeadwayError(str(path), "is a file, expected a directory for the run")
    if (path / "recipe.yaml").is_file():
        if not fresh:
            check_same_recipe(path, recipe)
    elif path.exists() and any(p.name != ".lock" for p in path.iterdir()):
        raise HeadwayError(str(path), "is not empty and holds no run", hint="choose another directory with --run")


def _sinks(recipe: Recipe, path: Path, stack: ExitStack) -> list[Observer]:
    sinks: list[Observer] = [MetricsFile(path / "metrics.jsonl")]
    sinks += [TensorBoard(path / "tensorboard")] if recipe.log.tensorboard else []
    sinks += [{"wandb": WandB, "mlflow": MLflow}[sink](recipe) for sink in recipe.log.sinks]
    for observer in sinks:
        stack.callback(observer.close)
    return sinks


def _out_of_memory(trainer: Trainer, error: BaseException, planned: bool) -> HeadwayError:
    said = str(error).strip().splitlines()
    reason = said[0] if said else "memory ran out"
    hint = "lower memory.budget" if planned else "memory.budget=SIZE finds the fastest way to train within SIZE"
    return HeadwayError(f"step {trainer.step + 1}", f"does not fit in memory ({reason})", hint=hint)


def _note(observers: Sequence[Observer], text: str) -> None:
    for observer in observers:
        observer.on_note(text)


def summarize(trainer: Trainer, path: Path, wall_seconds: float) -> Record:
    """What a run came to: rates are medians over the logged steps."""
    engine, metrics_file = trainer.engine, path / "metrics.jsonl"
    logged = read_metrics(metrics_file) if metrics_file.is_file() else []
    rates = sorted(r["tokens_per_second"] for r in logged if "tokens_per_second" in r)
    rate = rates[len(rates) // 2] if rates else trainer.tokens / max(trainer.seconds, 1e-9)
    parameters, flops = engine.model_size(trainer)
    peak = meters.matmul_peak(DTYPES[trainer.recipe.train.precision], trainer.device, reached=rate * flops)
    peak *= engine.devices
    metrics = {key: value for key, value in trainer.evaluation.items() if key not in ("step", "tokens")}
    return {
        **metrics,
        "steps": trainer.step,
        "tokens": trainer.tokens,
        "tokens_per_second": rate,
        "flops_per_token": flops,
        "model_flops_utilization": rate * flops / peak,
        "peak_memory_bytes": int(engine.highest(trainer.peak_memory_bytes)),
        "process_peak_bytes": int(engine.highest(meters.process_peak_bytes())),
        "device_peak_bytes": meters.device_peak_bytes(trainer.device),
        "train_seconds": trainer.seconds,
        "wall_seconds": wall_seconds,
        "parameters": parameters,
        "methods": trainer.changes,
        "parallel": engine.report(),
        "reports": {method.card.name: report for method in trainer.methods if (report := method.report())},
        "checkpoints": trainer.checkpointer.report(),
        "fallbacks": entries(),
        "hardware": meters.hardware(),
        "versions": meters.versions(),
    }


def check_same_recipe(path: Path, recipe: Recipe) -> None:
    """Refuse to resume a run with a recipe that would have made another run.

    A longer budget is the same run where the schedule does not depend on its length.

    Raises:
        RecipeError: naming the keys that differ.
    """
    ours, theirs = _flat(recipe.to_dict()), _flat(Run(path).recipe.to_dict())
    different = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
    different = [k for k in different if k.split(".")[0] not in RESUMABLE]
    # `methods: {}` against `methods: {ema: ...}` differs in methods.ema alone.
    different = [k for k in different if not any(other.startswith(f"{k}.") for other in different)]
    if recipe.schedule.name in ("constant", "inverse-sqrt"):  # type: ignore[attr-defined]
        different = [k for k in different if k not in ("train.steps", "train.tokens", "train.time")]
    if different:
        changes = ", ".join(f"{k} (was {shown(theirs.get(k))}, now {shown(ours.get(k))})" for k in different[:4])
        raise RecipeError(different[0], f"{path} was started with another recipe: {changes}",
                          hint="name another directory with --run, or start over with --fresh")  # fmt: skip


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {
            k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}" if prefix else key).items()
        }
    return {prefix: value}


def _clear(path: Path) -> None:
    # The recipe goes last: a directory without one is taken for somebody else's, and a kill may come at any moment.
    for entry in sorted(path.iterdir(), key=lambda entry: entry.name == "recipe.yaml"):
        if entry.name == ".lock":
            continue
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
