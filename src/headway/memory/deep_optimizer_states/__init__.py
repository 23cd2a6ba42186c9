"""Optimizer state in host memory, with subgroups that the device updates in turn (Deep Optimizer States)."""

from headway.memory.deep_optimizer_states.calibrate import calibrate
from headway.memory.deep_optimizer_states.offload import InterleavedOffload
from headway.memory.deep_optimizer_states.plan import (
    Placement,
    Rates,
    Timeline,
    Unit,
    choose,
    device_extra,
    fitting_numel,
    places,
    predict,
    simulate,
    stride,
)
from headway.memory.deep_optimizer_states.update import Workers
from headway.memory.lanes import Lanes

__all__ = ["InterleavedOffload", "Lanes", "Placement", "Rates", "Timeline", "Unit", "Workers", "calibrate", "choose",
           "device_extra", "fitting_numel", "places", "predict", "simulate", "stride"]  # fmt: skip
