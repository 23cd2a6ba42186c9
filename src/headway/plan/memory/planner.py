"""The cheapest way to train a recipe within a number of bytes.

Every candidate is probed with shallow copies of the model (`probe.footprint`) and predicted for the whole; the fastest
one that fits is probed once more as it will run, and taken if it still fits. What a candidate leaves open (how much to
offload, which share to swap, which stride) its method decides by its own paper's cost model when it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from headway.core.build import select_device
from headway.core.errors import HeadwayError
from headway.core.recipe import Recipe
from headway.core.units import human, human_seconds
from headway.plan.memory.candidates import (
    ACTIVATIONS,
    ON_DISK,
    ON_HOST,
    STATES,
    Candidate,
    candidate,
    micro_batches,
    refused,
)
from headway.plan.memory.probe import Footprint, footprint
from headway.plan.memory.worker import Prober

HEADROOM = 0.03
"""Share of the budget that a prediction leaves free, for its own error."""
SMALLER_IS_SLOWER = 1.02
"""A first guess of what halving the micro-batch does to the time per sequence, so that the larger is tried first."""
MOST_CHECKS = 4
"""Candidates that are probed again as they would run, before the planner gives up; the thriftiest is among them."""
TRIAL_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens of a micro-batch that keep a device busy: the first probes of a candidate take no more."""
DEPTHS, DEPTHS_MOVING = (2, 4), (4, 6)
"""Blocks of the two shallow copies; methods that move data keep the last blocks, and show what they do from 4 on."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Option:
    """One candidate, with what it would take or why it is out."""

    name: str
    methods: dict[str, dict[str, Any]]
    micro_batch: int
    what: str = ""
    peak_bytes: int | None = None
    seconds: float | None = None
    """Predicted time of a step."""
    verdict: str = ""

    def fits(self, budget: int) -> bool:
        """Whether its predicted peak leaves the headroom free."""
        return self.peak_bytes is not None and self.peak_bytes <= budget * (1 - HEADROOM)


@dataclass(frozen=True)
class MemoryPlan:
    """The choice, its prediction, and everything that was considered."""

    budget: int
    chosen: Option
    options: list[Option]

    @property
    def predicted_bytes(self) -> int:
        """The predicted peak of live bytes."""
        assert self.chosen.peak_bytes is not None
        return self.chosen.peak_bytes

    def apply(self, recipe: Recipe) -> Recipe:
        """``recipe`` with the chosen switches, and no budget left to plan for."""
        chosen = self.chosen
        return Candidate(chosen.name, "", chosen.micro_batch, chosen.methods).apply(recipe)

    def explain(self) -> str:
        """The choice, its reason, and a line for each other way at the micro-batch that suits it best."""
        lines = [f"memory budget {human(self.budget, 'B')}: {self.chosen.name}: {self.chosen.what}"]
        rows = [self.chosen, *self._others()]
        width = max(len(option.name) for option in rows)
        for option in rows:
            peak = "" if option.peak_bytes is None else human(option.peak_bytes, "B")
            seconds = "" if option.seconds is None else f"{human_seconds(option.seconds)}/step"
            lines.append(f"  {option.name:<{width}}  {peak:>9}  {seconds:>10}  {option.verdict}".rstrip())
        return "\n".join(lines)

    def _others(self) -> list[Option]:
        best: dict[str, Option] = {}
        for option in self.options:  # fastest first
            way = option.name.rpartition(", micro-batch ")[0]
            known = best.get(way)
            if known is None or (option.fits(self.budget) and not known.fits(self.budget)):
                best[way] = option
        return [option for option in best.values() if option.name != self.chosen.name]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the run directory and ``--json``."""
        return asdict(self)


def read_plan(raw: dict[str, Any]) -> MemoryPlan:
    """The plan that `MemoryPlan.to_dict` wrote.

    Raises:
        KeyError, TypeError: it is none.
    """
    return MemoryPlan(raw["budget"], Option(**raw["chosen"]), [Option(**option) for option in raw["options"]])


def plan_memory(recipe: Recipe, say: Say = lambda _: None) -> MemoryPlan:
    """The fastest way found to keep a step's live bytes below ``recipe.memory.budget``.

    Args:
        say: is told what is being tried.

    Raises:
        HeadwayError: there is no budget, the recipe cannot be run, or nothing fits; says what comes nearest.
    """
    if recipe.memory.budget is None:
        raise HeadwayError("memory.budget", "is not given, so there is nothing to plan for")
    with Prober() as prober:
        return _Planner(recipe, recipe.memory.budget, prober.measure, say).plan()


