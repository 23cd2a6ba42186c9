"""ZeCO's experiment: what it measures at small sizes, the model of time, what it declares.

Needs: nothing. Run: pytest tests/experiments/test_zeco.py
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from headway.experiments import zeco
from headway.experiments.zeco import experiment
from headway.parallel.local import run_ranks
from headway.parallel.sequence import lasp
from headway.parallel.sequence.scan_time import best_blocks, estimate_sp_time, fit_link


def test_the_same_losses_and_the_bytes_of_the_formula():
    found = zeco._curves(12, 256)
    assert found["zeco parity"] < 1e-14 and found["lasp2 parity"] < 1e-14 and found["drift"] < 10
    assert found["one"][-1] < found["one"][0] - 0.05 and found["one"] not in found["controls"]
    assert found["zeco bytes"] == 1.0 and found["lasp2 bytes"] == 3.0


@pytest.mark.parametrize("when", [10, 3])
def test_a_state_that_is_wrong_once_is_seen(when, monkeypatch):
    """At a step that is compared by its gradient, and at one between: then the curves drift apart."""
    scan, calls = lasp.all_scan, []

    def wrong(*arguments, **options):
        calls.append(1)  # two layers, forward and backward: four calls a step
        pending = scan(*arguments, **options)
        wait, factor = pending.wait, 1 + 1e-6 * (len(calls) == 4 * when + 1)
        pending.wait = lambda: tuple(factor * x for x in wait())
        return pending

    monkeypatch.setattr(lasp, "all_scan", wrong)
    found = zeco._curves(12, 256)
    assert (found["zeco parity"] > 1e-10) == (when % zeco.EVERY == 0) and found["drift"] > 10


def test_how_far_curves_are_apart():
    one, near, far = [1.0, 1.0, 1.0], [1.0, 1.0 + 1e-8, 1.0], [1.0, 1.0 - 1e-7, 1.0 + 1e-8]
    assert zeco._drift(far, [near, one], one) == pytest.approx(10)
    assert zeco._drift(near, [near, far], one) == pytest.approx(0.1)
    assert zeco._drift([1 + 1e-12, 1.0, 1.0], [one], one) == pytest.approx(1000, rel=0.01)
    late = [1.0, 1.0 + 1e-5]  # what comes after is not judged, nor what is beyond a control's steps
    assert zeco._drift([1.0, 2.0, 2.0], [late], one) == 0.0 and zeco._drift(far, [[1.0]], one) == 0.0
    said = zeco._distances({"one": one, "zeco": near, "controls": [far[:2], near[:2]]})
    assert said.endswith("0.0e+00 (0.0e+00, 0.0e+00) in 1 steps; 1.0e-08 (1.0e-07, 1.0e-08) in 2 steps")


def test_a_slow_link_takes_its_time_and_sleeps_beside_work():
    alone, beside = (
        min(map(max, zip(*run_ranks(3, zeco._link_times, "zeco", compute, 4), strict=True))) for compute in (0.0, 0.1)
    )  # the slowest rank, the best of four times: the machine may be busy
    expected = estimate_sp_time(3, zeco.WIDTH, zeco.WIDTH, zeco.HEADS, zeco.BLOCKS, zeco.ALPHA, zeco.BETA, "zeco")
    assert alone > 0.95 * expected
    assert beside < 0.1 + 0.7 * expected  # not one after the other


def test_the_model_of_time():
    def seconds(method, P, K=4, update=0.0):
        return estimate_sp_time(P, 128, 128, 32, K, 1e-5, 1e-10, method, update=update)

    size = 4 * 32 * 128 * 128
    assert seconds("lasp1", 9) == seconds("lasp2", 9) == pytest.approx(8 * (1e-5 + 1e-10 * size))
    assert seconds("lasp1", 9, update=1.0) == pytest.approx(8 + seconds("lasp1", 9))
    assert seconds("zeco", 9) == pytest.approx(11 * (1e-5 + 1e-10 * size / 4))
    assert seconds("zeco", 9, K=1) == pytest.approx(seconds("lasp1", 9)) and seconds("zeco", 1) == 0
    assert fit_link(8, 4, size, seconds("zeco", 8), seconds("lasp2", 8)) == pytest.approx((1e-5, 1e-10))
    best = best_blocks(64, size, 1e-5, 1e-10)
    assert seconds("zeco", 64, best) == min(seconds("zeco", 64, K) for K in range(1, 65)) and 1 < best < 64
    assert best_blocks(2, size, 1e-5, 1e-10) == 1 and best_blocks(9, size, 0.0, 1e-10, most=16) == 16
    with pytest.raises(ValueError, match="no link takes"):
        fit_link(8, 4, size, 1.0, 0.1)
    with pytest.raises(ValueError, match="0 ranks"):
        seconds("zeco", 0)
    with pytest.raises(ValueError, match="none of zeco"):
        seconds("ring", 2)


def test_the_papers_tables_from_one_row():
    found = zeco.predictions()
    for method, expected in zip(("zeco", "lasp2"), zeco.PAPER_COLLECTIVES[8], strict=True):
        assert found[8][method] == pytest.approx(expected)
    assert found[256]["lasp2"] / found[256]["zeco"] == pytest.approx(3.23, abs=0.01)
    assert zeco._wrong_orders(found) == 0
    assert zeco._wrong_orders(found | {256: {"zeco": 3.0, "lasp2": 2.0, "lasp1": 4.0}}) == 2


@pytest.mark.parametrize("quick", [False, True])
def test_every_expectation_has_a_measurement(quick, monkeypatch):
    curves = {"one": [1.0], "zeco": [1.0], "controls": [[1.0]], "drift": 0.0} | {
        f"{method} {what}": 1.0 for method in ("zeco", "lasp2") for what in ("bytes", "parity")
    }
    times = {f"{m}{s}": {P: [0.1, 0.2] for P in "248"} for m in zeco.METHODS for s in ("", " work")}
    found = {"error": 0.0, "curves": curves, "links": times, "correction": 0.01}
    context = SimpleNamespace(
        quick=quick, keep=lambda name, _: found[name.split()[0]], say=lambda _: None, show=lambda _: None
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert {e.measure for e in experiment.expectations} <= zeco.measure(context).keys()
