"""Measure one recipe: raw step times, losses, memory, FLOPs; dissected where asked. What a cell of a grid runs."""

from __future__ import annotations

from typing import Any

from headway.core.build import build_trainer
from headway.core.errors import RecipeError
from headway.core.meters import device_peak_bytes, hardware, matmul_peak, process_peak_bytes, versions
from headway.core.recipe import Recipe
from headway.plan.dissect.memory import memory_breakdown
from headway.plan.dissect.training import dissect_trainer

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def measure_recipe(work: dict[str, Any]) -> dict[str, Any]:
    """Train a recipe for a few steps and return what they took.

    Args:
        work: ``recipe`` (a mapping), ``warmup`` and ``measure`` (steps; the warm-up ones, which compile and
        allocate, are
            not measured), and optionally ``dissect`` (steps to dissect afterwards).

    Returns:
        ``step_seconds`` (raw, of the measured steps), ``losses`` (of all steps), ``tokens_per_step``,
        ``flops_per_step``, ``precision`` (the data types of the matrix products), memory in bytes, ``parameters``,
        ``trained``, ``changes``, ``hardware``, ``versions``; with ``dissect`` also ``tree`` and ``memory``.

    Raises:
        HeadwayError: the recipe cannot be run; DivergedError: a loss that is not finite.
    """
    import torch

    warmup, measure = work["warmup"], work["measure"]
    recipe = Recipe.load(work["recipe"])
    steps = warmup + measure + (work.get("dissect") or 0) + 16
    trainer = build_trainer(recipe.override(f"train.steps={steps}", "train.tokens=null", "train.time=null"))
    losses = []
    for index in range(warmup):
        metered = index == warmup - 1  # the optimizer's state exists by then
        record = trainer.metered_step() if metered else trainer.train_step()
        losses.append(record["loss"])
    step_seconds = []
    for _ in range(measure):
        try:
            record = trainer.train_step()
        except StopIteration:
            raise RecipeError("data", f"is exhausted before step {warmup + measure}") from None
        losses.append(record["loss"])
        step_seconds.append(record["step_seconds"])
    tokens = trainer.tokens / trainer.step
    result = {
        "step_seconds": step_seconds,
        "losses": losses,
        "tokens_per_step": tokens,
        "flops_per_step": trainer.workload.flops_per_token(trainer.model) * tokens,
        "precision": {DTYPES[recipe.train.precision]: 1.0},
        "peak_memory_bytes": trainer.peak_memory_bytes,
        "process_peak_bytes": process_peak_bytes(),
        "device_peak_bytes": device_peak_bytes(trainer.device),
        "device_reserved_bytes": torch.cuda.max_memory_reserved() if trainer.device.type == "cuda" else None,
        "matmul_peak": matmul_peak(getattr(torch, DTYPES[recipe.train.precision]), trainer.device),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "trained": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "changes": trainer.changes,
        "hardware": hardware(),
        "versions": versions(),
    }
    if work.get("dissect"):
        result["tree"] = dissect_trainer(trainer, work["dissect"]).to_dict()
        result["memory"] = memory_breakdown(trainer.train_step, trainer.model, trainer.optimizer, warmup=0).to_dict()
    return result
