"""MEMO: each block's activations swapped to host or disk up to a token, and recomputed token by token from there on."""

from headway.memory.backends import FileBackend, HostBackend
from headway.memory.memo.alpha import AlphaPlan, Sizes, choose_alpha
from headway.memory.memo.runtime import Memo, memo_activations

__all__ = ["AlphaPlan", "FileBackend", "HostBackend", "Memo", "Sizes", "choose_alpha", "memo_activations"]
