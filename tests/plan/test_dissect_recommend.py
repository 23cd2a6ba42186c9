"""Recommendations from made-up results: the objective, constraints, ties within the spread, refusals.

Needs nothing but Headway: pytest tests/plan/test_dissect_recommend.py
"""

import pytest

from headway.core.errors import HeadwayError
from headway.plan.dissect.recommend import recommend
from headway.plan.dissect.results import Results


def lines(name, seconds, memory=1000, tokens=100, status="ok", environment="here", **labels):
    """One line per repeat."""
    return [
        {
            "kind": "cell",
            "key": f"{name}{labels}",
            "environment": environment,
            "session": "1",
            "repeat": repeat,
            "techniques": name.split("+") if name else [],
            "labels": labels,
            "status": status,
            "cause": "no more memory" if status == "oom" else "",
            "value": {
                "step_seconds": [value] * 3,
                "tokens_per_step": tokens,
                "flops_per_step": 1e9,
                "peak_memory_bytes": memory,
            },
        }
        for repeat, value in enumerate(seconds)
    ]


def results(*cells):
    return Results([line for cell in cells for line in cell], drift=None)


GRID = results(
    lines("", [0.20, 0.20], 3000),
    lines("flash", [0.10, 0.11], 2000),
    lines("flash+recompute", [0.14, 0.14], 500),
    lines("big", [0.05], status="oom"),
)


def test_the_fastest_possible_cell_is_best_and_the_others_have_reasons():
    found = recommend(GRID)
    assert found.best.cell.name == "flash"
    assert [c.cell.name for c in found.slower] == ["flash+recompute", "none"]
    assert [(c.cell.name, c.reason) for c in found.excluded] == [("big", "oom: no more memory")]
    assert "take flash: tokens_per_second" in str(found) and "oom" in str(found)


def test_a_constraint_excludes():
    found = recommend(GRID, {"peak_memory_bytes": 1000})
    assert found.best.cell.name == "flash+recompute"
    assert "peak_memory_bytes 3.00k is above 1.00k" in {c.reason for c in found.excluded}
    with pytest.raises(HeadwayError, match="no cell is possible"):
        recommend(GRID, {"peak_memory_bytes": 100})
    with pytest.raises(HeadwayError, match="joules was not measured"):
        recommend(GRID, {"joules": 100})


def test_the_least_memory_is_an_objective():
    assert recommend(GRID, objective="peak_memory_bytes").best.cell.name == "flash+recompute"
    assert recommend(GRID, objective="step_milliseconds").best.cell.name == "flash"


def test_within_the_spread_the_smaller_one_is_best():
    grid = results(lines("a", [0.10, 0.12], 3000), lines("b", [0.11, 0.11], 1000), lines("c", [0.2, 0.2]))
    found = recommend(grid)
    assert found.best.cell.name == "b"
    assert [c.cell.name for c in found.as_good] == ["a"]
    assert [c.cell.name for c in found.slower] == ["c"]


def test_rates_compare_batches_and_times_do_not():
    grid = results(lines("a", [0.1], batch=1), lines("a", [0.15], tokens=200, batch=2))
    assert recommend(grid).best.cell.labels == {"batch": 2}
    assert recommend(grid, batch=1).best.cell.labels == {"batch": 1}
    with pytest.raises(HeadwayError, match="tokens per step"):
        recommend(grid, objective="step_milliseconds")
    with pytest.raises(HeadwayError, match="no cell at"):
        recommend(grid, batch=3)


def test_machines_are_not_mixed():
    grid = results(lines("a", [0.1]), lines("b", [0.2], tokens=200, environment="there"))
    with pytest.raises(HeadwayError, match="different machines"):
        recommend(grid)
