"""The two grids of ranks: Megatron's groups, folding, what leaves a node, and refusals. Needs nothing; no torch.

Run: pytest tests/parallel/test_experts_grids.py
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from headway.core.errors import RecipeError
from headway.parallel.experts.grids import fold, fold_report, leaves, mappings, unfolded


def test_groups_are_megatrons_of_its_sixteen_gpus() -> None:
    """The docstring of Megatron-LM's initialize_model_parallel: tensor 2, pipeline 4."""
    grids = fold(16, tensor=2, pipeline=4)
    assert grids.groups("data") == [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]]
    assert grids.groups("tensor") == [[i, i + 1] for i in range(0, 16, 2)]
    assert grids.groups("pipeline") == [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]]


def test_eight_ranks_folded_as_in_the_paper() -> None:
    grids = fold(8, tensor=2, sequence=2, expert=8)
    assert tuple(grids.sizes().values()) == (1, 2, 2, 2, 1, 8, 1)
    assert grids.groups("expert") == [list(range(8))]
    assert grids.groups("sequence") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert grids.groups("data", "sequence") == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert grids.attention.coordinates(5) == {"pipeline": 0, "data": 1, "sequence": 0, "tensor": 1}


def test_unfolded_expert_ranks_are_data_ranks_and_sequence_ranks_have_copies() -> None:
    grids = unfolded(8, sequence=2, tensor=2, expert=2)
    assert grids.groups("expert") == [[0, 4], [1, 5], [2, 6], [3, 7]] == grids.groups("data")
    assert sorted(grids.groups("expert_tensor")) == grids.groups("tensor")
    assert grids.groups("expert_data") == [[0, 2], [1, 3], [4, 6], [5, 7]] == grids.groups("sequence")
    assert grids.experts.coordinates(6) == {"pipeline": 0, "expert_data": 1, "expert": 1, "expert_tensor": 0}


def test_every_grid_has_every_rank_once_along_every_dimension() -> None:
    for world in (1, 4, 8, 12):
        for grids in mappings(world, experts=4, width=6):
            for name in grids.sizes():
                assert sorted(r for group in grids.groups(name) for r in group) == list(range(world))
            assert grids.attention.groups("pipeline") == grids.experts.groups("pipeline")
    pipeline = [*mappings(8, pipeline=2)]
    assert len(pipeline) == 6 * 6
    assert all(g.attention.groups("pipeline") == g.experts.groups("pipeline") for g in pipeline)


def test_folding_keeps_expert_ranks_within_a_node_that_they_leave_otherwise() -> None:
    folded, apart = fold(4, sequence=2, expert=2), unfolded(4, sequence=2, expert=2)
    assert [leaves(g, 2) for g in folded.groups("expert")] == [False, False]
    assert [leaves(g, 2) for g in apart.groups("expert")] == [True, True]
    assert "expert: 2 of 2 ranks, all within a node of 2: [0, 1] [2, 3]" in fold_report(folded, 2)
    assert "expert: 2 of 2 ranks, 2 of 2 leave a node of 2: [0, 2] [1, 3]" in fold_report(apart, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline": 5}, "parallel.pipeline: of 5 stages does not divide 12 ranks. Take 1, 2, 3, 4, 6 or 12"),
        ({"tensor": 8}, "groups of 8 .sequence 1 x tensor 8. do not make up the 12 ranks.*sequence 1 x tensor 6"),
        ({"sequence": 2, "tensor": 2, "expert": 8}, "groups of 8 .expert 8 x expert_tensor 1. do not make up the 12 "
         "ranks of a stage.*data 3 x sequence 2 x tensor 2.*nearest are expert 6 x expert_tensor 1"),
        ({"expert": 4, "expert_tensor": 2}, "expert 3 x expert_tensor 2|expert 4 x expert_tensor 1"),
        ({"tensor": 2, "expert": 4, "tensor_sequence": False}, "each of 2 tensor ranks would send the same tokens"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_both_products_and_the_nearest(options: dict[str, int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        fold(12, **options)


def test_unfolded_expert_ranks_are_bounded_by_the_data_ranks() -> None:
    with pytest.raises(RecipeError, match=r"of 8 ranks is no part of the 2 data ranks.*1 or 2, or fold"):
        unfolded(16, sequence=8, expert=8)
    assert fold(8, sequence=8, expert=8).sizes()["expert_data"] == 1  # the paper's example: 8 ranks suffice


def test_no_torch_is_needed() -> None:
    code = "import sys, headway.parallel.experts.grids; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
