"""MEMO's experiment: what it counts at small sizes, the formula's table, what it declares.

Needs nothing. Run: pytest tests/experiments/test_memo.py
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from headway.core.surgery import Shell
from headway.experiments import memo
from headway.experiments.memo import LAYERS, WORKED, Setting, experiment


def test_what_is_counted():
    length = 320  # longer, and a plain block keeps no probabilities of attention
    found = memo._counted(length, ("none", "checkpoint", "memo, 0", "memo, 0.5"))
    none = found["none"]["saved"]
    assert found["memo, 0"]["saved"] == found["memo, 0.5"]["saved"] == pytest.approx(none * 2 / LAYERS, rel=1e-9)
    assert found["checkpoint"]["saved"] == pytest.approx(LAYERS * length * 128 * 4, rel=0.1)
    half, full = (found[f"memo, {share}"]["recomputed"] for share in ("0.5", "0"))
    assert 0 < half == pytest.approx(full / 2, rel=1e-6)
    assert full < found["checkpoint"]["recomputed"] * 4 / LAYERS
    assert found["memo, 0"]["peak"] < found["none"]["peak"]


def test_products_computed_again_by_hand():
    length, d = 128, 128
    setting = Setting(length)
    plain = setting.counts("none")["flops"]
    again = setting.counts("memo", alpha=0.0)["flops"] - plain
    f = setting.model.config.intermediate_width
    projections = 2 * length * (d * 3 * d + d * d + d * 2 * f)  # queries, keys, values; output; gate and up
    # the four swapped blocks; of their attention, the probabilities that a plain block keeps at so short a length
    probabilities = 4 * 2 * length * length * d
    assert again == 4 * projections + probabilities


def test_arms_put_the_blocks_back():
    setting = Setting(32)
    for kind in ("none", "checkpoint", "memo"):
        with setting.arm(kind):
            assert any(isinstance(block, Shell) for block in setting.model.blocks) == (kind != "none")
        assert not any(isinstance(block, Shell) for block in setting.model.blocks)


def test_a_slow_link_stalls_and_says_so():
    found = memo._times(64, 2e6, 2)
    assert len(found["ratios"]) == 2 and found["unclipped"] < 0 and found["alpha"] == 0
    assert min(found["stalls"]) > 0.05 and found["sets"] == 2


def test_the_formulas_table():
    rows = memo._worked()
    assert {int(n): round(row["alpha"], 2) for n, row in rows.items()} == pytest.approx(WORKED, abs=0.005)
    assert [row["binding"] for row in rows.values()] == ["bandwidth"] * 3 + ["none"] + ["host"] * 2


def test_mixed_lengths():
    found = memo._fragmentation((96, 64))
    assert found["lower_bound"] <= found["planned"] <= found["lower_bound"] * 1.2
    assert found["allocations"] > 500 and found["reserved"] >= found["allocated"]


@pytest.mark.parametrize("quick", [False, True])
def test_every_expectation_has_a_measurement(quick, monkeypatch):
    arm = {"saved": 2.0, "peak": 2.0, "recomputed": 1.0}
    found = {
        "counted": {"none": arm, "checkpoint": arm, "memo, 0": arm},
        "half": {"none": arm, "memo, 0.5": arm},
        "rate": {"rate": 1e9},
        "times": {"ratios": [1.0, 1.1], "stalls": [0.0, 0.1], "alpha": 0.5, "unclipped": 0.5, "sets": 2},
        "gpu": {f"{what} {name}": 1.0 for what in ("peak", "seconds") for name in ("none", "checkpoint", "memo")},
        "fragmentation": dict.fromkeys(
            ("reserved_over_planned", "reserved", "allocated", "planned", "lower_bound", "allocations"), 1
        ),
    }
    context = SimpleNamespace(
        quick=quick, keep=lambda name, _: found.get(name.split()[0], 0.0), say=lambda _: None, show=lambda _: None
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    needed = {e.measure for e in experiment.expectations if not (quick and e.only == "cuda")}
    assert needed <= memo.measure(context).keys()
