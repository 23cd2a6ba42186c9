"""Estimates with their spread: bootstrap intervals and paired ratios."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

LEVEL = 0.9
_RESAMPLES = 4000

Statistic = Callable[..., Any]


@dataclass(frozen=True)
class Estimate:
    """A statistic of a sample and the interval in which it would lie if the sample were drawn again."""

    value: float
    low: float
    high: float
    count: int
    """Observations behind it; with one, the interval is that point and says nothing."""
    level: float = LEVEL

    def __str__(self) -> str:
        spread = f" [{self.low:.3f}, {self.high:.3f}]" if self.count > 1 else ""
        return f"{self.value:.3f}{spread}"

    @property
    def interval(self) -> tuple[float, float] | None:
        """The interval, or None where one observation gives none."""
        return (self.low, self.high) if self.count > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def bootstrap(
    values: Sequence[float] | np.ndarray,
    statistic: Statistic = np.median,
    *,
    level: float = LEVEL,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """``statistic`` of ``values`` with its percentile bootstrap interval; the same values give the same interval.

    Args:
        values: observations, [n].
        statistic: takes an array and ``axis``, as ``np.median`` and ``np.mean`` do.
        level: coverage of the interval.

    Raises:
        ValueError: no values.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    sample = np.asarray(values, dtype=np.float64)  # [n]
    if sample.size == 0:
        raise ValueError("an estimate needs at least one value")
    value = float(statistic(sample, axis=-1))
    if sample.size == 1:
        return Estimate(value, value, value, 1, level)
    drawn = np.random.default_rng(seed).integers(sample.size, size=(resamples, sample.size))
    replicates = statistic(sample[drawn], axis=-1)  # [resamples]
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high), sample.size, level)


def paired_ratio(of: Sequence[float], to: Sequence[float], **options: Any) -> Estimate:
    """Median of ``of[i] / to[i]``, with its bootstrap interval.

    Pairing takes out whatever both members of a pair share: the machine's state in that minute, the seed.

    Raises:
        ValueError: the sequences differ in length, or are empty.
    """
    return bootstrap(np.divide(*_paired(of, to)), **options)


def paired_difference(of: Sequence[float], to: Sequence[float], **options: Any) -> Estimate:
    """Median of ``of[i] - to[i]``, with its bootstrap interval.

    Raises:
        ValueError: the sequences differ in length, or are empty.
    """
    return bootstrap(np.subtract(*_paired(of, to)), **options)


def _paired(of: Sequence[float], to: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(of, dtype=np.float64), np.asarray(to, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"pairs need as many of one kind as of the other, not {first.size} and {second.size}")
    return first, second
