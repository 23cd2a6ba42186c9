"""The torchtitan experiment: its pieces at a size of seconds, and that each can fail.

Needs gloo. Run: pytest tests/experiments/test_torchtitan.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headway.experiments import torchtitan, torchtitan_costs
from headway.experiments.llama_1b import WAYS, tokens_per_second, utilization
from headway.experiments.torchtitan import LAYOUTS, QUICK, WITH_EXPERTS, exactness, experiment, resumed_elsewhere
from headway.experiments.torchtitan_costs import LADDER
from headway.parallel import engine


def test_layouts_are_compared_with_one_process_and_a_wrong_sum_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    found = exactness(["fsdp 2"], 1)
    assert max(found["fsdp 2"]) < 1e-12
    sharded = engine.shard_weights

    def averaged(model: Any, parts: Any, *rest: Any) -> list[str]:
        said = sharded(model, parts, *rest)
        for part in parts:
            part.set_gradient_divide_factor(2.0)  # the root's alone: a mistake that is easily made
        return said

    monkeypatch.setattr(engine, "shard_weights", averaged)
    assert exactness(["fsdp 2"], 1)["fsdp 2"][1] > 1e-3


def test_experts_are_compared_with_a_model_that_has_some() -> None:
    found = exactness(["experts 2 over fsdp 2"], 1, WITH_EXPERTS)
    assert max(found["experts 2 over fsdp 2"]) < 1e-12


def test_a_run_is_resumed_in_other_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchtitan, "CHAIN", torchtitan.CHAIN[1:3])
    found = resumed_elsewhere(tmp_path)
    assert found["difference"] < 1e-12 and found["tokens"] == 0 and found["steps"] == 4


def test_what_is_kept_decides_memory_and_what_runs_again() -> None:
    peaks = torchtitan_costs.activation_peaks(128)
    assert list(peaks) == list(LADDER) and sorted(peaks.values(), reverse=True) == list(peaks.values())
    assert torchtitan_costs.products_run_again() == {"nothing": 6, "attention": 6, "products": 0}
    whole, chunked = torchtitan_costs.head_peaks(256, vocab=4000)
    assert whole > 2 * 256 * 4000 * 4 * 0.9 and chunked < 0.6 * whole


def test_a_lazy_checkpoint_stops_training_for_less(tmp_path: Path) -> None:
    stalls = torchtitan_costs.checkpoint_stalls(tmp_path, 1)
    assert 0 < stalls["lazy"] < stalls["plain"]


def test_layouts_that_do_not_exist_are_built_and_simulated() -> None:
    seconds, peak = torchtitan_costs.dry_run_seconds(layers=8)
    assert 0 < seconds < 60 and peak > 2**30
    assert 1.2 < torchtitan_costs.interleaving_gain() < 1.4


@pytest.mark.parametrize("way", [way for way in WAYS if way != "compiled"])
def test_the_arms_of_a_gpu_run(way: str) -> None:
    size = {"hidden": 64, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate": 128, "vocab": 300, "context": 32}
    if way == "transformers":
        pytest.importorskip("transformers")
    rate = tokens_per_second(way, 1, size, "cpu")
    assert rate > 0 and 0 < utilization({way: rate}, size, "cpu")[way] < 1


def test_what_is_expected_stays_what_it_was() -> None:
    bounds = {e.measure: e.expected for e in experiment.expectations}
    assert bounds["loss_difference"].high == bounds["gradient_difference"].high == 1e-9
    assert bounds["half_difference"].high == 2e-3 and bounds["legal_orders"].high == 1
    assert set(QUICK) < set(LAYOUTS) and len(LAYOUTS) + len(WITH_EXPERTS) == 17 == bounds["layouts"].low
    assert torchtitan.legal_orders() == 1 and experiment.minutes <= 4 and experiment.quick.minutes <= 1
