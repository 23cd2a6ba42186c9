"""The planner: sizes counted as real models have them, the budget spent, the ratio kept, warnings where data is short.

Needs: torch for the comparison with built models.
Run: pytest tests/plan/test_one_epoch_planner.py
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from headway.core.errors import HeadwayError
from headway.core.recipe import Recipe, merge
from headway.data.order import sample_index
from headway.models.build import build_model
from headway.models.config import GPT2Config, LlamaConfig, TransformersConfig
from headway.plan.one_epoch import (
    SizeRun,
    expected_unique_share,
    fit_power_law,
    fit_tokens_per_param,
    flops,
    measure,
    one_epoch_plan,
    one_epoch_tokens,
    rebalance,
    seconds,
)
from headway.plan.one_epoch.sizes import resized

LLAMA = LlamaConfig(hidden=512, layers=8, heads=8, vocab=4096)
GPT2 = GPT2Config(hidden=128, layers=4, heads=4, vocab=257, context=128)
FAMILIES = [
    LLAMA,
    LlamaConfig(
        hidden=96, layers=3, heads=6, kv_heads=2, vocab=300, qkv_bias=True, tied=False, window=16, window_layers=(1,)
    ),
    LlamaConfig(hidden=64, layers=2, heads=2, head_dim=48, intermediate=100, vocab=64, qk_norm=True),
    GPT2,
    GPT2Config(hidden=64, layers=2, heads=4, intermediate=72, vocab=99, context=32, tied=False),
]


@pytest.mark.parametrize("config", FAMILIES[1:], ids=lambda c: f"{c.family}-{c.hidden}")
def test_a_size_is_what_the_built_model_has(config):
    model = build_model(config, seed=0)
    outside = ("embedding", "positions", "head", "wte", "wpe", "lm_head")
    inside = {name: p for name, p in model.named_parameters() if not any(part in name for part in outside)}
    blocks = sum(p.numel() for p in model.structure().blocks.parameters())
    norm = sum(p.numel() for p in model.structure().norm.parameters())
    size = measure(config, sequence=24)
    assert size.parameters == blocks + norm == sum(p.numel() for p in inside.values())
    assert size.flops_per_token == model.flops_per_token(24)


def test_without_a_sequence_only_weights_cost():
    size = measure(GPT2)
    matrices = GPT2.layers * 12 * GPT2.hidden**2
    assert size.flops_per_token == 6 * matrices + 6 * GPT2.hidden * GPT2.vocab
    assert size.parameters == matrices + GPT2.layers * 13 * GPT2.hidden + 2 * GPT2.hidden


@pytest.mark.parametrize("family", FAMILIES[::3], ids=lambda c: c.family)
@pytest.mark.parametrize("budget", [1e14, 3e15, 1e18, 1e21])
@pytest.mark.parametrize("ratio", [5, 20])
def test_the_budget_is_spent_at_the_ratio_and_the_usual_shape(family, budget, ratio):
    plan = one_epoch_plan(flops(budget), 1e13, 8192, family, ratio=ratio, sequence=128)
    size = plan.size
    assert plan.flops == plan.tokens * size.flops_per_token
    assert plan.flops == pytest.approx(budget, rel=max(0.02, 0.5 / plan.steps))
    assert plan.tokens == plan.steps * 8192
    assert plan.ratio == pytest.approx(plan.tokens / size.parameters)
    assert plan.ratio == pytest.approx(ratio, rel=0.35 if budget < 1e15 else 0.1)
    assert 0.5 <= size.aspect / (family.hidden / family.layers) <= 2
    assert size == measure(size.config, 128)
    assert (size.config.hidden, size.config.layers, size.config.heads) == (size.width, size.depth, size.heads)
    assert plan.epochs == pytest.approx(plan.tokens / 1e13)


def test_rebalancing_keeps_the_compute_and_gives_the_ratio():
    """Step 4 of the method: P I unchanged within 2 %, T / P the wanted one."""
    for parameters, steps, per_step, ratio in [(1e6, 10_000, 8192, 5), (1e8, 1000, 65536, 20), (3e5, 500, 2048, 1)]:
        new_parameters, new_steps = rebalance(parameters, steps, per_step, ratio)
        assert new_parameters * new_steps == pytest.approx(parameters * steps, rel=1e-9)
        assert new_steps * per_step / new_parameters == pytest.approx(ratio, rel=1e-9)
    bigger, fewer = rebalance(1e6, 10_000, 8192, 5)
    assert bigger > 1e6  # 82 tokens per parameter: the model was too small
    assert fewer < 10_000
    with pytest.raises(HeadwayError, match="steps"):
        rebalance(1e6, 0, 8192, 5)


def test_a_plan_keeps_parameters_times_steps_within_two_per_cent():
    """The rounding of widths moves P; the steps follow, so that the compute of a rebalanced plan stays."""
    per_step, ratio = 8192, 20.0
    start = measure(LLAMA)
    steps0 = 40_000
    cost0 = start.flops_per_token * steps0 * per_step
    plan = one_epoch_plan(flops(cost0), 1e12, per_step, LLAMA, ratio=ratio)
    head = 6.0 * LLAMA.vocab

    def products(size, steps):
        return (size.flops_per_token - head * size.width) / 6 * steps

    spent = products(plan.size, plan.steps) + head / 6 * plan.size.width * plan.steps
    assert spent == pytest.approx(products(start, steps0) + head / 6 * start.width * steps0, rel=0.02)


def test_seconds_need_a_rate_and_may_depend_on_the_size():
    by_flops = one_epoch_plan(flops(1.8e15), 1e12, 8192, LLAMA)
    by_time = one_epoch_plan(seconds(1800), 1e12, 8192, LLAMA, flops_per_second=1e12)
    assert by_time.size == by_flops.size
    assert by_time.steps == by_flops.steps
    assert by_time.seconds == pytest.approx(1800, rel=0.02)
    assert by_flops.seconds is None
    slow_when_small = one_epoch_plan(
        seconds(1800), 1e12, 8192, LLAMA, flops_per_second=lambda size: 1e12 * min(1, size.width / 512)
    )
    assert slow_when_small.seconds == pytest.approx(1800, rel=0.02)
    assert slow_when_small.steps < by_time.steps or slow_when_small.size.parameters < by_time.size.parameters
    with pytest.raises(HeadwayError, match="rate of the machine"):
        one_epoch_plan(seconds(1800), 1e12, 8192, LLAMA)


def test_too_little_data_says_how_many_epochs_and_gives_the_best_smaller_plan():
    plan = one_epoch_plan(flops(3e16), 50e6, 8192, LLAMA, ratio=20)
    assert plan.epochs > 4
    assert f"{plan.epochs:.2f} epochs" in plan.warnings[0]
    assert "over-fits" in plan.warnings[0]
    smaller = plan.smaller
    assert smaller.epochs <= 1
    assert smaller.tokens > 50e6 - 8192
    assert smaller.ratio == pytest.approx(20, rel=0.2)
    assert smaller.flops < plan.flops
    assert smaller.size.parameters < plan.size.parameters
    few = one_epoch_plan(flops(3e15), 50e6, 8192, LLAMA, ratio=20)
    assert 1 < few.epochs < 4
    assert "costs little" in few.warnings[0]
    enough = one_epoch_plan(flops(3e15), 500e6, 8192, LLAMA, ratio=20)
    assert enough.smaller is None
    assert not any("epochs" in warning for warning in enough.warnings)


def test_near_duplicates_are_no_unique_tokens():
    plain = one_epoch_plan(flops(1e15), 100e6, 8192, LLAMA)
    spoilt = one_epoch_plan(flops(1e15), 100e6, 8192, LLAMA, duplicate_rate=0.7)
    assert plain.epochs < 1 < spoilt.epochs
    assert spoilt.epochs == pytest.approx(plain.epochs / 0.3)
    assert any("near-duplicates" in warning for warning in spoilt.warnings)


def test_a_learning_curve_predicts_the_loss_and_says_when_it_reaches_far():
    steps = np.linspace(20, 2000, 60)
    fit = fit_power_law(steps, 1.5 + 6 * steps**-0.35 * np.exp(0.002 * np.random.default_rng(0).normal(size=60)))
    plan = one_epoch_plan(flops(3e14), 1e12, 8192, LLAMA, fit=fit)
    assert plan.loss == fit.predict(plan.steps)
    assert plan.loss_interval[0] < plan.loss < plan.loss_interval[1]
    far = one_epoch_plan(flops(1e17), 1e12, 8192, LLAMA, fit=fit)
    assert any("extrapolated from 2000 steps" in warning for warning in far.warnings)
    assert "predicted" in str(far)


def test_a_fitted_ratio_moves_with_the_budget_and_predicts_the_loss():
    def run(p, budget):
        tokens = budget / 6 / p
        return SizeRun(p, tokens, 1.7 + 400 * p**-0.3 + 2000 * tokens**-0.4)

    runs = [run(p, c) for c in (1e14, 4e14, 1.6e15) for p in np.geomspace(4e6, 1.5e8, 6)]
    fit = fit_tokens_per_param(runs)
    plan = one_epoch_plan(flops(4e14), 1e13, 1024, LLAMA, ratio=fit)
    assert plan.ratio == pytest.approx(fit.at(4e14), rel=0.15)
    assert plan.loss == pytest.approx(fit.loss_at(plan.flops))
    far = one_epoch_plan(flops(1e18), 1e13, 1024, LLAMA, ratio=fit)
    assert any("far outside" in warning for warning in far.warnings)


def test_the_recipe_of_a_plan_is_one_that_can_be_run():
    plan = one_epoch_plan(flops(2e12), 5e6, 2048, GPT2, sequence=128)
    model = {"family": "gpt2", "hidden": 8, "layers": 1, "heads": 1}
    recipe = Recipe.load(merge({"model": model, "data": {"tokenizer": "byte"}}, plan.recipe()))
    assert recipe.model.hidden == plan.size.width
    assert recipe.train.steps == plan.steps
    assert "one-epoch" in recipe.methods


def test_resizing_keeps_everything_in_proportion():
    grouped = LlamaConfig(hidden=512, layers=8, heads=8, kv_heads=2, intermediate=1024, vocab=100, rope_theta=5e5)
    bigger = resized(grouped, 1024, 12)
    assert (bigger.heads, bigger.kv_heads, bigger.intermediate, bigger.rope_theta) == (16, 4, 2048, 5e5)
    assert resized(LlamaConfig(hidden=256, layers=6, heads=4, vocab=9), 96, 2).head_width == 32
    assert resized(LlamaConfig(hidden=64, layers=2, heads=2, head_dim=48, vocab=9), 96, 2).head_dim == 48


def test_drawing_with_replacement_is_not_one_epoch():
    assert expected_unique_share(1000, 1000) == pytest.approx(1 - math.exp(-1))
    rng = np.random.default_rng(0)
    drawn = np.unique(rng.integers(0, 100_000, 100_000)).size / 100_000
    assert drawn == pytest.approx(expected_unique_share(1e5, 1e5), abs=0.005)
    assert np.unique(sample_index(0, np.arange(100_000), 100_000)).size == 100_000  # the trainer's order is one
    assert one_epoch_tokens(4e5, 10) == 4e6


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"ratio": 0}, "ratio.*positive"),
        ({"ratio": math.nan}, "ratio"),
        ({"unique_tokens": 100}, "unique_tokens.*one step of 8192"),
        ({"unique_tokens": math.inf}, "unique_tokens"),
        ({"duplicate_rate": 1.0}, "duplicate_rate"),
        ({"flops_per_second": -1.0, "budget": seconds(10)}, "flops_per_second"),
        ({"family": TransformersConfig(path="x")}, "llama or gpt2"),
        ({"family": LlamaConfig(hidden=64, layers=2, heads=2)}, "vocab"),
    ],
)
def test_bad_arguments_are_refused(arguments, says):
    given = SimpleNamespace(budget=flops(1e15), unique_tokens=1e9, tokens_per_step=8192, family=LLAMA)
    given.__dict__.update(arguments)
    with pytest.raises(HeadwayError, match=says):
        one_epoch_plan(**given.__dict__)


@pytest.mark.parametrize("amount", [0, -1, math.nan, math.inf])
def test_a_budget_is_a_positive_number(amount):
    with pytest.raises(HeadwayError, match="positive"):
        flops(amount)
    with pytest.raises(HeadwayError, match="positive"):
        seconds(amount)
