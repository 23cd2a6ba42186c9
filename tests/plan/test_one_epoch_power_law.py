"""The power-law fit: truth within its intervals on simulated curves, prediction of a held-out end, refusals.

Needs: numpy and scipy only.
Run: pytest tests/plan/test_one_epoch_power_law.py
"""

import numpy as np
import pytest
from scipy.optimize import curve_fit

from headway.core.errors import HeadwayError
from headway.plan.one_epoch import fit_power_law, held_out_error

TRUTH = {"irreducible": 1.5, "scale": 6.0, "exponent": 0.35}
STEPS = np.linspace(0, 2000, 51)[1:]


def law(steps, irreducible=1.5, scale=6.0, exponent=0.35):
    return irreducible + scale * np.asarray(steps, float) ** -exponent


def noise(seed, n=STEPS.size, size=0.004, correlation=0.0):
    rng = np.random.default_rng(seed)
    shocks = rng.normal(size=n) * size * np.sqrt(1 - correlation**2)
    series = [shocks[0] / np.sqrt(1 - correlation**2)]
    for shock in shocks[1:]:
        series.append(correlation * series[-1] + shock)
    return np.exp(series)


def test_a_curve_without_noise_gives_its_parameters_back():
    fit = fit_power_law(STEPS, law(STEPS))
    for name, value in TRUTH.items():
        assert getattr(fit, name) == pytest.approx(value, rel=1e-4)
    assert fit.predict(20000) == pytest.approx(law(20000), rel=1e-6)
    assert fit.predict([10, 1000]) == pytest.approx(law([10, 1000]), rel=1e-6)
    assert fit.r2 == pytest.approx(1.0)
    assert fit.noise < 1e-6
    assert fit.steps == (120.0, 2000.0)  # 5 % are warm-up


@pytest.mark.parametrize(("correlation", "at_least"), [(0.0, 0.85), (0.6, 0.75)])
def test_intervals_hold_the_truth_about_as_often_as_they_say(correlation, at_least):
    """95 % intervals; 93-95 % and 87 % over many more curves than these 40, whose share varies by 5 %."""
    curves = 40
    hits = dict.fromkeys([*TRUTH, "extrapolated"], 0)
    for seed in range(curves):
        fit = fit_power_law(STEPS, law(STEPS) * noise(seed, correlation=correlation), draws=80)
        for name, value in TRUTH.items():
            hits[name] += fit.ci[name][0] <= value <= fit.ci[name][1]
        low, high = fit.interval(20000)
        hits["extrapolated"] += low <= law(20000) <= high
    for name, count in hits.items():
        assert at_least <= count / curves, (name, count / curves)
    assert min(hits.values()) < curves  # nor are they so wide that they say nothing


def test_intervals_narrow_with_the_noise():
    wide, narrow = (fit_power_law(STEPS, law(STEPS) * noise(1, size=s)).ci["exponent"] for s in (0.008, 0.001))
    assert 4 < (wide[1] - wide[0]) / (narrow[1] - narrow[0]) < 16


def test_agrees_with_scipy_where_there_are_no_outliers():
    loss = law(STEPS) * noise(3)
    kept = STEPS >= 100
    theirs, _ = curve_fit(
        lambda x, e, a, c: np.log(law(x, e, a, c)), STEPS[kept], np.log(loss[kept]), p0=[1.0, 5.0, 0.3]
    )
    fit = fit_power_law(STEPS, loss)
    assert fit.predict(20000) == pytest.approx(law(20000, *theirs), rel=0.01)


def test_the_pure_form_has_no_irreducible_loss():
    loss = law(STEPS, 0.0, 6.0, 0.1) * noise(4)
    fit = fit_power_law(STEPS, loss, irreducible=False)
    assert fit.irreducible == 0.0
    assert fit.exponent == pytest.approx(0.1, abs=0.005)
    assert fit.ci["exponent"][0] < 0.1 < fit.ci["exponent"][1]
    full = fit_power_law(STEPS, loss)
    assert full.ci["irreducible"][1] > 0.1  # with L_inf free, a pure law cannot tell c from L_inf this well


