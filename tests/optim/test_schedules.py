"""Schedules against transformers' own, by hand-computed values, and steps against shares of a budget.

Needs: nothing but the package and transformers (development extra).
Run: pytest tests/optim/test_schedules.py
"""

import itertools
import math

import pytest
import torch

from headway.core.errors import RecipeError
from headway.core.options import parse_options
from headway.optim.options import OptimizerOptions, ScheduleOptions
from headway.optim.schedules import SHORTEST_WARMUP, Schedules, build_schedule, factor

WARMUP, TOTAL, DECAY = 10, 100, 30


def theirs(name: str, **options) -> list[float]:
    """The factors transformers' scheduler gives steps 0 .. TOTAL."""
    import transformers.optimization as hf

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = getattr(hf, name)(optimizer, num_warmup_steps=WARMUP, **options)
    factors = []
    for _ in range(TOTAL + 1):
        factors.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize(
    ("ours", "name", "options"),
    [
        ({"name": "constant"}, "get_constant_schedule_with_warmup", {}),
        ({"name": "cosine"}, "get_cosine_schedule_with_warmup", {"num_training_steps": TOTAL}),
        (
            {"name": "cosine", "final": 0.1},
            "get_cosine_with_min_lr_schedule_with_warmup",
            {"num_training_steps": TOTAL, "min_lr_rate": 0.1},
        ),
        ({"name": "linear"}, "get_linear_schedule_with_warmup", {"num_training_steps": TOTAL}),
        ({"name": "inverse-sqrt"}, "get_inverse_sqrt_schedule", {}),
        (
            {"name": "wsd", "decay": DECAY, "final": 0.2},
            "get_wsd_schedule",
            {"num_training_steps": TOTAL, "num_decay_steps": DECAY, "min_lr_ratio": 0.2, "decay_type": "linear"},
        ),
    ],
)
def test_equals_transformers_but_wastes_no_step_at_rate_zero(ours, name, options):
    schedule = build_schedule(ScheduleOptions(warmup=WARMUP, **ours), TOTAL)
    expected = theirs(name, **options)
    got = [schedule(step) for step in range(TOTAL + 1)]
    assert got[WARMUP:] == pytest.approx(expected[WARMUP:], abs=1e-12)
    if name == "get_wsd_schedule":  # theirs rises from min_lr_ratio, ours from 0
        expected = [(value - 0.2) / 0.8 for value in expected]
    assert got[: WARMUP - 1] == pytest.approx(expected[1:WARMUP], abs=1e-12)
    assert got[WARMUP - 1] == 1.0
    assert min(got[:TOTAL]) > 0


def test_shares_of_the_run_are_steps_rounded_up():
    share = build_schedule(ScheduleOptions(name="wsd", warmup=0.095, decay=0.3), TOTAL)
    steps = build_schedule(ScheduleOptions(name="wsd", warmup=10, decay=30), TOTAL)
    assert [share(s) for s in range(TOTAL)] == [steps(s) for s in range(TOTAL)]
    third = build_schedule(ScheduleOptions(name="constant", warmup=0.1), 3)
    assert third(0) == 1.0  # 0.3 steps become one


def test_by_hand():
    cosine = build_schedule(ScheduleOptions(warmup=0, final=0.5), 4)
    assert [cosine(s) for s in range(5)] == pytest.approx(
        [1, 0.5 + 0.25 * (1 + math.sqrt(0.5)), 0.75, 0.5 + 0.25 * (1 - math.sqrt(0.5)), 0.5]
    )
    wsd = build_schedule(ScheduleOptions(name="wsd", warmup=2, decay=4), 10)
    assert [wsd(s) for s in range(11)] == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    assert build_schedule(ScheduleOptions(name="inverse-sqrt", warmup=4), None)(16) == 0.5


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "wsd", "inverse-sqrt"])
@pytest.mark.parametrize("in_steps", [True, False])
def test_progress_at_a_steady_pace_agrees_with_steps(name, in_steps):
    """Warm-up and decay given in steps are converted at the pace so far; as shares they are shares of the budget."""
    options = {"warmup": 50 if in_steps else 0.05}
    if name == "wsd":
        options["decay"] = 200 if in_steps else 0.2
    if name in ("cosine", "linear", "wsd"):
        options["final"] = 0.1
    total = 1000
    stepped = build_schedule(ScheduleOptions(name=name, **options), total)
    timed = build_schedule(ScheduleOptions(name=name, **options), None)
    for step in range(total + 1):
        tolerance = 1e-12 if in_steps or step > 50 else 1 / 50 + 1e-12  # the rise starts at 0 where the pace is unknown
        assert timed(step, step / total) == pytest.approx(stepped(step), abs=tolerance), step


