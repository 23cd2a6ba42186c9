"""The one table of what Headway offers: name -> ``module:Class``, imported only when used.

Packages outside Headway add to it through entry points (group ``headway.methods``, ``headway.workloads`` ...), and a
recipe may name any importable class as ``module:Class``.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from headway.core.errors import HeadwayError, RecipeError, nearest

TABLE: dict[str, dict[str, str]] = {
    "methods": {
        "deep-optimizer-states": "headway.memory.deep_optimizer_states.method:DeepOptimizerStates",
        "ema": "headway.optim.ema:EMA",
        "fuyou": "headway.memory.fuyou.method:Fuyou",
        "global-lbl": "headway.parallel.global_lbl.method:GlobalLBL",
        "label-smoothing": "headway.layers.label_smoothing:LabelSmoothing",
        "length-warmup": "headway.data.length_warmup:LengthWarmup",
        "memo": "headway.memory.memo.method:MemoMethod",
        "one-epoch": "headway.plan.one_epoch.method:OneEpoch",
        "recompute": "headway.memory.recompute:Recompute",
        "sam": "headway.optim.sam:SAM",
        "skip-pipeline": "headway.parallel.skippipe.method:SkipPipeline",
        "ssdtrain": "headway.memory.ssdtrain.method:SSDTrain",
        "streambp": "headway.memory.streambp.method:StreamBP",
        "token-accumulation": "headway.data.token_accumulation:TokenAccumulation",
    },
    "workloads": {
        "language": "headway.workloads.language:Language",
    },
    "optimizers": {
        "adamw": "headway.optim.adamw:AdamW",
    },
    "schedules": {
        name: "headway.optim.schedules:Schedules" for name in ("constant", "cosine", "linear", "wsd", "inverse-sqrt")
    },
    "checkpointers": {
        "lazy": "headway.resilience.lazy:LazyCheckpointer",
        "plain": "headway.resilience.checkpoint:PlainCheckpointer",
    },
    "engines": {
        "parallel": "headway.parallel.engine:ParallelEngine",
    },
    "planners": {
        "memory": "headway.plan.memory.planner:plan_memory",
        "memory-plan": "headway.plan.memory.planner:read_plan",
    },
    "experiments": {
        "memory": "headway.experiments.memory:experiment",
        "datastates": "headway.experiments.datastates:experiment",
        "fuyou": "headway.experiments.fuyou:experiment",
        "global-lbl": "headway.experiments.global_lbl:experiment",
        "deep-optimizer-states": "headway.experiments.deep_optimizer_states:experiment",
        "megatron-ptdp": "headway.experiments.megatron_ptdp:experiment",
        "memo": "headway.experiments.memo:experiment",
        "moe-folding": "headway.experiments.moe_folding:experiment",
        "ssdtrain": "headway.experiments.ssdtrain:experiment",
        "skippipe": "headway.experiments.skippipe:experiment",
        "streambp": "headway.experiments.streambp:experiment",
        "ulysses": "headway.experiments.ulysses:experiment",
        "torchtitan": "headway.experiments.torchtitan:experiment",
        "zeco": "headway.experiments.zeco:experiment",
        "one-epoch": "headway.experiments.one_epoch:experiment",
        "dissecting-runtime": "headway.experiments.dissecting_runtime:experiment",
    },
}


@cache
def _installed(kind: str) -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group=f"headway.{kind}")}


def names(kind: str) -> list[str]:
    """The names of one kind (``methods``, ``workloads`` ...), Headway's and those of installed packages."""
    return sorted({**_installed(kind), **TABLE[kind]})


def find(kind: str, name: str, where: str) -> Any:
    """The object behind ``name``: a name of the table, of an entry point, or ``module:Class``.

    Args:
        where: the recipe path to blame.

    Raises:
        RecipeError: nobody knows the name, or its module cannot be imported.
    """
    singular = kind.removesuffix("s")
    if not isinstance(name, str):
        raise RecipeError(where, got=name, expected="a name", hint=f"there are: {', '.join(names(kind))}")
    target = TABLE[kind].get(name) or _installed(kind).get(name) or (name if ":" in str(name) else None)
    if target is None:
        raise RecipeError(where, f"there is no {singular} {name!r}", hint=nearest(name, names(kind)))
    module, _, attribute = target.partition(":")
    if name == target and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # a module beside the recipe, as with `python -m`
    try:
        found = importlib.import_module(module)
    except HeadwayError:
        raise
    except Exception as error:  # a module that is not ours may fail in any way
        why = f"{type(error).__name__}: {error}" if not isinstance(error, ImportError) else str(error)
        raise RecipeError(where, f"cannot import {target!r} ({why})", hint="check the module's name") from error
    if not hasattr(found, attribute):
        members = [m for m in dir(found) if not m.startswith("_")]
        raise RecipeError(where, f"{module!r} has no {attribute!r}", hint=nearest(attribute, members))
    return getattr(found, attribute)