class _Planner:
    def __init__(self, recipe: Recipe, budget: int, measure: Callable[[Recipe], Footprint], say: Say) -> None:
        self.recipe, self.budget, self.measure, self.say = recipe, budget, measure, say
        self.device = select_device(recipe).type
        self.micro = micro_batches(recipe)
        sequence = getattr(recipe.data, "sequence", None)
        enough = [m for m in self.micro if sequence is None or m * sequence >= TRIAL_TOKENS[self.device]]
        self.trial = enough[-1] if enough else self.micro[0]
        self.out: list[Option] = []

    def plan(self) -> MemoryPlan:
        plain = self.probe("keep everything", "states in place", self.trial)
        if plain is not None:
            option = self.option("keep everything", "states in place", self.micro[0], plain)
            if option.fits(self.budget) and (exact := self.verify(option)).fits(self.budget):
                fitting = replace(exact, verdict="fits as it is")
                return MemoryPlan(self.budget, fitting, [fitting])
        ranked = self.ranked(plain)
        for index in self.worth_checking(ranked):
            ranked[index] = self.verify(ranked[index])
            if ranked[index].fits(self.budget):
                chosen = replace(ranked[index], verdict="the fastest that fits")
                others = [replace(o, verdict=self.verdict(o)) for o in ranked if o.name != chosen.name]
                return MemoryPlan(self.budget, chosen, [chosen, *others, *self.out])
        known = [option for option in ranked if option.peak_bytes is not None and not option.fits(self.budget)]
        least = min(known, key=lambda option: option.peak_bytes or 0, default=None)
        nearest = f"; {least.name} takes least, {human(least.peak_bytes or 0, 'B')}" if least else ""
        raise HeadwayError("memory.budget", f"{human(self.budget, 'B')} do not suffice for this recipe{nearest}",
                           hint="give more, or lower data.sequence or the model's size")  # fmt: skip

    def worth_checking(self, ranked: list[Option]) -> list[int]:
        """The fastest that seem to fit; where there are too many, the one that takes least at last."""
        fitting = [index for index, option in enumerate(ranked) if option.fits(self.budget)]
        if len(fitting) <= MOST_CHECKS:
            return fitting
        least = min(fitting, key=lambda index: ranked[index].peak_bytes or 0)
        return [*[index for index in fitting if index != least][: MOST_CHECKS - 1], least]

    def verdict(self, option: Option) -> str:
        return "fits, but is slower" if option.fits(self.budget) else "too much"

    def ranked(self, plain: Footprint | None) -> list[Option]:
        """Every combination, fastest first; its needs put together from probes of one change at a time."""
        found: dict[str, Footprint] = {"keep everything": plain} if plain is not None else {}
        for name in list(ACTIVATIONS)[1:]:
            if (probed := self.probe(name, "states in place", self.trial)) is not None:
                found[name] = probed
        if not found:
            raise HeadwayError("memory.budget", "not even two blocks of this model could be tried in this machine's "
                               "memory", hint="lower train.micro_batch or data.sequence")  # fmt: skip
        thrifty = min(found, key=lambda name: found[name].peak)
        states: dict[str, Footprint | None] = {"states in place": None}
        for name in list(STATES)[1:]:
            if (probed := self.probe(thrifty, name, self.trial)) is not None:
                states[name] = probed
        options = [
            self.option(activations, state, micro, _combined(needs, found[thrifty], moved) if moved else needs)
            for activations, needs in found.items()
            for state, moved in states.items()
            for micro in self.micro
        ]
        return sorted(options, key=lambda o: (o.seconds or 0.0, o.peak_bytes or 0))

    def option(self, activations: str, states: str, micro: int, trial: Footprint) -> Option:
        """A candidate, with what a trial at another micro-batch lets expect of it."""
        made = candidate(self.recipe, activations, states, micro)
        needs = _scaled(trial, micro / self.trial, SMALLER_IS_SLOWER ** math.log2(self.micro[0] / micro))
        what = ACTIVATIONS[activations][0] + ("" if states == "states in place" else f"; {STATES[states][0]}")
        seconds = needs.seconds(self.recipe.train.batch // micro)
        return Option(made.name, made.methods, micro, what, round(needs.peak), seconds)

    def probe(self, activations: str, states: str, micro: int) -> Footprint | None:
        made = candidate(self.recipe, activations, states, micro)
        if why := refused(self.recipe, made, self.device):
            self.out.append(Option(made.name, made.methods, micro, verdict=f"out: {why}"))
            return None
        self.say(f"trying {made.name}")
        moving = any(name in ON_DISK + ON_HOST for name in made.methods)
        try:
            return footprint(made.apply(self.recipe), DEPTHS_MOVING if moving else DEPTHS, self.measure)
        except MemoryError:
            why = "out: not even a few blocks fit in this machine's memory"
        except HeadwayError as error:
            if error.where == "memory.budget":
                raise
            why = f"out: {error}"
        self.out.append(Option(made.name, made.methods, micro, verdict=why))
        return None

    def verify(self, predicted: Option) -> Option:
        """The needs of a combination that was only added up, probed as it will run."""
        made = Candidate(predicted.name, "", predicted.micro_batch, predicted.methods)
        moving = any(name in ON_DISK + ON_HOST for name in made.methods)
        self.say(f"checking {predicted.name}")
        try:
            needs = footprint(made.apply(self.recipe), DEPTHS_MOVING if moving else DEPTHS, self.measure)
        except (MemoryError, HeadwayError) as error:
            self.out.append(replace(predicted, peak_bytes=None, seconds=None, verdict=f"out: {error}"))
            return replace(predicted, peak_bytes=None)
        seconds = needs.seconds(self.recipe.train.batch // predicted.micro_batch)
        return replace(predicted, peak_bytes=round(needs.peak), seconds=seconds)


def _scaled(needs: Footprint, share: float, slower: float) -> Footprint:
    """With micro-batches of ``share`` times the size: all but the idle bytes and the gradients grows with them."""
    fixed = needs.idle + needs.gradients
    backward = fixed + share * max(0.0, needs.backward - fixed)
    return replace(needs, backward=backward, pass_seconds=needs.pass_seconds * share * slower)


def _combined(activations: Footprint, base: Footprint, states: Footprint) -> Footprint:
    """Activations as in one probe, the optimizer's state as in another; ``base`` is what both changed."""
    return Footprint(**{
        field.name: max(0.0, getattr(activations, field.name) + getattr(states, field.name) - getattr(base, field.name))
        for field in fields(Footprint)
    })  # fmt: skip
