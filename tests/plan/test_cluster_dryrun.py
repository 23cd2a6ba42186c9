"""The dry run: what it counts against the formulas and against ranks that exist; hundreds of ranks; the command.

Needs nothing. Run: pytest tests/plan/test_cluster_dryrun.py
"""

import json
import time

import pytest
import torch

from headway.cli.main import main
from headway.core.errors import HeadwayError
from headway.core.recipe import Recipe
from headway.models.build import build_model
from headway.parallel.local import run_ranks
from headway.parallel.mesh import Layout, Mesh
from headway.parallel.tensor import tensor_parallel
from headway.plan.cluster.counting import CountCollectives
from headway.plan.cluster.dryrun import dry_run
from headway.plan.cluster.estimate import simulated
from headway.plan.cluster.hardware import cluster
from headway.plan.cluster.shape import shape_of

MODEL = {"family": "llama", "hidden": 256, "layers": 8, "heads": 8, "vocab": 1024, "context": 256}


def recipe(parallel, methods=None, model=None, **train):
    raw = {"model": model or MODEL, "data": {"sequence": 256}, "parallel": parallel, "methods": methods or {}}
    return Recipe.load({**raw, "train": {"batch": 32, "steps": 1, **train}})


LAYOUTS = {
    "shard": (8, {"shard": 8}, {}),
    "hybrid": (8, {"shard": 4, "replicate": 2}, {}),
    "tensor": (4, {"tensor": 4}, {}),
    "tensor-whole-stream": (2, {"tensor": {"degree": 2, "sequence": False}}, {}),
    "pipeline": (4, {"pipeline": 4}, {}),
    "all": (16, {"tensor": 2, "shard": 2, "pipeline": {"degree": 4, "schedule": "interleaved-1f1b", "chunks": 2}}, {}),
    "recompute": (8, {"tensor": 2, "shard": 2, "pipeline": 2}, {"recompute": {}}),
    "there-and-back": (4, {"pipeline": {"degree": 4, "schedule": "zbv-zero-bubble", "chunks": 2}}, {}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_counts_are_what_the_formulas_say(name):
    world, parallel, methods = LAYOUTS[name]
    config = recipe(parallel, methods, micro_batch=2)
    built = dry_run(config, world, 1024)
    shape = shape_of(config.model, 256)
    found, _ = simulated(shape, built.choice, cluster(f"a100x{world}"), 32)
    assert len(built.ranks) == built.layout.pipeline
    for rank, memory in zip(built.ranks, found.memory, strict=True):
        assert rank.memory.weights == pytest.approx(memory.weights, rel=0.02)
        assert rank.memory.activations == pytest.approx(memory.activations, rel=0.08)
        assert rank.memory.total == pytest.approx(memory.total, rel=0.06)
    for dimension in ("tensor", "pipeline"):
        most = max(rank.sent[dimension].bytes if dimension in rank.sent else 0 for rank in built.ranks)
        # The formulas leave out what embedding, head and norms send: much, beside stages of one block.
        assert most == pytest.approx(found.sent[dimension], rel=0.2), dimension
    weights = max(sum(r.sent[d].bytes for d in ("weights", "replicate") if d in r.sent) for r in built.ranks)
    assert weights == pytest.approx(found.sent["weights"], rel=0.25)  # what is at hand is not gathered twice
    total = sum(rank.parameters for rank in built.ranks) * built.layout.shard * built.layout.tensor
    twice = built.layout.pipeline > 1 and name != "there-and-back"  # the tied matrix, at both ends
    assert total == pytest.approx(shape.parameters + twice * 1024 * 256, rel=0.02)


def test_counts_are_those_of_ranks_that_exist():
    config = recipe({"tensor": 2}, micro_batch=2, precision="fp32")
    counted = dry_run(config, 2, 1024).ranks[0]
    model = build_model(config.model, seed=0)
    tokens = torch.zeros(2, 256, dtype=torch.long)

    def work(rank):
        mesh = Mesh(Layout(tensor=2), rank)
        tensor_parallel(model, mesh["tensor"])
        counter = CountCollectives({mesh["tensor"].get_group().group_name: ("tensor", 2)})
        # The mode answers questions for contents with 0; token 0 is within the vocabulary for real, too.
        with counter:
            loss, _ = model.head_loss(model.hidden(tokens).flatten(0, 1), model.head_weight, tokens.flatten())
            loss.backward()
        sent = counter.sent.values()
        local = sum(p.to_local().numel() for p in model.parameters())
        return sum(s.messages for s in sent) * 16, sum(s.bytes for s in sent) * 16, local

    messages, size, local = run_ranks(2, work)[0]
    assert (counted.sent["tensor"].messages, counted.sent["tensor"].bytes) == (messages, size)
    assert counted.parameters == local


@pytest.mark.parametrize("kind", ["ulysses", "ring"])
def test_shared_sequences_are_counted(kind):
    """Beside whole sequences on as many ranks: the same weights, a fourth of the tokens each, and more messages."""
    shared = dry_run(recipe({"sequence": {"degree": 4, "kind": kind}}, micro_batch=8), 4, 1024)
    alone = dry_run(recipe({"shard": 4}, micro_batch=8), 4, 1024)
    assert shared.ranks[0].memory.weights == alone.ranks[0].memory.weights
    assert shared.ranks[0].sent["weights"].bytes == pytest.approx(4 * alone.ranks[0].sent["weights"].bytes)
    assert 0.2 < shared.ranks[0].memory.activations / alone.ranks[0].memory.activations < 0.4
    sent = shared.ranks[0].sent["sequence"]
    tokens, layers, times = 8 * 256 / 4, 8, 4
    if kind == "ulysses":  # queries, keys, values there and the result back, and their gradients
        assert sent.bytes == 2 * 4 * 3 / 4 * tokens * 256 * 2 * layers * times
    else:
        assert sent.bytes > 2 * 3 * tokens * 256 * 2 * layers * times


def test_hundreds_of_ranks_in_under_a_minute():
    model = {"family": "gpt2", "hidden": 4096, "layers": 32, "heads": 32, "vocab": 51200, "context": 2048}
    config = recipe({"tensor": 8, "pipeline": 8, "shard": 8}, model=model, batch=256, micro_batch=2)
    start = time.perf_counter()
    built = dry_run(config, 512, 51200)
    assert time.perf_counter() - start < 60
    assert [rank.rank for rank in built.ranks] == [64 * stage for stage in range(8)]
    assert not torch.distributed.is_initialized()


def test_what_cannot_be_laid_out_is_refused():
    with pytest.raises(HeadwayError, match="does not divide the 8 heads"):
        dry_run(recipe({"tensor": 3}), 3, 1024)
    with pytest.raises(HeadwayError, match="do not make up 6"):
        dry_run(recipe({"tensor": 4}), 6, 1024)


def test_the_command(tmp_path, capsys):
    file = tmp_path / "r.yaml"
    file.write_text(recipe({"tensor": 2, "pipeline": 2}, batch=16).to_yaml())
    assert main(["plan", str(file), "--on", "a100x8", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "messages and bytes" in text
    assert "it fits" in text
    assert main(["plan", str(file), "--on", "a100x8", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["world"] == 8
    assert found["ranks"][1]["sent"]["pipeline"]["messages"] > 0
