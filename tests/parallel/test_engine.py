"""Whole trainings on many ranks against one process, in fp64. Needs gloo; `pytest tests/parallel/test_engine.py`."""

from typing import Any

import pytest
import torch

from headway.core.build import build_trainer
from headway.parallel.local import run_ranks
from headway.parallel.parity import parity
from tests.parallel.recipes import recipe

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "shard": (2, {"shard": 2}),
    "replicate": (2, {"replicate": 2}),
    "replicate x shard": (4, {"replicate": 2, "shard": 2}),
    "tensor": (2, {"tensor": 2}),
    "tensor, whole tokens": (2, {"tensor": {"degree": 2, "sequence": False}}),
    "shard x tensor": (4, {"shard": 2, "tensor": 2}),
    "replicate x tensor": (4, {"replicate": 2, "tensor": 2}),
    "pipeline": (2, {"pipeline": 2}),
    "pipeline, gpipe": (2, {"pipeline": {"degree": 2, "schedule": "gpipe"}}),
    "pipeline, interleaved": (2, {"pipeline": {"degree": 2, "chunks": 2, "schedule": "interleaved-1f1b"}}),
    "pipeline, zero bubble": (2, {"pipeline": {"degree": 2, "chunks": 2, "schedule": "interleaved-zero-bubble"}}),
    "pipeline, there and back": (2, {"pipeline": {"degree": 2, "chunks": 2, "schedule": "zbv-zero-bubble"}}),
    "pipeline x shard": (4, {"pipeline": 2, "shard": 2}),
    "pipeline x tensor": (4, {"pipeline": 2, "tensor": 2}),
    "pipeline x tensor, boundaries in parts": (4, {"pipeline": 2, "tensor": {"degree": 2, "sequence": False}}),
    "sequence": (2, {"sequence": 2}),
    "sequence, ring": (2, {"sequence": {"degree": 2, "kind": "ring"}}),
    "sequence, usp": (4, {"sequence": {"degree": 4, "kind": "usp", "ring": 2}}),
    "shard x sequence": (4, {"shard": 2, "sequence": 2}),
    "sequence x tensor": (4, {"sequence": 2, "tensor": 2}),
    "pipeline x sequence": (4, {"pipeline": 2, "sequence": 2}),
    "interleaved x replicate": (
        4,
        {"pipeline": {"degree": 2, "chunks": 2, "schedule": "interleaved-1f1b"}, "replicate": 2},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_and_gradients_are_those_of_one_process(name: str) -> None:
    ranks, layout = LAYOUTS[name]
    found = parity(recipe(parallel=layout), ranks)
    assert found.loss_difference < 1e-9 and found.gradient_difference < 1e-9, found
    assert found.changes and found.ranks == ranks


@pytest.mark.parametrize("name", ["shard", "replicate x tensor", "pipeline x shard"])
def test_micro_batches_and_untied_heads_change_nothing(name: str) -> None:
    ranks, layout = LAYOUTS[name]
    found = parity(recipe(parallel=layout, train={"micro_batch": 1}, model={"tied": False, "qk_norm": True}), ranks)
    assert found.loss_difference < 1e-9 and found.gradient_difference < 1e-9, found


def test_half_precision_is_near() -> None:
    found = parity(recipe(parallel={"shard": 2, "tensor": 2}, train={"precision": "bf16"}), 4, steps=2)
    assert 0 < found.loss_difference < 2e-3, found


@pytest.mark.parametrize("layout", ["tensor", "pipeline x tensor", "shard x tensor"])
def test_half_precision_is_that_of_one_process(layout: str) -> None:
    """Weights that tensor ranks share are rounded too, and so are the products: fp32 would be near as well."""
    ranks, parallel = LAYOUTS[layout]

    def widths(_: int) -> set[torch.dtype]:
        trainer = build_trainer(recipe(parallel=parallel, train={"precision": "bf16"}))
        seen: set[torch.dtype] = set()
        for module in trainer.model.modules():
            if hasattr(module, "gate"):
                module.gate.register_forward_hook(lambda _m, _i, product: seen.add(product.dtype))  # type: ignore[union-attr]
        trainer.train_step()
        return seen

    assert all(found == {torch.bfloat16} for found in run_ranks(ranks, widths))


FAMILIES: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "experts": ({"family": "moe"}, 2, {"shard": 2, "experts": 2}),
    "experts, gathered": ({"family": "moe"}, 2, {"shard": 2, "experts": {"degree": 2, "dispatcher": "all-gather"}}),
    "experts over tensor ranks": ({"family": "moe"}, 2, {"tensor": 2, "experts": 2}),
    "experts over shards and sequences": ({"family": "moe"}, 4, {"shard": 2, "sequence": 2, "experts": 4}),
    "experts cut, over shards and tensor ranks": (
        {"family": "moe"}, 4, {"shard": 2, "tensor": 2, "experts": {"degree": 2, "tensor": 2}}),
    "experts in a pipeline": ({"family": "moe"}, 4, {"pipeline": 2, "shard": 2, "experts": 2}),
    "half of the ranks hold the same experts": ({"family": "moe"}, 4, {"replicate": 2, "shard": 2, "experts": 2}),
    "all-scan": ({"family": "gla"}, 4, {"sequence": 4}),
    "lasp2": ({"family": "gla"}, 2, {"sequence": {"degree": 2, "kind": "lasp2"}}),
    "all-scan in a pipeline": ({"family": "gla"}, 4, {"pipeline": 2, "sequence": 2}),
    "gpt2": ({"family": "gpt2"}, 4, {"tensor": 2, "sequence": 2}),
    "gpt2 in a pipeline": ({"family": "gpt2"}, 4, {"pipeline": 2, "shard": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_too(name: str) -> None:
    model, ranks, layout = FAMILIES[name]
    more = {"moe": {"experts": 4, "top_k": 2, "kv_heads": 2}}.get(model["family"], {})
    base = {"hidden": 32, "layers": 4, "heads": 4, "context": 64}
    found = parity(recipe(parallel=layout, model={**base, **model, **more}, data={"mask_documents": True}), ranks)
    assert found.loss_difference < 1e-9 and found.gradient_difference < 1e-9, found
