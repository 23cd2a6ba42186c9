"""`headway compare`: a recipe with and without a switch, interleaved on this machine, as ratios with their spread."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console

from headway.core import registry
from headway.core.errors import HeadwayError, RecipeError
from headway.core.recipe import Recipe
from headway.core.units import human
from headway.experiments.comparison import ArmResult, Comparison, window_mean
from headway.experiments.differences import recipe_differences
from headway.experiments.progress import Bar
from headway.experiments.statistics import Estimate, bootstrap, paired_ratio

if TYPE_CHECKING:
    from headway.experiments.interleave import LiveArm

__all__ = ["Comparison", "compare", "compare_recipes", "parse_switch"]

# Settings of `data` that change neither the tokenizer nor the text on which an arm is evaluated.
_SAME_TEXT = {f"data.{key}" for key in ("sequence", "mask_documents", "max_passes", "on_exhausted", "cache")}
_SWITCH = "NAME, NAME:key=value,... or key.path=value"
_TOKENIZER = {"data.tokenizer", "data.vocab"}


def compare(
    recipe: str | Path | dict[str, Any] | Recipe,
    *,
    with_: Sequence[str] = (),
    against: Sequence[str] = (),
    set_: Sequence[str] = (),
    blocks: int = 8,
    steps: int = 4,
    repeats: int = 1,
    console: Console | None = None,
) -> Comparison:
    """Train a recipe with and without something, in turns, and compare time, memory and loss.

    Args:
        with_: methods of arm B, ``NAME[:key=value,...]``.
        against: methods, or settings ``key.path=value``, of arm A; B does not have them.
        set_: settings of arm B, ``key.path=value``.
        blocks: counted blocks per arm.
        steps: optimizer steps per block, of the arm with more tokens a step.
        repeats: how often, each time with the next seed.
        console: where progress is shown.

    Raises:
        HeadwayError: the arms are the same, an arm cannot run, a method changes nothing, or an arm diverges.
    """
    base = Recipe.load(recipe)
    switches = (tuple(against), (*with_, *set_))
    a, b = (base.override(*map(parse_switch, added)) for added in switches)
    names = [", ".join(added) or "as it is" for added in switches]
    return compare_recipes(a, b, names=names, blocks=blocks, steps=steps, repeats=repeats, console=console)


def parse_switch(text: str) -> str:
    """``ema:decay=0.9,every=2`` -> ``methods.ema={decay: 0.9, every: 2}``; ``train.batch=4`` is an override already.

    Raises:
        RecipeError: neither a method nor a setting.
    """
    if re.match(r"[\w.-]+=", text):
        return text
    name, _, options = text.partition(":")
    if options and "=" not in options.split(":")[0]:  # module:Class[:key=value,...]
        attribute, _, options = options.partition(":")
        name = f"{name}:{attribute}"
        if name.partition(":")[0] in registry.names("methods"):
            raise RecipeError(text, "gives a method an option without a value", expected=_SWITCH)
    pairs = [pair.partition("=") for pair in re.split(r",(?=[\w.-]+=)", options)] if options else []
    if not name or "=" in name or any(not key or not value for key, _, value in pairs):
        raise RecipeError(text, "is neither a method nor a setting", expected=_SWITCH)
    return f"methods.{name}={{{', '.join(f'{key}: {value}' for key, _, value in pairs)}}}"


def compare_recipes(
    a: Recipe,
    b: Recipe,
    *,
    names: Sequence[str] = ("A", "B"),
    blocks: int = 8,
    steps: int = 4,
    repeats: int = 1,
    console: Console | None = None,
) -> Comparison:
    """Train two recipes in turns; the options are those of `compare`.

    Raises:
        HeadwayError: as `compare`.
    """
    from headway.core import meters

    options = {"blocks": blocks, "steps": steps, "repeats": repeats}
    for option, value in options.items():
        if value < 1:
            raise HeadwayError(option, got=value, expected="a whole number from 1")
    differences = recipe_differences([a, b])
    if not differences:
        raise HeadwayError("compare", "both arms have the same recipe, so there is nothing to compare",
                           hint="--with NAME or --set key=value makes arm B another one")  # fmt: skip
    if a.workload != b.workload:
        raise HeadwayError("compare", f"the arms learn different things: {a.workload} and {b.workload}")
    a, b = _same_evaluation(a, b, set(differences))
    console = console or Console(quiet=True)
    found = []
    for repeat in range(repeats):
        seeded = [r.override(f"seed={r.seed + repeat}") for r in (a, b)]
        label = f"comparing, repeat {repeat + 1} of {repeats}" if repeats > 1 else "comparing"
        with Bar(console, label) as bar:
            found.append(_once(seeded[0], seeded[1], set(differences), blocks, steps, bar))
    return Comparison(
        a=_merge(names[0], [repeat.a for repeat in found]),
        b=_merge(names[1], [repeat.b for repeat in found]),
        ratios=_ratios(found),
        differences=differences,
        notes=found[0].notes,
        options=options,
        hardware=meters.hardware(),
        versions=meters.versions(),
    )


def _same_evaluation(a: Recipe, b: Recipe, different: set[str]) -> tuple[Recipe, Recipe]:
    """Evaluate both arms on the same text: ``eval.batches`` counts batches, whose size an arm may have changed."""
    if not (a.eval.batches and b.eval.batches):
        return a, b
    if different & (_TOKENIZER | {"data.sequence"}):
        return a.override("eval.batches=null"), b.override("eval.batches=null")
    size = min(r.eval.batch or r.train.micro_batch or r.train.batch for r in (a, b))
    return a.override(f"eval.batch={size}"), b.override(f"eval.batch={size}")


@dataclass
class _Repeat:
    a: ArmResult
    b: ArmResult
    notes: list[str]


def _once(a: Recipe, b: Recipe, different: set[str], blocks: int, steps: int, bar: Bar) -> _Repeat:
    from headway.experiments.interleave import LiveArm, interleave

    bar.update(0.0, "building both arms")
    arm_a, arm_b = LiveArm("arm A", a), LiveArm("arm B", b)
    block_tokens = steps * max(arm_a.tokens_per_step, arm_b.tokens_per_step)
    start, whole = arm_a.tokens + arm_b.tokens, 2 * (blocks + 1) * block_tokens

    def show() -> None:
        arms = (("A", arm_a), ("B", arm_b))
        losses = ", ".join(f"{name} loss {arm.losses[-1][1]:.3f} {human(arm.rate)}/s" for name, arm in arms)
        bar.update(min(1.0, (arm_a.tokens + arm_b.tokens - start) / whole), losses)

    interleave(arm_a, arm_b, blocks, block_tokens, show)
    bar.update(1.0, "evaluating both arms")
    arm_a.finish()
    arm_b.finish()
    per_byte, notes = _reservations(arm_a, arm_b, different)
    end = min(arm_a.seen, arm_b.seen)
    return _Repeat(_result(arm_a, per_byte, end), _result(arm_b, per_byte, end), notes)


def _reservations(a: LiveArm, b: LiveArm, different: set[str]) -> tuple[bool, list[str]]:
    """Whether to compare per byte, and what to keep in mind."""
    notes = []
    if per_byte := bool(different & _TOKENIZER):
        notes.append("the tokenizers differ: time and loss are compared per byte of the validation text")
    if other := sorted(k for k in different if k.startswith("data.") and k not in _SAME_TEXT | _TOKENIZER):
        notes.append(f"the arms are evaluated on different text ({', '.join(other)}): their losses do not compare")
    if "data.sequence" in different or per_byte:
        notes.append("evaluated on the whole validation split: the arms cut it into different sequences")
    if a.tokens_per_step != b.tokens_per_step:
        notes.append(f"A takes {a.tokens_per_step:,} tokens a step, B {b.tokens_per_step:,}: blocks have equal tokens")
    if a.seen != b.seen:
        notes.append(f"evaluated after {a.seen:,} tokens (A) and {b.seen:,} (B): whole steps do not come out equal")
    if overran := [name for name, arm in (("A", a), ("B", b)) if arm.overran]:
        notes.append(f"longer than the recipe of {' and '.join(overran)}: the schedule stands at its end from there on")
    return per_byte, notes


def _result(arm: LiveArm, per_byte: bool, end: int) -> ArmResult:
    metrics = {"live_peak_bytes": float(arm.live_peak_bytes), **arm.evaluation}
    unit, scale = "token", 1.0
    if per_byte:
        if "bits_per_byte" not in metrics:
            raise HeadwayError("compare", "the tokenizers differ, and this workload does not evaluate per byte")
        unit, scale = "byte", metrics.pop("eval_loss") / math.log(2) / metrics["bits_per_byte"]
    else:
        metrics["train_loss"] = window_mean(arm.losses, end / 2, end)
    times = [block.seconds / block.tokens / scale for block in arm.blocks]
    metrics[f"seconds_per_{unit}"] = median(times)
    return ArmResult(arm.name, metrics, arm.seen, arm.trainer.changes, arm.fallbacks, times, [arm.losses])


def _merge(name: str, results: list[ArmResult]) -> ArmResult:
    first = results[0]
    return ArmResult(
        name,
        {key: median(r.metrics[key] for r in results) for key in first.metrics},
        first.tokens,
        first.methods,
        first.fallbacks,
        [time for r in results for time in r.times],
        [losses for r in results for losses in r.losses],
    )


def _ratios(repeats: list[_Repeat]) -> dict[str, Estimate]:
    pairs = [(y, x) for repeat in repeats for x, y in zip(repeat.a.times, repeat.b.times, strict=True)]
    ratios = {}
    for key in repeats[0].a.metrics.keys() & repeats[0].b.metrics.keys():
        if key.startswith("seconds_per_"):
            ratios[key] = paired_ratio(*zip(*pairs, strict=True))
        elif all(repeat.a.metrics[key] for repeat in repeats):
            ratios[key] = bootstrap([repeat.b.metrics[key] / repeat.a.metrics[key] for repeat in repeats])
    return ratios
