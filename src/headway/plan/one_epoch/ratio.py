"""Tokens per parameter, fitted to one's own runs: several sizes at each of several equal budgets.

At one budget the loss over the size is a U: too small a model learns too little from its tokens, too big a one sees too
few. In logarithms, with budgets b of z_b = log C_b - mean,

    log L = h_b + k (log P - m - s z_b)^2

one curvature and one line of best sizes P*(C) for all budgets, heights of their own: linear least squares once it is
expanded. (Approach 2 of Hoffmann et al., arXiv 2203.15556, with the parabolas' curvature shared, so that three sizes a
budget leave residuals to judge by.) The ratio at a budget is C / (c(P*) P*), where c(P) is what a token costs: the
output head, which is not in P, costs too. Intervals come from a bootstrap over residuals; they do not cover what a
parabola misses: on a law that is steeper on one side (exponents 0.3 and 0.4) the ratio comes out 5 % off.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headway.core.errors import HeadwayError
from headway.plan.one_epoch.speedup import monotone

__all__ = ["Best", "RatioFit", "SizeRun", "fit_tokens_per_param", "runs_from_curve"]

Array = NDArray[np.float64]
WHERE = "tokens-per-parameter fit"
FEWEST_SIZES = FEWEST_BUDGETS = 3
SAME_BUDGET = 0.15  # costs this near to one another, relatively, are one budget
DIVERGED = 1.5  # times the median loss of its budget


@dataclass(frozen=True)
class SizeRun:
    """One run of a size at a budget, or one point of its learning curve at a constant learning rate."""

    parameters: float
    """Without embeddings and output head."""
    tokens: float
    loss: float
    seconds: float | None = None
    flops: float | None = None
    """None takes 6 P T."""


@dataclass(frozen=True)
class Best:
    """The best size at one budget."""

    budget: float
    parameters: float
    tokens: float
    loss: float
    inside: bool
    """Whether it lies between the smallest and the largest size that ran; otherwise it is extrapolated."""


@dataclass(frozen=True)
class RatioFit:
    """Fitted best sizes over budgets."""

    exponent: float
    """s: the best size grows as budget**s."""
    budgets: tuple[float, ...]
    best: tuple[Best, ...]
    r2: float
    """Share of the variance of the log loss within budgets that the parabolas explain."""
    excluded: tuple[SizeRun, ...]
    """Diverged runs, left out."""
    centre: float
    cost: tuple[float, float]
    """log cost per token = cost[0] + cost[1] log P."""
    line: Array
    """(m, s), then bootstrap draws of it, [1 + draws, 2]."""
    heights: Array
    """(intercept, slope) of the log of the lowest loss over log budget, then draws, [1 + draws, 2]."""

    @property
    def ratio(self) -> float:
        """Tokens per parameter at the (geometric) middle of the budgets."""
        return self.at(math.exp(self.centre))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of `ratio`."""
        return self.interval_at(math.exp(self.centre))

    def at(self, budget: float) -> float:
        """Tokens per parameter at ``budget``."""
        return float(self._ratios(budget)[0])

    def interval_at(self, budget: float, level: float = 0.95) -> tuple[float, float]:
        """Interval of `at`."""
        return _quantiles(self._ratios(budget)[1:], level)

    def best_parameters(self, budget: float) -> float:
        """The best size at ``budget``, parameters."""
        return float(np.exp(self.line[0, 0] + self.line[0, 1] * (math.log(budget) - self.centre)))

    def loss_at(self, budget: float) -> float:
        """The loss of the best size at ``budget``: a power law through the budgets' lowest losses."""
        return float(np.exp(self.heights[0] @ [1.0, math.log(budget) - self.centre]))

    def loss_interval(self, budget: float, level: float = 0.95) -> tuple[float, float]:
        """Interval of `loss_at`."""
        return _quantiles(np.exp(self.heights[1:] @ [1.0, math.log(budget) - self.centre]), level)

    def _ratios(self, budget: float) -> Array:
        size = self.line @ [1.0, math.log(budget) - self.centre]
        return np.exp(math.log(budget) - self.cost[0] - (self.cost[1] + 1.0) * size)


