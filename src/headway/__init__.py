"""Train neural networks with less time, less memory and fewer machines.

    import headway

    run = headway.train("recipe.yaml")                 # or a mapping, or a headway.Recipe
    print(run.summary["bits_per_byte"])
    model, tokenizer = headway.load_model(run.path)

The names of ``__all__`` are the public ones; each is imported when it is first used, so that ``import headway`` costs
no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headway.core.errors import HeadwayError
    from headway.core.method import Card, Method
    from headway.core.options import Options
    from headway.core.recipe import Recipe
    from headway.core.run import Run
    from headway.core.train import train
    from headway.experiments.compare import compare
    from headway.workloads.load import load_model

    __version__: str

__all__ = [
    "Card",
    "HeadwayError",
    "Method",
    "Options",
    "Recipe",
    "Run",
    "__version__",
    "compare",
    "load_model",
    "train",
]

_HOMES = {
    "Card": "headway.core.method",
    "HeadwayError": "headway.core.errors",
    "Method": "headway.core.method",
    "Options": "headway.core.options",
    "Recipe": "headway.core.recipe",
    "Run": "headway.core.run",
    "compare": "headway.experiments.compare",
    "load_model": "headway.workloads.load",
    "train": "headway.core.train",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("headway")
    if name not in _HOMES:
        raise AttributeError(f"module 'headway' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
