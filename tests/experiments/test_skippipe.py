"""SkipPipe's experiment: its searches and its learning at tiny sizes, what it declares.

Needs nothing. Run: pytest tests/experiments/test_skippipe.py
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from headway.experiments import skippipe
from headway.experiments.skippipe import LEARNING, experiment


def test_searches_order_the_arms():
    row = skippipe.search(0, False, 10)
    assert row["cbs"] <= row["no-tc2"] < row["random"] < row["full"]


def test_equal_data_nodes_gain_less_on_one_cluster():
    equal = skippipe.search(0, True, 10, skippipe.EQUAL)
    assert 0.6 < equal["cbs"] / equal["full"] < 1.0


@pytest.mark.parametrize("arm", LEARNING)
def test_arms_learn_with_the_block_passes_that_they_are_given(arm):
    found = skippipe.learn(arm, 4)
    length, _, longer = LEARNING[arm]
    assert found["block_passes"] == length * 4 * round(4 * longer)
    assert len(found["curve"]) == round(4 * longer) and set(found["loss"]) == {"6", "4", "3"}
    assert found["curve"][-1] < found["curve"][0]


def test_equal_compute_is_equal():
    assert LEARNING["4 of 6, equal compute"][0] * LEARNING["4 of 6, equal compute"][2] == LEARNING["full"][0]


@pytest.mark.parametrize("quick", [False, True])
def test_every_expectation_has_a_measurement(quick):
    row = {"full": 2.0, "random": 1.5, "no-tc2": 1.2, "cbs": 1.0}
    learnt = {"loss": {"6": 1.0, "4": 1.1, "3": 1.2}, "curve": [1.0] * 40, "block_passes": 10}

    def keep(name, _):
        return learnt if name.startswith("learn") else 33.0 if name.startswith("published") else row

    shown: list = []
    context = SimpleNamespace(quick=quick, keep=keep, say=lambda _: None, show=shown.append)
    found = skippipe.measure(context)
    assert {e.measure for e in experiment.expectations} <= found.keys()
    assert found["ordered"].value == 1 and found["ratio"].value == 0.5 and len(shown) == 2
    assert found["published_error"].value < 0.005
