"""The mixture-of-experts family: its parts, its options, its count of work, and the methods and uses around it.

Needs nothing. Run: pytest tests/models/test_moe.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from headway.core.build import build_trainer
from headway.core.errors import HeadwayError, ModelError, RecipeError
from headway.core.options import parse_options
from headway.core.recipe import Recipe
from headway.core.train import train
from headway.layers.experts import LimitedDispatch, MoE, moe_reference
from headway.models.build import build_model
from headway.models.config import MoEConfig
from headway.models.hf import save_hf
from headway.models.llama import FeedForward
from headway.models.moe import moe_layers
from headway.workloads.load import load_model
from tests.conftest import tiny_recipe

SMALL: dict[str, Any] = {"hidden": 32, "layers": 3, "heads": 2, "vocab": 97, "experts": 4, "expert_width": 16}
MODEL = {"family": "moe", "experts": 4, "top_k": 2, "expert_width": 32}


def build(**options: Any) -> Any:
    return build_model(MoEConfig(**{**SMALL, **options}), seed=0)


def test_the_parts_are_those_that_were_asked_for() -> None:
    model = build(dense_layers=1, shared_experts=2, top_k=3, router="sigmoid", normalize=False, router_bias=True)
    assert isinstance(model.blocks[0].mlp, FeedForward)
    assert [layer is model.blocks[i + 1].mlp for i, layer in enumerate(moe_layers(model))] == [True, True]
    layer = moe_layers(model)[0]
    assert layer.experts.gate.shape == (4, 16, 32)
    assert layer.experts.down.shape == (4, 32, 16)
    assert isinstance(layer.shared, FeedForward)
    assert layer.shared.gate.weight.shape == (32, 32)
    assert (layer.router.top_k, layer.router.score, layer.router.normalize) == (3, "sigmoid", False)
    assert "blocks.1.mlp.router.bias" in model.state_dict()
    assert not any("bias" in name for name, _ in model.named_parameters())
    limited = moe_layers(build(capacity=1.5, drop="position", pad=True))[0]
    assert isinstance(limited.dispatch, LimitedDispatch)
    assert (limited.capacity.factor, limited.capacity.keep, limited.capacity.pad) == (1.5, "position", True)  # type: ignore[union-attr]
    assert MoEConfig(hidden=48, layers=1, heads=2, top_k=3).expert_channels == 48  # 128 / 3, a multiple of 8


def test_first_weights_of_stacks_follow_their_place() -> None:
    parameters = dict(build(hidden=64, expert_width=64, layers=4, shared_experts=1).named_parameters())
    assert float(parameters["blocks.1.mlp.experts.gate"].detach().std()) == pytest.approx(0.02, rel=0.05)
    for name in ("experts.down", "shared.down.weight"):
        assert float(parameters[f"blocks.1.mlp.{name}"].detach().std()) == pytest.approx(0.02 / 8**0.5, rel=0.05)
    gate = parameters["blocks.1.mlp.experts.gate"]
    assert not torch.equal(gate[0], gate[1])


def test_model_equals_the_one_with_the_dense_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(dense_layers=1, shared_experts=1).double()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    x = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(2))
    ours = model(x)
    monkeypatch.setattr(MoE, "forward", moe_reference)
    torch.testing.assert_close(ours, model(x), rtol=1e-9, atol=1e-9)


def test_work_is_counted_for_the_experts_that_a_token_visits() -> None:
    model = build(dense_layers=1, shared_experts=1, top_k=2)
    F, D, V, T = 16, 32, 97, 64
    dense = 3 * D * model.config.intermediate_width
    per_moe = 4 * D + 2 * 3 * D * F + 3 * D * F  # router, two of four experts, the shared one
    weights = 3 * 4 * D * D + dense + 2 * per_moe + V * D
    assert model.flops_per_token(T) == 6 * weights + 12 * D * T * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, "at most experts"),
        ({"dense_layers": 3}, "fewer than layers"),
        ({"pad": True}, "capacity"),
        ({"capacity": 0}, "greater than 0"),
        ({"router": "softmx"}, "softmax"),
        ({"expert": 4}, "experts"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_options(MoEConfig, {**SMALL, **options})


def test_a_router_that_could_learn_nothing_is_not_trained() -> None:
    with pytest.raises(RecipeError, match=r"model\.normalize.*learns nothing"):
        build_trainer(Recipe.load(tiny_recipe(model={**MODEL, "top_k": 1})))
    build_trainer(Recipe.load(tiny_recipe(model={**MODEL, "top_k": 1, "normalize": False})))


@pytest.mark.parametrize(
    "options",
    [
        {"router": "sigmoid"},
        {"router_bias": True},
        {"shared_experts": 1},
        {"normalize": False},
        {"dense_layers": 1},
        {"qkv_bias": True},
        {"window": 4, "window_layers": (0,)},
    ],
)
def test_what_transformers_lacks_is_not_exported(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"model.{list(options)[-1]}"):
        save_hf(build(**options), tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trains_resumes_and_generates(precision: str, tmp_path: Path) -> None:
    recipe = Recipe.load(tiny_recipe(model={**MODEL, "router_bias": True}, train={"precision": precision, "steps": 30}))
    run = train(recipe, run=tmp_path / "run")
    losses = [record["loss"] for record in run.metrics() if "loss" in record]
    assert losses[-1] < losses[0] - 1
    model, tokenizer = load_model(run)
    prompt = torch.tensor([tokenizer.encode("the cat ")])
    whole = model(prompt)
    cache = model.new_cache(1, 32)
    pieces = torch.cat([model(prompt[:, :3], cache=cache), model(prompt[:, 3:], cache=cache)], 1)
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "methods",
    [
        {"recompute": {}},
        {"recompute": {"keep": "products"}},
        {"ssdtrain": {"min_bytes": 1}},
        {"streambp": {"chunk": 8}},
        {"ema": {}},
        {"sam": {}},
    ],
    ids=lambda m: "-".join(m),
)
def test_methods_that_work_on_blocks_work_on_these(methods: dict[str, Any], compiled: bool) -> None:
    if compiled and "recompute" not in methods:
        pytest.skip("one method is enough")
    model = {**MODEL, "shared_experts": 1, "layers": 4}
    sections: dict[str, Any] = {"model": model, "train": {"compile": compiled}}
    trainer = build_trainer(Recipe.load(tiny_recipe(methods=methods, **sections)))
    losses = [trainer.train_step()["loss"] for _ in range(5)]
    if "sam" in methods:
        return
    plain = build_trainer(Recipe.load(tiny_recipe(model=model)))
    assert losses == pytest.approx([plain.train_step()["loss"] for _ in range(5)], rel=1e-5)


def test_memo_refuses_a_block_whose_rows_are_not_its_tokens() -> None:
    recipe = tiny_recipe(methods={"memo": {"alpha": 0.5}}, model={**MODEL, "layers": 4})
    trainer = build_trainer(Recipe.load(recipe))
    with pytest.raises(HeadwayError, match="Switch memo off"):
        trainer.train_step()
