"""The fuyou experiment: its pieces at a size of milliseconds, and what it declares.

Needs a folder that can be written. Run: pytest tests/experiments/test_fuyou.py
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from headway.experiments import fuyou
from headway.experiments.fuyou import BUFFERS, SHARE, Setting, experiment
from headway.memory.fuyou.optimizer import TieredOptimizer
from headway.memory.fuyou.simulator import FITTED


class Shown:
    """Stands in for a context."""

    def __init__(self) -> None:
        self.figures: list[Any] = []
        self.said: list[str] = []

    def show(self, figure: Any) -> None:
        self.figures.append(figure)

    def say(self, text: str) -> None:
        self.said.append(text)


def test_bits_are_counted_over_all_settings(tmp_path: Path) -> None:
    assert fuyou._different(tmp_path, 1) == {"settings": 96, "different": 0}


def test_a_wrong_update_would_be_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update = TieredOptimizer._update

    def wrong(self: TieredOptimizer, work: Any) -> None:
        update(self, work)
        if work.group == 1:
            self.layouts[1].views(work.buffer.tensor, "exp_avg")[0].view(-1)[0].mul_(1.001)

    monkeypatch.setattr(TieredOptimizer, "_update", wrong)
    found = fuyou._different(tmp_path, 1)
    assert found["different"] == found["settings"]


def test_host_bytes_do_not_exceed_the_buffers(tmp_path: Path) -> None:
    found = fuyou._host(tmp_path)
    assert 0 < found["of_limit"] <= 1
    assert found["growth"] == 1


def test_live_bytes_are_those_of_weights_states_and_gradients(tmp_path: Path) -> None:
    in_memory, on_disk = fuyou._live(tmp_path, False), fuyou._live(tmp_path, True)
    parameters = Setting(128, 12, 2, 32, heads=2).parameters
    assert in_memory > 16 * parameters
    assert on_disk < in_memory / 2


def test_step_times_of_all_arms_on_one_slow_drive(tmp_path: Path) -> None:
    make = partial(Setting, 32, 3, 2, 64, heads=2)
    found = fuyou._step_times(make, tmp_path, torch.float32, repeats=2, steps=1)
    assert found["times"].keys() == fuyou.ARMS.keys()
    assert all(len(times) == 2 and min(times) > 0 for times in found["times"].values())
    assert found["traffic"] >= SHARE * found["backward"] * 0.99  # the lane is never faster than its rate
    assert found["host"] <= BUFFERS * 3 * 16 * 32 * 32 * 32
    falls = fuyou._falls({"after backward": [2.0, 4.0], "overlapped": [1.5, 3.0], "overlapped, delayed": [1.0, 2.0]})
    assert (falls["fall"].value, falls["fall_delayed"].value) == (0.25, 0.5)


def test_the_sweep_times_every_prefix_and_predicts_one() -> None:
    found = fuyou._sweep(Setting(32, 2, 2, 64, heads=2), 1)
    assert len(found["times"]) == found["units"] + 1 == len(found["bytes"]) == 13
    assert 0 <= found["predicted"] <= found["units"]
    context = Shown()
    known = {**found, "predicted": 3, "times": [[7.0], [5.0], [4.0], [3.5], [3.0], [5.0], [6.0]]}
    results = fuyou._sweep_results(known, context)  # type: ignore[arg-type]
    assert results["sweep_gap"].value == 1
    assert results["sweep_regret"].value == pytest.approx(3.5 / 3.0)
    assert results["sweep_against_none"].value == 0.5
    assert len(context.figures[0].series) == 2


def test_the_simulator_is_shown_cell_by_cell() -> None:
    context = Shown()
    results = fuyou._simulated(context)  # type: ignore[arg-type]
    assert results["simulator_worst"].value <= 0.15
    assert results["cells"].value == len(FITTED) == 20
    assert len(context.said) == 33
    assert sum(len(series.x) for series in context.figures[0].series) == 33


def test_what_is_expected_stays_what_it_was() -> None:
    bounds = {e.measure: e.expected for e in experiment.expectations}
    assert (bounds["fall"].low, bounds["fall"].high) == (0.2, 0.4)
    assert bounds["simulator_worst"].high == 0.15
    assert bounds["sweep_gap"].high == 1
    assert bounds["different"].high == 0
    assert experiment.minutes <= 6
