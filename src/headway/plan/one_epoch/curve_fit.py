"""The arithmetic behind `power_law.py`: a robust fit of one curve, and quick fits of many redrawn ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.signal import lfilter

Array = NDArray[np.float64]
SMALLEST_EXPONENT, LARGEST_EXPONENT = 1e-4, 5.0

# Parameters while fitting: (log of the loss above L_inf at the centre, log c, root of L_inf); well scaled, L_inf >= 0.


def log_law(theta: Array, u: Array) -> Array:
    """The log loss at log steps ``u`` (from their centre)."""
    floor = 2 * np.log(np.maximum(np.abs(theta[2]), 1e-150))
    return np.logaddexp(floor, theta[0] - np.exp(theta[1]) * u)


def gradients(theta: Array, u: Array) -> list[Array]:
    """The derivatives of `log_law` by each parameter."""
    c, law = np.exp(theta[1]), log_law(theta, u)
    falling = np.exp(theta[0] - c * u - law)  # the share of the loss above L_inf
    return [falling, -c * u * falling, 2 * theta[2] * np.exp(-law)]


def natural(theta: Array, centre: float) -> Array:
    """Fitted parameters as (L_inf, a, c)."""
    c = float(np.exp(theta[1]))
    return np.array([theta[2] ** 2, np.exp(theta[0] + c * centre), c])


def robust_fit(u: Array, v: Array, weight: Array, irreducible: bool) -> Array:
    """The best of several starts, each a straight line through log(loss - L_inf) for a guessed L_inf."""
    starts = []
    lowest = float(np.exp(v.min()))
    for share in (0.0,) if not irreducible else (0.02, 0.4, 0.7, 0.9):
        slope, height = np.polyfit(u, np.log(np.exp(v) - share * lowest), 1, w=np.sqrt(weight))
        starts.append(np.array([height, np.log(max(-slope, 1e-3)), np.sqrt(share * lowest)]))
    root = np.sqrt(weight)
    free = 3 if irreducible else 2
    scale = max(1.5 * float(np.median(np.abs(np.diff(v)))), 1e-6)  # where Huber's loss turns linear

    def full(theta: Array) -> Array:
        return theta if irreducible else np.append(theta, 0.0)

    best = None
    for first in starts:
        upper = [np.inf, np.log(LARGEST_EXPONENT), np.inf][:free]
        lower = [-np.inf, np.log(SMALLEST_EXPONENT), -np.inf][:free]
        found = least_squares(
            lambda theta: root * (log_law(full(theta), u) - v),
            np.clip(first[:free], lower, upper),
            jac=lambda theta: (root * np.stack(gradients(full(theta), u))).T[:, :free],
            bounds=(lower, upper),
            loss="huber",
            f_scale=scale,
            x_scale="jac",
        )
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    return full(best.x)


def bootstrap(
    u: Array, fitted: Array, residual: Array, weight: Array, best: Array, irreducible: bool, draws: int, seed: int
) -> Array:
    """Refits [draws, 3] to curves with new noise like the residuals': of the same sizes, alike from point to point."""
    rng = np.random.default_rng(seed)
    n, parameters = u.size, 3 if irreducible else 2
    root = np.sqrt(weight)
    scaled = (residual - np.average(residual, weights=weight)) * root
    # Fitting makes residuals smaller, and their lag-1 correlation lower, than the noise's: both undone to first order.
    scaled = scaled * np.sqrt(n / (n - parameters))
    power = float(scaled @ scaled)
    seen = float(scaled[1:] @ scaled[:-1]) / power if power > 0 else 0.0
    rho = float(np.clip(seen + (parameters + 3 * seen) / n, 0.0, 0.95))
    shocks = scaled[1:] - rho * scaled[:-1]
    shocks = (shocks - shocks.mean()) / max(float(shocks.std()), 1e-300) * float(scaled.std()) * np.sqrt(1 - rho**2)
    drawn = rng.choice(shocks, (draws, n))
    drawn[:, 0] /= np.sqrt(1 - rho**2)
    noise = lfilter([1.0], [1.0, -rho], drawn, axis=1)
    return _refit(u, fitted + noise / root, root, best, irreducible)


def _refit(u: Array, curves: Array, root: Array, start: Array, irreducible: bool, rounds: int = 40) -> Array:
    """Least squares from ``start`` for all ``curves`` [draws, N] at once, by Levenberg and Marquardt's method.

    Their noise has no outliers by construction, so that plain squares will do; one at a time by scipy they would take
    a hundred times as long.
    """
    free = 3 if irreducible else 2
    draws = len(curves)
    theta = np.tile(start, (draws, 1))
    if irreducible:  # at L_inf = 0 its root has no gradient, so that one start must lie elsewhere
        away = np.append(start[:2], np.sqrt(max(start[2] ** 2, 0.3 * float(np.exp(curves.min())))))
        theta = np.concatenate([theta, np.tile(away, (draws, 1))])
        curves = np.concatenate([curves, curves])
    cost = np.full(len(curves), np.inf)
    damping = np.full(len(curves), 1e-3)
    active = np.arange(len(curves))  # not yet converged
    for _ in range(rounds):
        here = theta[active]
        left = root * (curves[active] - log_law(here.T[..., None], u))  # [active, N]
        cost[active] = (left**2).sum(axis=1)
        slope = (root * np.stack(gradients(here.T[..., None], u), axis=1))[:, :free]  # [active, free, N]
        normal = slope @ slope.transpose(0, 2, 1)
        scale = np.einsum("bii->bi", normal)
        scale = damping[active, None] * np.maximum(scale, 1e-12 * scale.max(axis=1, keepdims=True))
        move = np.linalg.solve(normal + scale[:, None] * np.eye(free), (slope @ left[..., None]))[..., 0]
        trial = here.copy()
        trial[:, :free] += move
        trial[:, 1] = np.clip(trial[:, 1], np.log(SMALLEST_EXPONENT), np.log(LARGEST_EXPONENT))
        there = ((root * (curves[active] - log_law(trial.T[..., None], u))) ** 2).sum(axis=1)
        better = there <= cost[active]
        gained = cost[active] - there
        theta[active[better]], cost[active[better]] = trial[better], there[better]
        damping[active] = np.clip(np.where(better, damping[active] / 5, damping[active] * 5), 1e-9, 1e9)
        converged = (better & (gained <= 1e-7 * there)) | (damping[active] >= 1e9)
        active = active[~converged]
        if not active.size:
            break
    winner = cost.reshape(-1, draws).argmin(axis=0)
    return theta.reshape(-1, draws, 3)[winner, np.arange(draws)]
