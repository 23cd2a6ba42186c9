"""The moe-folding experiment: its pieces at a size of seconds, and that each can fail.

Needs nothing. Run: pytest tests/experiments/test_moe_folding.py
"""

from __future__ import annotations

import pytest

from headway.experiments import moe_folding
from headway.experiments.moe_folding import ARMS, PRINTED, curve, curve_on_ranks, experiment, out_of_order, text
from headway.parallel.experts.exchange import Link


def test_four_ranks_learn_as_one_process_does_and_folding_keeps_the_exchange_in_the_node() -> None:
    data = text(4)
    assert data.shape == (4, 8, 65)
    alone = curve(data)
    found = {arm: curve_on_ranks(data, arm) for arm in ARMS}
    for run in found.values():
        assert max(abs(a - b) for a, b in zip(alone, run["losses"], strict=True)) < 1e-12
        assert run["dropped"] == 0 and run["bytes"] > 0
    assert found["folded"]["crossing"] == 0
    assert found["unfolded"]["crossing"] == found["unfolded"]["bytes"]


def test_exactness_is_measured_and_a_wrong_sum_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = moe_folding.worst_error(quick=True)
    assert exact["worst"] < 1e-12 and exact["dropped"] == 0 and exact["cases"] == 24
    monkeypatch.setattr(Link, "reduce_scatter", lambda self, x, sizes: x.split(sizes)[self.rank])
    assert moe_folding.worst_error(quick=True)["worst"] > 0.1


def test_pairs_out_of_order_are_counted() -> None:
    printed = PRINTED["Mixtral-8x22B-G8T8"][1]
    assert out_of_order(printed, [*printed]) == 0
    assert out_of_order(printed, [2.2, 8.7, 9.0, 17.1, 28.8]) == 1
    assert out_of_order(printed, [None, 9.0, 8.7, 17.1, 28.8]) == 0
    assert out_of_order((None, 1.0, None, 2.0, 3.0), [0.5, 1.0, None, 2.0, 3.0]) == 1


def test_what_is_expected_stays_what_it_was() -> None:
    bounds = {e.measure: e.expected for e in experiment.expectations}
    assert bounds["error"].high == 1e-10 and bounds["crossing_folded"].high == 0 and bounds["dropped"].high == 0
    assert bounds["order_mixtral"].high == bounds["order_g8t8"].high == 0
    assert experiment.minutes <= 4
