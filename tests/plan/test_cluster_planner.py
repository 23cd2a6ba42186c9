"""The planner: the rules, what does not fit, brute force, legality; and the command that prints it.

Needs nothing. Run: pytest tests/plan/test_cluster_planner.py
"""

import json

import pytest

from headway.cli.main import main
from headway.core.errors import HeadwayError
from headway.core.recipe import Recipe
from headway.models.config import GPT2Config, LlamaConfig
from headway.parallel.legality import check_layout
from headway.parallel.mesh import Layout
from headway.plan.cluster.choice import Choice
from headway.plan.cluster.estimate import estimate, simulated
from headway.plan.cluster.hardware import cluster
from headway.plan.cluster.layouts import choices, data_splits, tensor_degrees
from headway.plan.cluster.planner import DoesNotFit, fits, plan
from headway.plan.cluster.shape import shape_of

GPT3 = GPT2Config(hidden=12288, layers=96, heads=96, vocab=51200, context=2048)
SMALL = LlamaConfig(hidden=256, layers=8, heads=8, kv_heads=2, vocab=4096, context=512)


def recipe(**train):
    return {
        "model": {"family": "llama", "hidden": 256, "layers": 8, "heads": 8, "context": 512},
        "data": {"sequence": 512},
        "train": {"batch": 32, "steps": 1, **train},
    }


def test_a_model_that_fits_one_device_is_divided_by_samples_alone():
    best = plan(SMALL, cluster("h100x8"), 512, sequence=512).best.choice
    assert (best.layout.tensor, best.layout.pipeline, best.layout.data) == (1, 1, 8)


def test_a_large_model_is_divided_within_nodes_first_and_fits():
    on = cluster("a100x1024")
    found = plan(GPT3, on, 1536, sequence=2048)
    assert found.parameters == pytest.approx(174.6e9, rel=0.001)
    for one in [*found.ranked, found.rules]:
        assert one.choice.layout.world == 1024
        assert one.choice.layout.tensor <= 8
        assert fits(one, on)
        assert 0.2 < one.mfu < 0.7
    assert [one.seconds for one in found.ranked] == sorted(one.seconds for one in found.ranked)
    # The paper's own choice for this model: tensor 8 and as few pipeline ranks as fit.
    assert found.rules.choice.layout.tensor == 8
    assert 4 <= found.rules.choice.layout.pipeline <= 16


def test_the_best_is_that_of_brute_force():
    on, shape = cluster("a100x16"), shape_of(SMALL, 512)
    found = plan(SMALL, on, 64, sequence=512, most=1)
    every = [estimate(shape, choice, on, 64) for choice in choices(shape, on, 64)]
    assert found.considered == len(every) > 50
    least = min((e for e in every if fits(e, on)), key=lambda e: e.seconds)
    assert found.best.seconds == pytest.approx(least.seconds, rel=0.02)


def test_what_does_not_fit_is_answered_with_the_memory_of_every_rank():
    with pytest.raises(DoesNotFit, match="on the fullest rank at the least") as caught:
        plan(GPT3, cluster("a100x8"), 64, sequence=2048)
    text = str(caught.value)
    assert "optimizer" in text
    assert len(caught.value.nearest.memory) == caught.value.nearest.choice.layout.pipeline
    assert text.count("GiB") > 4
    assert "devices would do" in text


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(HeadwayError, match="of 3 sequences cannot be shared among 64 devices"):
        plan(SMALL, cluster("a100x64"), 3, sequence=512)


def test_slow_links_are_avoided():
    """Between two servers without a fast link nobody shares matrices or gathers weights."""
    config = LlamaConfig(hidden=4096, layers=32, heads=32, kv_heads=8, vocab=128_000, context=8192, intermediate=14336)
    best = plan(config, cluster("slow-serversx16"), 512, sequence=8192).best.choice
    assert best.layout.tensor == 1
    assert best.layout.pipeline % 2 == 0 or best.layout.replicate == 2


def test_candidates_are_what_the_runtime_accepts():
    shape, on = shape_of(SMALL, 512), cluster("a100x8")
    for choice in choices(shape, on, 24):
        section = choice.recipe()
        raw = recipe(batch=24)
        raw["model"]["kv_heads"] = 2
        raw["train"].update(section["train"])
        loaded = Recipe.load({**raw, "parallel": section["parallel"], "methods": section.get("methods", {})})
        check_layout(loaded, choice.layout)


def test_splits_and_degrees():
    assert data_splits(16, 2, 8) == [(16, 1), (4, 4), (1, 16)]
    assert data_splits(1, 8, 8) == [(1, 1)]
    assert tensor_degrees(shape_of(SMALL, 512), 8) == [1, 2]  # two key and value heads


@pytest.mark.parametrize("schedule, chunks", [("1f1b", 1), ("interleaved-1f1b", 2), ("gpipe", 1)])
def test_formulas_and_simulation_agree_where_stages_are_alike(schedule, chunks):
    shape, on = shape_of(GPT3, 2048), cluster("a100x96")
    choice = Choice(Layout(tensor=8, pipeline=12), 1, schedule, chunks, True)
    blocks = [96 // choice.stages] * choice.stages
    quick = estimate(shape, choice, on, 48, blocks=blocks)
    slow, timeline = simulated(shape, choice, on, 48, blocks=blocks)
    assert quick.seconds == pytest.approx(slow.seconds, rel=0.03)
    assert quick.peak_bytes == pytest.approx(slow.peak_bytes, rel=0.05)
    assert timeline.bytes_by_link() == {
        "infiniband": pytest.approx(2 * 48 * (choice.stages - 1) * 2048 * 12288 * 2 / 8)
    }


def test_the_command(tmp_path, capsys):
    file, trace = tmp_path / "r.yaml", tmp_path / "t.json"
    file.write_text(json.dumps(recipe()))
    assert main(["plan", str(file), "--on", "h100x4", "--trace", str(trace)]) == 0
    text = capsys.readouterr().out
    assert "rules of thumb" in text
    assert "parallel:\n" in text
    assert json.loads(trace.read_text())["traceEvents"]
    assert main(["plan", str(file), "--on", "h100x4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["devices"] == 4
    best = found["ranked"][0]
    loaded = Recipe.load({**recipe(**best["train"]), "parallel": best["parallel"]})
    assert loaded.parallel.tensor.degree >= 1
    assert main(["plan", str(file), "--dry-run"]) == 2
    assert main(["plan", str(file), "--on", "h100x4", "--memory", "1GiB"]) == 2
    assert "one thing at a time" in capsys.readouterr().err
