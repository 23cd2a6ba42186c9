"""The planner of mappings for experts: the paper's table in its order, memory, and what each term depends on.

Needs nothing; no torch. Run: pytest tests/plan/test_cluster_experts.py
"""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest

from headway.core.errors import HeadwayError
from headway.models.config import MoEConfig
from headway.parallel.experts.grids import fold, unfolded
from headway.plan.cluster import experts as planner
from headway.plan.cluster.experts import (
    G8T8,
    LLAMA3,
    MIXTRAL,
    PRINTED,
    QWEN2,
    ExpertModel,
    Mapping,
    _Step,
    best_of_each,
    candidates,
    plan_moe_mapping,
    published,
)


def best(model: ExpertModel, **options: Any) -> list[float | None]:
    ranked = plan_moe_mapping(model, published(PRINTED[model.name][0]), 4096, **options)
    assert [p.seconds for p in ranked] == sorted(p.seconds for p in ranked)
    assert all(p.memory <= 80e9 for p in ranked)
    return [p and 100 * p.utilization for p in best_of_each(ranked).values()]


def order(values: Any) -> list[int]:
    return sorted(range(len(values)), key=lambda i: (values[i] is not None, values[i] or 0))


@pytest.mark.parametrize("model", [MIXTRAL, G8T8, LLAMA3], ids=lambda m: m.name)
def test_families_are_ranked_as_in_the_table(model: ExpertModel) -> None:
    printed, found = PRINTED[model.name][1], best(model)
    assert order(found) == order(printed)
    assert [v is None for v in found] == [v is None for v in printed]  # out of memory in the same places
    for claim, value in zip(printed, found):
        if claim is not None and value is not None:
            assert 1 / 3 < value / claim < 3


def test_the_order_does_not_hang_on_the_assumed_efficiency(monkeypatch: pytest.MonkeyPatch) -> None:
    for half in (128, 512):
        monkeypatch.setattr(planner, "HALF", half)
        assert order(best(G8T8)) == order(PRINTED[G8T8.name][1])


def test_folding_adds_most_for_fine_grained_experts_where_no_block_is_recomputed() -> None:
    gaps = {}
    for model in (MIXTRAL, LLAMA3, QWEN2, G8T8):
        values = best(model, recompute=False, families=("5-d", "folded"))
        assert values[4] is not None and values[3] is not None
        gaps[model.name] = values[4] - values[3]
    assert min(gaps.values()) > 0
    assert max(gaps, key=gaps.__getitem__) == G8T8.name


def test_parameters_are_the_models() -> None:
    assert MIXTRAL.parameters == pytest.approx(141e9, rel=0.01) and QWEN2.parameters == pytest.approx(57.4e9, rel=0.02)
    assert G8T8.routed == MIXTRAL.routed
    config = MoEConfig(hidden=64, layers=2, heads=4, vocab=100, experts=8, top_k=2, expert_width=32, shared_experts=1)
    model = ExpertModel.of(config)
    assert (model.experts, model.width, model.shared, model.kv_heads) == (8, 32, 32, 4)


def step(mapping: Mapping, devices: int = 16, model: ExpertModel = G8T8) -> _Step:
    return _Step(model, published(devices), mapping, 256, 4096)


def test_an_all_to_all_within_a_node_takes_the_fast_links_alone() -> None:
    folded = step(Mapping(fold(16, sequence=8, expert=8), False))
    apart = step(Mapping(unfolded(16, sequence=2, expert=8), False))  # two expert ranks of eight on each... neighbours
    routed = 4096 / 8 * 8 * 6144 * 2
    share = routed / 8
    assert folded._messages()["expert"] == pytest.approx(2 * 7 * (share / 450e9 + 5e-6))
    wide = 4 * routed / 8  # a rank has a half of a sequence, not an eighth
    assert apart._messages()["expert"] == pytest.approx(2 * 4 * (wide / 50e9 + 1e-5))


def test_tensor_ranks_of_experts_send_every_row_and_expert_ranks_only_those_that_leave() -> None:
    by_expert, by_tensor = (step(Mapping(fold(8, tensor=8, **o), False), 8)._messages()
                            for o in ({"expert": 8}, {"expert_tensor": 8}))  # fmt: skip
    assert by_expert["expert_tensor"] == by_tensor["expert"] == 0
    assert by_tensor["expert_tensor"] > 6 * by_expert["expert"]


def test_memory_is_that_of_weights_states_and_activations() -> None:
    mapping = Mapping(fold(128, expert=8), True, recompute=True)
    gathered = step(mapping, 128, MIXTRAL).predict("fsdp+ep").memory
    held = 18 * (MIXTRAL.parameters) / 128
    assert held < gathered < held + 20e9
    kept = step(Mapping(fold(128, expert=8), True), 128, MIXTRAL).predict("fsdp+ep").memory
    assert kept > 2 * gathered
    whole = step(Mapping(fold(128, tensor=8, expert=8), False), 128, MIXTRAL).predict("folded").memory
    assert whole > 6 * (MIXTRAL.routed * 56 / 8)  # weights and gradients of an eighth of the experts


def test_a_mapping_that_fits_nowhere_and_grids_that_do_not_divide() -> None:
    with pytest.raises(HeadwayError, match=r"Mixtral-8x22B on 8 devices: needs \d+ GB each at the least.*have 80"):
        plan_moe_mapping(MIXTRAL, published(8), 4096)
    for family in planner.FAMILIES:
        for mapping in candidates(family, QWEN2, 64, 256, 4096):
            size = mapping.grids.sizes()
            assert math.prod(size[n] for n in ("pipeline", "data", "sequence", "tensor")) == 64
            assert QWEN2.layers % (size["pipeline"] * mapping.chunks) == 0 and QWEN2.experts % size["expert"] == 0


def test_no_torch_is_needed() -> None:
    code = "import sys, headway.plan.cluster.experts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
