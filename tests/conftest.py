"""Fixtures for all tests: a private cache folder, one thread a process, a tiny recipe on generated text."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing that a test caches mixes with the user's own cache."""
    os.environ["HEADWAY_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def generated_text(documents: int = 40, words: int = 120, seed: int = 0) -> list[str]:
    """Documents of a small language with some grammar, so that a model has something to learn."""
    rng = random.Random(seed)
    nouns = ["cat", "tree", "river", "engine", "stone", "child", "wave", "lamp"]
    verbs = ["sees", "finds", "moves", "holds", "breaks", "likes"]
    return [
        " ".join(f"the {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)}." for _ in range(words // 5))
        for _ in range(documents)
    ]


def tiny_recipe(**sections: Any) -> dict[str, Any]:
    """A recipe whose step takes milliseconds; keyword arguments are laid over its sections."""
    recipe: dict[str, Any] = {
        "name": "tiny",
        "model": {"hidden": 32, "layers": 2, "heads": 2, "context": 64},
        "data": {"source": "memory", "documents": generated_text(), "tokenizer": "byte", "sequence": 32},
        "train": {"steps": 20, "batch": 4, "precision": "fp32", "device": "cpu"},
        "optimizer": {"lr": 0.01},
        "eval": {"batches": 2},
        "log": {"every": 1, "tensorboard": False},
    }
    for key, value in sections.items():
        recipe[key] = {**recipe[key], **value} if isinstance(value, dict) and key in recipe else value
    return recipe


@pytest.fixture
def tiny() -> Any:
    """The maker of tiny recipes: ``tiny(train={"steps": 5})``."""
    return tiny_recipe


@pytest.fixture
def headway_data() -> Path:
    """The folder of real data, where there is one."""
    folder = os.environ.get("HEADWAY_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("HEADWAY_DATA names no folder of real data")
    return Path(folder)
