"""How big a model, how many tokens: a run of one epoch for a budget of compute and a number of unique tokens.

Tokens and parameters keep a ratio (T / P, tokens per non-embedding parameter), and the budget is spent:

    T = ratio * P        budget = T * (6 P + 6 d V [+ attention])

(Komatsuzaki, arXiv 1906.06669, on size and iterations: a ratio near 5 in that setting; 20 is what later work with
schedules tuned per length found, Hoffmann et al., arXiv 2203.15556.) The head's 6 d V counts, since in small models it
is a large part of the cost though none of its weights are in P.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from headway.core.errors import HeadwayError
from headway.core.options import Options
from headway.core.units import human, human_seconds
from headway.plan.one_epoch.power_law import PowerLaw
from headway.plan.one_epoch.ratio import RatioFit
from headway.plan.one_epoch.sizes import Size, nearest_size

__all__ = [
    "HARMLESS_EPOCHS", "Budget", "OneEpochPlan", "expected_unique_share", "flops", "one_epoch_plan",
    "one_epoch_tokens", "rebalance", "seconds",
]  # fmt: skip

Target = float | RatioFit

HARMLESS_EPOCHS = 4.0  # repeats up to here cost little: Muennighoff et al., arXiv 2305.16264
MANY_DUPLICATES = 0.05
FAR_EXTRAPOLATION = 4.0
FEW_STEPS = 200
Rate = float | Callable[[Size], float]


@dataclass(frozen=True)
class Budget:
    """An amount of compute, in floating-point operations or in seconds."""

    amount: float
    unit: str

    def __str__(self) -> str:
        return f"{self.amount:.3g} FLOP" if self.unit == "flops" else human_seconds(self.amount)


def flops(amount: float) -> Budget:
    """A budget in floating-point operations, forward and backward."""
    return _budget(amount, "flops")


def seconds(amount: float) -> Budget:
    """A budget in seconds of training; its plan needs the rate that the machine reaches."""
    return _budget(amount, "seconds")


def _budget(amount: float, unit: str) -> Budget:
    if not (math.isfinite(amount) and amount > 0):
        raise HeadwayError(f"budget in {unit}", got=amount, expected="a positive number")
    return Budget(float(amount), unit)


@dataclass(frozen=True)
class OneEpochPlan:
    """What to train, and for how long."""

    size: Size
    steps: int
    tokens: int
    """Tokens that the run processes: steps times tokens per step."""
    epochs: float
    """Passes over the unique tokens, near-duplicates taken off; above 1 the plan repeats data."""
    ratio: float
    """Tokens per non-embedding parameter, as it came out."""
    flops: float
    seconds: float | None
    """Where the rate of the machine is known."""
    loss: float | None
    """Predicted, where a fit was given."""
    loss_interval: tuple[float, float] | None
    warnings: tuple[str, ...]
    smaller: OneEpochPlan | None
    """The largest plan of the same ratio that the unique tokens feed in one epoch, where this one repeats data."""

    def recipe(self) -> dict[str, Any]:
        """The part of a recipe that this plan decides, to be laid over the rest."""
        shape: dict[str, Any] = {"hidden": self.size.width, "layers": self.size.depth, "heads": self.size.heads}
        for name in ("kv_heads", "head_dim", "intermediate"):
            if getattr(self.size.config, name, None) is not None:
                shape[name] = getattr(self.size.config, name)
        return {"model": shape, "train": {"steps": self.steps}, "methods": {"one-epoch": {}}}

    def __str__(self) -> str:
        size, tokens = self.size, human(self.tokens)
        lines = [
            f"{human(size.parameters)} parameters: width {size.width}, {size.depth} blocks, {size.heads} heads",
            f"{self.steps} steps, {tokens} tokens ({self.ratio:.1f} per parameter), {self.epochs:.2f} epochs",
            f"{self.flops:.3g} FLOP" + (f", {human_seconds(self.seconds)}" if self.seconds is not None else ""),
        ]
        if self.loss is not None and self.loss_interval is not None:
            low, high = self.loss_interval
            lines.append(f"loss {self.loss:.4g} predicted ({low:.4g} to {high:.4g})")
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def one_epoch_plan(
    budget: Budget,
    unique_tokens: float,
    tokens_per_step: int,
    family: Options,
    *,
    ratio: Target = 20.0,
    sequence: int | None = None,
    flops_per_second: Rate | None = None,
    fit: PowerLaw | None = None,
    duplicate_rate: float = 0.0,
    aspect: float | None = None,
) -> OneEpochPlan:
    """The size and length of a one-epoch run that spends ``budget``.

    Args:
        budget: `flops(...)` or `seconds(...)`.
        unique_tokens: tokens in the data, each counted once.
        tokens_per_step: tokens per optimizer step.
        family: a Llama or GPT-2 configuration with its vocabulary; its size gives the usual aspect ratio and head
            width, everything else is kept.
        ratio: tokens per non-embedding parameter: 5 (the paper's), 20 (later work's), any other, or a fit to runs,
            which also predicts the loss.
        sequence: tokens per sequence, to count attention's products too; None leaves them out.
        flops_per_second: rate that training reaches, or a function of the size; needed for a budget in seconds.
        fit: a learning curve's law in steps, of a run of about the planned size, to predict the loss with.
        duplicate_rate: share of the tokens in near-duplicates, taken off the unique ones.
        aspect: width per block; None takes that of ``family``.

    Raises:
        HeadwayError: a value out of range, a budget in seconds without a rate, a family whose sizes are not known.
    """
    _check(unique_tokens, tokens_per_step, ratio, duplicate_rate)
    if budget.unit == "seconds" and flops_per_second is None:
        raise HeadwayError(
            "budget", "is in seconds, but the rate of the machine is not known",
            hint="pass flops_per_second: flops_per_token * tokens_per_second of a short run's summary.json",
        )  # fmt: skip
    unique = unique_tokens * (1.0 - duplicate_rate)

    def affordable(size: Size) -> float:
        """Tokens that the budget pays for at this size."""
        total = budget.amount if budget.unit == "flops" else budget.amount * _rate(flops_per_second, size)
        return total / size.flops_per_token

    def wanted(size: Size) -> float:
        """The ratio to aim at, at the compute that this size would use."""
        return ratio.at(affordable(size) * size.flops_per_token) if isinstance(ratio, RatioFit) else ratio

    def nearest(tokens: Callable[[Size], float]) -> Size:
        excess = lambda size: tokens(size) / size.parameters / wanted(size)  # noqa: E731
        return nearest_size(family, excess, sequence=sequence, aspect=aspect)

    best = nearest(affordable)
    steps = max(1, round(affordable(best) / tokens_per_step))
    plan = _plan(best, steps, tokens_per_step, unique, flops_per_second, ratio, fit)
    warnings = _warnings(plan, wanted(best), unique_tokens, duplicate_rate, ratio, fit)
    smaller = None
    if plan.epochs > 1:
        fed = nearest(lambda size: unique)
        smaller = _plan(fed, int(unique // tokens_per_step), tokens_per_step, unique, flops_per_second, ratio, fit)
        warnings.insert(
            0,
            f"{human(plan.tokens)} tokens wanted, {human(unique)} unique: {plan.epochs:.2f} epochs"
            + (", which costs little" if plan.epochs <= HARMLESS_EPOCHS else ", which over-fits")
            + f"; one epoch feeds {human(fed.parameters)} parameters (width {fed.width}, {fed.depth} blocks) for "
            f"{smaller.steps} steps, {smaller.flops / plan.flops:.2g} of the compute",
        )
    return _with(plan, warnings, smaller)


def _rate(rate: Rate | None, size: Size) -> float:
    value = rate(size) if callable(rate) else float(rate or 0.0)
    if not value > 0:
        raise HeadwayError("flops_per_second", got=value, expected="a positive rate")
    return value


def _check(unique_tokens: float, tokens_per_step: int, ratio: Target, duplicate_rate: float) -> None:
    if not (math.isfinite(unique_tokens) and unique_tokens >= tokens_per_step >= 1):
        raise HeadwayError(
            "unique_tokens", got=unique_tokens, expected=f"at least one step of {tokens_per_step} tokens"
        )
    if not isinstance(ratio, RatioFit) and not (math.isfinite(ratio) and ratio > 0):
        raise HeadwayError("ratio", got=ratio, expected="a positive number of tokens per parameter")
    if not 0 <= duplicate_rate < 1:
        raise HeadwayError("duplicate_rate", got=duplicate_rate, expected="a share in [0, 1)")


def _plan(
    size: Size,
    steps: int,
    per_step: int,
    unique: float,
    rate: Rate | None,
    ratio: float | RatioFit,
    fit: PowerLaw | None,
) -> OneEpochPlan:
    tokens = steps * per_step
    cost = tokens * size.flops_per_token
    loss, interval = None, None
    if fit is not None:
        loss, interval = fit.predict(steps), fit.interval(steps)
    elif isinstance(ratio, RatioFit):
        loss, interval = ratio.loss_at(cost), ratio.loss_interval(cost)
    return OneEpochPlan(
        size=size,
        steps=steps,
        tokens=tokens,
        epochs=tokens / unique,
        ratio=tokens / size.parameters,
        flops=cost,
        seconds=None if rate is None else cost / _rate(rate, size),
        loss=loss,
        loss_interval=interval,
        warnings=(),
        smaller=None,
    )


def _warnings(
    plan: OneEpochPlan, target: float, unique: float, duplicates: float, ratio: Target, fit: PowerLaw | None
) -> list[str]:
    warnings = []
    if duplicates > MANY_DUPLICATES:
        left = human(unique * (1 - duplicates))
        warnings.append(f"{duplicates:.0%} of the text is near-duplicates: {human(unique)} tokens count as {left}")
    if abs(math.log(plan.ratio / target)) > math.log(1.1):
        warnings.append(
            f"no size of this family comes nearer to {target:.3g} tokens per parameter than {plan.ratio:.3g}"
        )
    if plan.steps < FEW_STEPS:
        warnings.append(f"{plan.steps} steps are few: smaller steps would make better use of the tokens")
    if isinstance(ratio, RatioFit):
        low, high = ratio.budgets[0], ratio.budgets[-1]
        if not low / FAR_EXTRAPOLATION <= plan.flops <= high * FAR_EXTRAPOLATION:
            warnings.append(
                f"the ratio was fitted between {low:.2g} and {high:.2g} FLOP; {plan.flops:.2g} is far outside"
            )
    if fit is not None and plan.steps > FAR_EXTRAPOLATION * fit.steps[1]:
        warnings.append(f"the loss is extrapolated from {fit.steps[1]:.0f} steps to {plan.steps}")
    return warnings


def _with(plan: OneEpochPlan, warnings: list[str], smaller: OneEpochPlan | None) -> OneEpochPlan:
    return OneEpochPlan(**{**plan.__dict__, "warnings": tuple(warnings), "smaller": smaller})


def rebalance(parameters: float, steps: float, tokens_per_step: float, ratio: float) -> tuple[float, float]:
    """A given plan moved to ``ratio`` tokens per parameter at equal compute: new parameters and new steps.

    P = P0 sqrt(m0 / m), I = I0 sqrt(m / m0), with m0 = T0 / P0: P I stays what it was. (The paper adjusts size and
    iterations at constant compute; this form is the one that follows from cost = 6 P T, without the head.)

    Raises:
        HeadwayError: a value that is not positive.
    """
    for name, value in (
        ("parameters", parameters),
        ("steps", steps),
        ("tokens_per_step", tokens_per_step),
        ("ratio", ratio),
    ):
        if not value > 0:
            raise HeadwayError(name, got=value, expected="a positive number")
    factor = math.sqrt(steps * tokens_per_step / parameters / ratio)
    return parameters * factor, steps / factor


def one_epoch_tokens(unique_tokens: float, epochs: float) -> float:
    """Unique tokens that a plan of several epochs needs to become one epoch: D' = E D."""
    return unique_tokens * epochs


def expected_unique_share(tokens: float, unique_tokens: float) -> float:
    """Share of the unique tokens seen after ``tokens`` drawn *with* replacement: 1 - exp(-T / D).

    Drawing as many as there are shows only 63 % of them: it is not one epoch.
    """
    return 1.0 - math.exp(-tokens / unique_tokens)
