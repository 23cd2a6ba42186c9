"""The test loss of a one-epoch run as a power law of its steps, with intervals; refused where the curve is none.

    L(I) = L_inf + a * I**(-c)

(Komatsuzaki, arXiv 1906.06669, on learning curves; the pure form has L_inf = 0.) Fitted in log loss with a Huber loss,
since learning curves have outliers and their noise is relative. Intervals come from refits to curves with redrawn
noise: L_inf and c trade off against each other, far from a normal distribution. The redrawn noise is as correlated from
point to point as the residuals are (an AR(1) process), since a learning curve's noise is. On simulated curves the 95 %
intervals hold the truth 93 to 95 times in 100 with independent noise, and 85 (20 points) to 95 times (400 points) with
a correlation of 0.6 between neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headway.core.errors import HeadwayError
from headway.plan.one_epoch.curve_fit import bootstrap, log_law, natural, robust_fit

__all__ = ["HeldOut", "PowerLaw", "fit_power_law", "held_out_error"]

Array = NDArray[np.float64]
WHERE = "power-law fit"
FEWEST = 8  # points; three parameters need at least this many for a residual worth the name
MOST = 200  # points; longer curves are averaged in this many bins, equal on the logarithmic axis


@dataclass(frozen=True)
class PowerLaw:
    """A fitted curve ``irreducible + scale * step**(-exponent)``."""

    irreducible: float
    scale: float
    exponent: float
    r2: float
    """Share of the variance of the log loss that the law explains."""
    noise: float
    """Standard deviation of the residuals, relative to the loss."""
    ci: dict[str, tuple[float, float]]
    """Parameter -> its 95 % interval."""
    steps: tuple[float, float]
    """The range of steps that was fitted."""
    outliers: int
    """Points (at most a tenth) too far off to be noise; they count neither in `r2` nor in the intervals."""
    draws: Array
    """Bootstrap draws of (irreducible, scale, exponent), [draws, 3]."""

    @overload
    def predict(self, steps: float) -> float: ...
    @overload
    def predict(self, steps: Sequence[float] | Array) -> Array: ...
    def predict(self, steps: ArrayLike) -> float | Array:
        """The law's loss at ``steps`` (a number or an array)."""
        value = self.irreducible + self.scale * np.asarray(steps, dtype=float) ** -self.exponent
        return float(value) if np.ndim(steps) == 0 else value

    def interval(self, steps: float, level: float = 0.95) -> tuple[float, float]:
        """Interval of the loss at ``steps``, without the noise of a single measurement."""
        values = self.draws[:, 0] + self.draws[:, 1] * float(steps) ** -self.draws[:, 2]
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def fit_power_law(
    steps: ArrayLike,
    loss: ArrayLike,
    *,
    skip: float = 0.05,
    stop: float = 1.0,
    irreducible: bool = True,
    min_r2: float = 0.9,
    draws: int = 200,
    seed: int = 0,
) -> PowerLaw:
    """Fit the law to one learning curve.

    Args:
        steps: optimizer steps (or tokens) [N], increasing.
        loss: test loss there [N], positive.
        skip: share of the last step left out at the beginning: the warm-up.
        stop: share of the last step at which to stop: below 1 where the schedule decays at the end.
        irreducible: fit L_inf; False takes the pure form.
        min_r2: refuse a fit that explains less of the log loss.
        draws: bootstrap draws behind the intervals.

    Raises:
        HeadwayError: too few points, a loss that is not finite and positive, a curve that does not fall, turns up, or
            bends down on log-log axes (no law of this form does), or a poor fit.
    """
    x, y = _checked(steps, loss)
    span = (skip * x[-1] <= x) & (x <= stop * x[-1] * (1 + 1e-12))
    if span.sum() < FEWEST:
        raise HeadwayError(
            WHERE,
            f"has {int(span.sum())} points between {skip:.0%} and {stop:.0%} of the steps",
            expected=f"at least {FEWEST}",
            hint="evaluate more often",
        )
    u, v, weight = _binned(np.log(x[span]), np.log(y[span]))
    _refuse_other_shapes(u, v, weight)
    centre = float(np.average(u, weights=weight))
    best = robust_fit(u - centre, v, weight, irreducible)
    outlier = _outliers((v - log_law(best, u - centre)) * np.sqrt(weight))
    u, v, weight = u[~outlier] - centre, v[~outlier], weight[~outlier]
    fitted = log_law(best, u)
    residual = v - fitted
    variance = np.average((v - np.average(v, weights=weight)) ** 2, weights=weight)
    r2 = 1.0 - float(np.average(residual**2, weights=weight) / variance)
    if r2 < min_r2:
        raise HeadwayError(
            WHERE,
            f"explains only {r2:.0%} of the log loss",
            expected=f"at least {min_r2:.0%}",
            hint="use a less noisy loss (more evaluation batches), or skip more of the beginning",
        )
    sample = bootstrap(u, fitted, residual, weight, best, irreducible, draws, seed)
    parameters = np.stack([natural(theta, centre) for theta in [best, *sample]])
    low, high = np.quantile(parameters[1:], [0.025, 0.975], axis=0)
    names = ("irreducible", "scale", "exponent")
    return PowerLaw(
        irreducible=float(parameters[0, 0]),
        scale=float(parameters[0, 1]),
        exponent=float(parameters[0, 2]),
        r2=r2,
        noise=float(np.sqrt(np.average((residual * np.sqrt(weight)) ** 2))),
        ci={name: (float(a), float(b)) for name, a, b in zip(names, low, high)},
        steps=(float(x[span][0]), float(x[span][-1])),
        outliers=int(outlier.sum()),
        draws=parameters[1:],
    )


