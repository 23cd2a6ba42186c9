"""The one-epoch experiment: its texts, what it makes of learning curves whose answer is known, what it declares.

Needs the standard library's sources; trains nothing. Run: pytest tests/experiments/test_one_epoch.py
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from headway.core.errors import HeadwayError
from headway.experiments import one_epoch
from headway.experiments.context import Context
from headway.experiments.one_epoch import BATCH, EPOCHS, SEQUENCE, Setting, corpus, experiment, pieces, size
from headway.plan.one_epoch.ratio import SizeRun

STEPS = np.arange(20.0, 1001.0, 20.0)


def law(scale: float = 6.0, floor: float = 2.0, speed: float = 1.0) -> np.ndarray:
    return floor + scale * (STEPS * speed) ** -0.4


def curves(seeds: int = 3) -> dict:
    """Ten epochs go along half as fast and turn up after step 500; dropout costs 0.05 everywhere; cosine dips."""
    slow = law(speed=0.5)
    turned = np.where(STEPS > 500, slow[24] + 0.0004 * (STEPS - 500), slow)
    one = {"ten-epochs": turned, "ten-epochs-dropout": turned + 0.05, "one-epoch": law(),
           "one-epoch-dropout": law() + 0.05, "cosine": law() * (1 - 0.1 * (STEPS / 1000) ** 2)}  # fmt: skip
    return {name: [(STEPS, y)] * seeds for name, y in one.items()}


def test_known_curves_give_known_numbers():
    found = one_epoch._comparison(curves(), share=0.1)
    assert found["speedup"].value == pytest.approx(2.0, rel=0.05)
    assert found["ten_turns_up"].value == pytest.approx(0.0004 * 480, rel=0.05)
    assert found["one_turns_up"].value == 0.0
    assert found["gap_at_end"].value > found["gap_at_best"].value > 0
    assert found["dropout_share"].value == found["dropout_seeds"].value == 1.0
    assert found["dropout_cost"].value == pytest.approx(0.05)


def test_dropout_that_helps_shows():
    swapped = curves()
    swapped["one-epoch"], swapped["one-epoch-dropout"] = swapped["one-epoch-dropout"], swapped["one-epoch"]
    found = one_epoch._comparison(swapped, share=0.1)
    assert found["dropout_share"].value == found["dropout_seeds"].value == 0.0
    assert found["speedup"].value == pytest.approx(2.0, rel=0.05)  # the better of both is taken on either side


def test_the_law_foretells_a_constant_rate_and_not_a_cosine():
    found, figure = one_epoch._law(curves())
    assert found["law_error"].value < 0.01
    assert 0.05 < found["law_error_cosine"].value < 1 / 0.9 - 1  # less than at the very end
    assert found["law_extra_cosine"].value > 0.05
    assert len(figure.series) == 4


def test_sizes_of_a_known_law_form_a_u():
    budgets = [5e11, 1e12, 2e12]
    shapes = [size(width) for width in one_epoch.WIDTHS]
    runs = []
    for shape in shapes:
        tokens = [budget / shape.flops_per_token for budget in budgets]
        losses = [1 + 15 * shape.parameters**-0.35 + 40 * t**-0.3 for t in tokens]
        runs.append([SizeRun(shape.parameters, *point, flops=b) for *point, b in zip(tokens, losses, budgets)])
    found, figure = one_epoch._sizes(runs, budgets)
    assert found["u_shapes"].value == 3
    low, high = found["ratio"].interval
    assert 0.38 < low <= found["ratio"].value <= high < 490
    assert [len(series.x) for series in figure.series] == [4, 4, 4]

    slope = [[SizeRun(r.parameters, r.tokens, 3 - 0.1 * math.log(r.parameters), flops=r.flops) for r in one]
             for one in runs]  # fmt: skip
    found, _ = one_epoch._sizes(slope, budgets)
    assert found["u_shapes"].value == 0
    assert math.isnan(found["ratio"].value) and "refused" in found["ratio"].note


def test_corpora_are_nested_and_apart_from_the_held_out_text(tmp_path):
    train, held_out = pieces()
    small, large = corpus(train, 1, 100), corpus(train, 1, 1000)
    assert large.startswith(small) and len(large) == 1000 * SEQUENCE - 1
    assert corpus(train, 2, 100) != small
    assert not {t for t in train if len(t) > 500} & {t for t in held_out if len(t) > 500}
    with pytest.raises(HeadwayError, match="needs"):
        corpus(["short"], 0, 1)


def test_recipes_differ_in_what_is_compared(tmp_path):
    context = Context(experiment, quick=True, folder=tmp_path)
    setting = Setting(context)
    plans = {}
    for arm in experiment.arms:
        sequences = setting.unique * (1 if arm.name.startswith("ten") else EPOCHS)
        plans[arm.name] = context.recipe(arm, *setting.overrides(0, sequences, setting.steps, 5), seed=0)
    assert plans["ten-epochs"].data.path == plans["ten-epochs-dropout"].data.path != plans["one-epoch"].data.path
    assert len({plan.data.validation_path for plan in plans.values()}) == 1
    assert len({plan.train.steps for plan in plans.values()}) == 1
    assert set(plans["one-epoch"].methods) == {"one-epoch"} == set(plans["cosine"].methods)
    assert setting.unique * EPOCHS == setting.steps * BATCH  # one pass is exactly the run
    assert size(128).flops_per_token == pytest.approx(3.1e6, rel=0.02)


def test_expectations_are_of_numbers_that_are_measured():
    measured = {**one_epoch._comparison(curves(), 0.1), **one_epoch._law(curves())[0], "u_shapes": 0, "ratio": 0}
    assert {e.measure for e in experiment.expectations} <= measured.keys()
    held = {e.measure: e.judge(measured[e.measure]) for e in experiment.expectations
            if e.measure not in ("u_shapes", "ratio")}  # fmt: skip
    assert all(held.values()), held
