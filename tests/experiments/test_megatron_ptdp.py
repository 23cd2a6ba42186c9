"""PTD-P's experiment: its tables, fits that predict rows they have not seen, a padded pipeline, exact layouts.

Needs nothing. Run: pytest tests/experiments/test_megatron_ptdp.py
"""

import pytest
import torch

from headway.core.recipe import Recipe
from headway.experiments import megatron_ptdp as experiment
from headway.experiments import ptdp_tables as tables
from headway.experiments.padded_pipeline import step_seconds
from headway.parallel.parity import parity


def test_rows_are_consistent():
    for row in tables.TABLE_1:
        assert row.data * row.tensor * row.pipeline == row.devices
        assert row.batch % (row.data * row.micro) == 0
        assert sum(row.blocks) == row.layers
        assert row.shape.parameters / 1e9 == pytest.approx(row.billions, abs=0.1)


def test_one_number_fitted_predicts_rows_that_were_left_out():
    width = tables.left_out(tables.fit_width, tables.WITHIN_A_NODE)
    assert len(width) == 7
    assert max(map(abs, width.values())) <= 0.065
    model = tables.left_out(tables.fit_model, tables.TABLE_1)
    assert len(model) == 10
    assert max(map(abs, model.values())) <= 0.065


def test_one_constant_rate_misses_the_largest_model():
    assert tables.constant_misses() == pytest.approx(-0.25, abs=0.02)


def test_the_profile_is_what_was_fitted():
    fitted = tables.fitted_reach(tables.WITHIN_A_NODE)
    assert tables.cluster("a100").reach.most == pytest.approx(fitted.most, abs=0.01)


def test_formulas_give_what_the_simulated_schedules_do():
    for row in (tables.TABLE_1[4], tables.TABLE_1[5]):
        reach = tables.Reach(most=0.67)
        assert row.predict(reach, simulate=True).seconds == pytest.approx(row.predict(reach).seconds, rel=0.01)


def test_scaling_and_interleaving_have_the_papers_direction():
    reach = tables.Reach(most=0.67)
    ptdp, zero = tables.scaling(reach)
    assert ptdp.fall(ptdp.predicted) <= 0.1
    assert zero.fall(zero.predicted) >= 0.6
    few, many = (tables.interleaving(batch, True, reach) for batch in (12, 60))
    assert few > 0.08
    assert few > 3 * many > 0
    assert tables.interleaving(60, False, reach) < many
    assert 0 < tables.gathering(60, reach) < 0.12


def test_a_padded_pipeline_takes_at_least_what_the_formula_says():
    times = step_seconds([("1f1b", 1), ("interleaved-1f1b", 2)], [2, 4], 0.005, 0.01, 1)
    assert set(times) == {(1, 2), (1, 4), (2, 2), (2, 4)}
    for (chunks, count), taken in times.items():
        # Sleeping cannot be faster; how much slower a busy machine makes it is no matter of the code.
        assert min(taken) >= (count + 1 / chunks) * 2 * 0.015 * 0.99


@pytest.mark.parametrize("name", experiment.LAYOUTS)
def test_layouts_are_exact(name):
    recipe = Recipe.load({**experiment.PARITY_RECIPE, "parallel": experiment.LAYOUTS[name]})
    found = parity(recipe, 4, steps=2)
    assert found.loss_difference < 1e-9
    assert found.gradient_difference < 1e-9
    assert "embedding.weight" in found.gradients


@pytest.mark.slow
def test_the_gpus_measurement_runs():
    ratios = experiment.gpu_ratios(torch.device("cpu"), width=32, tokens=16)
    assert set(ratios) == {"gpu_recompute", "gpu_compile"}
    assert all(ratio > 0 for ratio in ratios.values())
