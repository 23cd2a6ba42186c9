"""What an experiment is: arms, measurements and the expectation that stand for a paper's claim, as data.

A file of this folder defines ``experiment = Experiment(...)``; the registry names it; ``headway reproduce NAME`` runs
it. What the measurements may use while they run (train an arm, compare two, keep a value) is in ``context.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from headway.core.errors import HeadwayError, nearest
from headway.experiments.statistics import Estimate

if TYPE_CHECKING:
    from headway.experiments.context import Context

Only = Literal["always", "full", "cuda"]
"""When an arm runs or an expectation is judged: always; not in a quick run; only where there is a GPU."""


@dataclass(frozen=True)
class Bound:
    """What is expected of a number, as data: ``low <= number <= high``, either side open where it is None."""

    low: float | None = None
    high: float | None = None

    def holds(self, value: float) -> bool:
        """Whether ``value`` is as expected; NaN never is."""
        if math.isnan(value):
            return False
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        if self.low is None:
            return f"at most {self.high:g}"
        if self.high is None:
            return f"at least {self.low:g}"
        return f"{self.low:g} to {self.high:g}"

    def to_dict(self) -> dict[str, Any]:
        """``{"op": "at_most" | "at_least" | "between", "bound": [...]}``."""
        op = "at_most" if self.low is None else "at_least" if self.high is None else "between"
        return {"op": op, "bound": [side for side in (self.low, self.high) if side is not None]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Bound:
        """The inverse of ``to_dict``."""
        makers: dict[str, Callable[..., Bound]] = {"at_most": at_most, "at_least": at_least, "between": between}
        return makers[data["op"]](*data["bound"])


def at_most(high: float) -> Bound:
    """The number must not exceed ``high``."""
    return Bound(None, high)


def at_least(low: float) -> Bound:
    """The number must reach ``low``."""
    return Bound(low, None)


def between(low: float, high: float) -> Bound:
    """The number must lie from ``low`` to ``high``, both included."""
    if low > high:
        raise ValueError(f"between({low}, {high}) is empty")
    return Bound(low, high)


@dataclass(frozen=True)
class Measurement:
    """One measured number; ``inf`` is allowed ("never reached"), NaN means that it could not be measured."""

    value: float
    interval: tuple[float, float] | None = None
    """Where it would lie if measured again (90 % bootstrap); None where there is no spread to know."""
    unit: str = ""
    note: str = ""

    @classmethod
    def of(cls, estimate: Estimate, unit: str = "", note: str = "") -> Measurement:
        """From an estimate of ``statistics.py``."""
        return cls(estimate.value, estimate.interval, unit, note)


@dataclass(frozen=True)
class Expectation:
    """What the paper claims about one measurement, and what must be seen here for the claim to hold."""

    measure: str
    """Name of the measurement."""
    claimed: str
    """The paper's number or words, with its place: ``1.9x to 3.3x (abstract)``."""
    expected: Bound
    """What must be measured here; differs from ``claimed`` where the machine or the scale does."""
    title: str = ""
    """The measurement in words, for the table; default: its name."""
    quick: Bound | None = None
    """What to expect of a quick run, where that is less; default: the same."""
    whole_interval: bool = False
    """The interval's two ends must be as expected too, not only the value."""
    only: Only = "always"

    def judge(self, measurement: Measurement, quick: bool = False) -> bool:
        """Whether ``measurement`` is as expected."""
        bound = self.bound(quick)
        ends = measurement.interval or () if self.whole_interval else ()
        return all(bound.holds(value) for value in (measurement.value, *ends))

    def bound(self, quick: bool) -> Bound:
        """What is expected of this kind of run."""
        return self.quick if quick and self.quick is not None else self.expected


@dataclass(frozen=True)
class Arm:
    """One side of an experiment: the experiment's recipe with overrides, or a recipe of its own."""

    name: str
    overrides: tuple[str, ...] = ()
    """``key.path=value``, as on the command line."""
    title: str = ""
    """In words, for tables and legends; default: its name."""
    recipe: Mapping[str, Any] | None = None
    """Replaces the experiment's recipe for this arm."""
    only: Only = "always"


class Measure(Protocol):
    """A measurement over finished arms; ``measures.py`` has ratios, differences and interleaved comparisons."""

    @property
    def name(self) -> str:
        """What expectations call it."""
        ...

    def measure(self, context: Context) -> Measurement:
        """The number, from the arms of ``context``."""
        ...


@dataclass(frozen=True)
class Quick:
    """The same experiment as a smoke test of about three minutes."""

    overrides: tuple[str, ...] = ()
    """Laid over every arm after its own."""
    seeds: int = 1
    """How many of the experiment's seeds are used."""
    minutes: float = 3.0


@dataclass(frozen=True)
class Experiment:
    """A paper's claim as something that can be run.

    Two ways to measure, which may be mixed: ``measurements`` over ``arms``, which are trained once per seed; and
    ``measure``, a function for everything that is no plain training (a simulator, a microbenchmark, a fit). Both end in
    named numbers that ``expectations`` judge.
    """

    name: str
    title: str
    paper: str
    """Authors, title, identifier: ``Komatsuzaki, One Epoch Is All You Need, arXiv 1906.06669``."""
    claim: str
    """The claim in one sentence of our own."""
    expectations: tuple[Expectation, ...]
    minutes: float
    """About how long the full experiment takes on two cores."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """What all arms share, as a recipe's mapping."""
    arms: tuple[Arm, ...] = ()
    seeds: tuple[int, ...] = (0,)
    measurements: tuple[Measure, ...] = ()
    measure: Callable[[Context], Mapping[str, Measurement]] | None = None
    quick: Quick = Quick()
    notes: str = ""
    """What differs from the paper's setting, and what this machine cannot show."""

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError(f"experiment {self.name!r} has two arms of one name")
        if not self.expectations:
            raise ValueError(f"experiment {self.name!r} expects nothing, so it cannot show anything")

    def arm(self, name: str) -> Arm:
        """The arm of that name.

        Raises:
            HeadwayError: there is none.
        """
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise HeadwayError(self.name, f"has no arm {name!r}", hint=nearest(name, [arm.name for arm in self.arms]))


def applies(only: Only, quick: bool) -> bool:
    """Whether what is marked ``only`` takes part in this kind of run, on this machine."""
    if only == "full":
        return not quick
    if only == "cuda":
        import torch

        return torch.cuda.is_available()
    return True
