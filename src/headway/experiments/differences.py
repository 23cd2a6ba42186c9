"""In which keys recipes differ."""

from __future__ import annotations

from typing import Any

from headway.core.recipe import Recipe

ABSENT = "-"


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as ``key.path -> value``; an empty mapping stays a value."""
    if isinstance(value, dict) and value:
        inner = (flat(v, f"{prefix}.{key}" if prefix else str(key)) for key, v in value.items())
        return {key: v for part in inner for key, v in part.items()}
    return {prefix: value}


def recipe_differences(recipes: list[Recipe], ignore: tuple[str, ...] = ("name",)) -> dict[str, list[Any]]:
    """Key path -> its value in each recipe, for the keys in which they differ; ``-`` where a recipe has no such key."""
    flats = [flat(recipe.to_dict()) for recipe in recipes]
    keys = [key for key in dict.fromkeys(k for one in flats for k in one) if key.split(".")[0] not in ignore]
    rows = {key: [one.get(key, ABSENT) for one in flats] for key in keys}
    return {key: row for key, row in rows.items() if _differ(key, row)}


def _differ(key: str, row: list[Any]) -> bool:
    if all(value == row[0] for value in row):
        return False
    # `methods: {}` in one recipe stands for the whole section in another, whose keys say it all.
    return key != "methods"
