"""The method `deep-optimizer-states` in a recipe: the losses without it, with others too; checkpoints; refusals.

Needs nothing. Run: pytest tests/memory/test_deep_optimizer_states_method.py
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from headway.core.build import build_trainer
from headway.core.errors import CheckpointError, MethodError, RecipeError
from headway.core.fallback import FallbackLog, use_log
from headway.core.method import resolve
from headway.core.recipe import Recipe
from headway.core.train import train
from headway.memory.deep_optimizer_states import InterleavedOffload
from tests.conftest import tiny_recipe

NAME = "deep-optimizer-states"
ON: dict[str, Any] = {"stride": 2, "subgroup": 1000}


@pytest.fixture(autouse=True)
def _no_log() -> Iterator[None]:
    yield
    use_log(None)


def records(steps: int = 6, **sections: Any) -> list[tuple[float, float]]:
    trainer = build_trainer(Recipe.load(tiny_recipe(**sections)))
    done = [trainer.train_step() for _ in range(steps)]
    return [(record["loss"], record["grad_norm"]) for record in done] + [(trainer.evaluate()["eval_loss"], 0.0)]


TRAIN: list[dict[str, Any]] = [
    {"precision": "fp32", "micro_batch": 4},
    {"precision": "bf16", "micro_batch": 1, "clip": 0.1},
]


@pytest.mark.parametrize("settings", TRAIN, ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "options",
    [ON, {"stride": 1, "subgroup": 3000}, {"stride": None}, {"stride": "auto", "async_grads": False},
     {"stride": 3, "resident_fraction": 0.5, "subgroup": 1000}],
    ids=str,
)  # fmt: skip
def test_bits_of_the_run_without(options: dict[str, Any], settings: dict[str, Any]) -> None:
    assert records(train=settings, methods={NAME: options}) == records(train=settings)


OTHERS: dict[str, Any] = {
    "sam": {},
    "ema": {"decay": 0.9},
    "recompute": {},
    "streambp": {},
    "ssdtrain": {"min_bytes": 1, "backend": "host"},
    "token-accumulation": {"targets": 200},
}


@pytest.mark.parametrize("settings", TRAIN, ids=["fp32", "bf16"])
@pytest.mark.parametrize("other", OTHERS)
def test_bits_of_the_run_with_the_other_method_alone(other: str, settings: dict[str, Any]) -> None:
    options = {other: OTHERS[other]}
    assert records(train=settings, methods={NAME: ON, **options}) == records(train=settings, methods=options)


@pytest.mark.slow
def test_with_compile() -> None:
    settings = {"compile": True, "precision": "bf16"}
    assert records(3, train=settings, methods={NAME: ON}) == records(3, train=settings)


def test_the_report_says_what_happened(tmp_path: Path) -> None:
    recipe = Recipe.load(tiny_recipe(train={"steps": 4}, methods={NAME: {"stride": "auto", "subgroup": 1000}}))
    run = train(recipe, run=tmp_path / "run")
    report = run.summary["reports"][NAME]
    assert report["updates"] == 4
    assert report["skipped"] == 0
    assert report["stride"] == report["plan"]["k"]
    assert report["predicted_over_measured"] > 0
    assert report["lanes"]["to_host"]["bytes"] > 0
    assert report["host_bytes"] == 12 * run.summary["parameters"]
    (change,) = run.summary["methods"][NAME]
    assert "host memory" in change


def test_a_checkpoint_that_mixes_steps_is_refused() -> None:
    recipe = Recipe.load(tiny_recipe(methods={NAME: ON}))
    trainer = build_trainer(recipe)
    trainer.train_step()
    old = pickle.loads(pickle.dumps(trainer.state_dict()))
    trainer.train_step()
    state = pickle.loads(pickle.dumps(trainer.state_dict()))
    name = next(iter(state["optimizer"]))
    state["optimizer"][name] = old["optimizer"][name]
    with pytest.raises(CheckpointError, match="step 1 where its subgroup was at step 2"):
        build_trainer(recipe).load_state_dict(state)


def test_a_diverged_step_changes_nothing() -> None:
    trainer = build_trainer(Recipe.load(tiny_recipe(methods={NAME: ON})))
    trainer.train_step()
    before = pickle.dumps(trainer.state_dict()["model"])
    with torch.no_grad():
        bias = next(p for p in trainer.model.parameters() if p.dim() == 1)
        kept = bias.clone()
        bias.fill_(float("nan"))
    with pytest.raises(Exception, match="gradient norm"):
        trainer.train_step()
    with torch.no_grad():
        bias.copy_(kept)
    assert pickle.dumps(trainer.state_dict()["model"]) == before


class Lion(torch.optim.Optimizer):
    """Any other optimizer."""


def test_refusals() -> None:
    with pytest.raises(MethodError, match=r"methods\.deep-optimizer-states.*element by element"):
        resolve(Recipe.load(tiny_recipe(methods={NAME: ON})))[0].optimizer(Lion([torch.ones(2)], {"lr": 1.0}))
    with pytest.raises(MethodError, match=r"stride: got 0"):
        resolve(Recipe.load(tiny_recipe(methods={NAME: {"stride": 0}})))
    with pytest.raises(RecipeError, match="resident_fraction"):
        Recipe.load(tiny_recipe(methods={NAME: {"resident_fraction": 1.0}}))
    with pytest.raises(MethodError, match=r"deep-optimizer-states.*max_device_extra.*too little"):
        build_trainer(Recipe.load(tiny_recipe(methods={NAME: {"stride": 2, "max_device_extra": "1KiB"}})))
    with pytest.raises(MethodError, match="cannot be combined with"):
        resolve(Recipe.load(tiny_recipe(methods={NAME: ON, "fuyou": {}}, train={"clip": None})))


def test_strict_runs_refuse_an_idle_device() -> None:
    with pytest.raises(Exception, match="strict"):
        build_trainer(Recipe.load(tiny_recipe(strict=True, methods={NAME: {"stride": 50}})))
    use_log(FallbackLog())
    assert isinstance(build_trainer(Recipe.load(tiny_recipe(methods={NAME: ON}))).optimizer, InterleavedOffload)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_goes_on_from_its_checkpoints_as_if_never_stopped(precision: str, tmp_path: Path) -> None:
    """With a checkpoint at every step, which may still be being read when the next update wants to begin."""

    def metrics(folder: str, *ends: int) -> list[float]:
        for end in ends:
            sections: dict[str, Any] = {"train": {"steps": end, "precision": precision}, "checkpoint": {"every": 1}}
            sections["schedule"] = {"name": "constant"}
            run = train(Recipe.load(tiny_recipe(methods={NAME: ON}, **sections)), run=tmp_path / folder)
        return [record["loss"] for record in run.metrics()] + [run.summary["eval_loss"]]

    assert metrics("stopped", 3, 6) == metrics("undisturbed", 6)