def test_outliers_neither_move_nor_widen_the_fit():
    loss = law(STEPS) * noise(5)
    clean = fit_power_law(STEPS, loss)
    loss[[20, 30]] *= 2
    spoilt = fit_power_law(STEPS, loss)
    assert (clean.outliers, spoilt.outliers) == (0, 2)
    assert spoilt.predict(20000) == pytest.approx(clean.predict(20000), rel=0.02)
    width = [f.interval(20000)[1] - f.interval(20000)[0] for f in (clean, spoilt)]
    assert width[1] < 1.5 * width[0]


def test_warm_up_and_decay_can_be_left_out():
    loss = law(STEPS) * noise(6, size=0.001)
    loss[STEPS < 200] *= 1.5
    loss[STEPS > 1600] *= 0.9
    fit = fit_power_law(STEPS, loss, skip=0.1, stop=0.8)
    assert fit.predict(20000) == pytest.approx(law(20000), rel=0.02)
    assert fit.steps == (200.0, 1600.0)


def test_long_noisy_curves_are_averaged_first():
    steps = np.arange(1, 5001)
    fit = fit_power_law(steps, law(steps) * noise(7, steps.size, 0.05))
    assert fit.predict(20000) == pytest.approx(law(20000), rel=0.03)
    assert fit.noise == pytest.approx(0.05, rel=0.2)


def test_same_seed_same_interval():
    loss = law(STEPS) * noise(8)
    assert fit_power_law(STEPS, loss).ci == fit_power_law(STEPS, loss).ci
    assert fit_power_law(STEPS, loss).ci != fit_power_law(STEPS, loss, seed=1).ci


def test_the_beginning_of_a_curve_foretells_its_end():
    steps = np.linspace(0, 2000, 101)[1:]
    told = held_out_error(steps, law(steps) * noise(9, steps.size, 0.003), share=0.3)
    assert abs(told.relative_error) < 0.05
    assert told.fit.steps[1] <= 600
    assert told.interval[0] < told.predicted < told.interval[1]
    bent = law(steps) * (1 - 0.15 * (steps / 2000) ** 3)  # as a decaying learning rate does
    assert held_out_error(steps, bent, share=0.3).relative_error > 0.1


P = STEPS / 2000


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (3.0 * noise(10), "does not fall"),
        (2 + P, "does not fall"),
        (np.full(50, 2.0), "does not fall"),
        ((2 + 2 / (1 + np.exp((P - 0.6) * 15))) * noise(10), "ever faster"),
        ((law(STEPS) - 0.4 * P**3) * noise(10), "ever faster.*learning rate decays"),
        (5 - 3 * P, "ever faster"),
        ((law(STEPS) + np.maximum(0, P - 0.5)) * noise(10), "turns up after step 1000.*over-fits"),
        (law(STEPS) * noise(10, size=0.1), "explains only .*less noisy"),
        (np.where(np.arange(50) == 20, np.nan, law(STEPS)), "not finite at point 20.*diverged"),
        (np.where(np.arange(50) == 20, np.inf, law(STEPS)), "not finite"),
        (law(STEPS) - 2, "positive losses"),
        (law(STEPS)[:7], "two lists of equal length"),
    ],
)
def test_what_is_no_power_law_is_refused_with_its_reason(loss, says):
    with pytest.raises(HeadwayError, match=says):
        fit_power_law(STEPS, loss)


@pytest.mark.parametrize(
    ("steps", "options", "says"),
    [
        (STEPS[:7], {}, "7 points.*at least 8"),
        (STEPS, {"skip": 0.9}, "6 points between 90% and 100%"),
        (STEPS[::-1], {}, "do not increase"),
        (np.repeat(STEPS[:25], 2), {}, "do not increase"),
    ],
)
def test_too_few_or_disordered_points_are_refused(steps, options, says):
    with pytest.raises(HeadwayError, match=says):
        fit_power_law(steps, law(STEPS)[: len(steps)], **options)


def test_step_zero_is_left_out():
    steps = np.append(0, STEPS)
    assert fit_power_law(steps, np.append(9.0, law(STEPS))).exponent == pytest.approx(0.35, rel=1e-3)


def test_a_share_too_short_to_fit_is_refused():
    with pytest.raises(HeadwayError, match="5 points in the first 10%"):
        held_out_error(STEPS, law(STEPS), share=0.1)