def fit_tokens_per_param(
    runs: Iterable[SizeRun | tuple[float, ...]],
    *,
    by: Literal["flops", "seconds"] = "flops",
    draws: int = 1000,
    seed: int = 0,
) -> RatioFit:
    """The ratio of tokens to parameters at which a budget gives the lowest loss.

    Args:
        runs: `SizeRun`s or tuples (parameters, tokens, loss[, seconds]); several of one size and budget are repeats.
        by: what a budget is an amount of; with ``seconds`` every run needs its own.
        draws: bootstrap draws behind the intervals.

    Raises:
        HeadwayError: fewer than 3 sizes at each of 3 budgets (after diverged runs are left out), losses that form no U
            over the size, or a best size beyond those that ran at most of the budgets.
    """
    every = [run if isinstance(run, SizeRun) else SizeRun(*run) for run in runs]
    kept, excluded = _without_diverged(every, by)
    size = np.log([run.parameters for run in kept])
    loss = np.log([run.loss for run in kept])
    cost = np.log([_cost(run, by) for run in kept])
    group = _groups(cost)
    _refuse_too_few(size, group, len(excluded))
    budgets = np.array([cost[group == b].mean() for b in range(int(group.max()) + 1)])
    z = budgets - budgets.mean()
    line, lowest, r2 = _parabolas(size, loss, group, z, draws, seed)
    heights = np.linalg.lstsq(np.column_stack([np.ones(len(z)), z]), lowest.T, rcond=None)[0].T
    slope, intercept = np.polyfit(size, cost - np.log([run.tokens for run in kept]), 1)
    best = []
    for b, budget in enumerate(budgets):
        here = float(line[0] @ [1.0, z[b]])
        at_budget = size[group == b]
        best.append(
            Best(
                budget=float(np.exp(budget)),
                parameters=float(np.exp(here)),
                tokens=float(np.exp(budget - intercept - slope * here)),
                loss=float(np.exp(lowest[0, b])),
                inside=bool(at_budget.min() < here < at_budget.max()),
            )
        )
    _refuse_ends(best, [run.parameters for run in kept])
    return RatioFit(
        exponent=float(line[0, 1]),
        budgets=tuple(b.budget for b in best),
        best=tuple(best),
        r2=r2,
        excluded=tuple(excluded),
        centre=float(budgets.mean()),
        cost=(float(intercept), float(slope)),
        line=line,
        heights=heights,
    )


def _parabolas(
    size: Array, loss: Array, group: NDArray[np.int64], z: Array, draws: int, seed: int
) -> tuple[Array, Array, float]:
    """The fit and its bootstrap: (m, s) [1 + draws, 2], the heights h_b [1 + draws, budgets], and R^2 within budgets.

    Raises:
        HeadwayError: the loss has no minimum over the size.
    """
    centre = size.mean()  # the columns are nearly collinear otherwise
    x = size - centre
    member = (group[:, None] == np.arange(len(z))).astype(float)
    design = np.column_stack([x**2, x, x * z[group], member])
    solve = np.linalg.pinv(design)
    fitted = design @ (solve @ loss)
    residual = loss - fitted
    within = loss - member @ np.array([loss[group == b].mean() for b in range(len(z))])
    r2 = 1.0 - float(residual @ residual) / max(float(within @ within), 1e-300)

    freedom = max(len(x) - design.shape[1], 1)
    noise = np.random.default_rng(seed).choice(residual * math.sqrt(len(x) / freedom), (draws, len(x)))
    solutions = np.column_stack([solve @ loss, solve @ (fitted + noise).T]).T  # [1 + draws, 3 + budgets]
    curvature = solutions[:, 0]
    if curvature[0] <= 0 or (curvature > 0).mean() < 0.95 or r2 < 0.5:
        raise HeadwayError(
            WHERE,
            "finds no U of the loss over the size",
            hint="spread the sizes further apart, take more seeds, and give each size its own best learning rate",
        )
    solutions = solutions[curvature > 0]
    k, beta, gamma = solutions[:, :3].T
    line = -0.5 * np.column_stack([beta, gamma]) / k[:, None]
    heights = solutions[:, 3:] - k[:, None] * (line @ np.stack([np.ones(len(z)), z])) ** 2
    line[:, 0] += centre
    return line, heights, r2


