"""The order checker, and that composing by hand trains what the engine trains. Needs gloo.

Run: pytest tests/parallel/test_compose.py
"""

from __future__ import annotations

import itertools
import pydoc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from headway.core.build import build_trainer
from headway.core.errors import MethodError
from headway.models.build import build_model
from headway.models.config import LlamaConfig
from headway.parallel import compose as composing
from headway.parallel.compose import (
    ORDER,
    Compile,
    Experts,
    Pipeline,
    Recompute,
    Sequences,
    Shard,
    Step,
    Tensors,
    compose,
    in_order,
)
from headway.parallel.local import RankFailed, run_ranks
from headway.parallel.mesh import Layout, Mesh
from headway.parallel.pipeline import PipelineRunner, cut_blocks
from headway.workloads.language import NextTokenLoss
from tests.parallel.recipes import recipe

MESH: Any = None
SIX: list[Step] = [Pipeline(MESH, 0), Tensors(MESH), Experts(MESH), Recompute(), Compile(), Shard(MESH)]
SEVEN = [*SIX[:3], Sequences(MESH), *SIX[3:]]


def accepted(steps: tuple[Step, ...]) -> bool:
    try:
        return in_order(steps, strict_order=True) == list(steps)
    except MethodError as error:
        # The two steps that are named stand the wrong way round, next to each other.
        before, after = str(error).removeprefix("compose: has ").split(", which")[0].split(" before ")
        names = [step.name for step in steps]
        assert names.index(after) == names.index(before) + 1 and ORDER.index(before) > ORDER.index(after)
        return False


def test_of_720_orders_of_six_steps_one_is_legal() -> None:
    legal = [steps for steps in itertools.permutations(SIX) if accepted(steps)]
    assert legal == [tuple(SIX)]
    assert all(in_order(steps) == SIX for steps in itertools.permutations(SIX)), "unless it is strict, it sorts"


def test_of_every_choice_of_steps_one_order_is_legal() -> None:
    for count in range(len(SEVEN) + 1):
        for chosen in itertools.combinations(SEVEN, count):
            if count <= 5:
                assert [s for s in itertools.permutations(chosen) if accepted(s)] == [chosen]
            assert in_order(chosen[::-1]) == list(chosen)
    assert tuple(step.name for step in SEVEN) == ORDER


def test_what_is_refused_changes_nothing() -> None:
    model = build_model(LlamaConfig(hidden=16, layers=2, heads=2, vocab=32, context=8), seed=0)
    blocks = list(model.blocks)
    with pytest.raises(MethodError, match="has compile before recompute, which must come first: the graph"):
        compose(model, [Compile(), Recompute()], strict_order=True)
    with pytest.raises(MethodError, match="has recompute 2 times"):
        compose(model, [Recompute(), Recompute("attention")])
    with pytest.raises(MethodError, match="steps of the kinds Pipeline"):
        compose(model, [Recompute(), "shard"])  # type: ignore[list-item]
    assert list(model.blocks) == blocks
    composed = compose(model, [Compile("eager"), Recompute("attention")])
    assert composed.changes == ["2 blocks recomputed, keeping attention", "2 blocks compiled"]
    assert composed.model is model and not composed.stages


CALLS = {  # what the engine calls for each step, where it finds it
    "pipeline": "headway.parallel.pipeline.keep_own_parts",
    "tensor": "headway.parallel.tensor.tensor_parallel",
    "experts": "headway.parallel.experts.parallel.expert_parallel",
    "sequence": "headway.parallel.sequence.apply.sequence_parallel",
    "recompute": "headway.memory.recompute.replace_blocks",
    "compile": "headway.workloads.language.Language.compile",
    "shard": "headway.parallel.engine.shard_weights",
}


