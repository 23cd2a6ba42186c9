"""From real numbers to whole ones: to the nearest with ties to even, stochastic, or towards zero."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from headway.core.errors import HeadwayError

Rounding = Literal["nearest", "stochastic", "zero"]
ROUNDINGS = ("nearest", "stochastic", "zero")


def round_(x: Tensor, rounding: Rounding, generator: torch.Generator | None = None) -> Tensor:
    """Round ``x`` (fp32 or fp64) in place to whole numbers.

    ``stochastic``: ``floor(x) + 1`` with probability ``x - floor(x)``, otherwise ``floor(x)``; whole numbers stay. The
    mean is ``x`` up to the draws' own resolution (2^-24 in fp32, 2^-53 in fp64). One draw for each element, whatever
    its value, so that the generator's state afterwards depends on the shape alone.

    Source: IEEE 754-2019, section 4.3; Gupta et al. 2015, section 3.1, equation 2.
    """
    if rounding == "nearest":
        return x.round_()
    if rounding == "zero":
        return x.trunc_()
    low = x.floor()
    up = draws(x, generator) < x.sub_(low)
    return torch.add(low, up, out=x)


def draws(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers in [0, 1) of the shape, dtype and device of ``like``; without a generator, torch's own."""
    if generator is not None and generator.device.type != like.device.type:
        raise HeadwayError("generator", f"lives on {generator.device}, the numbers to be rounded on {like.device}")
    return torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def check_rounding(rounding: str) -> None:
    """One sentence for a rounding that does not exist."""
    if rounding not in ROUNDINGS:
        raise HeadwayError("rounding", got=rounding, expected="nearest, stochastic or zero")
