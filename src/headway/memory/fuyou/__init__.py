"""Fuyou: parameters and optimizer states on disk, updates under the backward pass, activations swapped by benefit."""

from headway.memory.fuyou.activations import Activations
from headway.memory.fuyou.files import GroupFiles
from headway.memory.fuyou.groups import Group, block_groups, groups_of
from headway.memory.fuyou.optimizer import TieredOptimizer
from headway.memory.fuyou.plan import Plan, Profile, Tiers, Unit, plan_tiers, step_times
from headway.memory.fuyou.weights import WeightsOnDisk

__all__ = ["Activations", "Group", "GroupFiles", "Plan", "Profile", "TieredOptimizer", "Tiers", "Unit",
           "WeightsOnDisk", "block_groups", "groups_of", "plan_tiers", "step_times"]  # fmt: skip
