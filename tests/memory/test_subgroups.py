"""Subgroups: every element in exactly one, cuts at multiples of 64, no group mixed, views that share memory.

Needs nothing. Run: pytest tests/memory/test_subgroups.py
"""

from __future__ import annotations

import pytest
import torch

from headway.memory.subgroups import CUT, Subgroups

GROUPS = [
    [torch.arange(300.0).view(30, 10), torch.arange(1000.0, 1007.0), torch.arange(2000.0, 2500.0).view(5, 100)],
    [torch.arange(5000.0, 5009.0)],
]


@pytest.mark.parametrize("numel", [64, 100, 128, 257, 10_000])
def test_every_element_lies_in_exactly_one_place(numel: int) -> None:
    layout = Subgroups(GROUPS, numel)
    assert layout.numel == 300 + 7 + 500 + 9 == sum(s.numel for s in layout)
    flat = torch.full((layout.numel,), -1.0)
    for subgroup in layout:
        layout.gather(subgroup, layout.params, layout.slice(flat, subgroup))
    assert torch.equal(flat, torch.cat([p.flatten() for p in layout.params]))
    for view, param in zip(layout.views(flat), layout.params, strict=True):
        assert torch.equal(view, param)
        assert view.data_ptr() >= flat.data_ptr()
    out = [torch.zeros_like(p) for p in layout.params]
    for subgroup in layout:
        layout.scatter(subgroup, layout.slice(flat, subgroup), out)
    assert all(torch.equal(a, b) for a, b in zip(out, layout.params, strict=True))


@pytest.mark.parametrize("numel", [64, 100, 257])
def test_equal_within_a_cut_and_of_one_group(numel: int) -> None:
    layout = Subgroups(GROUPS, numel)
    assert [s.index for s in layout] == list(range(len(layout)))
    for subgroup, following in zip(layout, [*list(layout)[1:], None]):
        assert subgroup.numel <= numel
        if following is not None and following.group == subgroup.group:
            assert subgroup.numel > numel - CUT
        for piece in subgroup.pieces:
            assert piece.start % CUT == 0, "cut where a vector of a kernel would be torn"
    assert {piece.param for s in layout if s.group == 1 for piece in s.pieces} == {3}
    assert layout.largest <= numel


def test_too_small_and_empty() -> None:
    with pytest.raises(ValueError, match="63 elements"):
        Subgroups(GROUPS, 63)
    assert len(Subgroups([[]], 64)) == 0
    assert Subgroups([[]], 64).largest == 0
    layout = Subgroups([[torch.empty(0), torch.ones(3)]], 64)
    assert layout.numel == 3
    assert [v.shape for v in layout.views(torch.ones(3))] == [(0,), (3,)]
