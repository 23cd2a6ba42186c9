"""The fitted ratio of tokens to parameters, against a law whose best size is known in closed form; refusals.

Needs: numpy and scipy only.
Run: pytest tests/plan/test_one_epoch_ratio.py
"""

import math

import numpy as np
import pytest

from headway.core.errors import HeadwayError
from headway.plan.one_epoch import SizeRun, fit_tokens_per_param, runs_from_curve

A, B, E = 400.0, 2000.0, 1.7
BUDGETS = (1e15, 4e15, 1.6e16)


def law(parameters, tokens, alpha=0.35, beta=0.35):
    """Hoffmann et al. (arXiv 2203.15556), equation 2."""
    return E + A * parameters**-alpha + B * tokens**-beta


def best(budget, alpha=0.35, beta=0.35):
    """Their equation 4: the size with the lowest loss, and its ratio, for a cost of 6 P T."""
    parameters = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (budget / 6) ** (beta / (alpha + beta))
    return parameters, budget / 6 / parameters**2


def runs(noise=0.0, seed=0, budgets=BUDGETS, factors=(0.25, 0.5, 1, 2, 4), alpha=0.35, beta=0.35, shift=1.2):
    rng = np.random.default_rng(seed)
    return [
        (p, c / 6 / p, law(p, c / 6 / p, alpha, beta) * math.exp(noise * rng.normal()))
        for c in budgets
        for p in (best(c, alpha, beta)[0] * f * shift for f in factors)
    ]


def test_the_best_ratio_is_found_with_an_interval_that_holds_it():
    true = best(BUDGETS[1])[1]
    hits = 0
    for seed in range(20):
        fit = fit_tokens_per_param(runs(0.003, seed), draws=300)
        assert fit.ratio == pytest.approx(true, rel=0.1)
        hits += fit.interval[0] <= true <= fit.interval[1]
    assert hits >= 17


def test_best_sizes_exponent_and_losses_of_each_budget():
    fit = fit_tokens_per_param(runs())
    assert fit.exponent == pytest.approx(0.5, abs=0.02)
    assert fit.budgets == pytest.approx(BUDGETS)
    for found, budget in zip(fit.best, BUDGETS):
        parameters, ratio = best(budget)
        assert found.inside
        assert found.parameters == pytest.approx(parameters, rel=0.05)
        assert found.tokens / found.parameters == pytest.approx(ratio, rel=0.1)
        assert found.loss == pytest.approx(law(parameters, budget / 6 / parameters), rel=0.01)
        assert fit.best_parameters(budget) == pytest.approx(found.parameters)
        assert fit.loss_at(budget) == pytest.approx(found.loss, rel=0.02)
    assert fit.r2 > 0.98
    low, high = fit.loss_interval(1e17)
    assert low < fit.loss_at(1e17) < high


def test_the_ratio_may_change_with_the_budget():
    alpha, beta = 0.3, 0.4
    fit = fit_tokens_per_param(runs(alpha=alpha, beta=beta))
    assert fit.exponent == pytest.approx(beta / (alpha + beta), abs=0.02)
    for budget in (BUDGETS[0], BUDGETS[2], 1e17):
        assert fit.at(budget) == pytest.approx(best(budget, alpha, beta)[1], rel=0.1)
    assert fit.at(1e17) < fit.at(1e15)


def test_the_output_head_is_part_of_the_cost():
    """Costs given by the runs count: with a head of half the model's cost, the same budget buys fewer tokens."""
    head = 6 * 2e6

    def cost(p):
        return 6 * p + head

    grid = [p for p in np.geomspace(2e5, 5e7, 60)]
    at = {c: [SizeRun(p, c / cost(p), law(p, c / cost(p)), flops=c) for p in grid] for c in BUDGETS}
    fit = fit_tokens_per_param([r for runs in at.values() for r in runs if 0.4 < r.parameters / 4e6 < 4])
    true = min(at[BUDGETS[1]], key=lambda r: r.loss)
    assert fit.ratio == pytest.approx(true.tokens / true.parameters, rel=0.25)


