"""Expectations as data: bounds, judgements, and experiments that could show nothing.

Needs nothing. Run: pytest tests/experiments/test_base.py
"""

from __future__ import annotations

import json
import math

import pytest

from headway.core.errors import HeadwayError
from headway.experiments.base import (
    Arm,
    Bound,
    Expectation,
    Experiment,
    Measurement,
    applies,
    at_least,
    at_most,
    between,
)


@pytest.mark.parametrize(
    ("bound", "inside", "outside", "words"),
    [
        (at_most(2), [2, 1, -math.inf], [2.001, math.inf, math.nan], "at most 2"),
        (at_least(0.5), [0.5, math.inf], [0.499, -math.inf, math.nan], "at least 0.5"),
        (between(1, 2), [1, 1.5, 2], [0.99, 2.01, math.nan], "1 to 2"),
    ],
)
def test_bound(bound, inside, outside, words):
    assert all(bound.holds(v) for v in inside)
    assert not any(bound.holds(v) for v in outside)
    assert str(bound) == words
    assert Bound.from_dict(json.loads(json.dumps(bound.to_dict()))) == bound


def test_empty_range_is_refused():
    with pytest.raises(ValueError, match="empty"):
        between(2, 1)


def test_judgement_by_value_or_by_the_whole_interval():
    measured = Measurement(0.9, interval=(0.8, 1.1))
    assert Expectation("m", "lower", at_most(1)).judge(measured)
    assert not Expectation("m", "lower", at_most(1), whole_interval=True).judge(measured)
    assert Expectation("m", "lower", at_most(1.1), whole_interval=True).judge(measured)


def test_a_quick_run_may_expect_less():
    expectation = Expectation("m", "1.9x", at_least(1.5), quick=at_least(1.0))
    assert expectation.judge(Measurement(1.2), quick=True)
    assert not expectation.judge(Measurement(1.2))


def test_only():
    assert applies("always", quick=True)
    assert applies("full", quick=False)
    assert not applies("full", quick=True)


def experiment(**changes):
    facts = {
        "name": "e",
        "title": "E",
        "paper": "nobody",
        "claim": "c",
        "expectations": (Expectation("m", "x", at_most(1)),),
        "minutes": 1,
    }
    return Experiment(**{**facts, **changes})


def test_experiments_that_could_show_nothing():
    with pytest.raises(ValueError, match="expects nothing"):
        experiment(expectations=())
    with pytest.raises(ValueError, match="two arms of one name"):
        experiment(arms=(Arm("a"), Arm("a")))


def test_misspelt_arm_gets_the_nearest_name():
    with pytest.raises(HeadwayError, match="Did you mean 'plain'"):
        experiment(arms=(Arm("plain"), Arm("averaged"))).arm("plan")
