"""A run that is killed, or told to stop, and started again is the undisturbed run to the last bit.

Needs fork; the runs are processes forked from one helper (forked_runs.py), which is mostly import time.
Run: pytest tests/core/test_resume.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headway.cli.main import main
from headway.core.train import train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def helpers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Both scenarios, side by side on two cores."""
    started = {
        scenario: subprocess.Popen(
            [sys.executable, "-m", "tests.core.forked_runs", str(tmp_path_factory.mktemp(scenario)), scenario],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for scenario in ("kills", "signals")
    }  # fmt: skip
    yield started
    for process in started.values():
        process.kill()
        process.wait()


def result(process: subprocess.Popen[str]) -> Any:
    out, error = process.communicate(timeout=600)
    assert process.returncode == 0, error[-4000:]
    return json.loads(out.splitlines()[-1])


def test_killed_five_times_at_random_moments(helpers: Any) -> None:
    moments = result(helpers["kills"])
    assert set(moments) == {"fp32", "bf16"} and all(len(steps) == 5 for steps in moments.values()), moments


def test_signals_save_and_say_so(helpers: Any) -> None:
    told = result(helpers["signals"])
    assert told["statuses"] == {"SIGINT": 130, "SIGTERM": 143}
    assert "stopped by SIGINT" in told["log"] and "stopped by SIGTERM" in told["log"]
    assert "Traceback" not in told["log"] and "to go on: headway train" in told["log"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=0.5", "optimizer.lr (was 0.01, now 0.5)"),
        ("seed=7", "seed (was 0, now 7)"),
        ("train.steps=40", "train.steps (was 4, now 40)"),
        ("model.hidden=64", "model.hidden (was 32, now 64)"),
        ("methods.ema.decay=0.5", "methods.ema.decay (was 0.9, now 0.5)"),
        ("methods.label-smoothing={}", "methods.label-smoothing"),
        ("methods=null", "methods.ema"),
    ],
)
def test_another_recipe_is_refused_by_its_keys(
    tiny: Any, tmp_path: Path, capsys: Any, override: str, message: str
) -> None:
    import yaml

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny(train={"steps": 4}, methods={"ema": {"decay": 0.9}})))
    train(recipe, run=tmp_path / "run")
    before = files_of(tmp_path / "run")
    assert main(["train", str(recipe), override, "--run", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error and "was started with another recipe" in error and "--fresh" in error, error
    assert files_of(tmp_path / "run") == before
