"""One epoch (Komatsuzaki, arXiv 1906.06669): plan a run in which no token comes twice, fit and compare its curves.

Everything here works without the trainer: numbers and lists in, numbers out. The recipe's switch is in ``method.py``.
"""

from headway.plan.one_epoch.early_stop import PartialRun, Verdict, cannot_win
from headway.plan.one_epoch.planner import (
    Budget,
    OneEpochPlan,
    expected_unique_share,
    flops,
    one_epoch_plan,
    one_epoch_tokens,
    rebalance,
    seconds,
)
from headway.plan.one_epoch.power_law import HeldOut, PowerLaw, fit_power_law, held_out_error
from headway.plan.one_epoch.ratio import Best, RatioFit, SizeRun, fit_tokens_per_param, runs_from_curve
from headway.plan.one_epoch.sizes import Size, measure
from headway.plan.one_epoch.speedup import Reached, Speedup, lower_envelope, monotone, speedup_at_loss, time_to_loss

__all__ = [
    "Best",
    "Budget",
    "HeldOut",
    "OneEpochPlan",
    "PartialRun",
    "PowerLaw",
    "RatioFit",
    "Reached",
    "Size",
    "SizeRun",
    "Speedup",
    "Verdict",
    "cannot_win",
    "expected_unique_share",
    "fit_power_law",
    "fit_tokens_per_param",
    "flops",
    "held_out_error",
    "lower_envelope",
    "measure",
    "monotone",
    "one_epoch_plan",
    "one_epoch_tokens",
    "rebalance",
    "runs_from_curve",
    "seconds",
    "speedup_at_loss",
    "time_to_loss",
]
