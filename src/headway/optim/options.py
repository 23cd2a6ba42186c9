"""Options of the optimizer and of the learning-rate schedule (no torch here)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from headway.core.options import Options
from headway.core.units import Share


def _share(value: float | int | None) -> float | int | None:
    """A share of the run lies in [0, 1); a number of steps is not negative."""
    if value is None:
        return value
    if value < 0 or (isinstance(value, float) and value >= 1):
        raise ValueError("expected a share of the run below 100% such as 5%, or a number of steps such as 100")
    return value


RunShare = Annotated[Share, AfterValidator(_share)]


class OptimizerOptions(Options):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101): weight decay apart from the gradient."""

    name: Literal["adamw"] = "adamw"
    """Which optimizer."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate; the schedule multiplies it by a factor between 0 and 1."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay per step of the running means of the gradient and of its square; each in [0, 1)."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.1, ge=0)
    """Share of a weight removed per step, times the learning rate; matrices only, not norms and biases."""

    @model_validator(mode="after")
    def _betas_below_one(self) -> OptimizerOptions:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas}: expected two numbers in [0, 1)")
        return self


DECAYING = ("cosine", "linear", "wsd")


class ScheduleOptions(Options):
    """How the learning rate moves over the run, as a factor of `optimizer.lr`."""

    name: Literal["constant", "cosine", "linear", "wsd", "inverse-sqrt"] = "cosine"
    """Shape after the warm-up; `wsd` (warm-up, stable, decay) stays at 1 and falls linearly at the end."""
    warmup: RunShare = 0.02
    """Linear rise from 0 to 1: a number of steps (`100`) or a share of the run (`2%`)."""
    final: float | None = Field(None, ge=0, le=1)
    """Factor that cosine, linear and wsd fall to at the end of the run; default 0."""
    decay: RunShare | None = None
    """Length of wsd's fall: a number of steps or a share of the run; default 20%."""

    @model_validator(mode="after")
    def _fits_the_name(self) -> ScheduleOptions:
        if self.final is not None and self.name not in DECAYING:
            raise ValueError(
                f"{self.name} has no `final`: expected one of {', '.join(DECAYING)} with it, or `final: null`"
            )
        if self.decay is not None and self.name != "wsd":
            raise ValueError(f"{self.name} has no `decay`: expected `name: wsd` with it, or `decay: null`")
        if self.decay == 0:
            raise ValueError("`decay: 0` never falls: expected a share such as 20%, or `name: constant`")
        if self.name == "inverse-sqrt" and self.warmup == 0:
            raise ValueError("inverse-sqrt needs a warm-up: it falls as sqrt(warmup / step)")
        both = sum(value for value in (self.warmup, self.fall) if isinstance(value, float))
        if both > 1 + 1e-9:
            raise ValueError(f"warmup and decay together take {both:.0%} of the run: expected at most 100%")
        return self

    @property
    def fall(self) -> float | int:
        """Length of the fall at the end of `wsd`, with its default; 0 for the others."""
        if self.name != "wsd":
            return 0
        return 0.2 if self.decay is None else self.decay
