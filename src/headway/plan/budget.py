"""How big a model and how many tokens, for a recipe's data and a budget: what `headway plan` answers."""

from __future__ import annotations

from typing import Any

from headway.core.build import build_trainer
from headway.core.errors import HeadwayError
from headway.core.recipe import Recipe
from headway.plan.one_epoch.planner import OneEpochPlan, flops, one_epoch_plan, seconds

PROBE_STEPS = 4


def plan_recipe(
    recipe: Recipe, *, budget_flops: float | None = None, budget_seconds: float | None = None, ratio: float = 20.0
) -> OneEpochPlan:
    """The size and the length of a run of ``recipe`` that sees no token twice and spends the budget.

    The recipe gives the data, the batch and the model's family and shape; a budget in seconds is turned into
    floating-point operations by the rate that a few of its steps reach on this machine.

    Args:
        ratio: tokens per non-embedding parameter.

    Raises:
        HeadwayError: the recipe cannot be run, its workload does not count tokens, or the budget is not one of both.
    """
    if (budget_flops is None) == (budget_seconds is None):
        raise HeadwayError("plan", "needs one budget", expected="--flops or --time")
    trainer = build_trainer(recipe.override(f"train.steps={PROBE_STEPS}", "train.tokens=null", "train.time=null"))
    data: Any = getattr(trainer.workload, "data", None)
    unique = getattr(data, "unique_tokens", None)
    if unique is None:
        raise HeadwayError("workload", f"{recipe.workload} does not count the tokens of its data")
    times = [trainer.train_step()["step_seconds"] for _ in range(PROBE_STEPS if budget_seconds else 1)]
    tokens_per_step = round(trainer.tokens / trainer.step)
    rate = trainer.workload.flops_per_token(trainer.model) * tokens_per_step / min(times)
    return one_epoch_plan(
        flops(budget_flops) if budget_flops is not None else seconds(budget_seconds or 0.0),
        unique,
        tokens_per_step,
        trainer.workload.model_config(),
        ratio=ratio,
        sequence=recipe.data.sequence,  # type: ignore[attr-defined]
        flops_per_second=rate if budget_seconds is not None else None,
    )
