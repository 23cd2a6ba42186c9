"""The recipe that the tests of many ranks train: small, fp64, on the interpreter's own library."""

from typing import Any

from headway.core.recipe import Recipe, merge

BASE: dict[str, Any] = {
    "name": "ranks",
    "model": {"family": "llama", "hidden": 32, "layers": 4, "heads": 4, "kv_heads": 2, "context": 64},
    "data": {"source": "python-stdlib", "tokenizer": "byte", "sequence": 32, "validation_fraction": 0.02},
    "train": {"steps": 3, "batch": 4, "precision": "fp64"},
    "optimizer": {"lr": 1e-2},
    "eval": {"batches": 2},
    "log": {"tensorboard": False},
}


def recipe(**changes: Any) -> Recipe:
    """The small recipe with these sections laid over it."""
    return Recipe.load(merge(BASE, changes))
