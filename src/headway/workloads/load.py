"""From a run directory or a Hugging Face folder to a model that can be used, trained further or handed on."""

from __future__ import annotations

import re
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headway.core import registry
from headway.core.errors import CheckpointError, HeadwayError, RecipeError
from headway.core.method import resolve, wrap
from headway.core.options import Options
from headway.core.run import Run
from headway.core.state import load_model_state, model_state
from headway.data.tokenizers import Tokenizer, load_tokenizer
from headway.models import hf
from headway.models.build import build_model
from headway.models.config import TransformersConfig

HF = "hf:"
"""Prefix of a Hugging Face folder in ``train.from``."""


def load_model(source: str | Path | Run, *, device: str | torch.device = "cpu") -> tuple[Any, Tokenizer]:
    """A trained language model, fp32 and in evaluation mode, with its tokenizer.

    Args:
        source: a run directory, whose newest checkpoint is taken with the weights that its evaluation used (averaged
            ones, where a method averages); or a Hugging Face folder.
        device: where the model is put.

    Raises:
        HeadwayError: it is neither, or a part of it is missing or damaged.
    """
    path = source.path if isinstance(source, Run) else Path(source)
    if (path / "recipe.yaml").is_file():
        model, tokenizer = _load_run(Run(path))
    elif (path / "config.json").is_file():
        model, tokenizer = build_model(TransformersConfig(path=str(path))), load_tokenizer(str(path))
    else:
        why = "holds neither recipe.yaml nor config.json" if path.is_dir() else "there is no such folder"
        raise HeadwayError(str(path), why, expected="a run directory or a Hugging Face folder")
    return model.to(device).eval(), tokenizer


def load_weights(source: str, config: Options, tokenizer: Tokenizer) -> nn.Module:
    """The model of ``config`` with the weights that ``train.from`` names: a run directory, or ``hf:FOLDER``.

    Raises:
        RecipeError: the weights are those of another model, or were trained with another tokenizer.
        HeadwayError: the run or the folder is missing or damaged.
    """
    folder = source.removeprefix(HF)
    if source.startswith(HF) and isinstance(config, TransformersConfig):
        raise RecipeError(
            "train.from", "stands beside model.path, which names the weights already", hint="leave it out"
        )
    loaded, theirs = load_model(folder)
    if theirs.fingerprint != tokenizer.fingerprint:
        raise RecipeError("train.from", f"{folder} was trained with another tokenizer",
                          hint=f"set data.tokenizer={folder}/tokenizer.json")  # fmt: skip
    model = build_model(config, seed=0)
    try:
        load_model_state(model, None, model_state(loaded, None))  # type: ignore[arg-type]
    except CheckpointError as error:
        raise RecipeError("train.from", f"{folder} holds another model: {_difference(loaded.config, config) or error}",
                          hint="the section `model` must describe the model that is loaded") from None  # fmt: skip
    return model


def export_hf(source: str | Path, folder: str | Path) -> Path:
    """Write the model of a run as a folder that transformers loads, tokenizer included.

    Raises:
        HeadwayError: ``source`` cannot be loaded, ``folder`` holds something else, or transformers has no such model.
    """
    target = Path(folder)
    if target.exists() and not (target.is_dir() and ((target / "config.json").is_file() or not any(target.iterdir()))):
        raise HeadwayError(str(target), "holds something that is no model", expected="a new or empty folder")
    if (target / "recipe.yaml").exists():
        raise HeadwayError(str(target), "is a run directory", expected="a folder of its own for the exported model")
    model, tokenizer = load_model(source)
    hf.save_hf(model, target, tokenizer_file=Path(source), eos=tokenizer.eos)
    return target


def import_hf(folder: str | Path, run: str | Path) -> Run:
    """Make a run directory of a Hugging Face folder: a recipe with its model, its tokenizer, and a checkpoint.

    The recipe has no budget: it is there to start others from (``train.from``), to generate, evaluate and compare.

    Raises:
        HeadwayError: the folder is no model, or ``run`` holds something already.
    """
    from headway.core.recipe import Recipe

    target = Path(run)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise HeadwayError(str(target), "is there already", expected="a new or empty folder for the run")
    model, tokenizer = load_model(folder)
    if not (Path(folder) / "config.json").is_file():
        raise HeadwayError(str(folder), "is a run directory already", expected="a Hugging Face folder")
    config = model.config.model_dump(mode="json", by_alias=True)
    if isinstance(model.config, TransformersConfig):
        config["path"] = str(Path(folder).resolve())
    recipe = Recipe.load({
        "name": re.sub(r"[^A-Za-z0-9._-]+", "-", Path(folder).resolve().name).strip("-._") or "imported",
        "model": config,
        "data": {"tokenizer": str(target / "tokenizer.json"), "sequence": min(512, config.get("context") or 512)},
    })  # fmt: skip
    tokenizer.save(target)
    with closing(_checkpointer(recipe, target)) as checkpointer:
        checkpointer.save(0, {"model": model_state(model, None)})  # type: ignore[arg-type]
        checkpointer.wait()
    recipe.save(target / "recipe.yaml")  # last: a directory without it is no run
    return Run(target)


def _load_run(run: Run) -> tuple[nn.Module, Tokenizer]:
    recipe = run.recipe
    tokenizer = load_tokenizer(str(run.path / "tokenizer.json"))
    state = _checkpointer(recipe, run.path).load()
    if state is None:
        raise CheckpointError(str(run.path), "holds no checkpoint yet", hint="train it first")
    methods = resolve(recipe)
    config: Any = recipe.model
    if config.vocab is None:
        config = config.model_copy(update={"vocab": tokenizer.vocab})
    model = wrap(methods, "model", build_model(wrap(methods, "model_config", config), seed=recipe.seed))
    # In fp32 the optimizer works on the parameters themselves; only methods that average weights need it here.
    averaging = [method for method in methods if "weights" in method.points()]
    optimizer = registry.find("optimizers", recipe.optimizer.name, "optimizer.name").build(  # type: ignore[attr-defined]
        model, recipe.optimizer, torch.float32
    )
    optimizer = wrap(averaging, "optimizer", optimizer)
    load_model_state(model, optimizer, state["model"])
    for method in averaging:
        method.load_state_dict(state["methods"][method.card.name])
    with wrap(averaging, "weights", nullcontext)():
        evaluated: dict[str, Tensor] = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(evaluated)
    return model, tokenizer


def _checkpointer(recipe: Any, folder: Path) -> Any:
    part = registry.find("checkpointers", recipe.checkpoint.mode, "checkpoint.mode")
    return part(recipe.checkpoint, folder / "checkpoints")


def _difference(theirs: Any, ours: Any) -> str:
    """``layers 4, here 6``: the options in which two configurations differ."""
    a, b = theirs.model_dump(), ours.model_dump()
    return ", ".join(
        f"{key} {a.get(key)!r}, here {b.get(key)!r}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)
    )
