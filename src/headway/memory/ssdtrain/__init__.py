"""SSDTrain: activations on disk or in host memory between the forward and the backward pass."""

from headway.memory.backends import DryBackend, FileBackend, HostBackend
from headway.memory.ssdtrain.activations import ActivationStore, Plan
from headway.memory.ssdtrain.plan import drive_life_days, needed_rates, plan_amount

__all__ = ["ActivationStore", "DryBackend", "FileBackend", "HostBackend", "Plan", "drive_life_days", "needed_rates",
           "plan_amount"]  # fmt: skip
