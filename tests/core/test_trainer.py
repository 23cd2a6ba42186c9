"""The loop: a plain torch loop as reference, accumulation, budgets, evaluation, divergence, signals, run directories.

Needs nothing. Run: pytest tests/core/test_trainer.py
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from headway.core import trainer as trainer_module
from headway.core.build import build_trainer
from headway.core.errors import DivergedError, HeadwayError, Interrupted, RecipeError
from headway.core.method import POINTS
from headway.core.metrics import Observer
from headway.core.recipe import Recipe
from headway.core.run import Run, locked
from headway.core.train import train


def steps(recipe: Recipe, count: int) -> list[dict[str, Any]]:
    trainer = build_trainer(recipe)
    return [trainer.train_step() for _ in range(count)]


def test_equals_a_plain_torch_loop(tiny: Any) -> None:
    recipe = Recipe.load(tiny(schedule={"name": "linear", "warmup": 3}, train={"clip": 0.5, "steps": 10}))
    ours = steps(recipe, 6)
    reference = build_trainer(recipe)  # for its first weights and its data alone
    model, stream = reference.model, reference.stream
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    for step in range(6):
        batch = next(stream).micro[0]
        loss = F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        factor = (step + 1) / 3 if step < 3 else 1 - (step - 3) / 7
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * factor
        optimizer.step()
        optimizer.zero_grad()
        assert ours[step]["loss"] == pytest.approx(loss.item(), rel=2e-5)
        assert ours[step]["grad_norm"] == pytest.approx(norm.item(), rel=2e-4)
        assert ours[step]["lr"] == pytest.approx(0.01 * factor)


@pytest.mark.parametrize("masked", [False, True])
def test_accumulation_is_the_token_mean_of_the_whole_batch(tiny: Any, masked: bool) -> None:
    whole = Recipe.load(tiny(data={"mask_documents": masked}))
    for a, b in zip(steps(whole, 5), steps(whole.override("train.micro_batch=1"), 5)):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_bf16_keeps_fp32_masters_and_learns_alike(tiny: Any) -> None:
    recipe = Recipe.load(tiny(train={"precision": "bf16"}))
    trainer = build_trainer(recipe)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    assert {t.dtype for t in trainer.state_dict()["model"].values()} == {torch.float32}
    exact = build_trainer(recipe.override("train.precision=fp32"))
    for name, weight in exact.state_dict()["model"].items():
        assert torch.equal(weight, trainer.state_dict()["model"][name]), "masters start unrounded"
    low = [trainer.train_step()["loss"] for _ in range(20)]
    high = [exact.train_step()["loss"] for _ in range(20)]
    assert low[-1] < low[0] - 1
    assert low[-1] == pytest.approx(high[-1], rel=0.05)


def test_the_loop_shows_the_points_in_order() -> None:
    text = trainer_module.__doc__ or ""
    table = text.split("load the newest")[0]
    shown = [p for line in table.splitlines() for p in re.split(r"[,\s]+", line[57:]) if p in POINTS]
    assert shown == list(POINTS)
    assert len(Path(trainer_module.__file__).read_text().splitlines()) <= 300


def test_a_run_leaves_everything_behind(tiny: Any, tmp_path: Path) -> None:
    seen: list[str] = []

    class Watcher(Observer):
        def on_start(self, trainer: Any) -> None:
            seen.append("start")

        def on_eval(self, trainer: Any, record: Any) -> None:
            seen.append(f"eval {record['step']}")

        def on_checkpoint(self, trainer: Any, path: Any) -> None:
            seen.append(f"save {trainer.step}")

        def on_end(self, trainer: Any, summary: Any) -> None:
            seen.append("end")

    recipe = Recipe.load(
        tiny(train={"steps": 6}, eval={"every": 4}, checkpoint={"every": 4}, log={"every": 2, "tensorboard": True})
    )
    run = train(recipe, run=tmp_path / "run", observers=[Watcher()])
    assert seen == ["start", "eval 4", "save 4", "eval 6", "save 6", "end"]
    assert [r["step"] for r in run.metrics()] == [2, 4, 6]
    line = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "step_seconds", "peak_memory_bytes"}
    assert set(run.metrics()[0]) == line
    assert [r["step"] for r in run.evaluations()] == [4, 6]
    summary = run.summary
    measured = ("tokens_per_second", "bits_per_byte", "peak_memory_bytes", "model_flops_utilization", "wall_seconds")
    assert all(summary[key] > 0 for key in measured)
    assert summary["eval_loss"] == run.evaluations()[-1]["eval_loss"]
    assert summary["tokens"] == 6 * 4 * 32
    assert run.recipe == recipe
    assert list((run.path / "tensorboard").iterdir())
    # A finished run, started again, does nothing and loses nothing.
    before = (run.path / "metrics.jsonl").read_bytes()
    train(recipe, run=run.path)
    assert (run.path / "metrics.jsonl").read_bytes() == before
    assert run.summary["eval_loss"] == summary["eval_loss"]


@pytest.mark.parametrize(
    ("budget", "expected"), [({"steps": None, "tokens": 1000}, 8), ({"steps": 3, "tokens": 1000}, 3)]
)
def test_budgets(tiny: Any, budget: dict[str, Any], expected: int, tmp_path: Path) -> None:
    run = train(tiny(train=budget), run=tmp_path / "run")
    assert run.summary["steps"] == expected


def test_time_budget_ends_and_decays(tiny: Any, tmp_path: Path) -> None:
    run = train(tiny(train={"steps": None, "time": 1.0}), run=tmp_path / "run")
    assert 0.9 < run.summary["train_seconds"] < 6
    assert run.metrics()[-1]["lr"] < 0.005


def test_exhausted_data_ends_the_run(tiny: Any, tmp_path: Path) -> None:
    run = train(tiny(data={"max_passes": 1}, train={"steps": 10_000, "batch": 64}), run=tmp_path / "run")
    assert 0 < run.summary["steps"] < 50


def test_divergence_stops_and_keeps_the_checkpoint(tiny: Any, tmp_path: Path) -> None:
    recipe = Recipe.load(tiny(checkpoint={"every": 2}, train={"steps": 12}))

    class Poison(Observer):
        def on_step(self, trainer: Any, record: Any) -> None:
            if trainer.step == 5:
                with torch.no_grad():
                    next(trainer.model.parameters()).fill_(math.nan)

    with pytest.raises(DivergedError, match="step 6"):
        train(recipe, run=tmp_path / "run", observers=[Poison()])
    assert not Run(tmp_path / "run").summary
    resumed = train(recipe, run=tmp_path / "run")
    assert [r["step"] for r in resumed.metrics()] == list(range(1, 13))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_finish_the_step_and_save(tiny: Any, tmp_path: Path, signum: int) -> None:
    class Stop(Observer):
        def on_step(self, trainer: Any, record: Any) -> None:
            if trainer.step == 3:
                os.kill(os.getpid(), signum)

    recipe = Recipe.load(tiny(train={"steps": 8}))
    with pytest.raises(Interrupted) as stop:
        train(recipe, run=tmp_path / "run", observers=[Stop()])
    assert stop.value.signum == signum
    run = train(recipe, run=tmp_path / "run")
    whole = train(recipe, run=tmp_path / "whole")
    assert [r["loss"] for r in run.metrics()] == [r["loss"] for r in whole.metrics()]


def test_another_recipe_does_not_resume(tiny: Any, tmp_path: Path) -> None:
    recipe = Recipe.load(tiny(train={"steps": 2}))
    train(recipe, run=tmp_path / "run")
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*") if p.is_file())
    with pytest.raises(RecipeError, match=r"optimizer\.lr \(was 0\.01, now 0\.02\)"):
        train(recipe.override("optimizer.lr=0.02"), run=tmp_path / "run")
    assert sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*") if p.is_file()) == before
    train(recipe.override("log.every=2"), run=tmp_path / "run")
    train(recipe.override("optimizer.lr=0.02"), run=tmp_path / "run", fresh=True)
    assert Run(tmp_path / "run").recipe.optimizer.lr == 0.02


def test_one_process_per_directory(tiny: Any, tmp_path: Path) -> None:
    with locked(tmp_path / "run"), pytest.raises(HeadwayError, match=f"another process.*{os.getpid()}"):
        train(tiny(train={"steps": 1}), run=tmp_path / "run")


def test_foreign_directories_are_left_alone(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(HeadwayError, match="not empty and holds no run"):
        train(tiny(), run=tmp_path, fresh=True)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(HeadwayError, match="is a file"):
        train(tiny(), run=tmp_path / "mine.txt")


def test_no_budget_is_refused(tiny: Any) -> None:
    with pytest.raises(RecipeError, match=r"train: has no end.*train\.steps"):
        build_trainer(Recipe.load(tiny(train={"steps": None})))


def test_metrics_file_is_json_lines(tiny: Any, tmp_path: Path) -> None:
    run = train(tiny(train={"steps": 2}), run=tmp_path / "run")
    for line in (run.path / "metrics.jsonl").read_text().splitlines():
        assert isinstance(json.loads(line)["step"], int)