def runs_from_curve(
    parameters: float,
    tokens: ArrayLike,
    loss: ArrayLike,
    budgets: Sequence[float],
    *,
    flops_per_token: float | None = None,
    smooth: int = 1,
) -> list[SizeRun]:
    """One learning curve read at several budgets: at a constant learning rate each point is a run of its length.

    Args:
        parameters: of the model, without embeddings and output head.
        tokens: processed [N], increasing.
        loss: there [N].
        budgets: in FLOP; those beyond the curve's ends give no run.
        flops_per_token: cost; None takes 6 P.
        smooth: as for `speedup.monotone`.

    Raises:
        HeadwayError: as `speedup.monotone`.
    """
    x, y = monotone(tokens, loss, smooth)
    last = float(np.asarray(tokens, dtype=float)[-1])
    per_token = flops_per_token or 6.0 * parameters
    found = []
    for budget in budgets:
        seen = budget / per_token
        if x[0] <= seen <= last * (1 + 1e-9):
            there = float(np.exp(np.interp(np.log(seen), np.log(x), np.log(y))))
            found.append(SizeRun(parameters, seen, there, flops=budget))
    return found


def _quantiles(values: Array, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _cost(run: SizeRun, by: str) -> float:
    value = run.seconds if by == "seconds" else run.flops or 6.0 * run.parameters * run.tokens
    if value is None or not value > 0:
        raise HeadwayError(WHERE, "lacks the seconds of a run", hint="give every run its seconds, or fit by flops")
    return value


def _without_diverged(runs: list[SizeRun], by: str) -> tuple[list[SizeRun], list[SizeRun]]:
    for run in runs:
        if not (run.parameters > 0 and run.tokens > 0):
            raise HeadwayError(WHERE, got=run, expected="positive parameters and tokens")
    finite = [run for run in runs if math.isfinite(run.loss) and run.loss > 0]
    if not finite:
        raise HeadwayError(WHERE, "has no run with a finite loss")
    group = _groups(np.log([_cost(run, by) for run in finite]))
    losses = np.array([run.loss for run in finite])
    far = losses > DIVERGED * np.array([np.median(losses[group == g]) for g in group])
    kept = [run for run, away in zip(finite, far) if not away]
    return kept, [run for run in runs if not any(run is other for other in kept)]


def _groups(cost: Array) -> NDArray[np.int64]:
    """Which budget each cost belongs to, numbered from the smallest."""
    order = np.argsort(cost)
    new = np.append(0, np.diff(cost[order]) > math.log1p(SAME_BUDGET))
    group = np.empty(len(cost), dtype=np.int64)
    group[order] = np.cumsum(new)
    return group


def _refuse_too_few(size: Array, group: NDArray[np.int64], excluded: int) -> None:
    sizes = [len(set(np.round(size[group == b], 6))) for b in range(int(group.max()) + 1)]
    if len(sizes) < FEWEST_BUDGETS or min(sizes) < FEWEST_SIZES:
        raise HeadwayError(
            WHERE,
            f"has {len(sizes)} budgets with {', '.join(map(str, sizes))} sizes"
            + (f", after {excluded} diverged runs were left out" if excluded else ""),
            expected=f"at least {FEWEST_SIZES} sizes at each of {FEWEST_BUDGETS} budgets",
            hint=f"costs within {SAME_BUDGET:.0%} of one another count as one budget",
        )


def _refuse_ends(best: list[Best], sizes: list[float]) -> None:
    outside = [b for b in best if not b.inside]
    if 2 * len(outside) > len(best):
        side = "larger" if outside[-1].parameters >= max(sizes) else "smaller"
        raise HeadwayError(
            WHERE,
            f"puts the best size at {outside[-1].parameters:.3g} parameters, beyond those that ran "
            f"({min(sizes):.3g} to {max(sizes):.3g})",
            hint=f"add {side} sizes",
        )
