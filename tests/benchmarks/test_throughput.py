"""What the throughput benchmark makes of its measurements; it trains nothing.

Needs transformers and accelerate: pytest tests/benchmarks.
"""

import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def throughput(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("throughput")
    for name in ("throughput", "arms"):
        sys.modules.pop(name, None)


def measured(headway, transformers):
    seconds = {
        "headway-bf16": [headway] * 4,
        "headway-bf16-compile": [headway * 1.5] * 4,
        "transformers-fp32": [transformers * 2] * 4,
        "transformers-bf16": [transformers] * 4,
    }
    return {"seconds": seconds, "flops": 44e6, "peak": 1e12}


def test_the_ratio_is_of_the_best_arm_to_the_best_arm(throughput, capsys):
    result = throughput.report(throughput.SHAPES["small"], measured(0.5, 1.0))
    assert result["best"] == {"headway": "headway-bf16", "transformers": "transformers-bf16"}
    assert result["ratio"].value == pytest.approx(2.0)
    assert result["rates"]["headway-bf16"].value == pytest.approx(8 * 512 / 0.5)
    assert result["share"].value == pytest.approx(8 * 512 / 0.5 * 44e6 / 1e12)
    assert "2.000" in capsys.readouterr().out


@pytest.mark.parametrize("speed,held", [(0.5, True), (0.8, False)])
def test_the_evidence_judges_both_claims(throughput, speed, held):
    results = {}
    for name, shape in throughput.SHAPES.items():
        data = measured(speed, 1.0) | {"flops": 60e6}
        results[name] = {**data, **throughput.report(shape, data)}
    outcome = throughput.evidence(results, 1.0)
    assert [row.measure for row in outcome.rows] == ["small_ratio", "large_share"]
    assert outcome.held is held and not outcome.quick
    assert "transformers" in outcome.versions
    assert type(outcome).model_validate_json(outcome.to_json()) == outcome


def test_the_peers_model_has_the_shape_of_ours(throughput):
    """The same number of weights, so that tokens are worth the same."""
    from transformers import LlamaConfig as Theirs
    from transformers import LlamaForCausalLM

    from headway.core.recipe import Recipe
    from headway.models.build import build_model

    arms = sys.modules["arms"]
    config = Recipe.load(arms.recipe("headway-bf16", 128, 2)).model.model_copy(update={"vocab": arms.VOCAB})
    theirs = LlamaForCausalLM(Theirs(**arms.peer_config(128, 2)))
    assert sum(p.numel() for p in build_model(config).parameters()) == sum(p.numel() for p in theirs.parameters())