def test_the_engine_keeps_to_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def recorded(name: str, inner: Any) -> Any:
        def record(*arguments: Any, **options: Any) -> Any:
            called.append(name)
            return inner(*arguments, **options)

        return record

    for name, path in CALLS.items():
        monkeypatch.setattr(path, recorded(name, pydoc.locate(path)))
    model = {"family": "moe", "hidden": 32, "layers": 4, "heads": 4, "context": 64, "experts": 4, "top_k": 2}
    wanted = recipe(
        model=model,
        parallel={"pipeline": 2, "sequence": 2, "tensor": 2, "experts": 2},
        methods={"recompute": {}},
        train={"compile": True},
    )

    def build(_: int) -> list[str]:
        build_trainer(wanted)
        return called

    for rank, calls in enumerate(run_ranks(8, build)):
        assert tuple(calls) == ORDER, rank


CONFIG = LlamaConfig(hidden=32, layers=4, heads=4, kv_heads=2, vocab=64, context=16)
TOKENS = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(0))
BATCH = {"tokens": TOKENS[:, :-1], "targets": TOKENS[:, 1:]}


def whole(parameter: nn.Parameter) -> torch.Tensor:
    grad: Any = parameter.grad
    return (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()


def alone() -> dict[str, torch.Tensor]:
    model = build_model(CONFIG, seed=0).double()
    (NextTokenLoss()(model, BATCH)[0] / 64).backward()
    return {name: whole(p) for name, p in model.named_parameters()}


def composed_by_hand(rank: int) -> dict[str, torch.Tensor]:
    """Two shards of two tensor ranks, blocks recomputed; given in any order."""
    mesh = Mesh(Layout(shard=2, tensor=2), rank)
    model = build_model(CONFIG, seed=0).double()
    composed = compose(model, [Shard(mesh.weights(), "fp64"), Recompute("attention"), Tensors(mesh["tensor"])])
    assert len(composed.changes) >= 3
    mine = {key: value.chunk(2)[mesh.at["shard"]] for key, value in BATCH.items()}
    (NextTokenLoss()(model, mine)[0] / 64).backward()
    return {name: whole(p) for name, p in model.named_parameters()}


def composed_pipeline(rank: int) -> dict[str, torch.Tensor]:
    """Two stages of two shards."""
    mesh = Mesh(Layout(pipeline=2, shard=2), rank)
    cuts = cut_blocks(CONFIG.layers, 2, head=1.0)
    model = build_model(CONFIG.model_copy(update={"tied": False}), seed=0).double()
    composed = compose(model, [Pipeline(cuts, mesh.at["pipeline"]), Recompute(), Shard(mesh.weights(), "fp64")])
    assert len(composed.stages) == 1
    composed.stages[-1].loss = NextTokenLoss()
    runner = PipelineRunner(composed.stages, cuts, mesh["pipeline"], schedule="1f1b", micro_batches=2, width=32,
                            tokens=16, dtype=torch.float64, device=torch.device("cpu"))  # fmt: skip
    runner.forward_backward({key: value.chunk(2)[mesh.at["shard"]] for key, value in BATCH.items()}, 64)
    own = {name: whole(p) for name, p in model.named_parameters()}
    everywhere: list[Any] = [None] * 4
    dist.all_gather_object(everywhere, own)
    return {name: grad for part in everywhere for name, grad in part.items()}


def test_composed_by_hand_gradients_are_those_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone()
    for found in run_ranks(4, composed_by_hand):
        assert found.keys() == expected.keys()
        assert max(float((found[name] - g).abs().max()) for name, g in expected.items()) < 1e-12
    # Out of order it cannot even be built: tensor parallelism finds blocks that are wrapped already.
    monkeypatch.setattr(composing, "in_order", lambda steps, strict_order: list(steps))
    with pytest.raises(RankFailed, match="is wrapped by RecomputedBlock already"):
        run_ranks(4, composed_by_hand)


def test_composed_pipelines_run_their_stages() -> None:
    model = build_model(CONFIG.model_copy(update={"tied": False}), seed=0).double()
    (NextTokenLoss()(model, BATCH)[0] / 64).backward()
    expected = {name: whole(p) for name, p in model.named_parameters()}
    for found in run_ranks(4, composed_pipeline):
        assert found.keys() == expected.keys()
        assert max(float((found[name] - g).abs().max()) for name, g in expected.items()) < 1e-12
