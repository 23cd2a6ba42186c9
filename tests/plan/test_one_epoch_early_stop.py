"""Early stopping of runs that cannot win: the winner is never stopped, hopeless runs are, the rest is left alone.

Needs: numpy and scipy only.
Run: pytest tests/plan/test_one_epoch_early_stop.py
"""

import numpy as np
import pytest

from headway.core.errors import HeadwayError
from headway.plan.one_epoch import PartialRun, cannot_win

TOTAL = 10_000


def partial(irreducible, scale, exponent=0.35, share=0.2, seed=0, noise=0.003, total=TOTAL):
    steps = np.linspace(0, share * total, 41)[1:]
    rng = np.random.default_rng(seed)
    loss = (irreducible + scale * steps**-exponent) * np.exp(noise * rng.normal(size=steps.size))
    return PartialRun(steps, loss, total)


def test_a_hopeless_run_is_stopped_and_the_reason_names_the_numbers():
    verdicts = cannot_win({"good": partial(1.5, 6), "bad": partial(2.2, 6)})
    assert verdicts["good"].outcome == "keep"
    assert verdicts["bad"].outcome == "stop"
    assert "good" in verdicts["bad"].reason
    assert verdicts["bad"].interval[0] < verdicts["bad"].predicted < verdicts["bad"].interval[1]


def test_a_run_that_is_behind_but_will_win_is_kept():
    """What a mere comparison of losses at equal steps would stop: the bigger model starts slower and ends lower."""
    quick, slow = partial(2.0, 4, 0.4), partial(1.2, 14, 0.3)
    assert slow.loss[-1] > quick.loss[-1]
    assert cannot_win({"quick": quick, "slow": slow})["slow"].outcome == "keep"
    assert cannot_win({"quick": quick, "slow": slow}, schedule="decaying")["slow"].outcome == "stop"


def test_the_winner_is_hardly_ever_stopped():
    stopped = 0
    for seed in range(25):
        runs = {"best": partial(1.5, 6, seed=seed), "near": partial(1.55, 6, seed=seed + 100)}
        stopped += cannot_win(runs)["best"].outcome == "stop"
    assert stopped <= 1


def test_lengths_may_differ():
    verdicts = cannot_win({"short": partial(1.5, 6, total=2000), "long": partial(1.5, 6, total=2_000_000)})
    assert verdicts["short"].outcome == "stop"
    assert verdicts["long"].outcome == "keep"


def test_diverged_and_unclear_runs_are_told_apart():
    flat = PartialRun(np.arange(1, 30), np.full(29, 3.0), TOTAL)
    spoilt = partial(1.5, 6)
    spoilt.loss[7] = np.nan
    verdicts = cannot_win({"spoilt": spoilt, "flat": flat, "good": partial(1.5, 6)})
    assert list(verdicts) == ["spoilt", "flat", "good"]
    assert verdicts["spoilt"].outcome == "diverged"
    assert verdicts["flat"].outcome == "unknown"
    assert "does not fall" in verdicts["flat"].reason
    assert verdicts["good"].outcome == "keep"


def test_only_diverged_runs_leave_nothing_to_compare():
    spoilt = partial(1.5, 6)
    spoilt.loss[0] = np.inf
    for schedule in ("constant", "decaying"):
        assert cannot_win({"only": spoilt}, schedule=schedule)["only"].outcome == "diverged"


def test_with_a_decaying_schedule_runs_are_compared_at_equal_fractions():
    runs = {
        "a": partial(1.5, 6, share=0.2),
        "b": partial(1.5, 6.02, share=0.1, seed=1),
        "c": partial(2.0, 6, share=0.3),
    }
    verdicts = cannot_win(runs, schedule="decaying")
    assert [verdicts[name].outcome for name in "abc"] == ["keep", "keep", "stop"]
    assert "10% of the run" in verdicts["c"].reason


def test_no_runs_and_no_evaluations_are_refused():
    with pytest.raises(HeadwayError, match="no runs"):
        cannot_win({})
    with pytest.raises(HeadwayError, match="early stopping of x: has no evaluation"):
        cannot_win({"x": PartialRun([], [], 10)})
