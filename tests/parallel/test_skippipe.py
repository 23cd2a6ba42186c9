"""SkipPipe on one process: stages left out and reordered, normalisation, orders, the method's own behaviour.

Needs nothing. Run: pytest tests/parallel/test_skippipe.py
"""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from headway.core.build import build_trainer
from headway.core.errors import HeadwayError, MethodError, ModelError
from headway.core.recipe import Recipe
from headway.models.build import build_model
from headway.models.config import GPT2Config, LlamaConfig, MoEConfig
from headway.parallel.skippipe.cluster import Rules, ScheduleError, visits
from headway.parallel.skippipe.constraints import order_violations
from headway.parallel.skippipe.orders import draw_orders, legal_orders
from headway.parallel.skippipe.stage_skip import (
    StageSkip,
    cut_blocks,
    evaluate_share,
    share_orders,
    visit_scale,
)
from tests.conftest import tiny_recipe

SIZES = {"hidden": 16, "layers": 6, "heads": 2, "vocab": 20, "context": 16}


def model_of(family: type = LlamaConfig, **sizes: object) -> torch.nn.Module:
    return build_model(family(**{**SIZES, **sizes}), seed=0).double()


def tokens_of(seed: int = 0) -> torch.Tensor:
    return torch.randint(20, (2, 9), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", [LlamaConfig, GPT2Config])
def test_all_stages_in_order_are_the_model(family: type) -> None:
    model, tokens = model_of(family), tokens_of()
    assert torch.equal(StageSkip(model, 3).forward(tokens), model(tokens))


@pytest.mark.parametrize("family", [LlamaConfig, GPT2Config])
def test_an_order_runs_those_blocks_and_no_others(family: type) -> None:
    model, tokens = model_of(family), tokens_of()
    x, shared = model.embed(tokens)
    for index in (0, 1, 4, 5, 2, 3):  # stages 0, 2, 1 of two blocks each
        x = model.blocks[index](x, **shared)
    assert torch.equal(StageSkip(model, 3).hidden(tokens, order=(0, 2, 1)), model.norm(x))
    x, shared = model.embed(tokens)
    for index in (0, 1, 4, 5):
        x = model.blocks[index](x, **shared)
    skip = StageSkip(model, 3, sampler=lambda: (0, 2))
    assert torch.equal(skip.forward(tokens), F.linear(model.norm(x), model.head_weight))
    with pytest.raises(ValueError, match="begins with stage 0"):
        skip.forward(tokens, order=(1, 0))


def test_installed_it_acts_only_within_using() -> None:
    model, tokens = model_of(), tokens_of()
    whole = model.hidden(tokens)
    skip = StageSkip(model, 6)
    skip.install()
    with skip.using((0, 3)):
        assert torch.equal(model.hidden(tokens), skip.hidden(tokens, order=(0, 3)))
        assert not torch.equal(model.hidden(tokens), whole)
    assert torch.equal(model.hidden(tokens), whole)
    skip.remove()
    assert "hidden" not in model.__dict__


def gradients(model: torch.nn.Module, orders: list, scale: list[float] | None, targets: int) -> dict[str, torch.Tensor]:
    model.zero_grad()
    skip = StageSkip(model, 6)
    for index, order in enumerate(orders):
        tokens = tokens_of(index)
        logits = F.linear(skip.hidden(tokens, order=order, scale=scale), model.head_weight)[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        (loss / targets).backward()
    return {n: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}


def test_per_visit_is_the_mean_over_the_visitors() -> None:
    model, each = model_of(), 16
    orders = [(0, 1, 2, 4), (0, 2, 3, 4), (0, 1, 3, 5), (0, 2, 1, 3)]
    scale = visit_scale(orders, [each] * 4, 6)
    assert scale == [1.0, 4 / 3, 4 / 3, 4 / 3, 2.0, 4.0]
    scaled = gradients(model, orders, scale, 4 * each)
    plain = gradients(model, orders, None, 4 * each)
    for stage in range(6):
        visitors = [order if stage in order else None for order in orders]
        count = sum(order is not None for order in visitors)
        name = f"blocks.{stage}.mlp.up.weight"
        # the mean over those that visited: each alone, divided by their own targets
        mean = torch.zeros_like(plain[name])
        for index, order in enumerate(orders):
            if stage in order:
                mean += gradients_of_one(model, order, index, each)[name] / count
        torch.testing.assert_close(scaled[name], mean, rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(scaled[name], plain[name] * scale[stage], rtol=1e-11, atol=1e-14)
    # what is on every path is untouched by the scaling of the stages after it
    torch.testing.assert_close(scaled["embedding.weight"], plain["embedding.weight"], rtol=1e-11, atol=1e-14)


def gradients_of_one(model: torch.nn.Module, order: tuple, index: int, targets: int) -> dict[str, torch.Tensor]:
    model.zero_grad()
    tokens = tokens_of(index)
    logits = StageSkip(model, 6).forward(tokens, order=order)[:, :-1]
    (F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum") / targets).backward()
    return {n: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}


def test_blocks_are_cut_evenly() -> None:
    assert cut_blocks(7, 3) == ((0, 1, 2), (3, 4), (5, 6))
    with pytest.raises(ModelError, match="2 to 2"):
        cut_blocks(2, 3)


def test_models_whose_blocks_cannot_be_left_out_are_refused() -> None:
    with pytest.raises(ModelError, match="no embed"):
        StageSkip(torch.nn.Linear(2, 2), 2)
    moe = build_model(MoEConfig(**SIZES, experts=2, expert_width=8), seed=0)
    with pytest.raises(ModelError, match="balance loss"):
        StageSkip(moe, 3)
    model = model_of()
    model.blocks[3].mlp.up.weight = model.blocks[1].mlp.up.weight
    with pytest.raises(ModelError, match="shared by blocks 1 and 3"):
        StageSkip(model, 3)


def test_orders_are_legal_complete_and_balanced() -> None:
    import itertools

    rules = Rules(4)
    every = [(0, *o) for o in itertools.permutations(range(1, 6), 3)]
    assert legal_orders(6, 4) == tuple(o for o in every if not order_violations(o, 6, rules))
    assert all(list(o) == sorted(o) for o in legal_orders(6, 4, 0)) and len(legal_orders(6, 4, 0)) == 10
    drawn = draw_orders(15, 6, 4, 2, random.Random(1))
    assert visits(drawn, 6) == [15] + [9] * 5
    assert draw_orders(15, 6, 4, 2, random.Random(1)) == drawn != draw_orders(15, 6, 4, 2, random.Random(2))
    assert max(visits(draw_orders(15, 6, 4, 2, random.Random(1), balanced=False), 6)[1:]) > 9
    with pytest.raises(ScheduleError, match="2 to 6"):
        legal_orders(6, 1)
    with pytest.raises(ScheduleError, match="unvisited"):
        legal_orders(8, 2)  # a jump of 4 at most does not reach stage 5


def test_shares() -> None:
    assert share_orders(4, 0.5) == [(0, 1), (0, 2), (0, 3)]
    model, tokens = model_of(), tokens_of()
    batch = {"tokens": tokens, "targets": tokens}
    skip = StageSkip(model, 6)
    whole = F.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten())
    assert evaluate_share(skip, [batch], 1.0) == pytest.approx(whole.item(), rel=1e-6)
    assert evaluate_share(skip, [batch], 0.5) != pytest.approx(whole.item(), rel=1e-6)


def recipe_of(**options: object) -> Recipe:
    methods = {"skip-pipeline": {"stages": 4, "path_length": 3, **options}}
    return Recipe.load(tiny_recipe(methods=methods, model={"layers": 4}, train={"micro_batch": 1}))


@pytest.mark.parametrize("options", [{}, {"scheduler": "none"}, {"scheduler": "cbs"}, {"resample": "fixed"},
                                     {"scheduler": "cbs", "resample": "fixed"}, {"swap": "none"}])  # fmt: skip
def test_the_method_keeps_to_its_paths(options: dict) -> None:
    trainer = build_trainer(recipe_of(**options))
    method = trainer.methods[0]
    for _ in range(3):
        trainer.train_step()
        assert not method.pending
    rules = Rules(3, 0 if options.get("swap") == "none" else 2)
    step_orders = [method.paths(4, step) for step in range(3)]
    assert not any(order_violations(o, 4, rules) for orders in step_orders for o in orders)
    assert (len(set(step_orders)) == 1) == (options.get("resample") == "fixed")
    report = method.report()
    assert report["visits"][0] == 1.0 and sum(report["visits"]) == pytest.approx(3.0)
    if options.get("scheduler") == "cbs":
        assert report["planned_seconds"] > 0
        again = build_trainer(recipe_of(**options))
        again.load_state_dict(trainer.state_dict())
        assert again.methods[0].schedule_used.paths == method.schedule_used.paths


def test_evaluation_is_of_the_full_model() -> None:
    trainer = build_trainer(recipe_of())
    trainer.train_step()
    found = trainer.evaluate()
    trainer.methods[0].skip.remove()
    assert trainer.evaluate() == found


def test_normalisations_differ() -> None:
    losses = [
        [trainer.train_step()["grad_norm"] for _ in range(2)]
        for trainer in (build_trainer(recipe_of(normalise=n)) for n in ("per_visit", "per_batch"))
    ]
    assert losses[0][0] > losses[1][0]


def test_bad_options() -> None:
    with pytest.raises(HeadwayError, match="more than the 4 stages"):
        recipe_of(path_length=5)
    with pytest.raises(MethodError, match="unvisited"):
        build_trainer(recipe_of(resample="fixed", path_length=2).override("train.micro_batch=4"))
    with pytest.raises(MethodError, match="number of blocks"):
        build_trainer(recipe_of(stages=5))
