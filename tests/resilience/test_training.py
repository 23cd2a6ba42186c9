"""Runs that save lazily are, in every loss and every checkpoint, the runs that save plainly.

Needs: torch. Run: pytest tests/resilience/test_training.py
"""

import errno
import os

import pytest

from headway.core.errors import HeadwayError
from headway.core.metrics import read_metrics
from headway.core.train import train
from headway.resilience import pipeline
from headway.resilience.reading import SavedStates
from headway.resilience.shards import Shards
from tests.resilience.states import same

TIMED = ("tokens_per_second", "step_seconds", "peak_memory_bytes")


@pytest.fixture(autouse=True)
def everything_through_the_ring(monkeypatch):
    monkeypatch.setattr(pipeline, "TINY_STATE", 0)
    monkeypatch.setattr(pipeline, "SMALL", 64)
    monkeypatch.setattr(pipeline, "CHUNK", 16 << 10)


def logged(run):
    return [{k: v for k, v in line.items() if k not in TIMED} for line in read_metrics(run.path / "metrics.jsonl")]


def states(run):
    found = {}
    for path in sorted((run.path / "checkpoints").iterdir()):
        found[path.name] = SavedStates(path.parent).load_from(path)
        found[path.name]["counters"].pop("seconds")
    return found


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"dropout": 0.1}, "train": {"steps": 8, "micro_batch": 2}},
        {"train": {"steps": 8, "precision": "bf16"}, "methods": {"ema": {"decay": 0.9}, "sam": {"rho": 0.05}}},
    ],
)
def test_lazy_is_plain(tiny, tmp_path, sections):
    runs = [
        train(
            tiny(
                checkpoint={"mode": mode, "every": 1, "keep": 20, **more}, eval={"every": 3, "batches": 1}, **sections
            ),
            run=tmp_path / mode,
        )
        for mode, more in (("plain", {}), ("lazy", {"host_cache": 1 << 16}))
    ]
    plain, lazy = map(states, runs)
    assert logged(runs[0]) == logged(runs[1]) and len(plain) == 8
    assert lazy.keys() == plain.keys() and all(same(lazy[name], plain[name]) for name in plain)
    assert not runs[1].summary["fallbacks"]


def test_a_run_goes_on_with_another_way_of_saving(tiny, tmp_path):
    def recipe(mode, steps):
        options = {"mode": mode, "every": 2 if mode == "plain" else 5}
        return tiny(checkpoint=options, train={"steps": steps}, schedule={"name": "constant"})

    whole = train(recipe("plain", 12), run=tmp_path / "whole")
    train(recipe("plain", 4), run=tmp_path / "run")
    train(recipe("lazy", 8), run=tmp_path / "run")
    run = train(recipe("plain", 12), run=tmp_path / "run")
    steps = [line for line in logged(run) if "loss" in line]
    assert steps == [line for line in logged(whole) if "loss" in line]
    assert run.summary["eval_loss"] == whole.summary["eval_loss"]


def test_a_disk_that_is_full_for_a_while(tiny, tmp_path, monkeypatch):
    write, reference = Shards.write, train(tiny(train={"steps": 9}), run=tmp_path / "reference")

    def full(self, folder, batch):
        if 3 <= int(folder.name.split(".")[1].removeprefix("step-")) <= 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, folder, batch)

    monkeypatch.setattr(Shards, "write", full)
    run = train(tiny(train={"steps": 9}, checkpoint={"every": 1, "keep": 20}), run=tmp_path / "run")
    assert run.summary["eval_loss"] == reference.summary["eval_loss"]
    assert sorted(int(name[-1]) for name in states(run)) == [1, 2, 6, 7, 8, 9]
    lost = [entry["what"] for entry in run.summary["fallbacks"]]
    assert lost == [f"no checkpoint of step {step}" for step in (3, 4, 5)]
    with pytest.raises(HeadwayError, match="no checkpoint of step 3: is a fallback"):
        train(tiny(train={"steps": 9}, checkpoint={"every": 1}, strict=True), run=tmp_path / "strict")
    assert max(states(type(run)(tmp_path / "strict"))) == "step-00000002"


def test_the_interval_that_is_chosen(tiny, tmp_path):
    run = train(tiny(train={"steps": 45}, checkpoint={"every": "auto", "overhead": 1.0}), run=tmp_path / "run")
    assert states(run).keys() >= {"step-00000045"} and run.recipe.checkpoint.every == "auto"


@pytest.mark.parametrize(("mode", "expected"), [("lazy", 3), ("plain", None)])
def test_the_summary_tells_what_saving_has_cost(tiny, tmp_path, mode, expected):
    run = train(tiny(train={"steps": 4}, checkpoint={"mode": mode, "every": 2}), run=tmp_path / "run")
    report = run.summary["checkpoints"]
    assert report.get("committed") == report.get("saved") == expected  # two on the way, one with the last evaluation
    assert report.get("failed", 0) == 0
