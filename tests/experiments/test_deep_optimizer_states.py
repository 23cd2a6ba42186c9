"""The experiment on interleaved offloading: what it makes of known times, its arms, its grid.

Needs nothing; trains nothing large. Run: pytest tests/experiments/test_deep_optimizer_states.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headway.core.recipe import Recipe, merge
from headway.experiments import deep_optimizer_states as file
from headway.experiments.deep_optimizer_states import LINKS, SUBGROUP, experiment
from headway.experiments.evidence import Figure
from headway.memory.deep_optimizer_states import Rates, predict, stride


class Shown:
    """Stands in for a context: keeps the figures."""

    def __init__(self) -> None:
        self.figures: list[Figure] = []

    def show(self, figure: Figure) -> None:
        self.figures.append(figure)


def link(measured: dict[str, float], predicted: dict[str, float]) -> dict[str, Any]:
    return {"measured": {k: [t, t] for k, t in measured.items()}, "predicted": predicted, "closed_form": "2"}


def test_known_times_give_known_verdicts() -> None:
    right = link({"1": 1.0, "2": 0.5, "none": 1.0}, {"1": 0.9, "2": 0.5, "none": 1.1})
    wrong = link({"1": 1.0, "2": 1.2, "none": 2.0}, {"1": 1.5, "2": 1.2, "none": 2.0})
    context: Any = Shown()
    found = file._judge_sweep({"fast": right, "middle": right, "slow": wrong}, context)
    assert found["agree"].value == 2
    assert found["error"].value == pytest.approx(0.5)
    assert found["regret"].value == pytest.approx(1.2)
    assert found["fast_two"].value == pytest.approx(0.5)
    assert len(context.figures) == 3
    assert context.figures[0].series[0].x == [1.0, 2.0, 9.0]


def test_the_three_links_have_three_different_best_strides_by_a_margin() -> None:
    """Otherwise it would be chance which of two wins."""
    best = []
    for bytes_per_second in LINKS.values():
        words = bytes_per_second / 4
        rates = Rates(words, words, file.HOST_RATE, file.DEVICE_RATE, 1e10)
        times = {k: predict([SUBGROUP] * file.COUNT, k, rates).seconds for k in file.STRIDES}
        first, second = sorted(times, key=times.__getitem__)[:2]
        best.append(first)
        assert times[second] > 1.15 * times[first]
    assert best == [1, 2, None]
    assert stride(LINKS["fast"] / 4, file.HOST_RATE, file.DEVICE_RATE) == 2


def test_a_pretended_step_takes_about_what_it_is_predicted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "COUNT", 2)
    with file.one_thread():
        setting = file.Setting()
        seconds = {k: setting.seconds(LINKS["fast"], k) for k in (2, None)}
    assert seconds[2] < 0.8 * seconds[None]
    assert seconds[None] > 2 * SUBGROUP / file.HOST_RATE


def test_an_arm_with_other_bits_would_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = file._trained(torch.bfloat16)
    got = file._trained(torch.bfloat16, stride=2, subgroup=1024)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    monkeypatch.setattr(file, "_trained", lambda dtype, **options: [torch.full((1,), float(len(options)))])
    assert file._different() == 30


def test_the_grid_and_the_published_log() -> None:
    context: Any = Shown()
    found = file._grid(context)
    assert len(context.figures) == 3
    assert found["grid_gain"].value > 1.5
    assert found["log_two"].value < 1, "the published interleaved update is slower than the model's"


def test_declaration() -> None:
    for arm in experiment.arms:
        recipe = Recipe.load(merge(dict(experiment.recipe), {"name": "arm"}), [*arm.overrides, "train.steps=2"])
        assert ("deep-optimizer-states" in recipe.methods) == (arm.name == "offloaded")
    for expectation in experiment.expectations:
        if expectation.quick is not None:
            low, high = expectation.quick.low, expectation.quick.high
            assert low is None or expectation.expected.low is None or low <= expectation.expected.low
            assert high is None or expectation.expected.high is None or high >= expectation.expected.high
