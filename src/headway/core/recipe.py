"""The recipe: a YAML file or a Python object that fully determines a run.

Sections that belong to a part (``model``, ``data``, ``optimizer``, ``schedule``, ``checkpoint``, each method) are
typed by that part's own ``Options``; this file only finds the part and asks it. The top-level keys are frozen by a
test.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, SerializeAsAny, create_model

from headway.core import registry
from headway.core.errors import RecipeError, nearest
from headway.core.files import write_text
from headway.core.layout import ParallelOptions
from headway.core.options import Options, parse_options
from headway.core.units import Bytes, Count, Seconds
from headway.core.workload import Workload

__all__ = ["EvalOptions", "LogOptions", "MemoryOptions", "Options", "Recipe", "TrainOptions", "parse_override"]


class TrainOptions(Options):
    """How long, how much at a time, and in which numbers."""

    from_: str | None = Field(None, alias="from")
    """Start from the weights of a run directory, or of a Hugging Face folder written `hf:FOLDER`."""
    steps: Count | None = Field(None, ge=1)
    """Stop after this many optimizer steps."""
    tokens: Count | None = Field(None, ge=1)
    """Stop after this many input tokens (samples, for other workloads)."""
    time: Seconds | None = Field(None, gt=0)
    """Stop after this much training time, such as `30min`; evaluation and checkpoints not counted."""
    batch: int = Field(8, ge=1)
    """Sequences per optimizer step, over all ranks."""
    micro_batch: int | None = Field(None, ge=1)
    """Sequences per forward-backward; gradients are accumulated up to `batch`. Default: the whole batch."""
    clip: float | None = Field(1.0, gt=0)
    """Largest gradient norm; `null` leaves gradients as they are."""
    precision: Literal["fp32", "bf16", "fp64"] = "bf16"
    """Number format of weights and activations; with `bf16`, master weights, gradients' sums and optimizer state stay
    fp32. `fp64` is for checks."""
    compile: bool = False
    """Compile each block with torch.compile."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; `auto` takes a GPU if there is one."""


class EvalOptions(Options):
    """Evaluation on the validation split."""

    every: Count | None = Field(None, ge=1)
    """Optimizer steps between evaluations; `null` evaluates only at the end."""
    batches: int | None = Field(None, ge=1)
    """Validation batches per evaluation, always the same ones; `null` uses the whole split."""
    batch: int | None = Field(None, ge=1)
    """Sequences per evaluation batch; default: the training micro-batch."""


class LogOptions(Options):
    """What is written down while training."""

    every: int = Field(10, ge=1)
    """Optimizer steps between logged lines."""
    tensorboard: bool = True
    """Write TensorBoard events beside the metrics."""
    sinks: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Also send metrics to these; each needs its extra."""


class MemoryOptions(Options):
    """How much memory there is, and where else data may go."""

    budget: Bytes | None = Field(None, ge=1)
    """Most bytes of live tensors in a training step, such as `6GiB`: before the first step the fastest way to stay
    below is found and switched on. `headway plan RECIPE --memory 6GiB` shows what was considered."""
    disk: str | None = None
    """Folder on a fast drive for what is moved out of memory; default: the system's temporary folder."""


