"""Charts: ticks, ranges, thinning, and drawings that are well-formed whatever they are given.

Needs nothing. Run: pytest tests/experiments/test_charts.py
"""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from headway.experiments.charts import Chart, Line, _thinned, _ticks, format_value
from headway.experiments.curves import Log, loss_chart, smoothed


def drawings(chart: Chart) -> list[ElementTree.Element]:
    html = chart.html().replace("&nbsp;", " ")
    return [
        node for node in ElementTree.fromstring(html).iter("svg") if "plot" in node.get("class", "")
    ]  # not parseable: fails


def points_of(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (2.31, 8.4, [4, 6, 8]), (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-1, 1, None)],
)
def test_ticks_are_round_numbers_inside(low, high, expected):
    ticks = _ticks(low, high, False, 5)
    assert all(low <= t <= high for t in ticks)
    assert expected is None or ticks == expected
    assert 0.0 in _ticks(-1, 1, False, 5)


def test_ticks_of_a_logarithmic_axis_are_decades():
    assert _ticks(1, 1e6, True, 7) == [10.0**d for d in range(7)]
    assert _ticks(100, 1000, True, 5) == [100, 200, 500, 1000]


def test_a_line_is_drawn_where_its_numbers_are():
    for svg in drawings(Chart("T", "x", "y", [Line("a", [0, 5, 10], [0, 10, 5])], from_zero=True)):
        left, top, right, bottom = (float(v) for v in svg.get("data-plot").split(","))
        low_x, high_x, _, low_y, high_y, _ = (float(v) for v in svg.get("data-ends").split(","))
        path = next(p for p in svg.iter("path") if p.get("d").count("L") == 2)
        assert (low_x, high_x, low_y) == (0, 10, 0)
        expected = [
            (left + x / 10 * (right - left), bottom - y / high_y * (bottom - top))
            for x, y in [(0, 0), (5, 10), (10, 5)]
        ]
        for (x, y), (ex, ey) in zip(points_of(path.get("d")), expected, strict=True):
            assert abs(x - ex) < 0.06
            assert abs(y - ey) < 0.06


def test_thinning_keeps_the_extremes_and_the_order():
    x = list(range(100_000))
    y = [math.sin(v / 1000) for v in x]
    y[54_321], y[77_777] = 9.0, -9.0
    thin = _thinned(Line("a", x, y))
    assert len(thin["x"]) <= 401
    assert max(thin["y"]) == 9.0
    assert min(thin["y"]) == -9.0
    assert thin["x"] == sorted(thin["x"])
    assert thin["x"][-1] == x[-1]


@pytest.mark.parametrize(
    "lines",
    [
        [Line("one point", [3], [4])],
        [Line("flat", [1, 2], [5, 5])],
        [Line("zero", [1, 2], [0, 0])],
        [Line("holes", [1, 2, 3, math.inf], [1, math.nan, 3, 4])],
        [Line("huge", [1e12, 2e12], [1e-12, 1e300])],
        [Line("bars", [0, 1], [3, -4], style="bars"), Line("more", [0, 1], [1, 2], 1, "bars", [0.5, 1], [2, 3])],
        [Line("<b>&\"'</b></script>", [1, 2], [1, 2]), Line("none", [], [])],
    ],
    ids=lambda lines: lines[0].name,
)
@pytest.mark.parametrize("log", [False, True])
def test_drawings_are_well_formed(lines, log):
    chart = Chart("</script><i>", "x", "y", lines, log_x=log, log_y=log, names=["a", "b"] if len(lines) > 1 else [])
    found = drawings(chart)
    assert len(found) == 2
    text = chart.html()
    assert "nan" not in re.sub(r"<script.*?</script>", "", text)
    payload = re.search(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)
    assert json.loads(payload[1], parse_constant=lambda name: pytest.fail(name))["s"]


def test_nothing_to_draw():
    assert Chart("T", "x", "y", [Line("a", [], []), Line("b", [1], [math.nan])]).empty


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (1_500_000, "si", "1.50M"),
        (200_000, "si", "200k"),
        (0.004, "plain", "0.004"),
        (3 * 2**20, "bytes", "3MiB"),
        (90, "seconds", "90 s"),
        (600, "seconds", "10 min"),
    ],
)
def test_numbers_on_axes(value, kind, text):
    assert format_value(value, kind) == text


def test_smoothing_follows_without_lag_and_skips_holes():
    ramp = [float(i) for i in range(1000)]
    assert smoothed(ramp)[500] == pytest.approx(500, abs=1)
    assert smoothed([1.0] * 5 + [math.nan] + [1.0] * 5) == pytest.approx([1.0] * 11)


def test_training_time_adds_up_from_the_logged_rates():
    steps = [{"step": s, "tokens": 1000 * s, "loss": 1.0, "tokens_per_second": 500.0 * s} for s in (1, 2, 4)]
    log = Log("a", steps, [{"step": 3, "tokens": 3000, "eval_loss": 2.0}])
    assert log.seconds == pytest.approx([2.0, 3.0, 4.0])
    assert log.evaluated("eval_loss", by_time=True) == ([pytest.approx(3.5)], [2.0])
    assert not loss_chart([log], by_time=True).empty


def test_a_point_that_is_a_series_is_called_by_its_name_inside_the_plot():
    names = ["left & low", "right"]
    drawn = str(Chart("t", "x", "y", [Line(n, [float(i)], [1.0 + i], i, "points") for i, n in enumerate(names)]).html())
    assert 'text-anchor="start">left &amp; low</text>' in drawn
    assert 'text-anchor="end">right</text>' in drawn
