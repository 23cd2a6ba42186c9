"""Which techniques may be combined: the sets that were published, and those of any recipe of Headway's.

A rule says of a set of techniques why it is not allowed, or None. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations as subsets
from typing import Any

from headway.core import registry
from headway.core.errors import HeadwayError, nearest
from headway.core.method import resolve
from headway.core.recipe import Recipe, parse_override

Rule = Callable[[tuple[str, ...]], str | None]

PUBLISHED = ("F", "R", "L", "QL", "Z2", "Z2O", "Z3", "Z3O")
"""FlashAttention, gradient checkpointing, LoRA, 4-bit base with LoRA, ZeRO stage 2 and 3; O: states offloaded."""


def combinations(names: Sequence[str], rule: Rule, most: int = 4) -> list[tuple[str, ...]]:
    """Every allowed set of at most ``most`` techniques, by size and then in the order of ``names``."""
    sizes = range(min(most, len(names)) + 1)
    return [chosen for size in sizes for chosen in subsets(names, size) if rule(chosen) is None]


def published_rule(chosen: tuple[str, ...]) -> str | None:
    """Why a set of the published letters is not among the 40 that were measured; None if it is.

    Source: examples/e2e-benchmark/run.sh of the authors' llm-toolkit.
    """
    sharded = [name for name in chosen if name.startswith("Z")]
    if len(sharded) > 1:
        return "has two stages of ZeRO"
    if "L" in chosen and "QL" in chosen:
        return "has two kinds of adapter"
    if "QL" in chosen and sharded:
        return "shards a quantised base"
    if {"F", "L"} <= set(chosen) and sharded and "R" not in chosen:
        return "was left out: attention, LoRA and ZeRO were measured together only with checkpointing"
    return None


def published() -> list[tuple[str, ...]]:
    """The 40 sets of arXiv 2311.03687."""
    return combinations(PUBLISHED, published_rule)


def headway_techniques() -> dict[str, tuple[str, ...]]:
    """What Headway offers to be combined, as overrides of a recipe: its settings, and every method of the registry."""
    settings: dict[str, tuple[str, ...]] = {"bf16": ("train.precision=bf16",), "compile": ("train.compile=true",)}
    return {**settings, **{name: (f"methods.{name}={{}}",) for name in registry.names("methods")}}


def recipe_rule(recipe: Recipe, techniques: Mapping[str, Sequence[str]]) -> Rule:
    """The rule of techniques that are overrides of ``recipe``.

    A set is allowed where no two of it give one key different values, the recipe with all of them is valid, and the
    methods' own cards allow them together.
    """

    def rule(chosen: tuple[str, ...]) -> str | None:
        given: dict[str, tuple[str, str]] = {}
        for name in chosen:
            for override in techniques[name]:
                key, _, value = override.partition("=")
                other, before = given.setdefault(key, (name, value))
                if before != value:
                    return f"{other} and {name} both set {key}"
        try:
            resolve(recipe.override(*(o for name in chosen for o in techniques[name])))
        except HeadwayError as error:
            return str(error)
        return None

    return rule


def technique(value: Any, name: str) -> tuple[str, ...]:
    """The overrides that a technique stands for.

    Args:
        value: None for one of ``headway_techniques``, or an override or several.

    Raises:
        HeadwayError: a name that is none, or what is no override.
    """
    if value is None:
        known = headway_techniques()
        if name not in known:
            raise HeadwayError(f"techniques.{name}", "is not a technique of Headway's", hint=nearest(name, known))
        return known[name]
    overrides = (value,) if isinstance(value, str) else tuple(value)
    for override in overrides:
        parse_override(override)
    return overrides