class Recipe(Options):
    """One run, fully determined. Load it with `Recipe.load`."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run directory."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Fixes initial weights, data order and every random choice."""
    workload: str = "language"
    """What is learnt: a name of the registry or `module:Class`."""
    model: SerializeAsAny[Options]
    """The model's configuration; its options depend on the workload and on `model.family`."""
    data: SerializeAsAny[Options]
    """Where the data comes from; its options depend on the workload."""
    train: TrainOptions
    """How long, how much at a time, and in which numbers."""
    optimizer: SerializeAsAny[Options]
    """The optimizer, by `optimizer.name`, with its options."""
    schedule: SerializeAsAny[Options]
    """The learning-rate schedule, by `schedule.name`, with its options."""
    eval: EvalOptions = Field(default_factory=EvalOptions)
    """Evaluation on the validation split."""
    log: LogOptions = Field(default_factory=LogOptions)
    """What is written down while training."""
    checkpoint: SerializeAsAny[Options]
    """When and how the run is saved, by `checkpoint.mode`."""
    memory: MemoryOptions = Field(default_factory=MemoryOptions)
    """How much memory there is."""
    parallel: ParallelOptions = Field(default_factory=ParallelOptions)
    """How the run is spread over ranks; `headway train RECIPE --ranks N` starts them."""
    methods: dict[str, SerializeAsAny[Options]] = Field(default_factory=dict)
    """The switched-on methods: `{name: {option: value}}`; an empty mapping takes the method's defaults."""
    strict: bool = False
    """Turn every fallback into an error."""

    @classmethod
    def load(cls, source: str | Path | dict[str, Any] | Recipe, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
        """A recipe from a YAML file, a mapping or another recipe, with ``key.path=value`` overrides laid over it.

        Raises:
            RecipeError: the file is missing or no YAML, or anything in it is unknown, of the wrong type or refused.
        """
        if isinstance(source, Recipe):
            raw = source.to_dict()
        elif isinstance(source, dict):
            raw = _with_base(source, Path.cwd(), ())
        else:
            raw = _read(Path(source), ())
            raw.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source).stem).strip("-._") or "run")
        for override in overrides:
            raw = merge(raw, parse_override(override))
        return cls._resolve(raw)

    @classmethod
    def _resolve(cls, raw: dict[str, Any]) -> Recipe:
        for key in raw:
            if key not in cls.model_fields:
                raise RecipeError(str(key), "is not a key of a recipe", hint=nearest(key, cls.model_fields))
        resolved = {key: value for key, value in raw.items() if value is not None}
        workload = registry.find("workloads", resolved.get("workload", "language"), "workload")
        if not (isinstance(workload, type) and issubclass(workload, Workload)):
            raise RecipeError("workload", got=resolved["workload"], expected="a headway workload")
        section = {key: _mapping(resolved, key) for key in ("model", "data", "optimizer", "schedule", "checkpoint")}
        kinds = {
            "model": workload.model_options(section["model"]),
            "data": workload.data_options(section["data"]),
            "optimizer": _options("optimizers", section["optimizer"].get("name", "adamw"), "optimizer.name"),
            "schedule": _options("schedules", section["schedule"].get("name", "cosine"), "schedule.name"),
            "checkpoint": _options("checkpointers", section["checkpoint"].get("mode", "lazy"), "checkpoint.mode"),
        }
        for key, kind in kinds.items():
            resolved[key] = parse_options(kind, section[key], key)
        resolved["train"] = parse_options(TrainOptions, resolved.get("train"), "train")
        resolved["methods"] = {
            name: parse_options(_options("methods", name, f"methods.{name}"), options, f"methods.{name}")
            for name, options in _mapping(resolved, "methods").items()
            if options is not False
        }
        return parse_options(cls, resolved)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with every default spelled out; `Recipe.load` gives the same recipe back."""
        return self.model_dump(mode="json", by_alias=True)

    def to_yaml(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def save(self, path: str | Path) -> None:
        """Write the resolved recipe; it can be run as it is."""
        write_text(path, self.to_yaml())

    def override(self, *overrides: str) -> Recipe:
        """This recipe with ``key.path=value`` overrides."""
        return Recipe.load(self, overrides)

    @classmethod
    def file_schema(cls) -> dict[str, Any]:
        """JSON schema of recipe files, for editors: every family, every method, every option."""
        fields: dict[str, Any] = {}
        for name, info in cls.model_fields.items():
            fields[name] = (
                info.annotation,
                info if name in ("name", "workload") else Field(None, description=info.description),
            )
        workload = registry.find("workloads", "language", "workload")
        families = workload.model_families()
        union: Any = families[0]
        for family in families[1:]:
            union = union | family
        fields["model"] = (union, Field(None, description=cls.model_fields["model"].description))
        fields["data"] = (workload.data_options({}), fields["data"][1])
        fields["optimizer"] = (registry.find("optimizers", "adamw", "optimizer").Options, fields["optimizer"][1])
        fields["schedule"] = (registry.find("schedules", "cosine", "schedule").Options, fields["schedule"][1])
        fields["checkpoint"] = (registry.find("checkpointers", "lazy", "checkpoint").Options, fields["checkpoint"][1])
        methods = {
            name.replace("-", "_"): (registry.find("methods", name, "methods").Options | None, Field(None, alias=name))
            for name in registry.names("methods")
        }
        fields["methods"] = (create_model("Methods", __base__=Options, **methods), fields["methods"][1])  # type: ignore[call-overload]
        fields["base"] = (str | None, Field(None, description="A recipe file, relative to this one, to start from."))
        return create_model("Recipe", __base__=Options, **fields).model_json_schema(by_alias=True)


def _options(kind: str, name: str, where: str) -> type[Options]:
    options = getattr(registry.find(kind, name, where), "Options", None)
    if not (isinstance(options, type) and issubclass(options, Options)):
        raise RecipeError(where, got=name, expected=f"a headway {kind.removesuffix('s')} (a class with Options)")
    return options


def _mapping(raw: dict[str, Any], key: str) -> dict[str, Any]:
    value = {} if raw.get(key) is None else raw[key]
    if isinstance(value, Options):
        value = value.model_dump(mode="json", by_alias=True)
    if not isinstance(value, dict):
        raise RecipeError(key, got=value, expected="a mapping of options")
    return value


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        raise RecipeError(str(path), "there is no such recipe", hint=nearest(str(path), near) if near else "")
    path = path.resolve()
    if path in seen:
        raise RecipeError(str(path), "inherits from itself through base:")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except UnicodeDecodeError as error:
        raise RecipeError(str(path), f"is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise RecipeError(str(path), f"is not YAML{line} ({getattr(error, 'problem', None) or error})") from None
    except RecursionError:
        raise RecipeError(str(path), "is nested too deeply") from None
    if raw is None:
        raise RecipeError(str(path), "is empty", hint="`headway recipe schema` lists what a recipe may hold")
    if not isinstance(raw, dict):
        raise RecipeError(str(path), f"holds a {type(raw).__name__}", expected="a mapping of recipe keys")
    return _with_base(raw, path.parent, (*seen, path))


def _with_base(raw: dict[str, Any], folder: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    raw = dict(raw)
    base = raw.pop("base", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise RecipeError("base", got=base, expected="the path of a recipe file")
    return merge(_read(folder / base, seen), raw)


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``under``, mapping by mapping; ``null`` removes a mapping and is a value elsewhere.

    A section whose kind changes (``model.family``, ``optimizer.name`` ...) starts from nothing: the old kind's
    options do not fit the new one.
    """
    result = dict(under)
    for key, value in over.items():
        if value is None:
            result[key] = None
            if isinstance(under.get(key), dict):
                del result[key]
        elif isinstance(value, dict) and isinstance(under.get(key), dict):
            kind = {"model": "family", "optimizer": "name", "checkpoint": "mode"}.get(key)
            changed = kind in value and value[kind] != under[key].get(kind, value[kind]) if kind else False
            result[key] = dict(value) if changed else merge(under[key], value)
        else:
            result[key] = value
    return result


def parse_override(text: str) -> dict[str, Any]:
    """``train.steps=20`` -> ``{"train": {"steps": 20}}``; the value is read as YAML.

    Raises:
        RecipeError: no ``=``, an empty key, or a value that is no YAML.
    """
    key, equals, value = text.partition("=")
    parts = _split_key(key)
    if not equals or not all(parts):
        raise RecipeError(text, "is not an override", expected="key.path=value, such as train.steps=100")
    try:
        parsed: Any = yaml.safe_load(value) if value else None
    except yaml.YAMLError:
        raise RecipeError(key, got=value, expected="a value in YAML") from None
    for part in reversed(parts):
        parsed = {part: parsed}
    return parsed


def _split_key(key: str) -> list[str]:
    """Split at dots, but keep a ``package.module:Class`` of ``methods.`` in one piece."""
    match = re.fullmatch(r"methods\.([\w.]+:\w+)(?:\.(.*))?", key.strip())
    if match:
        return ["methods", match[1], *(match[2].split(".") if match[2] else [])]
    return key.strip().split(".")


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML lets a later key silently replace an earlier one; here that is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key) if isinstance(key, str) else None
        return super().construct_mapping(node, deep)