def test_seconds_can_be_the_budget():
    slow = [(p, t, loss, 6 * p * t / 1e9) for p, t, loss in runs()]
    fit = fit_tokens_per_param(slow, by="seconds")
    assert fit.budgets == pytest.approx([c / 1e9 for c in BUDGETS])
    assert fit.ratio == pytest.approx(fit_tokens_per_param(runs()).ratio)
    with pytest.raises(HeadwayError, match="lacks the seconds"):
        fit_tokens_per_param(runs(), by="seconds")


def test_repeats_narrow_the_interval():
    once = fit_tokens_per_param(runs(0.005, 1))
    four = fit_tokens_per_param([run for seed in range(1, 5) for run in runs(0.005, seed)])

    def width(fit):
        return math.log(fit.interval[1] / fit.interval[0])

    assert width(four) < 0.8 * width(once)


def test_diverged_runs_are_left_out_and_listed():
    spoilt = [*runs(), (1e6, 1e15 / 6e6, math.nan), (2e6, 4e15 / 12e6, 50.0)]
    fit = fit_tokens_per_param(spoilt)
    assert [run.parameters for run in fit.excluded] == [1e6, 2e6]
    assert fit.ratio == fit_tokens_per_param(runs()).ratio


def test_costs_that_are_nearly_equal_are_one_budget():
    uneven = [(p, t * (1 + 0.05 * (i % 3)), loss) for i, (p, t, loss) in enumerate(runs())]
    assert len(fit_tokens_per_param(uneven).budgets) == 3


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (runs(budgets=BUDGETS[:2]), "2 budgets with 5, 5 sizes.*at least 3 sizes at each of 3 budgets"),
        (runs(factors=(0.5, 2)), "3 budgets with 2, 2, 2 sizes"),
        (runs()[:-3], "3 budgets with 5, 5, 2 sizes"),
        ([(p, t, math.nan) for p, t, _ in runs()], "no run with a finite loss"),
        ([(p, t, 3.0) for p, t, _ in runs()], "no U"),
        ([(p, t, 20 - loss) for p, t, loss in runs()], "no U"),
        (runs(noise=0.3), "no U"),
        (runs(factors=(4, 6, 8, 12)), "beyond those that ran.*smaller sizes"),
        (runs(factors=(1 / 12, 1 / 8, 1 / 6, 1 / 4)), "beyond those that ran.*larger sizes"),
        ([(-1.0, 1e9, 3.0)], "positive parameters"),
    ],
)
def test_what_cannot_be_fitted_is_refused_with_its_reason(bad, says):
    with pytest.raises(HeadwayError, match=says):
        fit_tokens_per_param(bad)


def test_excluded_runs_are_named_where_too_few_are_left():
    bad = [(p, t, math.nan if i in (12, 13, 14) else loss) for i, (p, t, loss) in enumerate(runs())]
    with pytest.raises(HeadwayError, match="after 3 diverged runs were left out"):
        fit_tokens_per_param(bad)


def test_a_learning_curve_is_read_at_several_budgets():
    tokens = np.geomspace(1e5, 1e8, 400)
    read = runs_from_curve(1e6, tokens, law(1e6, tokens), [1e10, 6e13, 3e14, 1e16])
    assert [r.tokens for r in read] == pytest.approx([1e7, 5e7])
    assert [r.loss for r in read] == pytest.approx([law(1e6, 1e7), law(1e6, 5e7)], rel=1e-4)
    dear = runs_from_curve(1e6, tokens, law(1e6, tokens), [6e13], flops_per_token=12e6)
    assert dear[0].tokens == pytest.approx(5e6)
    budgets = [1e14, 2e14, 4e14]
    tokens = np.geomspace(1e5, 1e9, 400)
    sizes = best(2e14)[0] * 2.0 ** np.arange(-2, 3)
    fit = fit_tokens_per_param([r for p in sizes for r in runs_from_curve(p, tokens, law(p, tokens), budgets)])
    assert fit.budgets == pytest.approx(budgets)
    assert fit.ratio == pytest.approx(best(2e14)[1], rel=0.1)