def test_a_slow_first_step_does_not_skip_the_warm_up():
    schedule = build_schedule(ScheduleOptions(warmup=0.02), None)
    assert schedule(0, 0.0) == 0.0
    assert [schedule(s, 0.05) for s in range(1, 4)] == pytest.approx([(s + 1) / SHORTEST_WARMUP for s in range(1, 4)])
    assert schedule(SHORTEST_WARMUP, 0.02) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "wsd", "inverse-sqrt"])
def test_stays_in_range_never_jumps_and_ends_at_final(name):
    final = {"final": 0.25} if name in ("cosine", "linear", "wsd") else {}
    schedule = build_schedule(ScheduleOptions(name=name, warmup=0.1, **final), 500)
    values = [schedule(step) for step in range(700)]
    assert all(0 < value <= 1 for value in values)
    assert max(abs(a - b) for a, b in itertools.pairwise(values)) <= 1 / 50 + 1e-12
    if final:
        assert values[500:] == [0.25] * 200
    by_progress = build_schedule(ScheduleOptions(name=name, warmup=0.1, **final), None)
    assert by_progress(700, 1.7) == pytest.approx(0.25 if final else values[500])


def test_the_whole_run_may_be_warm_up():
    schedule = build_schedule(ScheduleOptions(warmup=10), 10)
    assert [schedule(s) for s in range(10)] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert schedule(10) == 0.0
    assert factor("cosine", 1.0, warmup=1.0) == 0.0


@pytest.mark.parametrize(
    ("options", "total", "says"),
    [
        ({"warmup": 200}, 100, "schedule.warmup.*200 steps.*run of 100"),
        ({"name": "wsd", "warmup": 60, "decay": 60}, 100, "60.*60.*run of 100"),
    ],
)
def test_what_does_not_fit_into_the_run_is_refused(options, total, says):
    with pytest.raises(RecipeError, match=says):
        build_schedule(ScheduleOptions(**options), total)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"name": "cosin"}, "schedule.name.*Did you mean 'cosine'"),
        ({"warmup": "120%"}, "schedule.warmup.*below 100%"),
        ({"warmup": -3}, "schedule.warmup.*not|schedule.warmup.*such as"),
        ({"warmup": "ten"}, "schedule.warmup.*such as"),
        ({"final": 1.5}, "schedule.final"),
        ({"name": "constant", "final": 0.1}, "constant has no `final`"),
        ({"name": "cosine", "decay": 0.1}, "cosine has no `decay`"),
        ({"name": "wsd", "decay": 0}, "never falls"),
        ({"name": "wsd", "warmup": 0.9}, "110%"),
        ({"name": "inverse-sqrt", "warmup": 0}, "needs a warm-up"),
        ({"warmpu": 3}, "Did you mean 'warmup'"),
    ],
)
def test_bad_options_are_refused_with_their_path(raw, says):
    with pytest.raises(RecipeError, match=says):
        parse_options(ScheduleOptions, raw, "schedule")


def test_options_survive_a_round_trip_through_plain_data():
    for raw in ({"name": "wsd", "warmup": "5%", "decay": "2k"}, {"name": "constant", "warmup": "100"}, {}):
        options = parse_options(ScheduleOptions, raw)
        again = parse_options(ScheduleOptions, options.model_dump(mode="json"))
        assert again == options
        assert type(again.warmup) is type(options.warmup)


def test_a_budget_without_progress_is_refused():
    with pytest.raises(RecipeError, match="length of the run"):
        build_schedule(ScheduleOptions(), None)(5)


@pytest.mark.parametrize(
    ("raw", "says"),
    [({"lr": 0}, "optimizer.lr"), ({"betas": [0.9, 1.0]}, "betas"), ({"name": "adam"}, "adamw"), ({"eps": -1}, "eps")],
)
def test_bad_optimizer_options(raw, says):
    with pytest.raises(RecipeError, match=says):
        parse_options(OptimizerOptions, raw, "optimizer")


def test_the_registry_entry():
    assert Schedules.Options is ScheduleOptions
    assert Schedules.build(ScheduleOptions(), 10)(9) > 0
