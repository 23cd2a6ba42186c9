"""Typed options: every section of a recipe and every method's settings is one of these."""

from __future__ import annotations

from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from headway.core.errors import RecipeError, nearest


class Options(BaseModel):
    """A frozen record that refuses unknown keys; the docstring under a field is its help text."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True,
                              populate_by_name=True, allow_inf_nan=False, serialize_by_alias=True)  # fmt: skip

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`batch: true` is a slip, not a batch of one."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and annotation not in (bool, Any) and bool not in get_args(annotation):
            raise ValueError("expected no boolean here")
        return value


T = TypeVar("T", bound=Options)


def parse_options(cls: type[T], raw: Any, where: str = "") -> T:
    """``raw`` as ``cls``.

    Args:
        where: the recipe path of ``raw``, put before the path of what is wrong.

    Raises:
        RecipeError: an unknown key, a wrong type or a refused value, with its full path; all of them in one message.
    """
    if isinstance(raw, cls):
        return raw
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise RecipeError(where or "recipe", got=raw, expected="a mapping of options")
    for key in raw:
        if not isinstance(key, str):
            raise RecipeError(where or "recipe", got=key, expected="a name as the key")
    try:
        return cls.model_validate(raw)
    except ValidationError as error:
        problems = [_problem(cls, where, details) for details in error.errors()]
        first = RecipeError(**problems[0])
        if len(problems) > 1:
            rest = "; ".join(str(RecipeError(**p)) for p in problems[1:])
            first.args = (f"{first}\n  also {rest}",)
        raise first from None


def _problem(cls: type[Options], where: str, details: Any) -> dict[str, Any]:
    location = [str(part) for part in details["loc"]]
    path = ".".join(part for part in [where, *location] if part) or "recipe"
    kind, got = details["type"], details["input"]
    if kind == "extra_forbidden":
        known = field_names(_owner(cls, location[:-1]))
        return {"where": path, "what": "is not an option here", "hint": nearest(location[-1], known)}
    if kind == "missing":
        return {"where": path, "what": "is required"}
    message = details["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    message = message.replace("String should ", "a string to ")
    if kind == "value_error" and not location:  # of options that do not fit one another: the sentence says all
        return {"where": path, "what": message}
    if kind == "literal_error" and isinstance(got, str):
        allowed = [v.strip().strip("'") for v in message.replace(" or ", ", ").split(",")]
        return {"where": path, "got": got, "expected": message, "hint": nearest(got, allowed)}
    return {"where": path, "got": got, "expected": message.removeprefix("expected ")}


def field_names(cls: type[BaseModel]) -> list[str]:
    """The keys that a recipe may use for ``cls``."""
    return [info.alias or name for name, info in cls.model_fields.items()]


def _owner(cls: type[BaseModel], location: list[str]) -> type[BaseModel]:
    for part in location:
        info = cls.model_fields.get(part)
        candidates = [] if info is None else [info.annotation, *get_args(info.annotation)]
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not nested:
            return cls
        cls = nested[0]
    return cls
