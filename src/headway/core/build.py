"""From a recipe to a trainer: find the parts, let each method wrap them, check that every method changed something."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from headway.core import registry
from headway.core.allocator import keep_freed_memory
from headway.core.budget import plan_for
from headway.core.checkpointer import NoCheckpoints
from headway.core.engine import Engine, engine_for
from headway.core.errors import RecipeError
from headway.core.fallback import FallbackLog, use_log
from headway.core.method import check_changes, resolve, wrap
from headway.core.metrics import Observer
from headway.core.recipe import Recipe
from headway.core.state import seed_everything
from headway.core.trainer import Trainer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def build_trainer(
    recipe: Recipe, folder: Path | None = None, observers: Sequence[Observer] = (), engine: Engine | None = None
) -> Trainer:
    """Assemble a training; nothing is trained or written yet.

    Args:
        folder: where checkpoints go; without one nothing is saved.
        engine: whoever takes part; by default found out from the environment.

    Raises:
        HeadwayError: the recipe cannot be run, a method is refused or changed nothing.
    """
    recipe = _settled(recipe)
    engine = engine or engine_for(recipe)
    engine.recipe = recipe  # a memory plan may have chosen another micro-batch
    use_log(FallbackLog(recipe.strict))
    seed_everything(recipe.seed)
    methods = resolve(recipe)
    device = engine.device(select_device(recipe))
    if device.type == "cpu":
        keep_freed_memory()
    workload = registry.find("workloads", recipe.workload, "workload")(recipe)
    workload.engine = engine

    config = wrap(methods, "model_config", workload.model_config())
    built = workload.build_model(config).to(device)
    if recipe.train.precision == "fp64":
        built = built.double()
    model = wrap(methods, "model", engine.split(built, workload))
    if recipe.train.compile:
        workload.compile(model)
    engine.shard(model)
    dtype = engine.weights_dtype(DTYPES[recipe.train.precision])
    optimizer_part = registry.find("optimizers", recipe.optimizer.name, "optimizer.name")  # type: ignore[attr-defined]
    optimizer = wrap(methods, "optimizer", optimizer_part.build(model, recipe.optimizer, dtype))
    loss = wrap(methods, "loss", workload.loss())
    stream = engine.stream(wrap(methods, "stream", workload.stream()))
    schedule_part = registry.find("schedules", recipe.schedule.name, "schedule.name")  # type: ignore[attr-defined]
    by_steps = recipe.train.tokens is None and recipe.train.time is None
    schedule = wrap(methods, "schedule", schedule_part.build(recipe.schedule, recipe.train.steps if by_steps else None))

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    checkpointer_part = registry.find("checkpointers", recipe.checkpoint.mode, "checkpoint.mode")  # type: ignore[attr-defined]
    checkpointer = checkpointer_part(recipe.checkpoint, folder) if folder else NoCheckpoints()
    trainer = Trainer(
        recipe=recipe,
        engine=engine,
        workload=workload,
        methods=methods,
        changes={},
        device=device,
        model=model,
        optimizer=optimizer,
        loss=loss,
        stream=stream,
        schedule=schedule,
        forward_backward=wrap(methods, "forward_backward", engine.forward_backward(model, loss)),
        gradients=wrap(methods, "gradients", engine.gradients(model, optimizer, recipe.train.clip)),
        update=wrap(methods, "update", update),
        weights=wrap(methods, "weights", nullcontext),
        checkpointer=wrap(methods, "checkpointer", checkpointer),
        observers=observers,
        base_lrs=[group["lr"] for group in optimizer.param_groups],
    )
    trainer.changes = check_changes(methods)
    return trainer


def _settled(recipe: Recipe) -> Recipe:
    if not (recipe.train.steps or recipe.train.tokens or recipe.train.time):
        raise RecipeError("train", "has no end", hint="give train.steps, train.tokens or train.time")
    plan = plan_for(recipe)
    return plan.apply(recipe) if plan is not None else recipe


def select_device(recipe: Recipe) -> torch.device:
    """The device that the recipe asks for.

    Raises:
        RecipeError: it asks for a GPU and there is none.
    """
    wanted = recipe.train.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RecipeError("train.device", "asks for a GPU, but torch sees none", hint="auto takes what there is")
    return torch.device(wanted)
