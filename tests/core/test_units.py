"""Sizes as people write them. Needs nothing. Run: pytest tests/core/test_units.py"""

from __future__ import annotations

import pytest

from headway.core import units


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (units.count, "5M", 5_000_000),
        (units.count, "64k", 64_000),
        (units.count, "1.5B", 1_500_000_000),
        (units.count, "1_000", 1000),
        (units.count, 7, 7),
        (units.count, "2e3", 2000),
        (units.bytes_, "6GiB", 6 * 2**30),
        (units.bytes_, "1kB", 1000),
        (units.bytes_, "512 MiB", 512 * 2**20),
        (units.seconds, "2h", 7200.0),
        (units.seconds, "90", 90.0),
        (units.seconds, "1.5min", 90.0),
        (units.share, "5%", 0.05),
        (units.share, 0.1, 0.1),
        (units.share, 100, 100),
        (units.share, "2k", 2000),
    ],
)
def test_reads(parse: object, text: object, value: float) -> None:
    assert parse(text) == value  # type: ignore[operator]


@pytest.mark.parametrize(
    ("parse", "text"),
    [(units.count, t) for t in ("", "k", "five", "1.2", "3x", "-1", None, True, "1h")]
    + [(units.bytes_, "3 parsecs"), (units.seconds, "2 weeks"), (units.share, "x%")],
)
def test_refuses(parse: object, text: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse(text)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(1234567, "", "1.23M"), (999, "", "999"), (3 * 2**30, "B", "3.00GiB"), (25_600, "", "25.6k"), (0, "B", "0B")],
)
def test_human(value: float, unit: str, text: str) -> None:
    assert units.human(value, unit) == text


@pytest.mark.parametrize(("value", "text"), [(8.25, "8.2s"), (95, "1m35s"), (3725, "1h02m")])
def test_human_seconds(value: float, text: str) -> None:
    assert units.human_seconds(value) == text