@dataclass(frozen=True)
class HeldOut:
    """How well a fit on the beginning of a curve foretold its end."""

    fit: PowerLaw
    step: float
    predicted: float
    interval: tuple[float, float]
    measured: float
    """Mean loss of the last few points."""

    @property
    def relative_error(self) -> float:
        """(predicted - measured) / measured."""
        return (self.predicted - self.measured) / self.measured


def held_out_error(steps: ArrayLike, loss: ArrayLike, *, share: float = 0.3, tail: int = 3, **options: Any) -> HeldOut:
    """Fit the first ``share`` of the steps and compare the prediction with the last ``tail`` points.

    Args:
        options: as for `fit_power_law`; ``skip`` is then a share of the fitted part.

    Raises:
        HeadwayError: the beginning cannot be fitted.
    """
    x, y = _checked(steps, loss)
    seen = x <= share * x[-1]
    if seen.sum() < FEWEST:
        has = f"has {int(seen.sum())} points in the first {share:.0%}"
        raise HeadwayError(WHERE, has, expected=f"at least {FEWEST}", hint="evaluate more often")
    fit = fit_power_law(x[seen], y[seen], **options)
    end = float(np.exp(np.log(x[-tail:]).mean()))
    return HeldOut(fit, end, fit.predict(end), fit.interval(end), float(y[-tail:].mean()))


def _checked(steps: ArrayLike, loss: ArrayLike) -> tuple[Array, Array]:
    x, y = np.asarray(steps, dtype=float), np.asarray(loss, dtype=float)
    if x.ndim != 1 or x.shape != y.shape:
        raise HeadwayError(WHERE, f"got steps {x.shape} and losses {y.shape}", expected="two lists of equal length")
    if x.size < FEWEST:
        raise HeadwayError(WHERE, f"has {x.size} points", expected=f"at least {FEWEST}", hint="evaluate more often")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        first = int(np.flatnonzero(~(np.isfinite(x) & np.isfinite(y)))[0])
        raise HeadwayError(WHERE, f"got a value that is not finite at point {first}", hint="the run diverged")
    if (y <= 0).any():
        raise HeadwayError(WHERE, got=float(y.min()), expected="positive losses")
    if (np.diff(x) <= 0).any() or x[-1] <= 0:
        raise HeadwayError(WHERE, "got steps that do not increase", expected="each step once, in order")
    return x[x > 0], y[x > 0]  # step 0 has no place on a logarithmic axis


def _binned(u: Array, v: Array) -> tuple[Array, Array, Array]:
    """Means over ``MOST`` bins equal in u, and how many points each holds (unchanged where there are fewer points)."""
    if u.size <= MOST:
        return u, v, np.ones_like(u)
    edges = np.linspace(u[0], u[-1], MOST + 1)
    index = np.clip(np.searchsorted(edges, u, side="right") - 1, 0, MOST - 1)
    count = np.bincount(index, minlength=MOST).astype(float)
    full = count > 0
    mean = [np.bincount(index, weights=w, minlength=MOST)[full] / count[full] for w in (u, v)]
    return mean[0], mean[1], count[full]


def _outliers(residual: Array) -> NDArray[np.bool_]:
    """Which residuals are beyond six robust standard deviations; none if they are more than a tenth."""
    centred = np.abs(residual - np.median(residual))
    far = centred > 6 * 1.4826 * np.median(centred)
    return far if far.mean() <= 0.1 else np.zeros_like(far)


def _refuse_other_shapes(u: Array, v: Array, weight: Array) -> None:
    """A power law with L_inf >= 0 falls, never turns up, and is straight or convex on log-log axes."""
    ends = max(2, u.size // 10)
    drop = float(np.average(v[:ends], weights=weight[:ends]) - np.average(v[-ends:], weights=weight[-ends:]))
    noise = float(np.std(np.diff(v)) / np.sqrt(2)) / np.sqrt(ends)
    if drop <= 3 * noise or drop <= 1e-9:
        raise HeadwayError(WHERE, "refuses a loss that does not fall", hint="train longer, or lower the learning rate")
    smooth = np.convolve(v, np.ones(ends) / ends, mode="valid")
    lowest = int(smooth.argmin())
    if smooth[-1] - smooth[lowest] > 5 * noise + 0.02 * drop:
        where = float(np.exp(u[lowest + ends // 2]))
        raise HeadwayError(
            WHERE,
            f"refuses a loss that turns up after step {where:.0f}",
            hint="the run over-fits: fit up to there, or repeat less",
        )
    (_, slope, bend), cov = _quadratic(u - u.mean(), v, weight)
    change = 2 * bend * float(u[-1] - u[0])  # of the log-log slope, from one end to the other
    if bend < -3 * np.sqrt(cov[2, 2]) and change < -0.5 * abs(slope):
        raise HeadwayError(
            WHERE,
            "refuses a loss that falls ever faster on log-log axes "
            f"(slope {slope - change / 2:.2f} to {slope + change / 2:.2f})",
            hint="the law has not begun (skip more), or the learning rate decays (use a constant one, or stop earlier)",
        )


def _quadratic(u: Array, v: Array, weight: Array) -> tuple[Array, Array]:
    design = np.stack([np.ones_like(u), u, u**2], axis=1)
    root = np.sqrt(weight)[:, None]
    solution, *_ = np.linalg.lstsq(design * root, v * root[:, 0], rcond=None)
    residual = (v - design @ solution) * root[:, 0]
    sigma2 = float(residual @ residual) / max(1, u.size - 3)
    return solution, sigma2 * np.linalg.inv((design * root).T @ (design * root))
