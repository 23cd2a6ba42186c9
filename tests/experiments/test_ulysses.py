"""The experiment on shared sequences: its parts at the smallest size, and what its model of time says.

Needs nothing. Run: pytest tests/experiments/test_ulysses.py
"""

from __future__ import annotations

from headway.core import registry
from headway.experiments import ulysses
from headway.parallel.local import run_ranks


def test_it_is_found_and_expects_only_what_it_measures() -> None:
    found = registry.find("experiments", "ulysses", "experiment")
    assert found is ulysses.experiment and len({e.measure for e in found.expectations}) == len(found.expectations)


def test_errors_are_of_rounding_and_cover_all_kinds() -> None:
    errors = run_ranks(2, ulysses._errors, 2)[0]
    assert len(errors) == len(ulysses.KINDS) * len(ulysses.HEADS)
    assert 0 < max(errors.values()) < 1e-10


def test_bytes_and_peaks_fall_as_they_should() -> None:
    sent = ulysses._bytes(8)
    assert {ratio for kind in ulysses.KINDS for ratio in sent[f"{kind} ratio"]} == {1.0}
    one, two, four = ulysses._peaks("ulysses", 256)
    assert one > 1.3 * two > 1.3 * four


def test_curves_of_all_arms_overlay() -> None:
    curves = ulysses._curves(3, 64)
    one = curves["one process"]
    assert len(curves) == 5 and one[2] < one[0]
    assert all(abs(a - b) < 1e-5 * b for curve in curves.values() for a, b in zip(curve, one, strict=True))


def test_a_ring_gains_with_the_sequence_and_loses_across_machines() -> None:
    assert ulysses._crossover(8) < ulysses._crossover(16) < ulysses._crossover(64)
    assert ulysses._times("megatron", 2**16, 8) > ulysses._times("ulysses", 2**16, 8)
