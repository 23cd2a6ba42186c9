"""MEMO: each block's activations swapped to host or disk up to a token, and recomputed token by token from there on."""

from headway.memory.backends import FileBackend, HostBackend
from headway.memory.memo.alpha import AlphaPlan, Sizes, choose_alpha
from headway.memory.memo.arena import MemoryPlan, lower_bound, plan_memory
from headway.memory.memo.fragmentation import Fragmentation, fragmentation
from headway.memory.memo.plan_report import memory_report
from headway.memory.memo.runtime import Memo, memo_activations
from headway.memory.memo.trace import Allocation, record_trace

__all__ = ["Allocation", "AlphaPlan", "FileBackend", "Fragmentation", "HostBackend", "Memo", "MemoryPlan", "Sizes",
           "choose_alpha", "fragmentation", "lower_bound", "memo_activations", "memory_report", "plan_memory",
           "record_trace"]  # fmt: skip
